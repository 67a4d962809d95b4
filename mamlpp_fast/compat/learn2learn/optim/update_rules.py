"""learn2learn's ``optim.update_rules``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mamlpp_fast.compat.learn2learn.utils import update_module

__all__ = ["DifferentiableSGD"]


class DifferentiableSGD(nn.Module):
    """Replaces every parameter p of a module by p − lr·grad, in place and differentiably.

    Args:
        lr: learning rate.
    """

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr

    def forward(self, module: nn.Module, gradients: Sequence[Tensor | None] | None = None) -> None:
        """Updates ``module``; without ``gradients`` by the parameters' ``grad``. None leaves a parameter."""
        if gradients is None:
            gradients = [p.grad for p in module.parameters()]
        update_module(module, [None if g is None else g.mul(-self.lr) for g in gradients])
