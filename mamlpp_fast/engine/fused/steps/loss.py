"""Losses on top of the network: gradient of the predictions, and its derivative along a tangent of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamlpp_fast.engine import base
from mamlpp_fast.engine.base import Unsupported
from mamlpp_fast.engine.fused.program import Emitter, Ref
from mamlpp_fast.engine.fused.steps.base import LOSS, Goal, Pass, Step, aten
from mamlpp_fast.reference import LossFn

__all__ = ["CrossEntropy", "Loss", "LossValue", "SquaredError", "loss_of", "loss_place", "scaled"]

_SCALE_ROW = 16
"""Elements from scale to scale: kernels take pointers to multiples of 16 bytes."""


@dataclass(frozen=True)
class LossValue:
    """Gradient [T, N, O] of the scaled loss, the loss [T] where asked for, and what the tangent rule reads."""

    grad: Ref
    loss: Ref | None
    saved: Any
    scale: Ref


class Loss:
    """A mean over the images of a task."""

    @property
    def steps(self) -> tuple[Step, ...]:
        """That it consists of, where it is a list of them."""
        return ()

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """Of a module that it is, by name."""
        return {}

    @property
    def asks(self) -> bool:
        """Whether a pass leaves in its ``answers`` if the loss was right to be this list."""
        return False

    def stored(
        self, outputs: tuple[int, ...], labels: tuple[int, ...], kind: torch.dtype, dtype: torch.dtype
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type of the labels of a task as :meth:`load` stores them.

        Args:
            outputs: of a prediction.
            labels, kind: shape [N, ...] and type of the labels as they come.
            dtype: of the program.
        """
        return (labels[0], *outputs), dtype

    def blank(self, stored: Tensor) -> float | None:
        """What ``stored`` is filled with before :meth:`load`; None where that leaves nothing of it."""
        return None

    def load(self, stored: Tensor, labels: Tensor) -> None:
        """Writes labels or targets [T, N, ...] into ``stored`` [T, N, O], which is :meth:`blank`."""
        raise NotImplementedError

    def check(self, name: str, labels: Tensor) -> None:
        """Raises ValueError when labels have not the form of this loss's."""
        raise NotImplementedError

    def of_pass(self, em: Emitter, ps: Pass, output: int) -> LossValue:
        """The loss of a pass with a goal: what a step took with it, or from the predictions."""
        if LOSS not in ps.saved:
            assert ps.goal is not None
            ps.saved[LOSS] = self.value(em, ps.values[output], ps.goal)
        value: LossValue = ps.saved[LOSS]
        return value

    def tangent_of_pass(self, em: Emitter, ps: Pass, output: int) -> Ref:
        """Derivative of the gradient along the tangent of the predictions, likewise."""
        if (LOSS, "tangent") not in ps.saved:
            ps.saved[LOSS, "tangent"] = self.tangent(em, ps.saved[LOSS], ps.tangents[output])
        tangent: Ref = ps.saved[LOSS, "tangent"]
        return tangent

    def value(self, em: Emitter, z: Ref, goal: Goal) -> LossValue:
        """The weighted loss of predictions ``z``, and its gradient."""
        raise NotImplementedError

    def tangent(self, em: Emitter, value: LossValue, z_dot: Ref) -> Ref:
        """Derivative of the (unweighted) gradient along ``z_dot``."""
        raise NotImplementedError


def scaled(em: Emitter, mean: float, goal: Goal) -> Ref:
    """``mean`` times the weight of a pass's step, as a device scalar, [2] of a pair; all steps' are taken at once."""
    scale, weights = em.constant(mean), goal.weights
    if weights is None:
        return scale

    def all_steps() -> Ref:
        shape = weights.shape[0], _SCALE_ROW
        if not base.launches_cost(em.device):
            out = em.new("loss scales", shape)
            em.call(aten.mul.out, weights.reshape(-1, 1).expand(*shape), scale, out=out)
            return out
        # The second of a row is that of a role without weight.
        out = em.own("loss scales", torch.full(shape, mean, dtype=em.dtype, device=em.device))
        em.strided_sum_of_owned(out[:, 0], weights, mean)
        return out

    row = em.once(("loss scales", mean, weights.buffer), all_steps)[goal.step]
    return row[:2] if goal.pair else row[0]


