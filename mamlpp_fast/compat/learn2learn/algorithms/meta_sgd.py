"""learn2learn's ``MetaSGD``: same interface and gradients; batch norm and updates in fewer operations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mamlpp_fast.accelerated import accelerate
from mamlpp_fast.compat.learn2learn.algorithms.base_learner import BaseLearner
from mamlpp_fast.compat.learn2learn.utils import (
    Replaced,
    clone_module,
    clone_parameters,
    modules_of,
    parameters_of,
)
from mamlpp_fast.ops.stepped import stepped

__all__ = ["MetaSGD", "meta_sgd_update"]


def meta_sgd_update(
    model: nn.Module, lrs: Iterable[Tensor] | None = None, grads: Sequence[Tensor | None] | None = None
) -> nn.Module:
    """Replaces every parameter p of a module by p − lr·grad, differentiably; returns the module.

    A parameter used in several places is replaced in each of them (in learn2learn, in the first alone).

    Args:
        model: changed in place; its tensors are not.
        lrs: one a parameter, of its shape; without it, or without ``grads``, each parameter's attribute ``_lr``.
        grads: one a parameter, None for what stays; without it, or without ``lrs``, each parameter's ``grad``.
    """
    replaced: Replaced = {}
    if grads is not None and lrs is not None:
        rows = zip(parameters_of(model), grads, lrs, strict=False)
        moved = [(p, grad, lr) for p, grad, lr in rows if grad is not None]
        new = stepped([p for p, _, _ in moved], [grad for _, grad, _ in moved], [lr for _, _, lr in moved])
        replaced = {id(p): (p, n) for (p, *_), n in zip(moved, new, strict=True)}
    else:
        for module in model.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if (
                    tensor is not None
                    and tensor.grad is not None
                    and getattr(tensor, "_lr", None) is not None
                ):
                    replaced[id(tensor)] = tensor, tensor - tensor._lr * tensor.grad  # type: ignore[attr-defined]
                    tensor.grad = tensor._lr = None  # type: ignore[attr-defined]
    for module in modules_of(model):
        groups: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in groups:
            for name, tensor in tensors.items():
                if (found := replaced.get(id(tensor))) is not None:
                    tensors[name] = found[1]
    return model


class MetaSGD(BaseLearner):
    """Meta-SGD (Li et al. 2017): MAML with a learned inner learning rate for every element of every parameter.

    Args:
        model: the module.
        lr: initial value of every rate.
        first_order: treat inner gradients as constants.
        lrs: the rates, one a parameter and of its shape; without it parameters of value ``lr``.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        first_order: bool = False,
        lrs: Iterable[Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.module = model
        self.lrs = (
            nn.ParameterList([nn.Parameter(torch.ones_like(p) * lr) for p in model.parameters()])
            if lrs is None
            else lrs
        )
        self.first_order = first_order

    def clone(self) -> MetaSGD:
        """A learner on differentiable copies of the module and the rates."""
        return MetaSGD(
            accelerate(clone_module(self.module)),
            lrs=clone_parameters(self.lrs),
            first_order=self.first_order,
        )

    def adapt(self, loss: Tensor, first_order: bool | None = None) -> None:
        """One gradient step on ``loss``, in place; first order as the learner has it where not given."""
        second_order = not (self.first_order if first_order is None else first_order)
        gradients = torch.autograd.grad(
            loss, parameters_of(self.module), retain_graph=second_order, create_graph=second_order
        )
        self.module = meta_sgd_update(self.module, self.lrs, gradients)
