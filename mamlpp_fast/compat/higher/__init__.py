"""The interface of facebookresearch's ``higher`` 0.2.1: ``import mamlpp_fast.compat.higher as higher``.

Differentiable inner loops around unchanged modules and ``torch.optim`` optimizers. ``docs/drop_in.md`` lists what
differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mamlpp_fast.compat.higher import optim, patch, utils
from mamlpp_fast.compat.higher._base import Override
from mamlpp_fast.compat.higher.optim import (
    DifferentiableOptimizer,
    apply_trainable_opt_params,
    create_diff_optim,
    get_diff_optim,
    get_trainable_opt_params,
    register_optim,
)
from mamlpp_fast.compat.higher.patch import FunctionalModule, buffer_sync, make_functional, monkeypatch

__all__ = [
    "apply_trainable_opt_params",
    "buffer_sync",
    "create_diff_optim",
    "get_diff_optim",
    "get_trainable_opt_params",
    "innerloop_ctx",
    "make_functional",
    "monkeypatch",
    "optim",
    "patch",
    "register_optim",
    "utils",
]


@contextmanager
def innerloop_ctx(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    device: torch.device | str | None = None,
    copy_initial_weights: bool = True,
    override: Override | None = None,
    track_higher_grads: bool = True,
    *,
    fused: bool = True,
) -> Iterator[tuple[FunctionalModule, DifferentiableOptimizer]]:
    """A stateless version of a model and a differentiable version of its optimizer, for one inner loop.

    Args:
        model: any module; neither its parameters nor its buffers change.
        opt: an optimizer of some or all of its parameters.
        device, copy_initial_weights, track_higher_grads, fused: see :func:`monkeypatch`.
        override: see :class:`~mamlpp_fast.compat.higher.optim.DifferentiableOptimizer`.

    Raises:
        ValueError: as :func:`monkeypatch` and :func:`get_diff_optim`.
    """
    fmodel = monkeypatch(model, device, copy_initial_weights, track_higher_grads, fused=fused)
    yield fmodel, get_diff_optim(opt, model.parameters(), fmodel, device, override, track_higher_grads)
