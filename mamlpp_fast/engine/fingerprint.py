"""What an engine may take for granted about a model, as one value: whether it has changed since is a comparison."""

from __future__ import annotations

import contextvars
import enum
import functools
import itertools
import os
import threading
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn

from mamlpp_fast.engine.counts import counts_of
from mamlpp_fast.engine.fragments import PLAIN, number_of, others, told
from mamlpp_fast.engine.glances import GLOBAL_HOOKS, HOOKS, PLUMBING, Glance, Seen, forward_of, traits
from mamlpp_fast.engine.named import (
    MADE_BY,
    beyond,
    imported,
    installed,
    is_operator,
    of_library,
    reads_environment,
)
from mamlpp_fast.engine.objects import (
    BUFFERS,
    CONTAINERS,
    ENTRIES,
    attributes_held,
    bytes_in,
    is_record,
    is_weak,
    pickled,
    place,
    plain_settings,
    small_values,
)
from mamlpp_fast.engine.reached import ITERATOR, REFERENCE, SETTINGS, reach, settings_of
from mamlpp_fast.reference import PerStepBatchNorm2d
from mamlpp_fast.reference.code import (
    CACHED,
    FUNCTIONS,
    LIBRARIES,
    attributes_of,
    from_library,
    function_of,
    functions_of,
    globals_of,
    own_bases,
    written_in,
)

__all__ = ["Fingerprint", "fingerprint", "look"]

_CODE = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    functools.partial,
    CACHED,
)
_NAMED_CODE = (types.FunctionType, types.MethodType, contextvars.ContextVar, CACHED)

_DEPTH = 6
"""Containers that lie deeper are compared by identity and length."""

# What engines set in every pass.
_CONTROLS = frozenset({"step", "eval_stats", "plain"})
_PLUMBING_OF_NORMS = PLUMBING | _CONTROLS


class Fingerprint:
    """Equal to another where nothing that :func:`fingerprint` looks at has changed.

    Holds on to what it knows by identity: the address of an object that is gone may be another's.

    Attributes:
        functions: of the user's own that a pass may call.
        of_a_thread: whether values of the calling thread (``threading.local``) are among what it looks at.
    """

    __slots__ = ("_hash", "_held", "_key", "_opaque", "_unseen", "functions", "of_a_thread")

    def __init__(self, reader: _Reader) -> None:
        self.of_a_thread = reader.of_a_thread
        self._key = tuple(reader.key)
        self._hash: int | None = None
        self._held = reader.held
        self._opaque = reader.opaque
        self.functions = reader.own
        self._unseen = [why for name, why in reader.unseen if name is None or name in reader.called]

    def unfollowed(self) -> str | None:
        """What the code does of which a recording, or a change, would tell nothing; None where there is nothing."""
        for function in self.functions:
            if (why := beyond(function)) is not None:
                return why
        return self._unseen[0] if self._unseen else None

    def modules(self) -> list[nn.Module]:
        """Those that it looks at or past: of the model, and what the functions name beside it."""
        return [value for value in self._held if isinstance(value, nn.Module)]

    def states(self) -> list[bytes]:
        """The insides, where they can be pickled, of objects known by identity: costly, to be read around one pass."""
        return [pickled(value) for value in self._opaque]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and self._key == other._key

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(self._key)
        return self._hash


