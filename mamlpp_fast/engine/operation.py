"""What a recording is made of: operations on values, parameters, buffers and constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name
from torch.utils._pytree import tree_leaves

from mamlpp_fast.engine.executions import Draw

__all__ = ["TAKE_SIZES", "Buffer", "Constant", "Operation", "Parameter", "Value", "is_reference", "name_of"]


@dataclass(frozen=True)
class Value:
    """An activation; the first ones are the inputs of the network, in order."""

    index: int


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model by its first name; ``detached``: as a constant."""

    name: str
    detached: bool = False


@dataclass(frozen=True)
class Buffer:
    """A buffer of the model by its first name."""

    name: str


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor that is a plain attribute of a module, or made from such alone: fixed for a form of a model.

    Attributes:
        tensor: its values; constants of the same values are equal.
    """

    tensor: Tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Constant):
            return NotImplemented
        a, b = self.tensor, other.tensor
        if a is b:
            return True
        return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and bool(
            ((a == b) | ((a != a) & (b != b))).all()
        )

    def __hash__(self) -> int:
        return hash((tuple(self.tensor.shape), self.tensor.dtype))


@dataclass(frozen=True)
class Operation:
    """One call.

    Attributes:
        function: what Python called, ``F.conv2d`` say.
        where: path of the innermost module whose forward made the call, "" for the model itself.
        args, kwargs: its arguments, tensors replaced by :class:`Value`, :class:`Parameter`, :class:`Buffer` and
            :class:`Constant`.
        outputs: values written, one for each tensor among what the call returned.
        tensors: their shapes and types.
        constant: the outputs take part in no gradient although an argument does (``detach``, ``no_grad``).
        draws: of dropout in it, in order; of an operation without arguments, noise, all that it is.
    """

    function: Callable[..., Any]
    where: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]
    tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    constant: bool
    draws: tuple[Draw, ...] = ()

    @property
    def output(self) -> int | None:
        """The value written, or None where the call made no tensor or several."""
        return self.outputs[0] if len(self.outputs) == 1 else None

    @property
    def name(self) -> str:
        return name_of(self.function)

    def inputs(self) -> list[Value | Parameter | Buffer | Constant]:
        leaves = tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if is_reference(leaf)]


def is_reference(leaf: Any) -> bool:
    return isinstance(leaf, (Value, Parameter, Buffer, Constant))


def name_of(func: Any) -> str:
    text = resolve_name(func) or getattr(func, "__name__", str(func))
    return text if text.endswith("__set__") else str(text.removesuffix(".__get__").rpartition(".")[2])


# Their arguments hold sizes that may follow the number of examples; what they make is told by its shape.
TAKE_SIZES = frozenset(
    {
        Tensor.view,
        Tensor.reshape,
        torch.reshape,
        Tensor.expand,
        Tensor.unflatten,
        torch.unflatten,
        Tensor.flatten,
    }
)
