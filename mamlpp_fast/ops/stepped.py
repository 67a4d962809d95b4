"""An inner step of all parameters of a model as one node of autograd's graph.

PyTorch's own operations in values and derivatives, of any order, under any transform; what differs is the graph, which
has one node a step where it would have one or more for each parameter. Native in ``csrc/cpu/stepped.cpp``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mamlpp_fast import _native

__all__ = ["stepped"]


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
    if not torch.compiler.is_compiling() and _native.status().loaded:
        operation = torch.ops.mamlpp_fast.stepped if one else torch.ops.mamlpp_fast.stepped_by_rates
        made: list[Tensor] = operation.default(parameters, gradients, rates)
        return made
    if one:
        return [torch.add(p, g, alpha=-rates) for p, g in zip(parameters, gradients, strict=True)]  # type: ignore[operator]
    return [
        p - rate * g if g.is_sparse else torch.addcmul(p, rate, g, value=-1)
        for p, g, rate in zip(parameters, gradients, rates, strict=True)  # type: ignore[arg-type]
    ]
