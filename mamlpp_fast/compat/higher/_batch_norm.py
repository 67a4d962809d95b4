"""PyTorch's batch norms computed by one operation, and one for each of its derivatives."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from mamlpp_fast import ops

__all__ = ["FUSED"]


class _FusedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Stands in front of a batch norm class and computes what it would, by our operation where that can be."""

    def forward(self, x: Tensor) -> Tensor:
        if not self._can_fuse(x):
            y: Tensor = super().forward(x)
            return y
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        if self.running_mean is None or not self.training:
            return ops.per_step_batch_norm(x, self.weight, self.bias, eps=self.eps)
        y, mean, var = ops.per_step_batch_norm_with_stats(x, self.weight, self.bias, eps=self.eps)
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

    def _can_fuse(self, x: Tensor) -> bool:
        return (
            (self.training or self.running_mean is None)
            and self.weight is not None
            and x.dim() in (2, 4)
            # torch.func's transforms and forward mode do not pass through the operation.
            and torch._C._functorch.peek_interpreter_stack() is None
            and forward_ad._current_level < 0
        )


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _FusedBatchNorm,
    nn.BatchNorm2d: _FusedBatchNorm,
}
"""What goes in front of a class; exactly these, for a subclass may compute something else."""
