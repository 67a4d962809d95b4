"""The names that a model's forward uses in its code, and in the code that this calls."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["PLUMBING", "names_in"]

_OTHERS = sys.stdlib_module_names | {"torch", "torchvision", "numpy", "mamlpp_fast"}
"""Packages whose code calls nothing of a model's but the model."""
_AROUND = "_mamlpp_fast_routed"
"""Of a class that :mod:`mamlpp_fast.accelerated` makes of a user's: its forward names that, and so all methods."""
PLUMBING = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


def _own(name: str | None) -> bool:
    return (name or "builtins").partition(".")[0] not in _OTHERS or name == "__main__"


def _unwrapped(thing: Any) -> Any:
    if isinstance(thing, functools.partial):
        thing = thing.func
    if isinstance(thing, property):
        return thing.fget
    return thing.__func__ if isinstance(thing, types.MethodType | staticmethod | classmethod) else thing


def _parts(model: nn.Module) -> frozenset[Any]:
    """Classes and functions that are none of torch's: of modules, of their attributes and of their hooks."""
    held: list[Any] = []
    for m in model.modules():
        held += [type(m), *m._forward_pre_hooks.values(), *m._forward_hooks.values()]
        if _own(type(m).__module__):
            held += [value for name, value in vars(m).items() if name not in PLUMBING]
    parts: set[Any] = set()
    for thing in held:  # grows meanwhile
        if type(thing) in (list, tuple):
            held += thing
        elif type(thing) is dict:
            held += thing.values()
        elif isinstance(found := _unwrapped(thing), types.FunctionType):
            parts.add(found)
        else:
            cls = found if isinstance(found, type) else type(found)
            parts.update(c for c in cls.__mro__ if _own(c.__module__) and _AROUND not in vars(c))
    return frozenset(parts)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _refers_to(function: types.FunctionType, names: set[str]) -> Iterator[Any]:
    """The values of a function's names, as far as they are global, a module's or its closure's."""
    for name in names & function.__globals__.keys():
        yield (value := function.__globals__[name])
        if isinstance(value, types.ModuleType) and _own(value.__name__):
            yield from (vars(value)[n] for n in names & vars(value).keys())
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not yet set
            continue


@functools.lru_cache(256)
def _names(parts: frozenset[Any]) -> frozenset[str]:
    classes = [part for part in parts if isinstance(part, type)]
    queue: list[Any] = [part for part in parts if not isinstance(part, type)]
    called = {"forward", "__call__"}
    queue += [vars(c)[name] for c in classes for name in called & vars(c).keys()]
    names: set[str] = set()
    seen: set[Any] = set()
    for thing in queue:  # grows meanwhile
        found = _unwrapped(thing)
        if not isinstance(found, types.FunctionType | types.BuiltinFunctionType | type) or found in seen:
            continue
        seen.add(found)
        if not _own(found.__module__):
            names.add(found.__name__)  # by whatever name it was imported
            continue
        if isinstance(found, type):
            queue += vars(found).values()
        if not isinstance(found, types.FunctionType):
            continue
        own = {name for code in _codes(found.__code__) for name in code.co_names}
        queue += _refers_to(found, own)
        queue += [vars(c)[name] for c in classes for name in (own - names) & vars(c).keys()]
        names |= own
    return frozenset(names)


def names_in(model: nn.Module) -> frozenset[str]:
    """Names in the code of a model's forward, its modules', hooks' and attributes', and of functions that these name.

    Code of torch, numpy and the standard library is not followed. What a name stands for at a call is not told:
    where one of them is missing, nothing by that name is used, unless by ``getattr`` or the like.
    """
    return _names(_parts(model))
