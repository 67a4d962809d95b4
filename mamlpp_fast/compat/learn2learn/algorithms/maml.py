"""learn2learn's ``MAML``: same interface, gradients and errors; batch norm and updates in fewer operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mamlpp_fast.accelerated import accelerate
from mamlpp_fast.compat.learn2learn._gradients import inner_gradients
from mamlpp_fast.compat.learn2learn.algorithms.base_learner import Adapting, BaseLearner, given
from mamlpp_fast.compat.learn2learn.utils import (
    clone_module,
    modules_of,
    parameters_of,
    replace_tensors,
    update_module,
    warn_of_lengths,
)
from mamlpp_fast.engine.fused.inner_step import steps_of_loss
from mamlpp_fast.ops.stepped import stepped

__all__ = ["MAML", "maml_update"]


def maml_update(
    model: nn.Module, lr: float | Tensor, grads: Sequence[Tensor | None] | None = None
) -> nn.Module:
    """Replaces every parameter p of a module by p − lr·grad, differentiably; returns the module.

    Args:
        model: changed in place; its tensors are not.
        lr: inner learning rate.
        grads: one a parameter, None for what stays; without it each parameter's attribute ``update`` is added.
    """
    if grads is None:
        return update_module(model)
    return _updated(model, parameters_of(model), lr, grads)


def _updated(
    model: nn.Module, parameters: Sequence[Tensor], lr: float | Tensor, grads: Sequence[Tensor | None]
) -> nn.Module:
    warn_of_lengths("maml_update", parameters, grads, "gradients")
    moved = [(p, grad) for p, grad in zip(parameters, grads, strict=False) if grad is not None]
    if isinstance(lr, int | float):
        new = stepped([p for p, _ in moved], [grad for _, grad in moved], lr)
    else:
        new = [p - lr * grad for p, grad in moved]
    replace_tensors(model, {id(p): (p, n) for (p, _), n in zip(moved, new, strict=True)})
    return model


class MAML(Adapting, BaseLearner):
    """Model-agnostic meta-learning (Finn et al. 2017) of any module.

    ``clone()`` it for a task, ``adapt(loss)`` the clone, and call ``backward`` on the adapted clone's loss: gradients
    arrive at the parameters of the wrapped module.

    Args:
        model: the module.
        lr: inner learning rate.
        first_order: treat inner gradients as constants (FOMAML).
        allow_unused: parameters that the loss does not use stay as they are; by default as ``allow_nograd``.
        allow_nograd: so do parameters with ``requires_grad=False``.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
    ) -> None:
        super().__init__()
        self.module = model
        self.lr = lr
        self.first_order = first_order
        self.allow_nograd = allow_nograd
        self.allow_unused = allow_nograd if allow_unused is None else allow_unused

    def _step(self, loss: Tensor, second_order: bool, options: dict[str, Any]) -> None:
        modules = modules_of(self.module)
        parameters = parameters_of(self.module, modules)
        if second_order and isinstance(self.lr, int | float):
            moved = steps_of_loss(loss, parameters, self.lr)
            if moved is not None:
                replace_tensors(self.module, {id(p): (p, new) for p, new in moved}, modules)
                return
        gradients = inner_gradients(
            loss,
            parameters,
            create_graph=second_order,
            retain_graph=second_order,
            hint="learn2learn: Maybe try with allow_nograd=True and/or allow_unused=True ?",
            **options,
        )
        self.module = _updated(self.module, parameters, self.lr, gradients)

    def clone(
        self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> MAML:
        """A learner on a differentiable copy of the module; what is not given is as this learner has it."""
        options = given(self, first_order=first_order, allow_unused=allow_unused, allow_nograd=allow_nograd)
        return MAML(accelerate(clone_module(self.module)), lr=self.lr, **options)
