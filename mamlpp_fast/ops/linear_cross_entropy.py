"""Linear head and softmax cross-entropy of a batch of tasks, with its tangents.

Every task has a head of its own, with logits z = f·W + b. Every op writes into its last arguments and returns nothing;
arguments that may be None are parts that do not exist (no bias, a tangent that is zero) or that nobody wants.
Formulas: ``docs/derivations/linear_cross_entropy.md``.
    f: features [T, N, F]; weight [T, F, O]; bias [T, O] or None; ``_dot``: their tangents, or None.
    target: shares of the classes [T, N, O], each row's sum 1: one-hot, or smoothed.
    scale: [], what a row's cross-entropy counts: 1/N for a mean.
    logits, probabilities: z and softmax(z) [T, N, O].
    gz: gradient of the logits, scale·(probabilities − target); gz_dot: its tangent along those of f, weight and bias.
    loss: scale times the sum of a task's cross-entropies [T], or None.
    gf, gweight, gbias: gradients of f, weight and bias, of their shapes, or None; ``_dot``: tangents of these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mamlpp_fast.ops._library import Shared, define_orders

MOST_CLASSES = 64
"""Classes that the GPU kernels have room for; the others have no limit."""

_PARTS = {
    "features": ("f_dot", "gf", "gf_dot"),
    "weights": ("weight_dot", "gweight", "gweight_dot"),
    "biases": ("bias", "bias_dot", "gbias", "gbias_dot"),
}
_KINDS = {name: kind for kind, names in _PARTS.items() for name in names}


def _check(*, f: Tensor, weight: Tensor, **others: Tensor | None) -> None:
    """Raises unless the tensors belong together; those whose kind no name says are of the logits' shape."""
    if f.dim() != 3 or weight.dim() != 3 or weight.shape[:2] != f.shape[::2]:
        raise ValueError(
            f"f, weight: expected [T, N, F] and [T, F, O], got {tuple(f.shape)} and {tuple(weight.shape)}"
        )
    tasks, classes = weight.shape[::2]
    shapes = {"features": f.shape, "weights": weight.shape, "biases": (tasks, classes)}
    own = {"scale": (), "loss": (tasks,)}
    for name, tensor in others.items():
        expected = own.get(name, shapes.get(_KINDS.get(name, ""), (*f.shape[:2], classes)))
        if tensor is not None and tuple(tensor.shape) != tuple(expected):
            raise ValueError(f"{name}: expected {tuple(expected)}, got {tuple(tensor.shape)}")


def _products(
    out: Tensor, pairs: tuple[tuple[Tensor | None, Tensor | None], ...], bias: Tensor | None
) -> None:
    """``out`` = sum of the products of whole pairs + bias."""
    if bias is None:
        out.zero_()
    else:
        out.copy_(bias[:, None])
    for a, b in pairs:
        if a is not None and b is not None:
            out.baddbmm_(a, b)


def _forward(
    f: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: Tensor,
    logits: Tensor, probabilities: Tensor, gz: Tensor, loss: Tensor | None,
) -> None:  # fmt: skip
    _products(logits, ((f, weight),), bias)
    torch.softmax(logits, -1, out=probabilities)
    torch.sub(probabilities, target, out=gz).mul_(scale)
    if loss is not None:
        loss.copy_(-scale * (target * logits.log_softmax(-1)).sum((1, 2)))


def _backward(
    gz: Tensor, f: Tensor, weight: Tensor, gf: Tensor | None, gweight: Tensor | None, gbias: Tensor | None
) -> None:
    _backward_tangent(gz, gz, None, None, f, weight, gf, gweight, gbias)


def _tangent(
    f_dot: Tensor | None, weight_dot: Tensor | None, bias_dot: Tensor | None, f: Tensor, weight: Tensor,
    probabilities: Tensor, scale: Tensor, gz_dot: Tensor,
) -> None:  # fmt: skip
    _products(gz_dot, ((f_dot, weight), (f, weight_dot)), bias_dot)
    mean = (probabilities * gz_dot).sum(-1, keepdim=True)
    gz_dot.sub_(mean).mul_(probabilities).mul_(scale)


def _backward_tangent(
    gz_dot: Tensor, gz: Tensor, f_dot: Tensor | None, weight_dot: Tensor | None, f: Tensor, weight: Tensor,
    gf_dot: Tensor | None, gweight_dot: Tensor | None, gbias_dot: Tensor | None,
) -> None:  # fmt: skip
    if gf_dot is not None:
        _products(gf_dot, ((gz_dot, weight.mT), (gz, None if weight_dot is None else weight_dot.mT)), None)
    if gweight_dot is not None:
        _products(gweight_dot, ((f.mT, gz_dot), (None if f_dot is None else f_dot.mT, gz)), None)
    if gbias_dot is not None:
        torch.sum(gz_dot, 1, out=gbias_dot)


_SHARED = Shared(frozenset({"weight", "bias"}), {"scale": 0, "gweight": 3, "gbias": 2})
define_orders(
    "linear_cross_entropy",
    (
        _forward,
        "Tensor f, Tensor weight, Tensor? bias, Tensor target, Tensor scale, "
        "Tensor(a!) logits, Tensor(b!) probabilities, Tensor(c!) gz, Tensor(d!)? loss",
    ),
    (_backward, "Tensor gz, Tensor f, Tensor weight, Tensor(a!)? gf, Tensor(b!)? gweight, Tensor(c!)? gbias"),
    (
        _tangent,
        "Tensor? f_dot, Tensor? weight_dot, Tensor? bias_dot, Tensor f, Tensor weight, Tensor probabilities, "
        "Tensor scale, Tensor(a!) gz_dot",
    ),
    (
        _backward_tangent,
        "Tensor gz_dot, Tensor gz, Tensor? f_dot, Tensor? weight_dot, Tensor f, Tensor weight, "
        "Tensor(a!)? gf_dot, Tensor(b!)? gweight_dot, Tensor(c!)? gbias_dot",
    ),
    check=_check,
    shared=_SHARED,
)
