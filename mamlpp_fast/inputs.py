"""What a model is given: a tensor; or several, as positional arguments (a tuple) or by name (a dict)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from mamlpp_fast.reference import Inputs

__all__ = [
    "as_given",
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
