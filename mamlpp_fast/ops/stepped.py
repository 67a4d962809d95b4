"""An inner step of all parameters of a model, and copies of all, as one node of autograd's graph.

PyTorch's own operations in values and derivatives, of any order, under any transform; what differs is the graph, which
has one node where it would have one or more for each parameter. Native in ``csrc/cpu/stepped.cpp``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mamlpp_fast import _native
from mamlpp_fast.ops._library import transformed

__all__ = ["copied", "stepped"]

_PLAIN = frozenset({Tensor, nn.Parameter})


def copied(tensors: Sequence[Tensor]) -> list[Tensor]:
    """``t.clone()`` of each tensor."""
    if _native_serves() and _PLAIN.issuperset(map(type, tensors)):
        made: list[Tensor] = torch.ops.mamlpp_fast.copied.default(tensors)
        return made
    return [t.clone() for t in tensors]


def stepped(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], rates: float | Sequence[Tensor]
) -> list[Tensor]:
    """``p - rate * g`` of each parameter.

    Args:
        parameters: of any shapes.
        gradients: one a parameter, of its shape or one that broadcasts to it.
        rates: a number for all, or a tensor a parameter likewise.

    Raises:
        ValueError: there are not as many gradients, or rates, as parameters.
    """
    one = isinstance(rates, int | float)
    if _native_serves():
        operation = torch.ops.mamlpp_fast.stepped if one else torch.ops.mamlpp_fast.stepped_by_rates
        made: list[Tensor] = operation.default(parameters, gradients, rates)
        return made
    if one:
        return [torch.add(p, g, alpha=-rates) for p, g in zip(parameters, gradients, strict=True)]  # type: ignore[operator]
    return [
        p - rate * g if g.is_sparse or rate.device != p.device else torch.addcmul(p, rate, g, value=-1)
        for p, g, rate in zip(parameters, gradients, rates, strict=True)  # type: ignore[arg-type]
    ]


def _native_serves() -> bool:
    """Under transforms neither: to ``vmap`` an operation of ours is one without a rule."""
    return not torch.compiler.is_compiling() and not transformed() and _native.status().loaded
