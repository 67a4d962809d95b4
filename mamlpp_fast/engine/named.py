"""What the engines ask of the code of functions and classes, beside what it names."""

from __future__ import annotations

import dis
import functools
import gc
import importlib
import inspect
import itertools
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mamlpp_fast.reference.code import (
    READS,
    attributes_of,
    from_library,
    globals_of,
    module_of,
    named_by,
    values_named,
    written_in,
)

__all__ = [
    "MADE_BY",
    "beyond",
    "imported",
    "installed",
    "is_operator",
    "of_library",
    "of_library_s_code",
    "reads_environment",
    "tensors_named",
]

MADE_BY = frozenset({"__init__", "__new__", "__post_init__", "__call__"})
"""Methods that a call of a class runs, or of its metaclass."""
_NOT_IN_USE = MADE_BY | {
    *("__repr__", "__str__", "__format__", "__dir__", "__sizeof__", "__del__", "__init_subclass__"),
    *("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__copy__", "__deepcopy__"),
}
_OF_BUILTINS = frozenset({"eval", "exec", "id", "hash"})
_BY_WAYS = (
    *(sys.modules, sys._getframe, inspect.currentframe, inspect.stack, importlib.import_module),
    *(gc.get_objects, gc.get_referrers),
)
_COMPILED = ("torch._higher_order_ops.", "torch.nn.attention.flex_attention")
_DEPTH = 6  # of functions that name functions


@functools.lru_cache(maxsize=1000)
def reads_environment(code: types.CodeType) -> bool:
    """Whether a function may read or write the process's environment."""
    return not {"environ", "environb", "expandvars", "getenv"}.isdisjoint(
        (*globals_of(code), *attributes_of(code))
    )


def beyond(function: types.FunctionType) -> str | None:
    """What a function of the user's names that is not followed, or not to be run under a mode; None for nothing."""
    space = function.__globals__
    named = _builtins(function.__code__).difference(space)
    if not named.isdisjoint({"eval", "exec"}):
        return "runs what a text says (eval, exec), which is not followed"
    if named and function.__name__ != "__hash__":  # of a frozen dataclass, say
        return f"asks for the {min(named)} of objects, which copies of it do not share"
    found = [space.get(name) for name in globals_of(function.__code__)]
    for module, name in _of_globals(function.__code__):
        if isinstance(owner := space.get(module), types.ModuleType):
            found.append(getattr(owner, name, None))
    for value in found:
        if any(value is way for way in _BY_WAYS):
            return "looks for objects by their names or frames (sys.modules, inspect), which is not followed"
        # Run once under a dispatch mode it fails in every later call of the process (torch 2.13).
        if isinstance(value, types.FunctionType) and module_of(value.__globals__).startswith(_COMPILED):
            return f"computes by {value.__name__}, which compiles what it is given"
    return None


@functools.lru_cache(maxsize=1000)
def _of_globals(code: types.CodeType) -> tuple[tuple[str, str], ...]:
    """Globals and the attributes of them that a function reads: ``torch.cond``."""
    both = itertools.pairwise(dis.get_instructions(code))
    found = [
        (a.argval, b.argval)
        for a, b in both
        if a.opname in ("LOAD_GLOBAL", "LOAD_NAME") and b.opname in READS
    ]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found += _of_globals(constant)
    return tuple(found)


@functools.lru_cache(maxsize=1000)
def _builtins(code: types.CodeType) -> frozenset[str]:
    own = {*named_by(code, "LOAD_GLOBAL", "LOAD_NAME")}
    if not {"builtins", "__builtins__"}.isdisjoint((*globals_of(code), *_imports(code))):
        own.update(attributes_of(code))
    return _OF_BUILTINS & own


@functools.lru_cache(maxsize=1000)
def _imports(code: types.CodeType) -> tuple[str, ...]:
    return named_by(code, "IMPORT_NAME")


def imported(function: types.FunctionType) -> list[types.ModuleType]:
    """The modules that a function itself imports, where they have been imported before."""
    found = list[types.ModuleType]()
    for name in _imports(function.__code__):
        package = function.__globals__.get("__package__") or ""
        for full in (name, name.partition(".")[0], f"{package}.{name}".rstrip(".")):
            if (module := sys.modules.get(full)) is not None and module not in found:
                found.append(module)
    return found


def of_library_s_code(space: Mapping[str, Any]) -> bool:
    """Whether the code that has these globals is a library's, or of another installed package."""
    name = module_of(space)
    return from_library(name) or installed(name) != ""


@functools.lru_cache(maxsize=1000)
def of_library(cls: type) -> bool:
    """Whether libraries alone wrote a class and its bases."""
    return all(from_library(written_in(base)) for base in cls.__mro__)


@functools.cache
def installed(module: str | None) -> str:
    """The package of that module where it was installed, as other people's are; else nothing."""
    file = getattr(sys.modules.get(str(module)), "__file__", None) or ""
    return str(module).partition(".")[0] if {"site-packages", "dist-packages"} & {*Path(file).parts} else ""


def is_operator(name: str) -> bool:
    """Whether a method of this name is called by other code than a call of it: ``x * y``, ``with x``, ``x[0]``."""
    return name.startswith("__") and name.endswith("__") and name not in _NOT_IN_USE


def tensors_named(function: Any) -> list[Tensor]:
    """Tensors that a function and those that it names read as globals or close over, without a gradient."""
    found: list[Tensor] = []
    seen, queue = set[int](), [(function, 0)]
    for value, depth in queue:  # grows meanwhile
        if isinstance(value, functools.partial):
            found += [t for t in (*value.args, *value.keywords.values()) if isinstance(t, Tensor)]
            queue.append((value.func, depth))
        value = getattr(value, "__func__", value)
        if not isinstance(value, types.FunctionType) or id(value) in seen or depth >= _DEPTH:
            continue
        seen.add(id(value))
        named = list(values_named(value).values())
        found += [t for t in named if isinstance(t, Tensor) and not t.requires_grad]
        queue += [(f, depth + 1) for f in named if isinstance(f, (types.FunctionType, functools.partial))]
    return found
