"""The buffers that a program names, views of them, and their places in memory: none that live together overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Buffer", "Ref", "Workspace", "place"]

_ALIGNMENT = 64


class Buffer:
    """Memory of one tensor: a place in the workspace, or a tensor of its own (``storage``).

    Lanes have a place each in the workspace, and of an own tensor a copy each where ``each``.

    Attributes:
        passing: whether it has a place in other memory, which lanes may have in common (:meth:`Emitter.passing`).
        first, last: calls that it is alive between.
    """

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        storage: Tensor | None = None,
        each: bool = True,
    ) -> None:
        self.name = name
        self.shape = tuple(shape)
        self.dtype = dtype
        self.tensors = [] if storage is None else [storage]
        self.owned = storage is not None
        self.each = each
        self.passing = False
        self.first = -1
        self.last = -1
        self.offset = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def within(self, memory: Tensor) -> Tensor:
        """The tensor at its place in memory [bytes]."""
        return memory[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)

    def tensor(self, lane: int = 0) -> Tensor:
        if not self.tensors:
            raise RuntimeError(f"buffer {self.name} has no memory yet")
        return self.tensors[lane if self.each else 0]


class Ref:
    """A buffer, or a view of one, before it has memory."""

    def __init__(
        self, buffer: Buffer, views: tuple[Callable[[Tensor], Tensor], ...] = (), meta: Tensor | None = None
    ) -> None:
        self.buffer = buffer
        self._views = views
        self._meta = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta") if meta is None else meta

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._meta.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self._meta.dtype

    def stride(self) -> tuple[int, ...]:
        return self._meta.stride()

    @property
    def nbytes(self) -> int:
        return self._meta.numel() * self._meta.element_size()

    def settled(self, alignment: int) -> bool:
        """Whether it lies contiguous, and begins at a multiple of so many bytes in its buffer."""
        return self._meta.is_contiguous() and self.begin * self._meta.element_size() % alignment == 0

    @property
    def begin(self) -> int:
        """Elements of the buffer in front of the first."""
        return int(self._meta.storage_offset())

    def view(self, fn: Callable[[Tensor], Tensor]) -> Ref:
        """The view that ``fn`` makes of this one; ``fn`` must not copy."""
        return Ref(self.buffer, (*self._views, fn), fn(self._meta))

    def __getitem__(self, index: Any) -> Ref:
        return self.view(lambda t: t[index])

    def reshape(self, *shape: int) -> Ref:
        return self.view(lambda t: t.view(*shape))

    def expand(self, *shape: int) -> Ref:
        return self.view(lambda t: t.expand(*shape))

    def tensor(self, lane: int = 0) -> Tensor:
        """The tensor, a lane's own where lanes have one each, once the buffer has memory."""
        t = self.buffer.tensor(lane)
        for fn in self._views:
            t = fn(t)
        return t


class Workspace:
    """The memory that programs of one engine take turns in; grows to the largest of them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)
        self.generation = 0

    def reserve(self, nbytes: int) -> None:
        if nbytes > self.memory.numel():
            self.memory = torch.empty(0, dtype=torch.uint8, device=self.device)
            self.memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
            self.generation += 1


def place(buffers: Sequence[Buffer]) -> int:
    """Gives each buffer an offset such that no two alive together overlap; returns the bytes needed.

    Largest first, each at the lowest place that is free throughout its life.
    """
    # Of those placed, in the order of their offsets: first and last call, offset and aligned end.
    placed = np.empty((4, len(buffers)), dtype=np.int64)
    total = 0
    for count, b in enumerate(sorted(buffers, key=lambda b: (-b.nbytes, b.first))):
        first, last, offsets, ends = placed[:, :count]
        busy = (first <= b.last) & (b.first <= last)
        starts = offsets[busy]
        free = np.maximum.accumulate(np.concatenate([[0], ends[busy]]))  # in front of each, and behind all
        fits = np.flatnonzero(free[:-1] + b.nbytes <= starts)
        b.offset = int(free[fits[0]] if len(fits) else free[-1])
        at = int(np.searchsorted(offsets, b.offset))
        placed[:, at + 1 : count + 1] = placed[:, at:count]
        placed[:, at] = b.first, b.last, b.offset, _align(b.offset + b.nbytes)
        total = max(total, b.offset + b.nbytes)
    return _align(total)


def _align(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
