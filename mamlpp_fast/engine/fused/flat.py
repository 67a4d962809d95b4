"""One flat buffer for the tensors of all parameters and tasks, so that updates take one call, not one a parameter."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch

from mamlpp_fast.engine.fused.program import Emitter, Ref
from mamlpp_fast.engine.fused.steps import Slot
from mamlpp_fast.engine.fused.steps.base import aten

__all__ = ["Layout"]

_ALIGNMENT = 64


class Layout:
    """Places of the parameters' tensors [T, *shape] in a flat buffer, one after the other, each aligned.

    Args:
        slots: the parameters' shapes.
        names: which of them, in order.
        tasks: T.
        dtype: of the elements.

    Attributes:
        size: elements of the buffer.
    """

    def __init__(
        self, slots: Mapping[str, Slot], names: Sequence[str], tasks: int, dtype: torch.dtype
    ) -> None:
        self.names = tuple(names)
        self.shapes = {name: torch.Size((tasks, *slots[name].shape)) for name in self.names}
        self.begins: dict[str, int] = {}
        step, end = _ALIGNMENT // dtype.itemsize, 0
        self.has_gaps = False
        for name in self.names:
            self.begins[name] = -(-end // step) * step
            self.has_gaps |= self.begins[name] != end
            end = self.begins[name] + math.prod(self.shapes[name])
        self.size = end

    def new(self, em: Emitter, name: str) -> Ref:
        """A buffer whose gaps are zero."""
        flat = em.new(name, (self.size,))
        if self.has_gaps:
            em.call(aten.zero_.default, flat)
        return flat

    def views(self, flat: Ref) -> dict[str, Ref]:
        """The parameters' tensors in a buffer at least as long."""
        return {
            name: flat[begin : begin + shape.numel()].reshape(*shape)
            for name, (begin, shape) in self.places().items()
        }

    def views_of_each(self, flat: Ref) -> dict[str, Ref]:
        """The tensors [R, T, *shape] in buffers [R, ...] at least as long."""
        return {
            name: flat[:, begin : begin + shape.numel()].view(functools.partial(_unflattened, shape))
            for name, (begin, shape) in self.places().items()
        }

    def places(self) -> dict[str, tuple[int, torch.Size]]:
        """Where each parameter's tensor begins, and its shape."""
        return {name: (self.begins[name], shape) for name, shape in self.shapes.items()}

    def offsets(self, segments: Sequence[str]) -> torch.Tensor:
        """Ends [L + 1] of the segments, in the order of ``names``, those without a tensor here being empty.

        A gap belongs to the tensor before it.
        """
        begins = [*[self.begins[name] for name in segments if name in self.begins][1:], self.size]
        ends, present = [0], iter(begins)
        for name in segments:
            ends.append(next(present) if name in self.begins else ends[-1])
        return torch.tensor(ends)


def _unflattened(shape: torch.Size, flat: torch.Tensor) -> torch.Tensor:
    parts: torch.Tensor = flat.unflatten(1, shape)
    return parts