def loss_place(em: Emitter, goal: Goal, tasks: int) -> Ref | None:
    """Where the loss [T] goes, None where it is not wanted."""
    if not goal.want_loss:
        return None
    return em.new("loss", (tasks,)) if goal.loss is None else goal.loss


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Softmax cross-entropy; the targets are stored one-hot, a share ``smoothing`` spread over all classes."""

    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing <= 1:
            raise ValueError(f"label_smoothing: expected 0 to 1, got {self.smoothing}")

    def blank(self, stored: Tensor) -> float:
        return self.smoothing / stored.shape[-1]

    def load(self, stored: Tensor, labels: Tensor) -> None:
        spread = self.blank(stored)
        stored.scatter_(-1, labels.unsqueeze(-1), 1.0 - self.smoothing + spread)

    def check(self, name: str, labels: Tensor) -> None:
        if labels.dtype != torch.int64 or labels.ndim != 2:
            raise ValueError(
                f"{name}: expected int64 labels [tasks, images], got {labels.dtype} {tuple(labels.shape)}"
            )

    def value(self, em: Emitter, z: Ref, goal: Goal) -> LossValue:
        scale = scaled(em, 1 / z.shape[1], goal)
        log_p, p, grad = em.like("log p", z), em.like("p", z), em.like("gradient of logits", z)
        em.call(aten._log_softmax.out, z, -1, False, out=log_p)
        em.call(aten.exp.out, log_p, out=p)
        em.call(aten.sub.out, p, goal.target, out=grad)
        em.call(aten.mul.out, grad, scale, out=grad)
        loss = loss_place(em, goal, z.shape[0])
        if loss is not None:
            terms = em.like("loss terms", z)
            em.call(aten.mul.out, goal.target, log_p, out=terms)
            em.call(aten.mul.out, terms, scale, out=terms)
            em.call(aten.sum.IntList_out, terms, [1, 2], out=loss)
            em.call(aten.neg_.default, loss)
        return LossValue(grad, loss, p, scale)

    def tangent(self, em: Emitter, value: LossValue, z_dot: Ref) -> Ref:
        """(P∘u − P (P·u)) / n."""
        p = value.saved
        pu, total, out = (
            em.like("p u", z_dot),
            em.new("p.u", (*z_dot.shape[:2], 1)),
            em.like("tangent of gradient", z_dot),
        )
        em.call(aten.mul.out, p, z_dot, out=pu)
        em.call(aten.sum.IntList_out, pu, [2], True, out=total)
        em.call(aten.addcmul.out, pu, p, total, value=-1, out=out)
        em.call(aten.mul.out, out, value.scale, out=out)
        return out


class SquaredError(Loss):
    """Mean of squared differences over images and outputs."""

    def load(self, stored: Tensor, labels: Tensor) -> None:
        if labels.shape != stored.shape:  # `copy_` would broadcast
            raise ValueError(
                f"targets: expected one for each prediction, {tuple(stored.shape)}, got {tuple(labels.shape)}"
            )
        stored.copy_(labels)

    def check(self, name: str, labels: Tensor) -> None:
        if not labels.is_floating_point() or labels.ndim != 3:
            raise ValueError(
                f"{name}: expected float targets [tasks, images, outputs], got {labels.dtype} {tuple(labels.shape)}"
            )

    def value(self, em: Emitter, z: Ref, goal: Goal) -> LossValue:
        scale = scaled(em, 1 / (z.shape[1] * z.shape[2]), goal)
        difference, grad = em.like("difference", z), em.like("gradient of predictions", z)
        em.call(aten.sub.out, z, goal.target, out=difference)
        em.call(aten.mul.out, difference, scale, out=grad)
        loss = loss_place(em, goal, z.shape[0])
        if loss is not None:
            terms = em.like("loss terms", z)
            em.call(aten.mul.out, difference, grad, out=terms)
            em.call(aten.sum.IntList_out, terms, [1, 2], out=loss)
        em.call(aten.add.out, grad, grad, out=grad)
        return LossValue(grad, loss, difference, scale)

    def tangent(self, em: Emitter, value: LossValue, z_dot: Ref) -> Ref:
        out = em.like("tangent of gradient", z_dot)
        em.call(aten.mul.out, z_dot, value.scale, out=out)
        em.call(aten.add.out, out, out, out=out)
        return out


def loss_of(loss_fn: LossFn) -> Loss | None:
    """The rules of a loss that has some of its own, for labels that are numbers of classes, or values.

    Raises:
        Unsupported: for one with hooks.
    """
    if isinstance(loss_fn, nn.Module) and (loss_fn._forward_hooks or loss_fn._forward_pre_hooks):
        raise Unsupported("loss", "has a hook")
    if loss_fn is F.mse_loss or (type(loss_fn) is nn.MSELoss and loss_fn.reduction == "mean"):
        return SquaredError()
    if loss_fn is F.cross_entropy:
        return CrossEntropy()
    if isinstance(loss_fn, functools.partial) and loss_fn.func is F.cross_entropy and not loss_fn.args:
        if loss_fn.keywords.keys() <= {"label_smoothing"}:
            return CrossEntropy(loss_fn.keywords.get("label_smoothing", 0.0))
    elif type(loss_fn) is nn.CrossEntropyLoss:
        plain = (loss_fn.weight, loss_fn.ignore_index, loss_fn.reduction) == (None, -100, "mean")
        if plain:
            return CrossEntropy(loss_fn.label_smoothing)
    return None
