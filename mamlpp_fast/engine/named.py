"""What the code of functions and classes names, by its instructions: globals, attributes, modules, methods."""

from __future__ import annotations

import dis
import functools
import gc
import importlib
import inspect
import itertools
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = [
    "CACHED",
    "FUNCTIONS",
    "LIBRARIES",
    "MADE_BY",
    "ROUTED",
    "attributes_of",
    "beyond",
    "from_library",
    "function_of",
    "functions_of",
    "globals_of",
    "imported",
    "installed",
    "is_operator",
    "of_library",
    "of_library_s_code",
    "own_bases",
    "reads_environment",
    "tensors_named",
    "values_named",
    "written_in",
]

LIBRARIES = ("torch.", "mamlpp_fast.", "builtins")
ROUTED = "_mamlpp_fast_routed"
"""Of a class whose ``forward`` computes what its base's does (:mod:`mamlpp_fast.accelerated`)."""
_BESIDE = (ROUTED, "_fast_original")
"""Of a class that says nothing beside its bases, and bears the name of one."""
_ON_A_HEAP = 1 << 9  # Python's flag of classes that are no part of its own or of an extension's code

MADE_BY = frozenset({"__init__", "__new__", "__post_init__", "__call__"})
"""Methods that a call of a class runs, or of its metaclass."""
_NOT_IN_USE = MADE_BY | {
    *("__repr__", "__str__", "__format__", "__dir__", "__sizeof__", "__del__", "__init_subclass__"),
    *("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__copy__", "__deepcopy__"),
}
# Of what these are given as a text, the name is a constant of the code.
_BY_TEXT = frozenset(
    {"getattr", "hasattr", "attrgetter", "methodcaller", "vars", "globals", "__dict__", "__getattribute__"}
)
_OF_BUILTINS = frozenset({"eval", "exec", "id", "hash"})
_BY_WAYS = (
    *(sys.modules, sys._getframe, inspect.currentframe, inspect.stack, importlib.import_module),
    *(gc.get_objects, gc.get_referrers),
)
_COMPILED = ("torch._higher_order_ops.", "torch.nn.attention.flex_attention")
_READS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_SUPER_METHOD", "IMPORT_FROM")
_DEPTH = 6  # of functions that name functions
_STDLIB = sysconfig.get_path("stdlib")


def _named(code: types.CodeType, *operations: str) -> tuple[str, ...]:
    """What these operations of a function, and of functions and comprehensions written within it, name."""
    found = dict.fromkeys(i.argval for i in dis.get_instructions(code) if i.opname in operations)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= dict.fromkeys(_named(constant, *operations))
    return tuple(found)


def _texts(code: types.CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _texts(constant)
        elif isinstance(constant, str) and constant.replace(".", "_").isidentifier():
            yield from constant.split(".")


@functools.lru_cache(maxsize=1000)
def _all_of(code: types.CodeType) -> tuple[tuple[str, ...], tuple[str, ...]]:
    own = _named(code, "LOAD_GLOBAL", "STORE_GLOBAL", "LOAD_NAME")
    attributes = _named(code, *_READS, "STORE_ATTR")
    texts = () if _BY_TEXT.isdisjoint((*own, *attributes)) else tuple(_texts(code))
    return tuple(dict.fromkeys(own + texts)), tuple(dict.fromkeys(attributes + texts))


def globals_of(code: types.CodeType) -> tuple[str, ...]:
    """Names of the globals that a function reads or sets."""
    return _all_of(code)[0]


def attributes_of(code: types.CodeType) -> tuple[str, ...]:
    """Names of the attributes that a function reads or sets, methods among them; by ``getattr`` and the like too."""
    return _all_of(code)[1]


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
        if a.opname in ("LOAD_GLOBAL", "LOAD_NAME") and b.opname in _READS
    ]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found += _of_globals(constant)
    return tuple(found)


@functools.lru_cache(maxsize=1000)
def _builtins(code: types.CodeType) -> frozenset[str]:
    own = {*_named(code, "LOAD_GLOBAL", "LOAD_NAME")}
    if not {"builtins", "__builtins__"}.isdisjoint((*globals_of(code), *_imports(code))):
        own.update(attributes_of(code))
    return _OF_BUILTINS & own


@functools.lru_cache(maxsize=1000)
def _imports(code: types.CodeType) -> tuple[str, ...]:
    return _named(code, "IMPORT_NAME")