class _Reader:
    """Writes what it meets into one flat list, which is far cheaper to make and compare than nested ones."""

    def __init__(self, form: bool = False, counts: bool = True) -> None:
        self.key: list[Any] = []
        self.held: list[object] = []
        self.queue: list[nn.Module] = []
        self.seen: dict[int, int] = {}
        self.opaque: list[object] = []
        # Modules, parameters and buffers by their order and not by identity: which of them are the same one.
        self.form = form
        self.counts = counts
        self.tensors: dict[int, int] = {}
        self.followed: set[tuple[int, types.CodeType]] = set()
        self.functions: set[int] = set()
        self.own: list[types.FunctionType] = []
        self.classes: set[type] = set()
        # Names of attributes that any function followed so far reads, of whatever object.
        self.called: set[str] = set()
        self.of_a_thread = False
        # Objects, tensors among them, whose attributes count where one of those functions reads such a name.
        self.objects: list[object] = []
        # Why something is not followed, with the module's attribute that it is in or behind; None behind others.
        self.unseen: list[tuple[str | None, str]] = []
        self.attribute: str | None = None
        # Installed packages of which the model or what counts beside it is: others are libraries.
        self.home: set[str] = set()

    def module(self, module: nn.Module, training: bool) -> None:
        key, held = self.key, self.held
        if not self.form:
            held.append(module)
        cls: Any = type(module)
        state = module.__dict__
        forward = forward_of(cls)
        key += (id(cls), id(forward), module.training != training)
        held += (cls, forward)
        functions: list[types.FunctionType] = []
        opaque = len(self.opaque)
        if not of_library(cls):
            self.home.add(installed(next(filter(None, map(written_in, own_bases(cls))), None)))
            self.constants(cls)
            self.names(forward)
            functions = self.methods(cls, forward)
        for name in HOOKS:
            if state[name]:
                self.identities(name, state[name].values())
        for group in ("_parameters", "_buffers"):
            for name, tensor in state[group].items():
                key.append(name)
                if tensor is None:
                    continue
                if tensor.__dict__:
                    self.objects.append(tensor)
                if not self.form:
                    self.tensor(tensor)
                    continue
                key += (self.tensors.setdefault(id(tensor), len(self.tensors)), *traits(tensor))
                if group == "_buffers":
                    key.append(tensor.requires_grad)  # given by a functional call, with a graph of its own
        for name, child in state["_modules"].items():
            key.append(name)
            if child is not None:
                self.child(child)
        skipped = PLUMBING
        if isinstance(module, PerStepBatchNorm2d):
            skipped = _PLUMBING_OF_NORMS
            if self.form:  # of one call; its step is read when it is made
                key += (module.eval_stats, getattr(module, "plain", False))
        elif not self.counts and (own := counts_of(module)):
            skipped |= own
        names = others(tuple(state), skipped)
        values = tuple(map(state.__getitem__, names))
        number = number_of(names, values)
        if number is not None:
            key.append(number)
        else:
            for name, value in zip(names, values, strict=True):
                key.append(name)
                self.attribute = name
                self.value(value, 0)
            self.attribute = None
        for value in self.opaque[opaque:]:
            for function in functions:
                self.named_of(value, function.__code__, 1)

    def child(self, module: nn.Module) -> None:
        if id(module) not in self.seen:
            self.seen[id(module)] = len(self.seen)
            self.queue.append(module)
        self.key.append(self.seen[id(module)] if self.form else id(module))

    def tensor(self, t: Tensor) -> None:
        self.held.append(t)
        self.key += (id(t), t.requires_grad, t.shape, t.dtype, t.device, place(t))
        for hooks in (t._backward_hooks, getattr(t, "_post_accumulate_grad_hooks", None)):
            if hooks:
                self.identities("hooks", hooks.values())

    def identities(self, name: str, objects: Iterable[object]) -> None:
        kept = list(objects)
        self.held += kept
        self.key += (name, len(kept), *map(id, kept))

    def value(self, value: Any, depth: int) -> None:
        """A plain attribute, or what a container among them holds."""
        key = self.key
        kind = type(value)
        if kind in PLAIN:
            key += (kind, told(value))
        elif is_weak(kind):
            self.unseen.append((self.attribute, REFERENCE))
        elif isinstance(value, Tensor):
            if value.__dict__:
                self.objects.append(value)
            version = 0 if value.is_inference() else value._version
            key += (id(value), version, value.requires_grad, value.shape, small_values(value))
            if value.is_leaf:  # another one carries a graph, which is not to be kept alive
                self.held.append(value)
        elif isinstance(value, nn.Module):
            self.child(value)
        elif isinstance(value, CONTAINERS) and depth < _DEPTH and len(value) <= ENTRIES:
            key += (kind, len(value))
            for item in itertools.chain.from_iterable(value.items()) if isinstance(value, dict) else value:
                self.value(item, depth + 1)
        elif depth + 1 < _DEPTH and is_record(value):
            key.append(id(value))
            self.held.append(value)
            self.value(attributes_held(value), depth + 1)
        elif isinstance(value, (int, float, str)) and not isinstance(value, enum.Enum):
            key += (kind, told(value))  # subclasses, numpy's float64 among them
        else:
            self.other(value, depth)

    def other(self, value: Any, depth: int) -> None:
        """By identity; with what it holds where that is plain."""
        self.key.append(id(value))
        self.held.append(value)
        if isinstance(value, type):
            self.constants(value)
            if not self.foreign(written_in(value)):
                self.operators(value, *MADE_BY, *self.called)
        elif isinstance(value, types.MappingProxyType) and depth < _DEPTH:
            self.value(dict(value), depth + 1)
        elif isinstance(value, CONTAINERS):
            self.key.append(len(value))
            self.opaque.append(value)
        elif isinstance(value, np.ndarray):
            if value.size <= ENTRIES and not value.dtype.hasobject:
                self.key += (value.shape, value.dtype, value.tobytes())
            else:
                self.opaque.append(value)
        elif isinstance(value, _CODE):
            if depth == 0:  # an attribute, or the loss
                self.home.add(installed(getattr(getattr(value, "func", value), "__module__", None)))
            self.names(value)
            if isinstance(value, types.MethodType) and isinstance(value.__func__, types.FunctionType):
                self.named_of(value.__self__, value.__func__.__code__, depth)
            if isinstance(value, functools.partial) and depth < _DEPTH:
                for part in (value.func, value.args, value.keywords):
                    self.value(part, depth + 1)
        elif value is os.environ:
            self.environment()
        elif isinstance(value, contextvars.ContextVar):
            if depth < _DEPTH:
                self.value(value.get(None), depth + 1)
        elif isinstance(value, BUFFERS):
            self.key.append(bytes_in(value))
        else:
            self.of_a_thread |= isinstance(value, threading.local)
            self.opaque.append(value)
            self.operators(type(value))
            if (settings := plain_settings(value)) is None or depth + 1 >= _DEPTH:
                self.objects.append(value)
            else:
                self.constants(type(value))
                self.value(settings, depth + 1)

    def constants(self, cls: type) -> None:
        """Attributes of a class and its bases: plain ones, and others but for functions; each base's once."""
        for base in own_bases(cls):
            if base in self.classes:
                continue
            self.classes.add(base)
            own = not self.foreign(written_in(base))
            for name, value in tuple(vars(base).items()):
                if name.startswith("__") or isinstance(value, FUNCTIONS):
                    continue
                if own or type(value) in PLAIN or isinstance(value, CONTAINERS) or is_record(value):
                    self.key.append(name)
                    self.value(value, 1)

    def methods(self, cls: type, forward: Any) -> list[types.FunctionType]:
        """The class's own functions that are called by its forward, or from outside, and so on; and the forward.

        With what they name.
        """
        own, forward = functions_of(cls), function_of(forward)
        outer = [name for name in own if is_operator(name) or name == "__call__" or name in self.called]
        seen = dict.fromkeys((forward, *(f for name in outer for f in own[name])))
        queue = [f for f in seen if f is not None]
        for function in queue:  # grows meanwhile
            if function is not forward:
                self.identities(function.__name__, (function,))
                self.names(function)
            for name in attributes_of(function.__code__):
                more = [f for f in own.get(name, ()) if f not in seen]
                seen |= dict.fromkeys(more)
                queue += more
        return queue

    def operators(self, cls: type, *names: str) -> None:
        """Methods that are called without their name, and those of these names."""
        for name, functions in functions_of(cls).items():
            if is_operator(name) or name == "__call__" or name in names:
                for function in functions:
                    self.names(function)

    def names(self, function: Any) -> None:
        """What a function itself names: globals and closed-over values; its defaults and attributes.

        Of a library's, a wrapper say, not the globals.
        """
        function = function_of(getattr(function, "__func__", function))
        if function is None or id(function) in self.functions:
            return
        self.functions.add(id(function))
        code = function.__code__
        found: list[Any] = []
        if not self.foreign(written_in(function)):
            self.own.append(function)
            self.called.update(attributes_of(code))
            if reads_environment(code):
                self.environment()
            for name in settings_of(code):
                self.key.append(SETTINGS[name]())
            found = [function.__globals__.get(name) for name in globals_of(code)]
            found += imported(function)
        for given in (function.__defaults__, function.__kwdefaults__, function.__dict__):
            if given:
                self.value(given, 1)
        for cell in function.__closure__ or ():
            try:
                found.append(cell.cell_contents)
            except ValueError:  # not filled yet
                continue
        for value in found:
            self.named(value, code, 1)

    def foreign(self, module: str | None) -> bool:
        """Whether what a module defines is left aside: no code of those who made the model or the loss."""
        package = installed(module)
        return from_library(module) or (package != "" and package not in self.home)

    def named(self, value: Any, code: types.CodeType, depth: int) -> None:
        """A value that a function names."""
        if is_weak(type(value)):
            self.unseen.append((None, REFERENCE))
            return
        if (
            type(value) in PLAIN
            or isinstance(value, (*CONTAINERS, types.MappingProxyType))
            or is_record(value)
        ):
            self.value(value, depth)
            return
        # Which one it is counts at least: another activation under the same name, say.
        self.key.append(id(value))
        self.held.append(value)
        if value is os.environ:
            self.environment()
        elif isinstance(value, types.ModuleType):
            if not self.foreign(value.__name__) and (id(value), code) not in self.followed:
                self.followed.add((id(value), code))
                for name in attributes_of(code):
                    if name in vars(value):
                        self.named(vars(value)[name], code, depth)
        elif isinstance(value, _NAMED_CODE):
            self.value(value, depth)
        elif isinstance(value, nn.Module):
            self.named_of(value, code, depth)
        elif (getattr(value, "__module__", None) or "builtins").startswith(LIBRARIES) and of_library(
            value if isinstance(value, type) else type(value)
        ):
            if isinstance(value, (np.ndarray, *BUFFERS)):
                self.value(value, depth)
            elif isinstance(value, Iterator):
                self.unseen.append((None, ITERATOR))
        elif isinstance(value, type):
            if not self.foreign(written_in(value)):
                self.constants(value)  # a namespace of settings, say
                self.operators(value, *MADE_BY, *attributes_of(code))
                self.operators(type(value), *attributes_of(code))
        elif plain_settings(value) is not None:
            self.value(value, depth)
            self.named_of(value, code, depth)
        else:
            self.of_a_thread |= isinstance(value, threading.local)
            self.objects.append(value)
            self.named_of(value, code, depth)

    def environment(self) -> None:
        self.key += os.environ.items()

    def named_of(self, value: object, code: types.CodeType, depth: int) -> None:
        """Plain attributes of an object that a function names, and those that the methods name which it calls."""
        if depth >= _DEPTH or (id(value), code) in self.followed:
            return
        self.followed.add((id(value), code))
        held, own = attributes_held(value), functions_of(type(value))
        methods = [f for name in own if is_operator(name) or name == "__call__" for f in own[name]]
        for name in attributes_of(code):
            if name in held:
                self.key.append(name)
                self.value(held[name], depth + 1)
            else:
                methods += own.get(name, ())
        for method in methods:
            self.names(method)
            self.named_of(value, method.__code__, depth + 1)


