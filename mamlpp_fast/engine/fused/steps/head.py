"""The last layer and its cross-entropy in one: one call a rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import mamlpp_fast.ops.linear_cross_entropy  # noqa: F401 - registers the operations
from mamlpp_fast.engine.fused.program import Emitter, Ref
from mamlpp_fast.engine.fused.steps.base import LOSS, Gradients, Pass
from mamlpp_fast.engine.fused.steps.linear import Linear
from mamlpp_fast.engine.fused.steps.loss import LossValue, loss_place, scaled

__all__ = ["Head"]

ops = torch.ops.mamlpp_fast


@dataclass
class Head(Linear):
    """Takes the place of a ``Linear`` whose output is the predictions, where the loss is cross-entropy.

    The forward leaves the loss's value and the tangent that of its gradient, so that the logits' own tangent is never
    stored. A pass without a goal takes the predictions alone.
    """

    def forward(self, em: Emitter, ps: Pass) -> None:
        if ps.goal is None:
            super().forward(em, ps)
            return
        logits = self.new_output(em, ps)
        p, gz = em.like("p", logits), em.like("gradient of logits", logits)
        loss = loss_place(em, ps.goal, ps.tasks)
        scale = scaled(em, 1 / ps.images, ps.goal)
        bias = None if self.bias is None else ps.weights[self.bias.name]
        x, w = ps.values[self.inputs[0]], ps.weights[self.weight.name]
        em.call(
            ps.op("linear_cross_entropy"),
            *(x, w, bias, ps.goal.target, scale, logits, p, gz, loss),
            flops=self._flops(ps),
        )
        ps.values[self.output] = logits
        ps.saved[LOSS] = LossValue(gz, loss, p, scale)

    def tangent(self, em: Emitter, ps: Pass) -> None:
        value: LossValue = ps.saved[LOSS]
        u, v = ps.tangents.get(self.inputs[0]), ps.directions.get(self.weight.name)
        b = None if self.bias is None else ps.directions.get(self.bias.name)
        out = em.like("tangent of gradient of logits", value.grad)
        em.call(
            ops.linear_cross_entropy_tangent.default,
            *(
                u,
                v,
                b,
                ps.values[self.inputs[0]],
                ps.weights[self.weight.name],
                value.saved,
                value.scale,
                out,
            ),
            flops=self._flops(ps) * ((u is not None) + (v is not None)),
        )
        ps.saved[LOSS, "tangent"] = out

    def gradients(self, em: Emitter, ps: Pass, g: Ref, g0: Ref | None, out: Gradients) -> None:
        source = self.inputs[0]
        x, w = ps.values[source], ps.weights[self.weight.name]
        gx = self.new_gradient(em, ps, out) if source in out.wanted_values else None
        found = {
            slot.name: out.of(em, slot, ps.tasks) for slot in self.slots if slot.name in out.wanted_params
        }
        out.params.update(found)
        results = (gx, found.get(self.weight.name), None if self.bias is None else found.get(self.bias.name))
        products = sum(r is not None for r in results[:2])
        if gx is None and not found:
            return
        if g0 is None:
            op = ps.op("linear_cross_entropy_backward")
            em.call(op, g, x, w, *results, flops=self._flops(ps) * products)
            return
        u, v = ps.tangents.get(source), ps.directions.get(self.weight.name)
        op = ops.linear_cross_entropy_backward_tangent.default
        em.call(op, g, g0, u, v, x, w, *results, flops=2 * self._flops(ps) * products)
