"""Places in memory for buffers whose lives are known: none that live together overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from mamlpp_fast.engine.fused.program import Buffer

__all__ = ["Workspace", "place"]

_ALIGNMENT = 64


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
