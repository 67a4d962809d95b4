"""Losses without rules of their own: recorded like a model, a list of generic steps on predictions and labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mamlpp_fast.engine.base import Unsupported
from mamlpp_fast.engine.fused.lowering import lower_loss
from mamlpp_fast.engine.fused.network import Network
from mamlpp_fast.engine.fused.passes import write_backward, write_forward, write_tangent
from mamlpp_fast.engine.fused.program import Emitter, Ref
from mamlpp_fast.engine.fused.steps import Gradients, Loss, Pass, Step
from mamlpp_fast.engine.fused.steps.base import LOSS, aten
from mamlpp_fast.engine.fused.steps.layout import settled
from mamlpp_fast.engine.fused.steps.loss import LossValue, loss_place, scaled
from mamlpp_fast.engine.record import record_loss
from mamlpp_fast.reference import LossFn

__all__ = ["RecordedLoss", "recorded_loss"]

_PREDICTIONS, _LABELS = 0, 1


def recorded_loss(
    loss_fn: LossFn,
    sides: tuple[tuple[tuple[int, ...], Tensor], tuple[tuple[int, ...], Tensor]],
    dtype: torch.dtype,
    model: torch.nn.Module,
) -> RecordedLoss:
    """The rules of a loss, found by watching it.

    Args:
        loss_fn: (predictions [N, ...], labels [N, ...]) to a scalar.
        sides: shape of a prediction, and labels as they come, of the support and of the target set.
        dtype: of the predictions.
        model: what they are of.

    Raises:
        Unsupported: names ``loss``, and why it is no fixed list of operations.
    """

    def predictions(outputs: tuple[int, ...], labels: Tensor) -> Tensor:
        shape = (len(labels), *outputs)
        z = torch.arange(1.0, math.prod(shape) + 1, dtype=torch.float64, device=labels.device).cos()
        # Between 0.25 and 0.75: some losses take probabilities, or deviations.
        return (z / 4 + 0.5).view(shape).to(dtype).requires_grad_()

    pairs = [(predictions(outputs, labels), labels) for outputs, labels in sides]
    try:
        recording, watched = record_loss(loss_fn, pairs[0], pairs[1], model)
        network = lower_loss(recording, watched, dtype)
    except Unsupported as error:
        raise Unsupported("loss", error.why) from error
    if network.asked and sides[0][1].device.type != "cpu":
        why = "asks for values, which a GPU would wait for (torch.distributions asks none with validate_args=False)"
        raise Unsupported("loss", why)
    if network.output not in network.depends(frozenset(), frozenset({_PREDICTIONS})):
        raise Unsupported("loss", "expected one that depends on the predictions")
    return RecordedLoss(network, dict(watched.named_buffers()))


@dataclass(frozen=True, eq=False)
class RecordedLoss(Loss):
    """A list of generic steps, from predictions and labels to the loss [T] of a pass.

    Attributes:
        network: of these steps.
        held: the buffers that they read, by name.
    """

    network: Network
    held: Mapping[str, Tensor]

    @property
    def steps(self) -> tuple[Step, ...]:
        return self.network.steps

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        return self.held

    @property
    def asks(self) -> bool:
        return bool(self.network.asked)

    def stored(
        self, outputs: tuple[int, ...], labels: tuple[int, ...], kind: torch.dtype, dtype: torch.dtype
    ) -> tuple[tuple[int, ...], torch.dtype]:
        return labels, dtype if kind.is_floating_point else kind

    def load(self, stored: Tensor, labels: Tensor) -> None:
        stored.copy_(labels)

    def check(self, name: str, labels: Tensor) -> None:
        """What does not fit raised when the loss was watched."""

    def of_pass(self, em: Emitter, ps: Pass, output: int) -> LossValue:
        if LOSS not in ps.saved:
            ps.saved[LOSS] = self._value(em, ps, output)
        value: LossValue = ps.saved[LOSS]
        return value

    def _value(self, em: Emitter, ps: Pass, output: int) -> LossValue:
        goal, z, net = ps.goal, ps.values[output], self.network
        assert goal is not None
        own = Pass(
            ps.tasks, ps.images, ps.step, {}, {}, {_PREDICTIONS: z, _LABELS: goal.target}, buffers=ps.buffers
        )
        write_forward(em, net, own)
        for value, answer in net.asked:
            assert ps.answers is not None
            found = own.values[value].reshape(ps.tasks)
            if not answer:
                found, asked = em.new("an answer", found.shape, torch.bool), found
                em.call(aten.logical_not.out, asked, out=found)
            em.call(aten.logical_and_.default, ps.answers, found)
        of_tasks = own.values[net.output]
        scale = em.new("loss scale", (ps.tasks,))
        em.call(aten.copy_.default, scale, scaled(em, 1.0, goal))
        loss = loss_place(em, goal, ps.tasks)
        if loss is not None:
            em.call(aten.mul.out, of_tasks, scale, out=loss)
        out = self._gradients()
        write_backward(em, net, own, scale, out, keep=True)
        return LossValue(self._of_predictions(em, out, z), loss, own, scale)

    def tangent(self, em: Emitter, value: LossValue, z_dot: Ref) -> Ref:
        own: Pass = value.saved
        own.tangents[_PREDICTIONS] = z_dot
        write_tangent(em, self.network, own, self._gradients().wanted_values)
        still = em.once("a loss's gradient that stays", lambda: self._still(em, own.tasks))
        out = self._gradients()
        write_backward(em, self.network, own, still, out, tangent=True)
        return self._of_predictions(em, out, z_dot)

    def _gradients(self) -> Gradients:
        return Gradients(self.network.depends(frozenset(), frozenset({_PREDICTIONS})), frozenset())

    def _still(self, em: Emitter, tasks: int) -> Ref:
        return em.own("no gradient", torch.zeros(tasks, dtype=em.dtype, device=em.device))

    def _of_predictions(self, em: Emitter, out: Gradients, z: Ref) -> Ref:
        terms = out.terms.get(_PREDICTIONS, [])
        if terms:
            return settled(em, em.sum("gradient of predictions", terms), "gradient of predictions")
        zeros = em.new("gradient of predictions", z.shape)
        em.call(aten.zero_.default, zeros)
        return zeros
