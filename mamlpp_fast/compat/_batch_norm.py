"""Batch norms in models of other libraries' users, by the package's operation; a leaky ReLU behind one included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from mamlpp_fast import ops
from mamlpp_fast._modes import pytorchs_norms
from mamlpp_fast.ops.per_step_batch_norm import kept_versions

__all__ = ["by_batch", "hooked", "in_turn", "normalises_by_batch"]


def normalises_by_batch(norm: _BatchNorm, x: Tensor) -> bool:
    """Whether :func:`by_batch` computes it: statistics of the batch, weights, and what PyTorch itself would take."""
    return (
        (norm.training or norm.running_mean is None)
        and norm.weight is not None
        and norm.bias is not None
        and x.dim() == (2 if isinstance(norm, nn.BatchNorm1d) else 4)
        and x.shape[1] == norm.num_features
        and x.is_floating_point()
        and x.numel() > x.shape[1]
        and not pytorchs_norms.now
    )


def by_batch(norm: _BatchNorm, x: Tensor, slope: float | None) -> Tensor:
    """The normalised x, with a leaky ReLU of this slope behind it if there is one; running statistics follow."""
    if not (norm.training and norm.track_running_stats) or norm.running_mean is None:
        return ops.per_step_batch_norm(x, norm.weight, norm.bias, eps=norm.eps, negative_slope=slope)
    y, mean, var = ops.per_step_batch_norm_with_stats(
        x, norm.weight, norm.bias, eps=norm.eps, negative_slope=slope
    )
    assert norm.running_var is not None
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    count = x.numel() // x.shape[1]
    ops.update_running_stats(
        *kept_versions(norm.running_mean, norm.running_var), mean, var, count=count, momentum=momentum or 0.0
    )
    return y


def hooked(*modules: nn.Module) -> bool:
    return _has_any_global_hook() or any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in modules
    )


def in_turn(
    modules: Sequence[nn.Module], x: Any, slope_of: Callable[[Any, nn.Module, Any], float | None]
) -> Any:
    """The modules one behind the other.

    Args:
        slope_of: of a module, the one right behind it and the input; where it is not None, the first one's ``fused``
            computes both.
    """
    at = 0
    while at < len(modules):
        slope = slope_of(modules[at], modules[at + 1], x) if at + 1 < len(modules) else None
        x = modules[at](x) if slope is None else modules[at].fused(x, slope)  # type: ignore[operator]
        at += 1 if slope is None else 2
    return x
