"""Tensors in one and the same memory: what a recording would take for several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mamlpp_fast.engine.glances import PLUMBING

__all__ = ["NOTHING", "Shared", "held", "in_memory_of", "shared", "with_a_graph"]


class Shared(NamedTuple):
    """What of a model lies in the memory of its parameters and buffers.

    Attributes:
        held: names of these, by the place of a tensor among :func:`held`.
        beside: of a buffer, the other names whose memory it shares.
    """

    held: Mapping[int, str]
    beside: Mapping[str, frozenset[str]]


NOTHING = Shared({}, {})


def held(model: nn.Module) -> list[Tensor]:
    """The tensors in the attributes of all modules, tables of parameters and buffers among them, in order."""
    leaves = tree_leaves([list(vars(m).values()) for m in model.modules()])
    return [t for t in leaves if isinstance(t, Tensor)]


def shared(model: nn.Module) -> Shared:
    """To be asked of a model itself: a copy's parameters have memory of their own."""
    own = {name: _span(t) for name, t in _own(model)}
    found = ((i, _in(t, own)) for i, t in enumerate(held(model)))
    beside = {
        name: frozenset(n for n, s in own.items() if n != name and _meet(own[name], s))
        for name, _ in model.named_buffers()
    }
    return Shared(
        {i: name for i, name in found if name is not None}, {n: names for n, names in beside.items() if names}
    )


def in_memory_of(model: nn.Module, tensors: Iterable[Tensor]) -> str | None:
    """The parameter or buffer of a model that one of these tensors shares memory with."""
    own = {name: _span(t) for name, t in _own(model)}
    return next((name for t in tensors if (name := _in(t, own)) is not None), None)


def with_a_graph(model: nn.Module) -> str | None:
    """The attribute, no table, that holds what was computed with a gradient: a copy has it as a constant."""
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in PLUMBING and any(
                isinstance(t, Tensor) and not t.is_leaf for t in tree_leaves(value)
            ):
                return name
    return None


def _own(model: nn.Module) -> tuple[tuple[str, Tensor], ...]:
    return *model.named_parameters(), *model.named_buffers()


def _span(t: Tensor) -> tuple[int, int]:
    """Where the elements lie: the first byte, and the one behind the last."""
    if t.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _meet(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def _in(t: Tensor, own: Mapping[str, tuple[int, int]]) -> str | None:
    place = _span(t)
    return next((name for name, s in own.items() if _meet(place, s)), None)
