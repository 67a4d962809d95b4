"""What an engine may take for granted about a model, as one value: whether it has changed since is a comparison."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import types
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn

from mamlpp_fast.reference import PerStepBatchNorm2d

__all__ = ["Fingerprint", "Watch", "fingerprint"]

# Compared by value.
_PLAIN = frozenset(
    {int, bool, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.layout}
    | {torch.memory_format, slice, range}
)
_CONTAINERS = (list, tuple, dict, set, frozenset)
_RECORDS = (types.SimpleNamespace, argparse.Namespace)

# Containers that lie deeper or hold more than this are compared by identity and length.
_DEPTH = 6
_ENTRIES = 1000

# PyTorch's own bookkeeping in a module; what matters of it is read otherwise.
_PLUMBING = frozenset(vars(nn.Module())) | {"_flat_weights", "_flat_weight_refs", "_flat_weights_names"}
# What engines set in every pass.
_CONTROLS = frozenset({"step", "eval_stats", "plain"})
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


class Fingerprint:
    """Equal to another where nothing that :func:`fingerprint` looks at has changed.

    Holds on to what it knows by identity: the address of an object that is gone may be another's.
    """

    __slots__ = ("_held", "_key")

    def __init__(self, key: list[Any], held: list[object]) -> None:
        self._key = tuple(key)
        self._held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


class _Reader:
    """Writes what it meets into one flat list, which is far cheaper to make and compare than nested ones."""

    def __init__(self) -> None:
        self.key: list[Any] = []
        self.held: list[object] = []
        self.queue: list[nn.Module] = []
        self.seen: set[int] = set()

    def module(self, module: nn.Module, training: bool) -> None:
        key, held = self.key, self.held
        held.append(module)
        cls = type(module)
        state = module.__dict__
        key += (id(cls), id(getattr(cls, "forward", None)), module.training != training)
        for name in _HOOKS:
            if state[name]:
                self.identities(name, state[name].values())
        for name, p in state["_parameters"].items():
            key.append(name)
            if p is not None:
                self.parameter(p)
        for name, buffer in state["_buffers"].items():
            key.append(name)
            if buffer is not None:
                held.append(buffer)
                key += (id(buffer), buffer.shape, buffer.dtype, buffer.device, _place(buffer))
        for name, child in state["_modules"].items():
            key.append(name)
            if child is not None:
                self.child(child)
        skipped = _PLUMBING | _CONTROLS if isinstance(module, PerStepBatchNorm2d) else _PLUMBING
        for name, value in state.items():
            if name not in skipped:
                key.append(name)
                if (kind := type(value)) in _PLAIN:
                    key += (kind, value)
                else:
                    self.value(value, 0)

    def child(self, module: nn.Module) -> None:
        self.key.append(id(module))
        if id(module) not in self.seen:
            self.seen.add(id(module))
            self.queue.append(module)

    def parameter(self, p: Tensor) -> None:
        self.held.append(p)
        self.key += (id(p), p.requires_grad, p.shape, p.dtype, p.device, _place(p))
        for hooks in (p._backward_hooks, getattr(p, "_post_accumulate_grad_hooks", None)):
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
        if kind in _PLAIN:
            key += (kind, value)
        elif isinstance(value, Tensor):
            version = 0 if value.is_inference() else value._version
            key += (id(value), version, value.requires_grad, value.shape)
            if value.is_leaf:  # another one carries a graph, which is not to be kept alive
                self.held.append(value)
        elif isinstance(value, nn.Module):
            self.child(value)
        elif isinstance(value, _CONTAINERS) and depth < _DEPTH and len(value) <= _ENTRIES:
            key += (kind, len(value))
            if isinstance(value, dict):
                for name, item in value.items():
                    self.value(name, depth + 1)
                    self.value(item, depth + 1)
            else:
                for item in value:
                    self.value(item, depth + 1)
        elif isinstance(value, _RECORDS) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
            key.append(id(value))
            self.held.append(value)
            self.value(getattr(value, "__dict__", None), depth + 1)
        elif isinstance(value, (int, float, str)) and not isinstance(value, enum.Enum):
            key += (kind, value)  # subclasses, numpy's float64 among them
        else:
            key.append(id(value))
            self.held.append(value)
            if isinstance(value, _CONTAINERS):
                key.append(len(value))


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """How the values lie, and on a GPU where, for a captured graph reads them there."""
    if tensor.layout is not torch.strided:
        return (tensor.layout,)
    return tensor.data_ptr() if tensor.is_cuda else 0, *tensor.stride()


def fingerprint(model: nn.Module) -> Fingerprint:
    """Everything about a model, but for the values in it, that decides what a pass through it computes.

    These are: its modules, their classes and own ``forward``; training flags that differ from the root's; identity,
    shape, strides, dtype, device and ``requires_grad`` of parameters, and likewise of buffers; hooks of modules,
    of parameters' gradients and of all modules; and plain attributes: numbers, texts and the like by value, in
    lists, dictionaries, dataclasses and namespaces too (up to 1000 entries and 6 levels of each), tensors by identity
    and version, other objects by identity. What a pass of ours sets (``PerStepBatchNorm2d.step``, ``eval_stats`` and
    ``plain``) does not count. Not seen are globals, what functions close over, and changes within other objects.

    Args:
        model: any module. Nothing is read from a device.
    """
    reader = _Reader()
    for name in _GLOBAL_HOOKS:
        hooks = getattr(torch_module, name)
        if hooks:
            reader.identities(name, hooks.values() if isinstance(hooks, dict) else (hooks,))
    reader.child(model)
    queue, training = reader.queue, model.training
    for module in queue:  # grows meanwhile
        reader.module(module, training)
    return Fingerprint(reader.key, reader.held)


class Watch:
    """Tells whether a model has changed since it was last looked at, in training and in evaluation mode.

    Both are looked at together: a module may set other attributes in one than in the other.

    Args:
        model: left in the mode it is in.
    """

    def __init__(self, model: nn.Module) -> None:
        self._known: dict[bool, Fingerprint] = {}
        self.look(model)

    def look(self, model: nn.Module) -> None:
        """Takes the model as it is for what is known."""
        flags = [(module, module.training) for module in model.modules()]
        for training in (True, False):
            model.train(training)
            self._known[training] = fingerprint(model)
        for module, training in flags:
            module.training = training

    def changed(self, model: nn.Module) -> bool:
        """Whether the model is another than when it was last looked at."""
        return self._known[model.training] != fingerprint(model)
