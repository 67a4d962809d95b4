"""learn2learn's ``optim.LearnableOptimizer``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mamlpp_fast._modes import quiet
from mamlpp_fast.compat.learn2learn.utils import update_module

__all__ = ["LearnableOptimizer"]


class LearnableOptimizer(nn.Module):
    """An optimiser whose transforms of the gradients are learned: its step is differentiable by them.

    Args:
        model: what it updates; not among its own parameters.
        transform: makes the transform of a parameter, a module.
        lr: learning rate.
    """

    def __init__(self, model: nn.Module, transform: Callable[[Tensor], nn.Module], lr: float = 1.0) -> None:
        super().__init__()
        assert isinstance(model, nn.Module), "model should inherit from nn.Module."
        self.info = {"model": model}  # in a dictionary, where nn.Module does not look for children
        self.transforms = nn.ModuleList([transform(p) for p in model.parameters()])
        self.lr = lr

    def step(self, closure: Any = None) -> None:
        """Updates the model by its parameters' ``grad``; their earlier graph is cut off."""
        model = self.info["model"]
        with quiet():  # about .grad of what is no leaf
            for parameter, transform in zip(model.parameters(), self.transforms, strict=False):
                if parameter.grad is not None:
                    update = -self.lr * transform(parameter.grad.detach())
                    parameter.detach_().requires_grad_(False)
                    parameter.update = update  # type: ignore[attr-defined]
            update_module(model)
            for parameter in model.parameters():
                parameter.retain_grad()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Gives the model's parameters, and no others, new gradients of zero."""
        with quiet():
            for parameter in self.info["model"].parameters():
                if parameter.grad is not None:
                    parameter.grad = torch.zeros_like(parameter.data)
