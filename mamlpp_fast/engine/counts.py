"""Counts that modules keep of their own calls: integers that a forward raises, and that nothing is computed from.

Many a ResNet-12 for few shots anneals DropBlock by such a count, and keeps it where nothing is dropped too. A recording
tells by a stand-in for the number whether a pass does more with it than to add to it. Where it does not, the number is
no part of a model's form, and whoever runs a program in place of the model's calls moves it as they would.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from mamlpp_fast.reference.code import ROUTED

__all__ = [
    "Count",
    "StandIns",
    "advance",
    "computes",
    "counts_of",
    "integers",
    "kind_of",
    "known_counts",
    "learn",
    "unmoved",
]

Count = tuple[str, str, int]
"""Path of a module, name of its attribute, and by how much a call moves it."""

_NONE: frozenset[str] = frozenset()
_Names = weakref.WeakKeyDictionary[type, frozenset[str]]
_known, _computed = _Names(), _Names()
"""By class the names of what forwards count, and of what some of them compute with as well."""


def kind_of(cls: Any) -> type:
    """The class that a module was made of."""
    kind: type = cls.__mro__[1] if vars(cls).get(ROUTED) else vars(cls).get("_fast_original", cls)
    return kind


def known_counts() -> dict[type, frozenset[str]]:
    """Names of counts by class, as far as recordings have found them."""
    return dict(_known)


def counts_of(module: nn.Module) -> frozenset[str]:
    """Names of a module's counts, of those that a recording has found in its class."""
    if not _known or not (names := _known.get(kind_of(type(module)), _NONE)):
        return _NONE
    return frozenset(name for name in names if type(vars(module).get(name)) is int)


def integers(model: nn.Module) -> dict[tuple[str, str], int]:
    """The integers that are attributes of modules, by path and name."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) is int
    }


def learn(model: nn.Module, before: dict[tuple[str, str], int]) -> bool:
    """Takes integers that a pass has moved for counts; whether some were not known."""
    before_it = known_counts()
    for (path, name), value in integers(model).items():
        kind = kind_of(type(model.get_submodule(path)))
        if before.get((path, name), value) != value and name not in _computed.get(kind, _NONE):
            _known[kind] = _known.get(kind, _NONE) | {name}
    return before_it != known_counts()


def computes(model: nn.Module) -> None:
    """Takes in that passes of a model compute with its counts, whose values count from now on."""
    for module in model.modules():
        kind = kind_of(type(module))
        _computed[kind] = _computed.get(kind, _NONE) | _known.pop(kind, _NONE)


def advance(model: nn.Module, counts: Iterable[Count], calls: int = 1) -> None:
    """Moves a model's counts as so many calls do."""
    for path, name, by in counts:
        vars(model.get_submodule(path))[name] += by * calls


@contextlib.contextmanager
def unmoved(model: nn.Module) -> Iterator[None]:
    """Puts a model's counts back."""
    before = [(module, name, vars(module)[name]) for module in model.modules() for name in counts_of(module)]
    try:
        yield
    finally:
        for module, name, value in before:
            vars(module)[name] = value


class StandIns:
    """In place of a model's counts, within it.

    Attributes:
        used: whether the pass did more with one than to add to it.
        counts: how it moved them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.used = False
        self.counts: tuple[Count, ...] = ()
        self._places = [(p, m, name) for p, m in model.named_modules() for name in counts_of(m)]

    def __bool__(self) -> bool:
        return bool(self._places)

    def __enter__(self) -> StandIns:
        self._before = [vars(module)[name] for _, module, name in self._places]
        for place, value in zip(self._places, self._before, strict=True):
            vars(place[1])[place[2]] = _Number(value, place, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        moved = []
        for place, value in zip(self._places, self._before, strict=True):
            path, module, name = place
            left = vars(module).get(name)
            same = type(left) is _Number and left.__dict__["origin"] is place
            self.used |= not same
            if same and (by := left.__dict__["value"] - value):
                moved.append((path, name, by))
            vars(module)[name] = value
        self.counts = tuple(moved)

    def _note(self) -> None:
        self.used = True


class _Number:
    """An integer to which integers may be added; all else that is done with it is noted."""

    def __init__(self, value: int, origin: object, note: Callable[[], None]) -> None:
        self.__dict__.update(value=value, origin=origin, note=note)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return int

    def __add__(self, other: Any) -> Any:
        if type(other) is not int:
            return _used(self).__add__(other)
        own = self.__dict__
        return _Number(own["value"] + other, own["origin"], own["note"])

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self + -other if type(other) is int else _used(self).__sub__(other)

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, name) if name.startswith("__") else getattr(_used(self), name)


def _used(number: _Number) -> int:
    number.__dict__["note"]()
    value: int = number.__dict__["value"]
    return value


def _noted(name: str) -> Callable[..., Any]:
    return lambda self, *args: getattr(_used(self), name)(*args)


# What is no arithmetic, and what is defined above.
_PLUMBING = "class new init init_subclass subclasshook doc dir getattribute setattr delattr add radd sub"
for _name in set(dir(int)).difference(f"__{name}__" for name in _PLUMBING.split()):
    if _name.startswith("__"):
        setattr(_Number, _name, _noted(_name))