def imported(function: types.FunctionType) -> list[types.ModuleType]:
    """The modules that a function itself imports, where they have been imported before."""
    found = list[types.ModuleType]()
    for name in _imports(function.__code__):
        package = function.__globals__.get("__package__") or ""
        for full in (name, name.partition(".")[0], f"{package}.{name}".rstrip(".")):
            if (module := sys.modules.get(full)) is not None and module not in found:
                found.append(module)
    return found


@functools.cache
def from_library(module: str | None) -> bool:
    """Whether what is defined in a module of this name is PyTorch's, NumPy's, ours or Python's own."""
    top = "builtins" if module is None else module.partition(".")[0]
    if top in ("torch", "mamlpp_fast", "numpy", "builtins"):
        return True
    # A script's own module may have the name of one of Python's.
    file = getattr(sys.modules.get(str(module)), "__file__", None)
    return top in sys.stdlib_module_names and (file is None or file.startswith(_STDLIB))


@functools.lru_cache(maxsize=1000)
def _found(cls: type) -> bool:
    """Whether a class is what its module has under its name."""
    if not cls.__flags__ & _ON_A_HEAP or any(name in vars(cls) for name in _BESIDE):
        return True
    found: object = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is cls


def written_in(value: type | types.FunctionType) -> str:
    """The module that a class or function is written in; empty where it bears a library's name only.

    So do classes that ``torch.nn.utils.parametrize`` and ``torch.fx`` make of the user's, and what ``exec`` makes
    without a ``__name__``: its functions name no module, its classes ``builtins``.
    """
    if not isinstance(value, type):
        return module_of(value.__globals__)
    return value.__module__ if _found(value) or not from_library(value.__module__) else ""


def module_of(space: Mapping[str, Any]) -> str:
    """Likewise the module whose globals these are."""
    name = space.get("__name__")
    there = getattr(sys.modules.get(str(name)), "__dict__", None) is space
    return name if name is not None and (there or not from_library(name)) else ""


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


CACHED = functools._lru_cache_wrapper
_BEHIND: dict[type, str] = {
    **dict.fromkeys((staticmethod, classmethod), "__func__"),
    **dict.fromkeys((functools.cached_property, functools.partialmethod), "func"),
    property: "fget",
    CACHED: "__wrapped__",
}
FUNCTIONS = (types.FunctionType, types.MemberDescriptorType, types.GetSetDescriptorType, *_BEHIND)
"""What a class holds of its methods and attributes."""


def function_of(value: object) -> types.FunctionType | None:
    """The function behind a method of a class, whatever its kind."""
    while type(value) is not types.FunctionType:
        name = next((_BEHIND[kind] for kind in type(value).__mro__ if kind in _BEHIND), None)
        if name is None:
            return None
        value = getattr(value, name)
    return value


@functools.lru_cache(maxsize=1000)
def own_bases(cls: type) -> tuple[type, ...]:
    """A class and its bases, but for those of libraries."""
    return tuple(base for base in cls.__mro__ if not written_in(base).startswith(LIBRARIES))


def functions_of(cls: type) -> dict[str, tuple[types.FunctionType, ...]]:
    """The functions of a class and its bases by name, but for those of libraries: ``super()`` reaches each."""
    own: dict[str, tuple[types.FunctionType, ...]] = {}
    for base in own_bases(cls):
        for name, value in tuple(vars(base).items()):
            if (function := function_of(value)) is not None:
                own[name] = (*own.get(name, ()), function)
    return own


def is_operator(name: str) -> bool:
    """Whether a method of this name is called by other code than a call of it: ``x * y``, ``with x``, ``x[0]``."""
    return name.startswith("__") and name.endswith("__") and name not in _NOT_IN_USE


def values_named(function: types.FunctionType) -> dict[str, Any]:
    """Globals and closed-over values that a function names, and attributes that it names of modules among them."""
    code, space = function.__code__, function.__globals__
    found = {name: space[name] for name in globals_of(code) if name in space}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        if cell != types.CellType():
            found[name] = cell.cell_contents
    for name, value in list(found.items()):
        if isinstance(value, types.ModuleType):
            own = vars(value)
            found |= {f"{name}.{n}": own[n] for n in attributes_of(code) if n in own}
    return found


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
