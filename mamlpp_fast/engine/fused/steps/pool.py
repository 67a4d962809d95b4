"""Pools: maxima and means over windows of images."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import mamlpp_fast.ops.window_pool  # noqa: F401 - registers the operations
from mamlpp_fast.engine.fused.program import Emitter, Ref
from mamlpp_fast.engine.fused.steps.base import Gradients, Pass, Step
from mamlpp_fast.engine.fused.steps.linear import Plain

__all__ = ["AveragePool", "MaxPool", "Window"]

ops = torch.ops.mamlpp_fast
Window = tuple[int, int, int, int, int, int]
"""Height and width, steps of both axes, padding of both."""


@dataclass
class MaxPool(Step):
    """Maxima of windows, the first where several are equal."""

    window: Window

    @property
    def halves(self) -> bool:
        """Whether the windows are 2x2, side by side, without padding."""
        return self.window == (2, 2, 2, 2, 0, 0)

    def forward(self, em: Emitter, ps: Pass) -> None:
        out = self.new_output(em, ps)
        index = em.new(f"{self.name} positions", out.shape, torch.uint8)
        em.call(ops.window_max.default, ps.values[self.inputs[0]], list(self.window), out, index)
        ps.values[self.output] = out
        ps.saved[self.name] = index

    def tangent(self, em: Emitter, ps: Pass) -> None:
        out = self.new_output(em, ps, "tangent of ")
        u = ps.tangents[self.inputs[0]]
        em.call(ops.window_max_pick.default, u, ps.saved[self.name], list(self.window), out)
        ps.tangents[self.output] = out

    def backward(self, em: Emitter, ps: Pass, gy: Ref, out: Gradients) -> None:
        if self.inputs[0] in out.wanted_values:
            gx = self.new_gradient(em, ps, out)
            em.call(ops.window_max_place.default, gy, ps.saved[self.name], list(self.window), gx)

    def backward_tangent(self, em: Emitter, ps: Pass, gy: Ref | None, gy_dot: Ref, out: Gradients) -> None:
        self.backward(em, ps, gy_dot, out)


@dataclass
class AveragePool(Plain):
    """Means over windows, zeros of the padding included; over whole images the result may be [C] alone."""

    window: Window

    def _images(self, ref: Ref) -> Ref:
        return ref if len(ref.shape) == 5 else ref.reshape(*ref.shape[:2], 1, 1, ref.shape[2])

    def apply(self, em: Emitter, ps: Pass, xs: list[Ref], prefix: str) -> Ref:
        out = self.new_output(em, ps, prefix)
        em.call(ops.window_mean.default, xs[0], list(self.window), self._images(out))
        return out

    def backward(self, em: Emitter, ps: Pass, gy: Ref, out: Gradients) -> None:
        if self.inputs[0] in out.wanted_values:
            gx = self.new_gradient(em, ps, out)
            em.call(ops.window_mean_place.default, self._images(gy), list(self.window), gx)
