"""Calling a model with other tensors in place of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mamlpp_fast.reference.orders import rightly
from mamlpp_fast.reference.weights import right_weight_norm

__all__ = ["Arguments", "Inputs", "Tensors", "called", "functional_call", "predicted", "swapped"]

Inputs = Any
"""What a model is given: a tensor; a tuple, for ``model(*inputs)``; a dict, for ``model(**inputs)``; or arguments."""

Tensors = Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]
"""Tensors by name; several such mappings, of parameters and of buffers say, that have no name in common."""


@dataclass(frozen=True)
class Arguments:
    """What a model is given in any other way."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def functional_call(
    model: nn.Module,
    tensors: Tensors,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Calls ``model`` with ``tensors`` in place of its parameters and buffers of those names, and leaves it as it was.

    Like ``torch.func.functional_call``, but right for a submodule that is held under two names: torch 2.11 to 2.14 swap
    it twice and leave the given tensors in the model (pytorch issue 164759). A tensor is replaced wherever the model
    holds it, so one name of a tied weight is enough.

    Args:
        model: any module; not to be called by another thread meanwhile.
        tensors: by the names of ``model.named_parameters()`` or ``named_buffers()``, every alias of a name included; or
            several such mappings.
        args: positional arguments, or the only one.
        kwargs: keyword arguments.

    Raises:
        KeyError: for a name that ``model`` lacks.
        TypeError: for tensors without names.
        ValueError: for two different values of one tied tensor, or a name in two mappings.
    """
    with swapped(model, tensors), right_weight_norm(model):
        given = args if isinstance(args, tuple) else (args,)
        return rightly(model, lambda: model(*given, **(kwargs or {})))


def predicted(model: nn.Module, tensors: Tensors, inputs: Inputs) -> Any:
    """What ``model`` makes of inputs with ``tensors`` in place of its own; see :func:`functional_call`."""
    with swapped(model, tensors), right_weight_norm(model):
        return rightly(model, lambda: called(model, inputs))


def called(model: Callable[..., Any], inputs: Inputs) -> Any:
    """What ``model`` makes of inputs."""
    if isinstance(inputs, Arguments):
        return model(*inputs.args, **inputs.kwargs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@contextlib.contextmanager
def swapped(model: nn.Module, tensors: Tensors) -> Iterator[None]:
    """Within it ``model`` holds ``tensors`` in place of its own; see :func:`functional_call`."""
    new: dict[int, Tensor] = {}
    for name, tensor in _named(tensors):
        held = _held(model, name)
        if new.setdefault(id(held), tensor) is not tensor:
            raise ValueError(f"tensors: expected one value for a tied tensor, got another for {name!r}")
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in model.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for leaf, old in table.items():
                    if id(old) in new:
                        replaced.append((table, leaf, old))
                        table[leaf] = new[id(old)]
        yield
    finally:
        for table, leaf, old in replaced:
            table[leaf] = old


def _named(tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    """The tensors of all mappings with their names."""
    seen = set[str]()
    for part in (tensors,) if isinstance(tensors, Mapping) else tensors:
        if not isinstance(part, Mapping):
            raise TypeError(f"tensors: expected tensors by name, got a {type(part).__name__}")
        if twice := seen & part.keys():
            raise ValueError(f"tensors: expected each name in one mapping, got {min(twice)!r} in two")
        seen |= part.keys()
        yield from part.items()


def _held(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of this name."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    tables = () if module is None else (module._parameters, module._buffers)
    held = next((table[leaf] for table in tables if leaf in table), None)
    if held is None:
        raise KeyError(f"tensors: expected names of parameters or buffers of the model, got {name!r}")
    return held
