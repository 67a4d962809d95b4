"""What is really executed underneath a pass, as operators of ATen; see :mod:`mamlpp_fast.engine.record`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mamlpp_fast._compiler import lean_mode
from mamlpp_fast._seeded import seeded

__all__ = ["Draw", "Executions", "draws", "sized_by_values"]


@dataclass(frozen=True, eq=False)
class Draw:
    """Numbers that a call draws from the process's generator, as dropout does for its mask.

    Attributes:
        shape: of the tensor, with the examples.
        strides: numbers are drawn in the order in which its elements lie in memory.
        method: of tensors, which draws the same numbers in place, ``"normal_"`` say.
        arguments: of that method: numbers, or the chances of ones as a tensor.
        dtype: of the tensor, which the numbers of most methods depend on.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    method: str
    arguments: tuple[float | Tensor, ...]
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(
        cls, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], t: Tensor | None = None
    ) -> Draw | None:
        """What a call of an operator draws; None where it is no such draw, or where that cannot be told.

        Args:
            t: what the call makes, or a tensor of that form; where None the call's first argument.
        """
        given = _named(func, args) | dict(kwargs)
        if func not in _METHODS or given.get("generator") is not None:
            return None
        method, defaults = _METHODS[func]
        t = given.get("self") if t is None else t
        if t is None:
            return None
        own = [given["self"].clone()] if func is aten.bernoulli.default else []
        own += [float(given.get(name, default)) for name, default in defaults.items()]
        return cls(tuple(t.shape), tuple(t.stride()), method, tuple(own), t.dtype)

    @property
    def dense(self) -> bool:
        """Whether the tensor has neither gaps in memory nor elements that share their place."""
        count = math.prod(self.shape)
        reach = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return count > 0 and reach == count

    @property
    def numbers(self) -> tuple[Any, ...]:
        """How many numbers of which kind, whatever type and place they have."""
        return [n for n in self.shape if n != 1], self.method, self.arguments

    @property
    def by_values(self) -> bool:
        """Whether the numbers follow those of a tensor."""
        return any(isinstance(a, Tensor) for a in self.arguments)

    @property
    def stored(self) -> torch.dtype:
        """The smallest type in which the method draws the same numbers: for zeros and ones a byte."""
        return torch.bool if self.method == "bernoulli_" else self.dtype

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Draw):
            return NotImplemented
        plain = [
            (d.shape, d.strides, d.method, d.dtype, [type(a) for a in d.arguments]) for d in (self, other)
        ]
        return plain[0] == plain[1] and all(
            torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
            for a, b in zip(self.arguments, other.arguments, strict=True)
        )

    def __hash__(self) -> int:
        return hash((self.shape, self.strides, self.method, self.dtype))

    def into(self, place: Tensor, generator: torch.Generator | None = None) -> None:
        """Draws into a tensor of the draw's shape and strides; by default from the process's generator."""
        getattr(place, self.method)(*self.arguments, generator=generator)

    def again(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether :meth:`into` draws what a call that makes a tensor draws, which depends on PyTorch's version."""
        own = torch.empty_strided(self.shape, self.strides, dtype=self.stored)
        with seeded(0):
            made = func(*args, **kwargs)
        with seeded(0):
            self.into(own)
        return torch.equal(made, own.to(made.dtype))


aten = torch.ops.aten
_NORMAL, _UNIFORM = {"mean": 0.0, "std": 1.0}, {"from": 0.0, "to": 1.0}
# Operators by the method that draws the same: itself in place, and what makes a tensor of its own.
_METHODS: dict[Any, tuple[str, dict[str, float]]] = {
    aten.bernoulli_.float: ("bernoulli_", {"p": 0.5}),
    aten.bernoulli.p: ("bernoulli_", {"p": 0.5}),
    aten.bernoulli.default: ("bernoulli_", {}),
    aten.normal_.default: ("normal_", _NORMAL),
    aten.normal.float_float: ("normal_", _NORMAL),
    aten.randn.default: ("normal_", _NORMAL),
    aten.randn_like.default: ("normal_", _NORMAL),
    aten.uniform_.default: ("uniform_", _UNIFORM),
    aten.rand.default: ("uniform_", _UNIFORM),
    aten.rand_like.default: ("uniform_", _UNIFORM),
    aten.exponential_.default: ("exponential_", {"lambd": 1.0}),
}


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
        self.reads |= torch.Tag.data_dependent_output in func.tags or sized_by_values(func, args)
        if func._schema.is_mutable:
            given = _named(func, args) | kwargs
            for argument in func._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    leaves = tree_leaves(given.get(argument.name))
                    self.written += [t for t in leaves if isinstance(t, Tensor)]
        result = func(*args, **kwargs)
        if draws(func, args, kwargs):
            draw = Draw.of(func, args, kwargs, result)
            if draw is not None and (func._schema.is_mutable or draw.again(func, args, kwargs)):
                self.drawn.append(draw)
            else:
                self.draws = True
        return result


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
