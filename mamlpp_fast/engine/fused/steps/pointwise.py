"""Steps that act on each element alone: activation, scale and shift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import mamlpp_fast.ops.pointwise  # noqa: F401 - registers the operations
from mamlpp_fast.engine.base import Unsupported
from mamlpp_fast.engine.executions import Draw
from mamlpp_fast.engine.fused.program import Emitter, Ref
from mamlpp_fast.engine.fused.steps.base import Gradients, OneBackward, Pass, Slot, Step, aten
from mamlpp_fast.engine.fused.steps.linear import Plain

__all__ = ["Activation", "Dropout", "Noise", "ScaleShift", "Smooth", "Times"]

ops = torch.ops.mamlpp_fast


class Sloped(Step):
    """A function of each element: tangents and gradients are the same product with its slopes."""

    def slopes_times(self, em: Emitter, x: Ref, g: Ref, out: Ref) -> None:
        """Leaves in ``out`` the slopes at ``x`` times ``g``."""
        raise NotImplementedError

    def _product(self, em: Emitter, ps: Pass, g: Ref, name: str) -> Ref:
        out = em.like(name, g)
        self.slopes_times(em, ps.values[self.inputs[0]], g, out)
        return out

    def tangent(self, em: Emitter, ps: Pass) -> None:
        u = ps.tangents[self.inputs[0]]
        ps.tangents[self.output] = self._product(em, ps, u, f"tangent of {self.name}")

    def backward(self, em: Emitter, ps: Pass, gy: Ref, out: Gradients) -> None:
        if self.inputs[0] in out.wanted_values:
            out.add(self.inputs[0], self._product(em, ps, gy, f"gradient of input of {self.name}"))


@dataclass
class Activation(Sloped):
    """Leaky ReLU; slope 0 is a ReLU."""

    slope: float

    def forward(self, em: Emitter, ps: Pass) -> None:
        out = self.new_output(em, ps)
        em.call(aten.leaky_relu.out, ps.values[self.inputs[0]], self.slope, out=out)
        ps.values[self.output] = out

    def slopes_times(self, em: Emitter, x: Ref, g: Ref, out: Ref) -> None:
        em.call(aten.leaky_relu_backward.grad_input, g, x, self.slope, False, grad_input=out)

    def backward_tangent(self, em: Emitter, ps: Pass, gy: Ref | None, gy_dot: Ref, out: Gradients) -> None:
        self.backward(em, ps, gy_dot, out)


@dataclass
class Smooth(Sloped):
    """A function of :mod:`mamlpp_fast.ops.pointwise`, by its number and the number that it takes."""

    function: int
    a: float

    def forward(self, em: Emitter, ps: Pass) -> None:
        out = self.new_output(em, ps)
        em.call(ops.pointwise.default, ps.values[self.inputs[0]], self.function, self.a, out)
        ps.values[self.output] = out

    def slopes_times(self, em: Emitter, x: Ref, g: Ref, out: Ref) -> None:
        em.call(ops.pointwise_slope.default, x, g, self.function, self.a, out)

    def backward_tangent(self, em: Emitter, ps: Pass, gy: Ref | None, gy_dot: Ref, out: Gradients) -> None:
        source = self.inputs[0]
        u = ps.tangents.get(source)
        if gy is None or u is None or source not in out.wanted_values:
            self.backward(em, ps, gy_dot, out)
            return
        gx = self.new_gradient(em, ps, out)
        em.call(ops.pointwise_bend.default, ps.values[source], gy_dot, gy, u, self.function, self.a, gx)


@dataclass
class Times(Plain):
    """The product with a number."""

    factor: float

    def _times(self, em: Emitter, x: Ref, name: str) -> Ref:
        out = em.like(name, x)
        em.call(aten.mul.out, x, em.constant(self.factor), out=out)
        return out

    def apply(self, em: Emitter, ps: Pass, xs: list[Ref], prefix: str) -> Ref:
        return self._times(em, xs[0], f"{prefix}{self.name}")

    def backward(self, em: Emitter, ps: Pass, gy: Ref, out: Gradients) -> None:
        if self.inputs[0] in out.wanted_values:
            out.add(self.inputs[0], self._times(em, gy, f"gradient of input of {self.name}"))


@dataclass
class Dropout(Plain):
    """Dropout of elements or of whole channels: the product with a mask, the same in all rules of a pass.

    Attributes:
        draws: of a task, by the number of examples.
        one: what is kept is multiplied by it.
        grid: [H, W, C] of images, also flattened ones, whose channels come first in the model.
        whole: whether every element has a number; else every channel of an example.
    """

    draws: Mapping[int, Draw]
    one: float
    grid: tuple[int, ...] | None
    whole: bool

    def _mask(self, em: Emitter, ps: Pass) -> Ref:
        if ps.images not in self.draws:
            raise Unsupported(self.name, f"dropout: not recorded with {ps.images} examples")
        arrange = None if self.grid is None else self._arranged
        mask = ps.drawn.of(em, (self.name, self.output), self.draws[ps.images], self.one, arrange)
        return mask.reshape(ps.tasks, ps.images, *(self.shape if self.whole else (1, 1, self.shape[-1])))

    def _arranged(self, mask: Tensor) -> Tensor:
        assert self.grid is not None
        height, width, channels = self.grid if self.whole else (1, 1, self.grid[2])
        return mask.reshape(*mask.shape[:2], channels, height, width).permute(0, 1, 3, 4, 2)

    def apply(self, em: Emitter, ps: Pass, xs: list[Ref], prefix: str) -> Ref:
        out = self.new_output(em, ps, prefix)
        em.call(aten.mul.out, xs[0], self._mask(em, ps), out=out)
        return out

    def backward(self, em: Emitter, ps: Pass, gy: Ref, out: Gradients) -> None:
        if self.inputs[0] in out.wanted_values:
            em.call(aten.mul.out, gy, self._mask(em, ps), out=self.new_gradient(em, ps, out))


@dataclass
class Noise(Step):
    """Random numbers of a pass, in the model's own layout, the same in all rules of the pass.

    Attributes:
        draws: of a task, by the number of examples.
        dtype: of the numbers; None for the model's.
    """

    draws: Mapping[int, Draw]
    dtype: torch.dtype | None

    @property
    def constant(self) -> bool:
        return True

    def forward(self, em: Emitter, ps: Pass) -> None:
        if ps.images not in self.draws:
            raise Unsupported(self.name, f"noise: not recorded with {ps.images} examples")
        key = self.name, self.output
        ps.values[self.output] = ps.drawn.of(em, key, self.draws[ps.images], dtype=self.dtype)


@dataclass
class ScaleShift(OneBackward):
    """``x * scale + shift`` with parameters per channel [C] or per element [H, W, C], each task's own.

    The affine part of a layer norm, and, where its weights adapt, of a norm by running statistics.
    """

    scale: Slot | None
    shift: Slot | None

    @property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(s for s in (self.scale, self.shift) if s is not None)

    def _wide(self, ps: Pass, slot: Slot, source: Ref) -> Ref:
        """``source`` [T, *slot.shape] against activations [T, N, *shape]."""
        ones = [1] * (1 + len(self.shape) - len(slot.shape))
        return source.reshape(ps.tasks, *ones, *slot.shape)

    def _reduce(self, em: Emitter, slot: Slot, g: Ref, out: Gradients) -> None:
        total = out.of(em, slot, g.shape[0])
        em.call(aten.sum.IntList_out, g, list(range(1, len(g.shape) - len(slot.shape))), out=total)
        out.params[slot.name] = total

    def forward(self, em: Emitter, ps: Pass) -> None:
        y = ps.values[self.inputs[0]]
        for slot, op in ((self.scale, aten.mul.out), (self.shift, aten.add.out)):
            if slot is not None:
                out = self.new_output(em, ps)
                em.call(op, y, self._wide(ps, slot, ps.weights[slot.name]), out=out)
                y = out
        ps.values[self.output] = y

    def tangent(self, em: Emitter, ps: Pass) -> None:
        x, u = ps.values[self.inputs[0]], ps.tangents.get(self.inputs[0])
        terms: list[Ref] = []
        if u is not None:
            terms.append(
                u
                if self.scale is None
                else self._times(em, u, self._wide(ps, self.scale, ps.weights[self.scale.name]))
            )
        if self.scale is not None and self.scale.name in ps.directions:
            terms.append(self._times(em, x, self._wide(ps, self.scale, ps.directions[self.scale.name])))
        if self.shift is not None and self.shift.name in ps.directions:
            shift = self._wide(ps, self.shift, ps.directions[self.shift.name])
            total = self.new_output(em, ps, "tangent of ")
            if terms:
                em.call(aten.add.out, em.sum("tangent", terms), shift, out=total)
            else:
                em.call(aten.copy_.default, total, shift)
            terms = [total]
        ps.tangents[self.output] = em.sum(f"tangent of {self.name}", terms)

    def _times(self, em: Emitter, a: Ref, b: Ref) -> Ref:
        out = em.like(f"product in {self.name}", a)
        em.call(aten.mul.out, a, b, out=out)
        return out

    def gradients(self, em: Emitter, ps: Pass, g: Ref, g0: Ref | None, out: Gradients) -> None:
        source, scale, shift = self.inputs[0], self.scale, self.shift
        if shift is not None and shift.name in out.wanted_params:
            self._reduce(em, shift, g, out)
        if scale is None:
            if source in out.wanted_values:
                out.add(source, g)
            return
        u, v = ps.tangents.get(source), ps.directions.get(scale.name)
        if scale.name in out.wanted_params:
            terms = [self._times(em, g, ps.values[source])]
            if g0 is not None and u is not None:
                terms.append(self._times(em, g0, u))
            self._reduce(em, scale, em.sum("product", terms), out)
        if source in out.wanted_values:
            terms = [self._times(em, g, self._wide(ps, scale, ps.weights[scale.name]))]
            if g0 is not None and v is not None:
                terms.append(self._times(em, g0, self._wide(ps, scale, v)))
            out.add(source, em.sum(f"gradient of input of {self.name}", terms))
