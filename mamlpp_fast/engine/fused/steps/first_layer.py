"""The first layer: convolution, batch norm, activation and pooling in one, its feature map never stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

import mamlpp_fast.ops.conv_norm_act_pool  # noqa: F401 - registers the operations
from mamlpp_fast.engine.fused.program import Emitter, Ref
from mamlpp_fast.engine.fused.steps.base import Affine, Gradients, Pass, Rows, Scaling, Slot, aten

__all__ = ["FirstLayer"]

ops = torch.ops.mamlpp_fast


@dataclass
class FirstLayer(Affine):
    """Takes the place of a ``Conv`` on the images (stride 1, few channels) and the pooled ``NormActPool`` behind it.

    The images and the moments of their patches do not change within an iteration: they are prepared by the first pass
    that reads them.
    """

    weight: Slot
    padding: int
    affine: Rows | Scaling | None
    eps: float
    slope: float
    norm: str

    @property
    def convolves(self) -> bool:
        return True

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (self.weight, *super().slots)

    def _flops(self, ps: Pass) -> int:
        return 2 * ps.tasks * ps.images * 4 * math.prod(self.shape) * math.prod(self.weight.shape[:3])

    def _prepared(self, em: Emitter, images: Ref) -> tuple[Ref, Ref]:
        """Of all images of the buffer, if it has those of several roles; these images' part."""
        each = math.prod(images.shape[1:])
        tasks = math.prod(images.buffer.shape) // each
        whole = images if tasks == images.shape[0] else Ref(images.buffer).reshape(tasks, *images.shape[1:])
        prepared = em.once((self.name, images.buffer), lambda: self._prepare(em, whole))
        begin = images.begin // each
        end = begin + images.shape[0]
        return prepared if whole is images else (prepared[0][begin:end], prepared[1][begin:end])

    def _prepare(self, em: Emitter, images: Ref) -> tuple[Ref, Ref]:
        tasks, count, height, width, channels = images.shape
        kh, kw = self.weight.shape[:2]
        rim, values = 2 * self.padding, kh * kw * channels
        padded = em.new("padded images", (tasks, count, height + rim, width + rim, channels))
        moments = em.new("patch moments", (tasks, values + 2, values), torch.float64)
        em.call(ops.patch_moments.default, images, kh, kw, self.padding, padded, moments)
        return padded, moments

    def forward(self, em: Emitter, ps: Pass) -> None:
        images = ps.values[self.inputs[0]]
        prepared = self._prepared(em, images)
        out, shape = self.new_output(em, ps), (ps.tasks, self.shape[-1])
        if self.norm in ps.stats:
            mean, rstd = ps.stats[self.norm]
        else:
            mean, rstd = em.new(f"{self.name} mean", shape), em.new(f"{self.name} 1/std", shape)
        index = em.new(f"{self.name} positions", out.shape, torch.uint8)
        w, (gamma, beta) = ps.weights[self.weight.name], self.weight_and_bias(em, ps, shape[1])
        em.call(
            ps.op("conv_norm_act_pool"),
            *(*prepared, w, gamma, beta, self.eps, self.slope, out, index, mean, rstd),
            flops=self._flops(ps),
        )
        ps.values[self.output] = out
        ps.saved[self.name] = (out, index, *prepared, rstd)

    def _saved(self, em: Emitter, ps: Pass) -> tuple[Any, ...]:
        """What the forward left for the other rules, with what they read beside."""
        out, index, padded, moments, rstd = ps.saved[self.name]
        gamma, _ = self.weight_and_bias(em, ps, self.shape[-1])
        return out, index, padded, moments, ps.weights[self.weight.name], gamma, rstd, self.slope

    def tangent(self, em: Emitter, ps: Pass) -> None:
        out, t = self.new_output(em, ps, "tangent of "), em.new(f"{self.name} t", (ps.tasks, self.shape[-1]))
        v, moved = ps.directions.get(self.weight.name), self.their_directions(ps)
        if v is None:  # weight and bias of the norm alone adapt
            v = em.like(f"no direction of {self.weight.name}", ps.weights[self.weight.name])
            em.call(aten.zero_.default, v)
        em.call(
            ops.conv_norm_act_pool_tangent.default,
            *(v, *self._saved(em, ps), out, t, *moved),
            flops=self._flops(ps),
        )
        ps.tangents[self.output] = out
        ps.saved[self.name, "tangent"] = (v, t, moved[:1])

    def _outputs(self, em: Emitter, ps: Pass, out: Gradients) -> tuple[Ref, Ref, Ref]:
        gw = out.of(em, self.weight, ps.tasks)
        if self.weight.name in out.wanted_params:
            out.params[self.weight.name] = gw
        return gw, *self.their_gradients(em, ps, out, (ps.tasks, self.shape[-1]))

    def backward(self, em: Emitter, ps: Pass, gy: Ref, out: Gradients) -> None:
        sums = em.new(f"{self.name} sums", (ps.tasks, math.prod(self.weight.shape[:3]), self.shape[-1]))
        gw, ggamma, gbeta = self._outputs(em, ps, out)
        em.call(
            ps.op("conv_norm_act_pool_backward"),
            *(gy, *self._saved(em, ps), gw, sums, ggamma, gbeta),
            flops=self._flops(ps),
        )
        ps.saved[self.name, "sums"] = sums

    def backward_tangent(self, em: Emitter, ps: Pass, gy: Ref | None, gy_dot: Ref, out: Gradients) -> None:
        if (self.name, "tangent") not in ps.saved:
            self.backward(em, ps, gy_dot, out)
            return
        v, t, moved = ps.saved[self.name, "tangent"]
        em.call(
            ops.conv_norm_act_pool_backward_tangent.default,
            *(gy_dot, v, *self._saved(em, ps), ps.saved[self.name, "sums"], t),
            *(*self._outputs(em, ps, out), *moved),
            flops=self._flops(ps),
        )
