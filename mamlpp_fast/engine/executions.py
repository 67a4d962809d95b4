"""What is really executed underneath a pass, as operators of ATen; see :mod:`mamlpp_fast.engine.record`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mamlpp_fast._compiler import lean_mode

__all__ = ["Draw", "Executions", "draws", "sized_by_values"]


@dataclass(frozen=True)
class Draw:
    """Zeros and ones that a call draws from the process's generator, as dropout does for its mask.

    Attributes:
        shape: of the tensor, with the examples.
        strides: numbers are drawn in the order in which its elements lie in memory.
        chance: of a one.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    chance: float

    @classmethod
    def of(cls, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Draw | None:
        """What a call of an operator draws; None where it is no such draw."""
        given = _named(func, args) | dict(kwargs)
        if func not in (torch.ops.aten.bernoulli_.float, torch.ops.aten.bernoulli.p):
            return None
        if given.get("generator") is not None:
            return None
        t: Tensor = given["self"]
        return cls(tuple(t.shape), tuple(t.stride()), float(given.get("p", 0.5)))


@lean_mode
class Executions(TorchDispatchMode):
    """What is executed, since it was last asked."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.executed: list[str] = []
        self.written: list[Tensor] = []
        self.drawn: list[Draw] = []
        self.draws = False
        self.reads = False

    def clear(self) -> None:
        self.executed, self.written, self.drawn, self.draws, self.reads = [], [], [], False, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.executed.append(str(func))
        if (draw := Draw.of(func, args, kwargs)) is not None:
            self.drawn.append(draw)
        else:
            self.draws |= draws(func, args, kwargs)
        self.reads |= torch.Tag.data_dependent_output in func.tags or sized_by_values(func, args)
        if func._schema.is_mutable:
            given = _named(func, args) | kwargs
            for argument in func._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    leaves = tree_leaves(given.get(argument.name))
                    self.written += [t for t in leaves if isinstance(t, Tensor)]
        return func(*args, **kwargs)


def draws(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of an operator draws random numbers; an attention without dropout does not."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    named = {a.name: a.default_value for a in func._schema.arguments} | _named(func, args) | dict(kwargs)
    return bool(named.get("dropout_p", 1.0) != 0)


def sized_by_values(func: Any, args: Sequence[Any]) -> bool:
    """Whether the size of a call's result depends on values; not where elements are picked by their numbers."""
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    masks = (torch.bool, torch.uint8)
    return func is not torch.ops.aten.index.Tensor or any(t is not None and t.dtype in masks for t in args[1])


def _named(func: Any, args: Sequence[Any]) -> dict[str, Any]:
    return dict(zip((a.name for a in func._schema.arguments), args, strict=False))
