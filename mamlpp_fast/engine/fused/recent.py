"""What an engine made for forms of batches: those used last, and whether a further one is worth making."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

__all__ = ["KEPT", "Recent", "Visits"]

_K = TypeVar("_K")
_V = TypeVar("_V")

KEPT = 32
"""Programs of an engine: each has some MiB beside the memory that they take turns in."""
FREE, OFTEN = 8, 16
"""So many forms are written as they come, and a further one once it has come so often: writing takes as long as a
plain loop takes for some ten batches, which a form that does not come again never brings back."""
_COUNTED = 1000
"""Forms without a program that are counted."""


class Recent(OrderedDict[_K, _V]):
    """A table of at most so many entries: the one that was not read for longest goes first."""

    def __init__(self, most: int = KEPT) -> None:
        super().__init__()
        self._most = most

    def __getitem__(self, key: _K) -> _V:
        value = super().__getitem__(key)
        self.move_to_end(key)
        return value

    def __setitem__(self, key: _K, value: _V) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        while len(self) > self._most:
            del self[next(iter(self))]


class Visits:
    """How often forms have come that have no program."""

    def __init__(self) -> None:
        self._written = 0
        self._came: Recent[object, int] = Recent(_COUNTED)

    @property
    def why(self) -> str:
        """Why a form is not to have a program yet."""
        return f"of a form, beyond the first {FREE}, that has not come {OFTEN} times yet"

    def pays(self, key: object) -> bool:
        """Takes in that a form came; whether its program is to be written now."""
        came = self._came.pop(key, 0) + 1
        if self._written >= FREE and came <= OFTEN:
            self._came[key] = came
            return False
        self._written += 1
        return True
