"""Batch norm with the activation and pooling behind it, and norm from running statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

import mamlpp_fast.ops.norm_act_pool  # noqa: F401 - registers the operations
from mamlpp_fast.engine.fused.program import Emitter, Ref
from mamlpp_fast.engine.fused.steps.base import Affine, Gradients, Pass, Rows, Scaling, Step, aten

__all__ = ["FrozenNorm", "NormActPool"]

ops = torch.ops.mamlpp_fast


@dataclass
class NormActPool(Affine):
    """Batch norm over a task's images, leaky ReLU (slope 1: none), max-pooling 2x2 where ``pool``: one call a rule.

    Attributes:
        per_image: every image has statistics of its own, over all its elements: a layer norm, without ``affine``.
        group: so many neighbouring channels of an image have: group norm, or instance norm where it is 1; 0 for the
            batch norm. Weights are each task's own, or none.
    """

    affine: Rows | Scaling | None
    eps: float
    slope: float
    pool: bool
    per_image: bool = False
    norm: str = ""
    group: int = 0

    def _view(self, ps: Pass, x: Ref) -> Ref:
        """[T, N, H, W, C], or the images of all tasks as tasks, of one channel where they have one statistic."""
        if self.group:
            return x.reshape(ps.tasks * ps.images, 1, *x.shape[2:])
        if not self.per_image:
            return x
        return x.reshape(ps.tasks * ps.images, 1, math.prod(x.shape[2:]), 1, 1)

    def _stats_shape(self, ps: Pass) -> tuple[int, int]:
        if self.group:
            return ps.tasks * ps.images, self.shape[-1]
        return (ps.tasks * ps.images, 1) if self.per_image else (ps.tasks, self.shape[-1])

    def forward(self, em: Emitter, ps: Pass) -> None:
        out, shape = self.new_output(em, ps), self._stats_shape(ps)
        if self.norm in ps.stats:
            mean, rstd = ps.stats[self.norm]
        else:
            mean, rstd = em.new(f"{self.name} mean", shape), em.new(f"{self.name} 1/std", shape)
        z = self._view(ps, ps.values[self.inputs[0]])
        gamma, beta = self.weight_and_bias(em, ps, shape[1])
        y = self._view(ps, out)
        index = em.new(f"{self.name} positions", y.shape if self.pool else (0,), torch.uint8)
        em.call(
            ops.norm_act_pool.default,
            *(z, gamma, beta, self.eps, self.slope, self.pool, y, index, mean, rstd, max(1, self.group)),
        )
        ps.values[self.output] = out
        ps.saved[self.name] = (z, index, mean, rstd)

    def _saved(self, em: Emitter, ps: Pass) -> tuple[Ref, ...]:
        """What the forward left for the other rules, and the weights."""
        return *ps.saved[self.name], *self.weight_and_bias(em, ps, self._stats_shape(ps)[1])

    def tangent(self, em: Emitter, ps: Pass) -> None:
        out, shape = self.new_output(em, ps, "tangent of "), self._stats_shape(ps)
        r, t = em.new(f"{self.name} r", shape), em.new(f"{self.name} t", shape)
        u, moved = ps.tangents.get(self.inputs[0]), self.their_directions(ps)
        if u is None:  # weight and bias alone adapt
            u = em.like(f"no tangent of input of {self.name}", ps.values[self.inputs[0]])
            em.call(aten.zero_.default, u)
        u = self._view(ps, u)
        em.call(
            ops.norm_act_pool_tangent.default,
            *(u, *self._saved(em, ps), self.slope, self.pool),
            *(self._view(ps, out), r, t, *(moved or (None, None)), max(1, self.group)),
        )
        ps.tangents[self.output] = out
        ps.saved[self.name, "tangent"] = (u, r, t, moved[0] if moved else None)

    def _outputs(self, em: Emitter, ps: Pass, out: Gradients) -> tuple[Ref, Ref, Ref]:
        """Where the gradients of the input, of weight and of bias go."""
        gx, shape = self.new_gradient(em, ps, out), self._stats_shape(ps)
        if self.group:  # of every image first
            each = [em.new(f"gradient of {self.name}'s {p}", shape) for p in ("weight", "bias")]
            return self._view(ps, gx), each[0], each[1]
        return (self._view(ps, gx), *self.their_gradients(em, ps, out, shape))

    def _sum_images(self, em: Emitter, ps: Pass, found: tuple[Ref, Ref, Ref], out: Gradients) -> None:
        """The gradients of the weights over a task's images, where every image has left its own."""
        if not (self.group and self.params() & out.wanted_params):
            return
        places = self.their_gradients(em, ps, out, (ps.tasks, self.shape[-1]))
        for place, each in zip(places, found[1:], strict=True):
            images = each.reshape(ps.tasks, ps.images, self.shape[-1])
            em.call(aten.sum.IntList_out, images, [1], out=place)

    def _wanted(self, out: Gradients) -> bool:
        return self.inputs[0] in out.wanted_values or bool(self.params() & out.wanted_params)

    def backward(self, em: Emitter, ps: Pass, gy: Ref, out: Gradients) -> None:
        if self._wanted(out):
            found = self._outputs(em, ps, out)
            em.call(
                ops.norm_act_pool_backward.default,
                *(self._view(ps, gy), *self._saved(em, ps), self.slope, self.pool),
                *(*found, max(1, self.group)),
            )
            self._sum_images(em, ps, found, out)

    def backward_tangent(self, em: Emitter, ps: Pass, gy: Ref | None, gy_dot: Ref, out: Gradients) -> None:
        if gy is None or (self.name, "tangent") not in ps.saved:
            self.backward(em, ps, gy_dot, out)
            return
        u, r, t, moved = ps.saved[self.name, "tangent"]
        found = self._outputs(em, ps, out)
        em.call(
            ops.norm_act_pool_backward_tangent.default,
            *(self._view(ps, gy_dot), self._view(ps, gy), u, *self._saved(em, ps), self.slope),
            *(r, t, self.pool, *found, moved, max(1, self.group)),
        )
        self._sum_images(em, ps, found, out)


