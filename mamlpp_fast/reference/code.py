"""What the code of functions and classes names, by its instructions: globals, attributes, methods."""

from __future__ import annotations

import dis
import functools
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

__all__ = [
    "CACHED",
    "FUNCTIONS",
    "LIBRARIES",
    "PLUMBING",
    "READS",
    "ROUTED",
    "attributes_of",
    "from_library",
    "function_of",
    "functions_of",
    "globals_of",
    "module_of",
    "named_by",
    "names_in",
    "own_bases",
    "standing_for",
    "values_named",
    "written_in",
]

LIBRARIES = ("torch.", "mamlpp_fast.", "builtins")
ROUTED = "_mamlpp_fast_routed"
"""Of a class whose ``forward`` computes what its base's does (:mod:`mamlpp_fast.accelerated`)."""
_BESIDE = (ROUTED, "_fast_original")
"""Of a class that says nothing beside its bases, and bears the name of one."""
_ON_A_HEAP = 1 << 9  # Python's flag of classes that are no part of its own or of an extension's code
# Of what these are given as a text, the name is a constant of the code.
_BY_TEXT = frozenset(
    {"getattr", "hasattr", "attrgetter", "methodcaller", "vars", "globals", "__dict__", "__getattribute__"}
)
READS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "LOAD_SUPER_METHOD", "IMPORT_FROM")
_STDLIB = sysconfig.get_path("stdlib")

PLUMBING = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


def standing_for(cls: Any, own: dict[str, Any]) -> Any:
    """A class like ``cls``, under its name, with these entries in place of its own.

    What a forward sets of its class later, a count at ``type(self)`` say, it sets of the user's.
    """
    made: Any = None  # until it is: what its own making sets is its own

    class Kind(type(cls)):  # type: ignore[misc]
        def __setattr__(kind, name: str, value: Any) -> None:
            setattr(cls, name, value) if kind is made else super().__setattr__(name, value)

        def __delattr__(kind, name: str) -> None:
            delattr(cls, name) if kind is made else super().__delattr__(name)

    about = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    made = Kind(cls.__name__, (cls,), about | own)
    return made


def named_by(code: types.CodeType, *operations: str) -> tuple[str, ...]:
    """What these operations of a function, and of functions and comprehensions written within it, name."""
    found = dict.fromkeys(i.argval for i in dis.get_instructions(code) if i.opname in operations)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= dict.fromkeys(named_by(constant, *operations))
    return tuple(found)


def _texts(code: types.CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _texts(constant)
        elif isinstance(constant, str) and constant.replace(".", "_").isidentifier():
            yield from constant.split(".")


@functools.lru_cache(maxsize=1000)
def _all_of(code: types.CodeType) -> tuple[tuple[str, ...], tuple[str, ...]]:
    own = named_by(code, "LOAD_GLOBAL", "STORE_GLOBAL", "LOAD_NAME")
    attributes = named_by(code, *READS, "STORE_ATTR")
    texts = () if _BY_TEXT.isdisjoint((*own, *attributes)) else tuple(_texts(code))
    return tuple(dict.fromkeys(own + texts)), tuple(dict.fromkeys(attributes + texts))


def globals_of(code: types.CodeType) -> tuple[str, ...]:
    """Names of the globals that a function reads or sets."""
    return _all_of(code)[0]


def attributes_of(code: types.CodeType) -> tuple[str, ...]:
    """Names of the attributes that a function reads or sets, methods among them; by ``getattr`` and the like too."""
    return _all_of(code)[1]


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


def _behind(thing: Any) -> Any:
    """The function that a callable wraps, or that is behind a method; else ``thing``."""
    while isinstance(thing, functools.partial | types.MethodType):
        thing = thing.func if isinstance(thing, functools.partial) else thing.__func__
    return function_of(thing) or thing


def _parts(model: nn.Module) -> frozenset[Any]:
    """Classes and functions that are no library's: of modules, of their attributes and of their hooks."""
    held: list[Any] = []
    for m in model.modules():
        held += [type(m), *m._forward_pre_hooks.values(), *m._forward_hooks.values()]
        if not from_library(type(m).__module__):
            held += [value for name, value in vars(m).items() if name not in PLUMBING]
    parts: set[Any] = set()
    for thing in held:  # grows meanwhile
        if type(thing) in (list, tuple):
            held += thing
        elif type(thing) is dict:
            held += thing.values()
        elif isinstance(found := _behind(thing), types.FunctionType | type):
            parts.add(found)
        else:
            parts.add(type(found))
    return frozenset(parts)


@functools.lru_cache(256)
def _names(parts: frozenset[Any]) -> frozenset[str]:
    # An accelerated class's forward is ours, and closes over the user's class with all its methods.
    methods = [
        {
            name: [f for f in own if not from_library(written_in(f))]
            for name, own in functions_of(part).items()
        }
        for part in parts
        if isinstance(part, type)
    ]
    queue: list[Any] = [part for part in parts if not isinstance(part, type)]
    queue += [f for own in methods for name in ("forward", "__call__") for f in own.get(name, ())]
    names, seen = set[str](), set[Any]()
    for thing in queue:  # grows meanwhile
        found = _behind(thing)
        if not isinstance(found, types.FunctionType | types.BuiltinFunctionType | type) or found in seen:
            continue
        seen.add(found)
        if from_library(found.__module__):
            names.add(found.__name__)  # by whatever name it was imported
        elif isinstance(found, type):
            queue += [f for own in functions_of(found).values() for f in own]
        elif isinstance(found, types.FunctionType):
            own = {*globals_of(found.__code__), *attributes_of(found.__code__)}
            queue += values_named(found).values()
            queue += [f for of_class in methods for name in own - names for f in of_class.get(name, ())]
            names |= own
    return frozenset(names)


def names_in(model: nn.Module) -> frozenset[str]:
    """Names in the code of a model's forward, its modules', hooks' and attributes', and of functions that these name.

    Code of torch, numpy and the standard library is not followed. What a name stands for at a call is not told:
    where one of them is missing, nothing by that name is used, unless by ``getattr`` or the like.
    """
    return _names(_parts(model))
