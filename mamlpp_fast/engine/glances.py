"""Whether a model has the form that one of its class had last, told in one pass that writes nothing down.

A small network's call takes half a millisecond, and asks what the model is made of every time. Where that is nothing
but PyTorch's modules (or ours) with plain attributes, each is compared with what stood in its place.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mamlpp_fast.engine.fragments import content
from mamlpp_fast.engine.named import of_library
from mamlpp_fast.reference import PerStepBatchNorm2d
from mamlpp_fast.reference.code import ROUTED, from_library, written_in

__all__ = ["GLOBAL_HOOKS", "HOOKS", "PLUMBING", "Glance", "Seen", "forward_of", "traits"]

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)
PLUMBING = frozenset(vars(nn.Module())) | {"_flat_weights", "_flat_weight_refs", "_flat_weights_names"}
"""PyTorch's own bookkeeping in a module; what matters of it is read otherwise."""
PLUMBING |= {"_fast_root_ref", "_fast_indices", "_fast_params", "_fast_places", "_fast_recurrent"}
"""Likewise that of compat.higher's functional modules, whose weights are others in every step."""

_STATE = ("_parameters", "_buffers", "_modules", "training", *HOOKS)
_PLUMBING_OF_NORMS = PLUMBING | {"step"}  # of one call, read when it is made


def forward_of(cls: type) -> Any:
    """The user's ``forward`` of a class."""
    for base in cls.__mro__:
        own = vars(base)
        if "forward" in own and not own.get(ROUTED):
            return own["forward"]
    return None


class _Row:
    """What a module has besides the numbers in its tensors; ``places``: of its children in the order of all."""

    __slots__ = (
        *("buffers", "children", "cls", "content", "parameters", "pick", "places", "size", "training"),
        "values",
    )

    def __init__(self, module: nn.Module, places: list[int], training: bool) -> None:
        state = module.__dict__
        self.cls = type(module)
        self.size = len(state)
        self.places = places
        self.pick = itemgetter(*_STATE, *_attributes(module))
        own, buffers, children, mode, *values = self.pick(state)
        self.parameters, self.buffers, self.children = tuple(own), tuple(buffers), tuple(children)
        self.training = mode == training
        self.values = tuple(values[len(HOOKS) :])
        self.content = _contents(self.values)