@dataclass
class FrozenNorm(Step):
    """Norm by the running statistics of one inner step, weight and bias included; first order only.

    ``affine.weight`` and ``affine.bias`` take no gradient; where they adapt they are a step of their own.
    """

    affine: Rows
    scaled: bool
    eps: float

    @property
    def rows(self) -> Rows | None:
        return self.affine

    def params(self) -> frozenset[str]:
        return frozenset()

    def forward(self, em: Emitter, ps: Pass) -> None:
        out = self.new_output(em, ps)
        mean, var = ps.stats[self.affine.name]
        shape = (self.shape[-1],)
        scale, shift = em.new(f"{self.name} scale", shape), em.new(f"{self.name} shift", shape)
        em.call(aten.add.out, var, em.constant(self.eps), out=scale)
        em.call(aten.rsqrt.out, scale, out=scale)
        if self.scaled:
            gamma, beta = ps.rows[self.affine.name]
            em.call(aten.mul.out, scale, gamma, out=scale)
            em.call(aten.mul.out, mean, scale, out=shift)
            em.call(aten.sub.out, beta, shift, out=shift)
        else:
            em.call(aten.mul.out, mean, scale, out=shift)
            em.call(aten.neg.out, shift, out=shift)
        em.call(aten.mul.out, ps.values[self.inputs[0]], scale, out=out)
        em.call(aten.add.out, out, shift, out=out)
        ps.values[self.output] = out
        ps.saved[self.name] = scale

    def backward(self, em: Emitter, ps: Pass, gy: Ref, out: Gradients) -> None:
        if self.inputs[0] in out.wanted_values:
            em.call(aten.mul.out, gy, ps.saved[self.name], out=self.new_gradient(em, ps, out))
