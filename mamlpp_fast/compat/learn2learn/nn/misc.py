"""learn2learn's ``nn.misc``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Flatten", "Lambda", "Scale", "freeze", "unfreeze"]

M = TypeVar("M", bound=nn.Module)


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, lmb: Callable[..., Any]) -> None:
        super().__init__()
        self.lmb = lmb

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.lmb(*args, **kwargs)


class Flatten(nn.Module):
    """[N, ...] as [N, elements]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), -1)


class Scale(nn.Module):
    """A learned factor for every element.

    Args:
        shape: of the factors, one number or several; one factor without it.
        alpha: what they start from.
    """

    def __init__(self, shape: int | Sequence[int] | None = None, alpha: float = 1.0) -> None:
        super().__init__()
        sizes = (1,) if shape is None else (shape,) if isinstance(shape, int) else tuple(shape)
        self.alpha = nn.Parameter(torch.ones(*sizes) * alpha)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha


def freeze(module: M) -> M:
    """Cuts the parameters off their graph and keeps them from taking gradients, in place."""
    for p in module.parameters():
        p.detach_().requires_grad_(False)
    return module


def unfreeze(module: M) -> M:
    """Lets all parameters take gradients, in place."""
    return module.requires_grad_(True)