class Glance:
    """A model's form, laid out by its modules in the order in which they are met.

    Holds no module and no tensor: plain values, classes and functions of libraries alone.

    Args:
        form: of the model.
        modules: all of its modules.
        places: of the children of each.
        tensors: their parameters and buffers, module by module.

    Attributes:
        by_step: whether a module takes a row of its tensors, that of its step.
    """

    def __init__(
        self, form: Any, modules: list[nn.Module], places: list[list[int]], tensors: list[Tensor | None]
    ) -> None:
        self.form = form
        self.rows = [
            _Row(m, children, modules[0].training) for m, children in zip(modules, places, strict=True)
        ]
        self.default = torch.get_default_dtype()
        self.by_step = any(isinstance(m, PerStepBatchNorm2d) for m in modules)
        self._picks: dict[tuple[str, ...], Callable[[Any], tuple[Any, ...]]] = {}
        self.forwards = [(cls, forward_of(cls)) for cls in {row.cls for row in self.rows}]
        self.tensors = _shapes(tensors)
        self.graphs = [b is not None and b.requires_grad for m in modules for b in m._buffers.values()]

    @staticmethod
    def of(form: Any, model: nn.Module) -> Glance | None:
        """None for a model of which a glance does not tell all that its form does."""
        if any(getattr(torch_module, name) for name in GLOBAL_HOOKS):
            return None
        seen, modules = {id(model): 0}, [model]
        places: list[list[int]] = []
        tensors: list[Tensor | None] = []
        for module in modules:  # grows meanwhile
            if not _plain(module):
                return None
            tensors += (*module._parameters.values(), *module._buffers.values())
            places.append([])
            for child in module._modules.values():
                assert child is not None
                places[-1].append(seen.setdefault(id(child), len(modules)))
                if places[-1][-1] == len(modules):
                    modules.append(child)
        plain = _apart(tensors) and _PLAIN_TENSORS.issuperset(map(type, tensors))
        return Glance(form, modules, places, tensors) if plain else None

    def pick_of(self, names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
        """What takes from the tensors that :meth:`fits` found those of these names."""
        pick = self._picks.get(names)
        if pick is None:
            places = [self._place(name) for name in names]
            # With fewer, itemgetter returns no tuple, or cannot be made.
            pick = itemgetter(*places) if len(places) > 1 else lambda found: tuple(found[i] for i in places)
            self._picks[names] = pick
        return pick

    def _place(self, name: str) -> int:
        *path, leaf = name.split(".")
        at = 0
        for part in path:
            at = self.rows[at].places[self.rows[at].children.index(part)]
        row = self.rows[at]
        before = sum(len(r.parameters) + len(r.buffers) for r in self.rows[:at])
        return before + (*row.parameters, *row.buffers).index(leaf)

    def fits(self, model: nn.Module) -> list[Any] | None:
        """The model's parameters and buffers, module by module, where its form is this one; else None."""
        if any(getattr(torch_module, name) for name in GLOBAL_HOOKS):
            return None
        if torch.get_default_dtype() is not self.default:
            return None
        training, queue = model.training, [model]
        tensors: list[Tensor | None] = []
        graphs: list[bool] = []
        for module, row in zip(queue, self.rows, strict=False):  # the queue grows meanwhile
            state = module.__dict__
            if type(module) is not row.cls or len(state) != row.size:
                return None
            try:
                own, buffers, children, mode, pre, post, back_pre, back, *values = row.pick(state)
            except KeyError:
                return None
            if pre or post or back_pre or back or (mode == training) != row.training:
                return None
            if not all(map(is_, values, row.values)):
                if _contents(values) != row.content:
                    return None
                row.values = tuple(values)
            if own or row.parameters:
                if tuple(own) != row.parameters:
                    return None
                tensors += own.values()
            if buffers or row.buffers:
                if tuple(buffers) != row.buffers:
                    return None
                tensors += buffers.values()
                graphs += [t is not None and t.requires_grad for t in buffers.values()]
            if children or row.children:
                if tuple(children) != row.children:
                    return None
                for child, place in zip(children.values(), row.places, strict=True):
                    if child is None:
                        return None
                    if place == len(queue):
                        queue.append(child)
                    elif queue[place] is not child:
                        return None
        same = (
            len(queue) == len(self.rows)
            and graphs == self.graphs
            and _PLAIN_TENSORS.issuperset(map(type, tensors))
            and _shapes(tensors) == self.tensors
            and all(forward_of(cls) is forward for cls, forward in self.forwards)
            and _apart(queue)
            and _apart(tensors)
        )
        return tensors if same else None


class Seen(NamedTuple):
    """What a glance found: itself, and the model's tensors."""

    glance: Glance
    tensors: list[Any]

    def picked(self, names: tuple[str, ...]) -> tuple[Any, ...]:
        """Of the tensors those of these names."""
        return self.glance.pick_of(names)(self.tensors)


def _apart(objects: Sequence[object]) -> bool:
    """Whether none is there twice; of None any number may be."""
    found = [id(o) for o in objects if o is not None]
    return len(set(found)) == len(found)


_PLAIN_TENSORS = frozenset({Tensor, nn.Parameter, type(None)})
"""Of these classes, and of none; another one may compute as it likes."""


def _shapes(tensors: list[Tensor | None]) -> list[object]:
    return [None if t is None else (t.shape, t.dtype, t.device, t.layout) for t in tensors]


def traits(t: Tensor) -> tuple[object, ...]:
    """What decides how a tensor is computed with, beside its values; its class and shape come first."""
    if type(t) in _PLAIN_TENSORS:
        return None, t.shape, t.dtype, t.device, t.layout
    return type(t), None if is_lazy(t) else t.shape, t.dtype, t.device, t.layout


def _attributes(module: nn.Module) -> list[str]:
    skipped = _PLUMBING_OF_NORMS if isinstance(module, PerStepBatchNorm2d) else PLUMBING
    return [name for name in module.__dict__ if name not in skipped]


def _plain(module: nn.Module) -> bool:
    """Whether a module is of a library's class, without hooks, and its attributes are compared by their values."""
    state = module.__dict__
    cls: Any = type(module)
    return (
        of_library(cls)
        and state.keys() >= set(_STATE)
        and not any(state[name] for name in HOOKS)
        and None not in state["_modules"].values()
        and None not in _contents([state[name] for name in _attributes(module)])
    )


def _contents(values: Sequence[object]) -> tuple[object, ...]:
    return tuple(map(_content, values))


def _content(value: object) -> object:
    """A value to compare; None for one that may change, but for functions of libraries that hold nothing."""
    if type(value) is not types.FunctionType:
        return content(value)
    bare = value.__closure__ is None and not value.__dict__ and not value.__kwdefaults__
    bare &= content(value.__defaults__ or ()) is not None
    return value if bare and from_library(written_in(value)) else None
