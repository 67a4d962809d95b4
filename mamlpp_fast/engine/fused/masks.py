"""Masks of dropout, and noise: drawn before an iteration's passes, so that all rules of a pass read the same.

They are drawn on the calling thread from the process's generator, task after task and pass after pass, in the order and
in the shapes in which PyTorch's own operations draw them in a loop over tasks: after ``torch.manual_seed`` the numbers
are those of such a loop, whatever lanes and groups there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mamlpp_fast.engine.executions import Draw
from mamlpp_fast.engine.fused.program import Emitter, Ref

__all__ = ["Mask", "Masks", "PassMasks"]


@dataclass(frozen=True)
class Mask:
    """One draw of a pass, for a group of tasks.

    Attributes:
        draw: of one task.
        memory: [T, M]: what is drawn, in the order of memory, or in that of ``arrange``; of every lane.
        one: what a one becomes.
        arrange: from a view [..., *draw.shape] to one with the axes that memory has; None for these themselves.
    """

    draw: Draw
    memory: Ref
    one: float
    arrange: Callable[[Tensor], Tensor] | None

    def seen(self, flat: Tensor) -> Tensor:
        """Numbers [..., M] in the order of the draws as a view [..., *draw.shape]."""
        lead = flat.shape[:-1]
        return flat.as_strided(
            (*lead, *self.draw.shape),
            (*flat.stride()[: len(lead)], *self.draw.strides),
            flat.storage_offset(),
        )

    def load(self, drawn: Tensor, lane: int) -> None:
        """Takes what was drawn, [T, M]."""
        values, own = self.seen(drawn), self.memory.tensor(lane)
        if self.arrange is None:
            self.seen(own).copy_(values)
        else:
            values = self.arrange(values)
            own.view(values.shape).copy_(values)
        if self.one != 1:
            own.mul_(self.one)


class PassMasks:
    """The masks of one pass, in the order in which they are drawn: made when a step first asks for them."""

    def __init__(self, tasks: int) -> None:
        self.tasks = tasks
        self.masks: dict[Hashable, Mask] = {}

    def of(
        self,
        em: Emitter,
        key: Hashable,
        draw: Draw,
        one: float = 1.0,
        arrange: Callable[[Tensor], Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Ref:
        """A mask [T, *draw.shape], or what ``arrange`` makes of that; the same whenever it is asked for.

        Args:
            dtype: of the mask; by default that of the program.

        Raises:
            ValueError: for a draw with gaps in memory.
        """
        count = math.prod(draw.shape)
        if not draw.dense:
            raise ValueError("expected a draw without gaps in memory")
        if key not in self.masks:
            zeros = torch.zeros(
                self.tasks, count, dtype=em.dtype if dtype is None else dtype, device=em.device
            )
            self.masks[key] = Mask(draw, em.own("a mask of dropout", zeros, each=True), one, arrange)
        mask = self.masks[key]
        if mask.arrange is None:
            return mask.memory.view(mask.seen)
        shape = mask.arrange(mask.seen(torch.empty(self.tasks, count, device="meta"))).shape
        return mask.memory.reshape(*shape)


class Masks:
    """The masks of all tasks of a batch.

    Args:
        passes: of a group, in their order.
        tasks: of a group.
        groups: of a batch.
    """

    def __init__(self, passes: Iterable[PassMasks], tasks: int, groups: int) -> None:
        self._masks = [mask for one in passes for mask in one.masks.values()]
        self._tasks, self._groups = tasks, groups
        self._drawn: list[Tensor] = []
        self._draws: list[tuple[Draw, Tensor]] = []

    @property
    def nbytes(self) -> int:
        """Of what :meth:`draw` keeps: a byte a zero or one, noise as the model has it."""
        sizes = (math.prod(m.draw.shape) * m.draw.stored.itemsize for m in self._masks)
        return self._groups * self._tasks * sum(sizes)

    def draw(self, generator: torch.Generator | None = None) -> None:
        """Draws those of an iteration; by default from the process's generator."""
        if not self._drawn:
            total = self._groups * self._tasks
            self._drawn = [
                torch.empty(total, math.prod(m.draw.shape), dtype=m.draw.stored, device="cpu")
                for m in self._masks
            ]
            self._draws = [
                (mask.draw, mask.seen(drawn[task]))
                for task in range(total)
                for mask, drawn in zip(self._masks, self._drawn, strict=True)
            ]
        for draw, place in self._draws:
            draw.into(place, generator)

    def load(self, group: int, lane: int) -> None:
        """Gives a lane the masks of a group of tasks."""
        begin = group * self._tasks
        for mask, drawn in zip(self._masks, self._drawn, strict=True):
            mask.load(drawn[begin : begin + self._tasks], lane)