def look(model: nn.Module) -> tuple[Fingerprint, Seen | None]:
    """A model's form, and what a glance found where one was enough.

    The form is as :func:`fingerprint`, but equal for copies, and for a model that holds other tensors of the same
    shapes: modules, parameters and buffers count by their order, with which of them are one and the same; the other
    attributes as ever, but for counts of calls. Hooks on gradients, ``requires_grad`` and strides of parameters do not
    count.
    """
    cls = type(model)
    last = _glances.get(cls)
    if last is not None and (tensors := last.fits(model)) is not None:
        return last.form, Seen(last, tensors)
    form = _fingerprint(model, (), form=True, counts=False)
    if (glance := Glance.of(form, model)) is not None:
        _glances[cls] = glance
    return form, None


_glances: dict[type, Glance] = {}
"""Of a model of each class, the one that was looked at last."""


def fingerprint(model: nn.Module, *beside: object, counts: bool = True) -> Fingerprint:
    """Everything about a model, but for the values in it, that decides what a pass through it computes.

    These are: its modules, their classes and own ``forward``; training flags that differ from the root's; identity,
    shape, strides, dtype, device and ``requires_grad`` of parameters, and likewise of buffers; hooks of modules,
    of parameters' gradients and of all modules; and plain attributes: numbers, texts and the like by value, in
    lists, dictionaries, dataclasses, namespaces and objects that hold nothing else too (up to 1000 entries and 6 levels
    of each), arrays and tensors by identity, version and, up to 1000 values on a CPU, those; other objects by identity.
    So are attributes of the user's classes, but for functions, and globals and closed-over values of these
    kinds that a ``forward``, the methods, properties and functions it calls, with what is written within them, or a
    function that is an attribute name; of other objects, which they are, and the attributes that these name. Defaults
    and attributes of such functions count, and the process's environment where one of them names that. What a pass of
    ours sets (``PerStepBatchNorm2d.step``, ``eval_stats`` and ``plain``) does not count. Functions are found by the
    names in their code, also through modules (``lib.scale(x)``), ``super()``, ``getattr`` with a written name, as
    operators (``x * y``, ``with x``) and as methods of other modules. Not seen are changes deeper within other objects,
    in libraries, and what is reached by a name that is computed.

    Args:
        model: any module. Nothing is read from a device.
        beside: what else counts, read as an attribute is.
        counts: whether the counts that modules keep of their calls are among it.
    """
    return _fingerprint(model, beside, counts=counts)


def _fingerprint(model: nn.Module, beside: tuple[object, ...], **how: bool) -> Fingerprint:
    reader = _Reader(**how)
    # What torch.distributions looks at is the process's as well: torch.compile switches it off.
    reader.key += (torch.get_default_dtype(), torch.distributions.Distribution._validate_args)
    for name in GLOBAL_HOOKS:
        hooks = getattr(torch_module, name)
        if hooks:
            reader.identities(name, hooks.values() if isinstance(hooks, dict) else (hooks,))
    reader.child(model)
    for value in beside:
        reader.value(value, 0)
    read = 0
    while read < len(reader.queue):
        for module in itertools.islice(reader.queue, read, None):  # grows meanwhile
            reader.module(module, model.training)
            read += 1
        if reader.objects:
            reach(reader)  # to further modules, perhaps
    return Fingerprint(reader)
