"""What a pass that only looks changes beside the model, put back: the user's calls are to be as many as they are."""

from __future__ import annotations

import contextlib
import functools
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from mamlpp_fast.engine.named import installed
from mamlpp_fast.engine.objects import ENTRIES
from mamlpp_fast.reference.code import FUNCTIONS, from_library, globals_of, own_bases, written_in
from mamlpp_fast.reference.orders import put_back

__all__ = ["undone"]

_DEPTH = 3
_VALUES = 2**16
"""Of a tensor that is copied beforehand: statistics and counts, no data set."""


@contextlib.contextmanager
def undone(model: nn.Module, functions: Iterable[types.FunctionType]) -> Iterator[None]:
    """Puts back globals and closed-over values that functions name, and attributes of the classes of modules.

    Which objects they are; what lists, dicts, sets and objects of the user's classes among them hold, up to 1000
    entries and 3 levels of each; and the values of tensors, up to 65536. Attributes of the modules are left: they are
    copies' own. What other threads write to the same places meanwhile is lost.

    Args:
        model: that the pass is made through.
        functions: of the user's own that it may call.
    """
    kept = _Kept()
    kinds: set[Any] = {type(m) for m in model.modules()}
    classes = {base for kind in kinds for base in own_bases(kind)}
    for function in functions:
        space = function.__globals__
        named = globals_of(function.__code__)
        own = {name: space[name] for name in named if name in space}
        kept.entries(own, space.get, space.__setitem__)
        kept.new(space, space.__delitem__, {*named} - own.keys())
        classes |= {value for value in own.values() if isinstance(value, type) and _of_user(value)}
        for cell in function.__closure__ or ():
            if cell != types.CellType():
                kept.entries({"cell_contents": cell.cell_contents}, cell.__getattribute__, cell.__setattr__)
    for cls in classes:
        own = {n: v for n, v in vars(cls).items() if not n.startswith("__") and not isinstance(v, FUNCTIONS)}
        kept.entries(own, vars(cls).get, functools.partial(setattr, cls))
        kept.new(vars(cls), functools.partial(delattr, cls))
    try:
        yield
    finally:
        for back in kept.undo:
            back()


def _of_user(cls: type) -> bool:
    module = written_in(cls)
    return not from_library(module) and not installed(module)


class _Kept:
    """Values as they are, and what makes them so again."""

    def __init__(self) -> None:
        self.undo: list[Callable[[], None]] = []
        self._seen = set[int]()

    def entries(
        self,
        own: Mapping[Any, Any],
        get: Callable[[Any], Any],
        put: Callable[[Any, Any], Any],
        depth: int = 0,
    ) -> None:
        """Entries of a table, or attributes, and the values themselves."""

        def back() -> None:
            for name, value in own.items():
                if get(name) is not value:
                    put(name, value)

        self.undo.append(back)
        for value in own.values():
            self.value(value, depth)

    def value(self, value: Any, depth: int) -> None:
        if depth > _DEPTH or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            known = value.layout is torch.strided and not value.is_meta and not value.is_inference()
            if known and value.numel() <= _VALUES:
                self._tensor(value)
        elif isinstance(value, dict):
            if len(value) <= ENTRIES:
                self._table(value, depth)
        elif isinstance(value, (list, deque, set)):
            if len(value) <= ENTRIES:
                self._sequence(value, depth)
        elif not isinstance(value, (type, nn.Module, *FUNCTIONS)) and _of_user(type(value)):
            self.value(getattr(value, "__dict__", None), depth)

    def new(
        self, table: Mapping[Any, Any], delete: Callable[[Any], None], names: Set[Any] | None = None
    ) -> None:
        """Entries that are not there yet, of these names or of whatever names."""
        before = set(table)

        def back() -> None:
            for name in table.keys() - before if names is None else names & table.keys():
                delete(name)

        self.undo.append(back)

    def _tensor(self, t: Tensor) -> None:
        before = t.detach().clone()

        def back() -> None:
            if not torch.equal(t, before):
                put_back(t, before)

        self.undo.append(back)

    def _table(self, table: dict[Any, Any], depth: int) -> None:
        own = dict(table)
        self.new(table, table.__delitem__)
        self.entries(own, table.get, table.__setitem__, depth + 1)

    def _sequence(self, found: Any, depth: int) -> None:
        own = list(found)

        def back() -> None:
            if len(found) != len(own) or any(a is not b for a, b in zip(found, own, strict=True)):
                found.clear()
                (found.update if isinstance(found, set) else found.extend)(own)

        self.undo.append(back)
        for value in own:
            self.value(value, depth + 1)
