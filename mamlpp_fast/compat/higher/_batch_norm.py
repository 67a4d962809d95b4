"""PyTorch's batch norms computed by one operation, and one for each of its derivatives; a ReLU behind them included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from mamlpp_fast import _native, ops
from mamlpp_fast.ops._library import transformed

__all__ = ["FUSED"]


class _FusedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Stands in front of a batch norm class and computes what it would, by our operation where that can be."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.can_fuse(x):
            y: Tensor = super().forward(x)
            return y
        return self.fused(x, None)

    def fused(self, x: Tensor, slope: float | None) -> Tensor:
        """The result, and a leaky ReLU of this slope behind it."""
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        if self.running_mean is None or not self.training:
            return ops.per_step_batch_norm(x, self.weight, self.bias, eps=self.eps, negative_slope=slope)
        y, mean, var = ops.per_step_batch_norm_with_stats(
            x, self.weight, self.bias, eps=self.eps, negative_slope=slope
        )
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked) if momentum is None else momentum
        assert self.running_var is not None
        ops.update_running_stats(
            self.running_mean,
            self.running_var,
            mean,
            var,
            count=x.numel() // x.shape[1],
            momentum=0.0 if momentum is None else momentum,
        )
        return y

    def can_fuse(self, x: Tensor) -> bool:
        return (
            (self.training or self.running_mean is None)
            and self.weight is not None
            and x.dim() in (2, 4)
            # Without the native library the operation's closed form is slower than PyTorch's batch norm on a CPU.
            and (not x.is_cpu or _native.status().loaded)
            # torch.func's transforms and forward mode do not pass through the operation.
            and not transformed()
            and forward_ad._current_level < 0
        )


class _FusedSequential(nn.Sequential):
    """Stands in front of ``nn.Sequential``: a ReLU right behind a fused batch norm is computed by its operation."""

    def forward(self, x: Any) -> Any:
        modules = list(self._modules.values())
        done = 0
        while done < len(modules):
            module = modules[done]
            slope = _slope(modules[done + 1]) if done + 1 < len(modules) else None
            if (
                slope is not None
                and isinstance(module, _FusedBatchNorm)
                and not _hooked(module, modules[done + 1])
                and module.can_fuse(x)
            ):
                x = module.fused(x, slope)
                done += 2
            else:
                assert module is not None
                x = module(x)
                done += 1
        return x


def _slope(module: nn.Module | None) -> float | None:
    """Of a ReLU's or leaky ReLU's negative side; None for any other module."""
    kind = getattr(type(module), "_fast_original", type(module))
    if kind is nn.ReLU:
        return 0.0
    return float(module.negative_slope) if kind is nn.LeakyReLU and module is not None else None  # type: ignore[arg-type]


def _hooked(*modules: nn.Module | None) -> bool:
    return torch.nn.modules.module._has_any_global_hook() or any(
        m is not None
        and (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
        for m in modules
    )


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _FusedBatchNorm,
    nn.BatchNorm2d: _FusedBatchNorm,
    nn.Sequential: _FusedSequential,
}
"""What goes in front of a class; exactly these, for a subclass may compute something else."""
