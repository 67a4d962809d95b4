"""Between the layout of the kernels and the model's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from mamlpp_fast.engine.fused.program import Emitter, Ref
from mamlpp_fast.engine.fused.steps.base import Gradients, Pass, aten
from mamlpp_fast.engine.fused.steps.linear import Plain

__all__ = ["Relayout", "inverse", "settled", "viewed"]

# What kernels may take for granted of a pointer.
_ALIGNMENT = 64


def inverse(order: Sequence[int]) -> list[int]:
    """The permutation that undoes one."""
    return [order.index(i) for i in range(len(order))]


def settled(em: Emitter, ref: Ref, name: str) -> Ref:
    """``ref``, or a copy of it that lies contiguous and aligned."""
    if ref.settled(_ALIGNMENT):
        return ref
    out = em.new(name, ref.shape, ref.dtype)
    em.call(aten.copy_.default, out, ref)
    return out


def viewed(em: Emitter, ref: Ref, view: Callable[[Tensor], Tensor], name: str) -> Ref:
    """A view of ``ref``, or of a contiguous copy where its strides have none."""
    try:
        return ref.view(view)
    except RuntimeError:
        out = em.new(name, ref.shape, ref.dtype)
        em.call(aten.copy_.default, out, ref)
        return out.view(view)


@dataclass
class Relayout(Plain):
    """The axes of every example in another order: a view where it can be one.

    Attributes:
        split: the shape of an example of the input, axes split or merged.
        order: of those axes in the output, which merges them to ``shape``.
        settle: whether the output, and the gradient of the input, are to lie contiguous: where kernels read them.
        several: the length of the first of those axes where it becomes rows of the output [N * several, ...]; else 0.
    """

    split: tuple[int, ...]
    order: tuple[int, ...]
    settle: tuple[bool, bool]
    several: int = 0

    def apply(self, em: Emitter, ps: Pass, xs: list[Ref], prefix: str) -> Ref:
        lead = (ps.tasks, ps.images)
        x = viewed(em, xs[0], lambda t: t.view(*lead, *self.split), f"{prefix}{self.name}")
        x = x.view(lambda t: t.permute(0, 1, *(i + 2 for i in self.order)))
        shape = (
            (ps.tasks, ps.images * self.several, *self.shape[1:]) if self.several else (*lead, *self.shape)
        )
        x = viewed(em, x, lambda t: t.view(shape), f"{prefix}{self.name}")
        return settled(em, x, f"{prefix}{self.name}") if self.settle[0] else x

    def backward(self, em: Emitter, ps: Pass, gy: Ref, out: Gradients) -> None:
        if self.inputs[0] not in out.wanted_values:
            return
        lead, name = (ps.tasks, ps.images), f"gradient of input of {self.name}"
        middle = [self.split[i] for i in self.order]
        shape = ps.values[self.inputs[0]].shape
        g = viewed(em, gy, lambda t: t.view(*lead, *middle), name)
        g = g.view(lambda t: t.permute(0, 1, *(i + 2 for i in inverse(self.order))))
        g = viewed(em, g, lambda t: t.view(shape), name)
        out.add(self.inputs[0], settled(em, g, name) if self.settle[1] else g)
