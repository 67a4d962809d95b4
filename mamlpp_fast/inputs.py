"""What a model is given: a tensor; or several, as positional arguments (a tuple) or by name (a dict)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from mamlpp_fast.reference import Arguments, Inputs

__all__ = [
    "Call",
    "as_given",
    "call_of",
    "examples_of",
    "form_of_inputs",
    "joined",
    "mapped",
    "named",
    "structure_of",
    "tensors_of",
]


def as_given(name: str, inputs: Any) -> Inputs:
    """Inputs as they are kept: a list of arguments becomes a tuple, any other mapping of them a dict.

    Raises:
        TypeError: where something else than a tensor is in them, or an argument's name is no string.
        ValueError: where no tensor is.
    """
    if isinstance(inputs, Tensor):
        return inputs
    if isinstance(inputs, list):
        inputs = tuple(inputs)
    elif isinstance(inputs, Mapping):
        inputs = dict(inputs)
        for key in inputs:
            if not isinstance(key, str):
                raise TypeError(f"{name}: expected names of the model's arguments as keys, got {key!r}")
    for path, leaf in _leaves(name, inputs):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{path}: expected a tensor, got {type(leaf).__name__}")
    if not tensors_of(inputs):
        raise ValueError(f"{name}: expected at least one tensor, got {inputs!r}")
    return inputs


def examples_of(inputs: Inputs) -> int:
    """How many examples there are, of inputs [n, ...]."""
    return len(tensors_of(inputs)[0])


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """The tensors of inputs, in order."""
    return [inputs] if isinstance(inputs, Tensor) else pytree.tree_leaves(inputs)


def named(name: str, inputs: Inputs) -> list[tuple[str, Tensor]]:
    """The tensors of inputs with what a message calls them, ``support_x['mask']`` say."""
    return [(name, inputs)] if isinstance(inputs, Tensor) else _leaves(name, inputs)


def _leaves(name: str, inputs: Any) -> list[tuple[str, Any]]:
    found, _ = pytree.tree_flatten_with_path(inputs)
    return [(f"{name}{pytree.keystr(path)}", leaf) for path, leaf in found]


def mapped(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Inputs of the same form, with each tensor as ``function`` makes it."""
    return function(inputs) if isinstance(inputs, Tensor) else pytree.tree_map(function, inputs)


def structure_of(inputs: Inputs) -> pytree.TreeSpec | None:
    """How inputs are held; None for a tensor alone."""
    return None if isinstance(inputs, Tensor) else pytree.tree_structure(inputs)


def joined(tensors: Sequence[Tensor], structure: pytree.TreeSpec | None) -> Inputs:
    """Inputs that hold these tensors; the other way round than :func:`tensors_of`."""
    return tensors[0] if structure is None else pytree.tree_unflatten(tensors, structure)


def form_of_inputs(inputs: Inputs, lead: int = 0) -> tuple[Hashable, ...]:
    """What tells inputs of one form from others: how they are held; shapes, without so many axes, and types."""
    return structure_of(inputs), *((t.shape[lead:], t.dtype) for t in tensors_of(inputs))


@dataclass(frozen=True)
class Call(Arguments):
    """A call's arguments as inputs.

    Attributes:
        tensors: among the arguments, in order, but for the one that takes a gradient, which is the first.
        form: how the arguments are held, those that are no tensors, and the place of the first tensor.
    """

    tensors: list[Tensor]
    form: tuple[pytree.TreeSpec, tuple[tuple[type, Any] | None, ...], int]


_FLAGS = (NoneType, bool)
"""Types of few values, each of which may be a form of its own."""


def call_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | Call | str:
    """A call ``model(*args, **kwargs)`` as inputs; why not, where it has arguments that are none."""
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        return args[0]
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    plain = tuple(None if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves)
    for kind in (p[0] for p in plain if p is not None):
        if kind not in _FLAGS:
            return f"an argument is of the type {kind.__name__}"
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        return "no argument is a tensor"
    if len({id(t) for t in tensors}) < len(tensors):
        return "two arguments are one tensor, which a forward may ask about"
    lead = next((i for i, t in enumerate(tensors) if t.requires_grad), 0)
    tensors.insert(0, tensors.pop(lead))
    return Call(args, dict(kwargs), tensors, (spec, plain, lead))


def _called(tensors: Any, form: Any) -> Call:
    spec, plain, lead = form
    own = list(tensors)
    rest = own[1:]
    rest.insert(lead, own[0])
    given = iter(rest)
    args, kwargs = pytree.tree_unflatten([next(given) if p is None else p[1] for p in plain], spec)
    return Call(args, kwargs, own, form)


pytree.register_pytree_node(Call, lambda call: (call.tensors, call.form), _called)
