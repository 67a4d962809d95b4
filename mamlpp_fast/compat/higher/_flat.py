"""Parameters that are updated by the same formula, joined into one buffer so that it takes one operation a term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Buffers", "buckets"]


@dataclass
class Buffers:
    """The flat buffers of the step before, by name, so that what was taken apart need not be joined again."""

    _kept: dict[Any, tuple[list[Tensor], Tensor]] = field(default_factory=dict)

    def join(self, name: Any, tensors: Sequence[Tensor]) -> Tensor:
        """The tensors end to end [P]: the very buffer they were last taken from, where they are its parts."""
        parts, flat = self._kept.get(name, ([], None))
        if flat is not None and len(parts) == len(tensors) and all(map(_same, parts, tensors)):
            return flat
        return torch.cat([t.reshape(-1) for t in tensors])

    def part(self, name: Any, flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """Views of the buffer with these shapes."""
        pieces = flat.split([t.numel() for t in like])
        parts = [piece.view(t.shape) for piece, t in zip(pieces, like, strict=True)]
        self._kept[name] = (parts, flat)
        return parts


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b


def buckets(
    params: Sequence[Tensor],
    grads: Mapping[int, Tensor],
    states: Mapping[int, Mapping[str, Any]],
    buffers: Sequence[str],
) -> list[list[int]]:
    """Indices of ``grads``, by what a common formula needs equal: type, device and scalar state.

    Args:
        params, grads, states: of one parameter group, by position in it.
        buffers: names of the state that has an entry for each element.
    """
    found: dict[Any, list[int]] = {}
    for i, g in grads.items():
        p, state = params[i], states[i]
        scalars = tuple((name, _key(value)) for name, value in state.items() if name not in buffers)
        present = tuple(name for name in buffers if state.get(name) is not None)
        alone = None if p.is_contiguous() and g.layout is torch.strided and g.dtype == p.dtype else i
        found.setdefault((p.dtype, p.device, scalars, present, alone), []).append(i)
    return list(found.values())


def _key(value: Any) -> Any:
    return id(value) if isinstance(value, Tensor) else value
