"""Copies of parameters, and walks over nested containers of hyperparameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["flatten", "get_func_params", "map_nested"]

_SEQUENCES = (list, tuple, set)


def flatten(x: Any) -> list[Any]:
    """The leaves of nested dicts, lists, tuples and sets, in order."""
    if isinstance(x, dict):
        x = list(x.values())
    if not isinstance(x, _SEQUENCES):
        return [x]
    return [leaf for part in x for leaf in flatten(part)]


def map_nested(x: Any, function: Callable[[Any], Any]) -> Any:
    """The same containers with ``function`` of every leaf."""
    if isinstance(x, dict):
        return type(x)((key, map_nested(value, function)) for key, value in x.items())
    if isinstance(x, _SEQUENCES):
        return type(x)(map_nested(part, function) for part in x)
    return function(x)


def copy_tensor(t: Tensor, safe_copy: bool = True, device: torch.device | str | None = None) -> Tensor:
    """A leaf with the values of ``t`` (its very memory unless ``safe_copy``), requiring gradient where ``t`` does."""
    copy = t.detach().clone() if safe_copy else t.detach()
    return (copy if device is None else copy.to(device)).requires_grad_(t.requires_grad)


def get_func_params(
    module: nn.Module, device: torch.device | str | None = None, safe_copy: bool = True
) -> list[Tensor]:
    """Detached copies of the parameters, each requiring gradient where its original does.

    Args:
        module: whose parameters, in the order of ``module.parameters()``.
        device: where the copies go; by default where the originals are.
        safe_copy: False shares the originals' memory.
    """
    return [copy_tensor(p, safe_copy, device) for p in module.parameters()]
