"""Differentiable versions of ``torch.optim`` optimizers, and their settings as tensors to learn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mamlpp_fast.compat.higher._base import DifferentiableOptimizer, Override, spread
from mamlpp_fast.compat.higher._modules import FunctionalModule
from mamlpp_fast.compat.higher._rules import (
    DifferentiableAdadelta,
    DifferentiableAdagrad,
    DifferentiableAdam,
    DifferentiableAdamax,
    DifferentiableAdamW,
    DifferentiableASGD,
    DifferentiableRMSprop,
    DifferentiableRprop,
    DifferentiableSGD,
)
from mamlpp_fast.compat.higher.utils import flatten, map_nested

__all__ = [
    "DifferentiableASGD",
    "DifferentiableAdadelta",
    "DifferentiableAdagrad",
    "DifferentiableAdam",
    "DifferentiableAdamW",
    "DifferentiableAdamax",
    "DifferentiableOptimizer",
    "DifferentiableRMSprop",
    "DifferentiableRprop",
    "DifferentiableSGD",
    "apply_trainable_opt_params",
    "create_diff_optim",
    "get_diff_optim",
    "get_trainable_opt_params",
    "register_optim",
]

_KINDS: dict[type[torch.optim.Optimizer], type[DifferentiableOptimizer]] = {
    torch.optim.Adadelta: DifferentiableAdadelta,
    torch.optim.Adagrad: DifferentiableAdagrad,
    torch.optim.Adam: DifferentiableAdam,
    torch.optim.AdamW: DifferentiableAdamW,
    torch.optim.Adamax: DifferentiableAdamax,
    torch.optim.ASGD: DifferentiableASGD,
    torch.optim.RMSprop: DifferentiableRMSprop,
    torch.optim.Rprop: DifferentiableRprop,
    torch.optim.SGD: DifferentiableSGD,
}


def register_optim(
    optim_type: type[torch.optim.Optimizer], diff_optim_type: type[DifferentiableOptimizer]
) -> None:
    """Makes ``diff_optim_type`` the differentiable version of ``optim_type``."""
    _KINDS[optim_type] = diff_optim_type


def _kind(of: type[torch.optim.Optimizer]) -> type[DifferentiableOptimizer]:
    if of not in _KINDS:
        names = ", ".join(sorted(kind.__name__ for kind in _KINDS))
        raise ValueError(f"opt: expected one of {names} or a registered optimizer, got {of.__name__}")
    return _KINDS[of]


def get_diff_optim(
    opt: torch.optim.Optimizer,
    reference_params: Iterable[Tensor],
    fmodel: FunctionalModule | None = None,
    device: torch.device | str | None = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """The differentiable version of an optimizer, with its settings and state.

    Args:
        opt: the optimizer, of a type in ``torch.optim`` or registered by :func:`register_optim`.
        reference_params: the parameters of the model it optimizes, ``model.parameters()``.
        fmodel, device, override, track_higher_grads, kwargs: see :class:`DifferentiableOptimizer`.

    Raises:
        ValueError: for another type of optimizer, and as :class:`DifferentiableOptimizer` does.
    """
    return _kind(type(opt))(
        opt,
        reference_params,
        fmodel=fmodel,
        device=device,
        override=override,
        track_higher_grads=track_higher_grads,
        **kwargs,
    )


def create_diff_optim(
    opt_type: type[torch.optim.Optimizer],
    opt_kwargs: dict[str, Any] | None = None,
    params: Iterable[Any] | None = None,
    fmodel: FunctionalModule | None = None,
    device: torch.device | str | None = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """A differentiable optimizer made from an optimizer's type and arguments.

    Args:
        opt_type: see :func:`get_diff_optim`.
        opt_kwargs: arguments of ``opt_type`` besides the parameters.
        params: tensors, or parameter groups of them, of the shapes to be optimized; by default the fast weights of
            ``fmodel``.
        fmodel, device, override, track_higher_grads, kwargs: see :class:`DifferentiableOptimizer`.

    Raises:
        ValueError: without ``params`` and ``fmodel``, and as :func:`get_diff_optim` does.
    """
    _kind(opt_type)  # or raises
    if params is None and fmodel is None:
        raise ValueError("params, fmodel: expected one of them, got neither")
    given = list(fmodel.parameters() if params is None and fmodel is not None else params or ())
    reference: list[Tensor] = []

    def stand_ins(tensors: Iterable[Tensor]) -> list[Tensor]:
        made = [torch.zeros_like(t, requires_grad=True) for t in tensors]
        reference.extend(made)
        return made

    if given and isinstance(given[0], dict):
        groups = [
            group | {"params": stand_ins([p] if isinstance(p := group["params"], Tensor) else p)}
            for group in given
        ]
        opt = opt_type(groups, **(opt_kwargs or {}))
    else:
        opt = opt_type(stand_ins(given), **(opt_kwargs or {}))
    return get_diff_optim(opt, reference, fmodel, device, override, track_higher_grads, **kwargs)


def get_trainable_opt_params(
    opt: torch.optim.Optimizer, device: torch.device | str | None = None
) -> dict[str, list[Any]]:
    """The settings of an optimizer as tensors that require gradient, ready to be an ``override``.

    Every setting made of numbers alone (of flags too, which are numbers to Python) becomes a list with an entry for
    each parameter group: a tensor, or the containers that held the numbers, of tensors.

    Args:
        opt: any optimizer.
        device: of the tensors.
    """
    settings: defaultdict[str, list[Any]] = defaultdict(list)
    for group in opt.param_groups:
        for name, value in group.items():
            if name != "params" and all(isinstance(leaf, int | float) for leaf in flatten(value)):
                settings[name].append(
                    map_nested(value, lambda x: torch.tensor(float(x), device=device, requires_grad=True))
                )
    return settings


def apply_trainable_opt_params(opt: torch.optim.Optimizer, override: Override) -> None:
    """Writes learned settings back into an optimizer, as the types of number that it has.

    Raises:
        ValueError: when a list in ``override`` has neither one entry nor one for each parameter group, or an entry is
            not built like the setting that it replaces.
    """
    for name, values in override.items():
        for group, value in zip(opt.param_groups, spread(name, values, len(opt.param_groups)), strict=True):
            group[name] = _applied(name, value, group[name])


def _applied(name: str, new: Any, old: Any) -> Any:
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        old.data = new.detach().to(old.device)
        return old
    if isinstance(new, Tensor) and new.numel() == 1 and isinstance(old, int | float):
        return type(old)(new.item())
    if isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        return type(old)(_applied(name, a, b) for a, b in zip(new, old, strict=True))
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return {key: _applied(name, new[key], old[key]) for key in old}
    raise ValueError(f"override: expected for {name!r} what can replace {old!r}, got {new!r}")
