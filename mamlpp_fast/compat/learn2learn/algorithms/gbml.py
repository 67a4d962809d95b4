"""learn2learn's ``GBML``: gradient-based meta-learning with a learned transform of inner gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mamlpp_fast.accelerated import accelerate
from mamlpp_fast.compat.learn2learn.algorithms.base_learner import Adapting, given
from mamlpp_fast.compat.learn2learn.optim import DifferentiableSGD, ParameterUpdate
from mamlpp_fast.compat.learn2learn.utils import clone_module

__all__ = ["GBML"]


class GBML(Adapting, nn.Module):
    """MAML whose inner gradients pass through a transform that is meta-learned with the module.

    Args:
        module: the module.
        transform: makes the transform of a parameter: a module, or None to leave its gradients as they are.
        lr: inner learning rate.
        adapt_transform: adapt the transforms' parameters too, in every step but the first.
        first_order: treat inner gradients as constants.
        allow_unused: parameters that the loss does not use stay as they are.
        allow_nograd: so do parameters with ``requires_grad=False``.
        compute_update: a :class:`ParameterUpdate` instead of one made of ``transform``.
    """

    def __init__(
        self,
        module: nn.Module,
        transform: Callable[[Tensor], nn.Module | None],
        lr: float = 1.0,
        adapt_transform: bool = False,
        first_order: bool = False,
        allow_unused: bool = False,
        allow_nograd: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.module = module
        self.transform = transform
        self.adapt_transform = adapt_transform
        self.lr = lr
        self.first_order = first_order
        self.allow_unused = allow_unused
        self.allow_nograd = allow_nograd
        if "compute_update" in kwargs:
            self.compute_update = kwargs["compute_update"]
        else:
            self.compute_update = ParameterUpdate(parameters=module.parameters(), transform=transform)
        self.diff_sgd = DifferentiableSGD(lr=lr)
        self._params_updated = False  # before the first update the loss does not depend on the transforms

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def clone(
        self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
        adapt_transform: bool | None = None,
    ) -> GBML:
        """A learner on differentiable copies of module and transforms; what is not given is as this learner has it."""
        options = given(self, first_order=first_order, allow_unused=allow_unused, allow_nograd=allow_nograd)
        return GBML(
            module=accelerate(clone_module(self.module)),
            transform=self.transform,
            lr=self.lr,
            compute_update=clone_module(self.compute_update),
            **options,
            **given(self, adapt_transform=adapt_transform),
        )

    def _step(self, loss: Tensor, second_order: bool, options: dict[str, Any]) -> None:
        if self.adapt_transform and self._params_updated:
            gradients = torch.autograd.grad(
                loss,
                list(self.compute_update.parameters()),
                create_graph=second_order,
                retain_graph=second_order,
                allow_unused=options["allow_unused"],
            )
            self.diff_sgd(self.compute_update, gradients)
            self._params_updated = False
        updates = self.compute_update(
            loss,
            self.module.parameters(),
            create_graph=second_order or self.adapt_transform,
            retain_graph=second_order or self.adapt_transform,
            **options,
        )
        self.diff_sgd(self.module, updates)
        self._params_updated = True
