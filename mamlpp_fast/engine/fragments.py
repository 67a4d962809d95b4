"""Plain attributes of a module as one number: hardly any ever change, and writing them out takes longer than a call."""

from __future__ import annotations

import functools
import itertools

import torch

__all__ = ["PLAIN", "content", "number_of", "others", "told"]

PLAIN = frozenset(
    {int, bool, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.layout}
    | {torch.memory_format, slice, range}
)
"""Types of attributes that are compared by value."""

_numbers: dict[object, int] = {}
_count = itertools.count()
_MOST = 10_000
"""Contents that have a number: a counter that every call raises makes a new one each time."""
# By identity: a number, and the values, without which another's address might be theirs.
_known: dict[tuple[tuple[str, ...], tuple[int, ...]], tuple[int, tuple[object, ...]]] = {}


def number_of(names: tuple[str, ...], values: tuple[object, ...]) -> int | None:
    """The number of these names and values; None where one of them could change, or is none to compare by value.

    Two calls give one number only where names, types and values are equal.
    """
    place = names, tuple(map(id, values))
    if (found := _known.get(place)) is not None:
        return found[0]
    held = tuple(map(content, values))
    if None in held:
        return None
    number = _numbers.get((names, held))
    if number is None:
        if len(_numbers) >= _MOST:
            return None
        number = _numbers.setdefault((names, held), next(_count))
    if len(_known) >= _MOST:
        _known.clear()
    _known[place] = number, values
    return number


def content(value: object) -> tuple[object, ...] | None:
    """A value with its type, to compare and to hash; None for one that is not plain, or changeable."""
    kind = type(value)
    if kind is tuple and isinstance(value, tuple):  # in this order: a dead proxy has no class
        parts = tuple(map(content, value))
        return None if None in parts else (kind, parts)
    return (kind, told(value)) if kind in PLAIN and kind is not slice else None


def told(value: object) -> object:
    """A plain value as one that equals no other: 0.0 equals -0.0."""
    if isinstance(value, float):
        return value.hex()
    return (value.real.hex(), value.imag.hex()) if isinstance(value, complex) else value


@functools.lru_cache(maxsize=1000)
def others(names: tuple[str, ...], but: frozenset[str]) -> tuple[str, ...]:
    """These names without some."""
    return tuple(name for name in names if name not in but)
