"""PyTorch's batch norms computed by one operation, and one for each of its derivatives; a ReLU behind them included."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.autograd import forward_ad

from mamlpp_fast import _native
from mamlpp_fast.compat._batch_norm import by_batch, hooked, in_turn, normalises_by_batch
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
        return by_batch(self, x, slope)

    def can_fuse(self, x: Tensor) -> bool:
        return (
            normalises_by_batch(self, x)
            # Without the native library the operation's closed form is slower than PyTorch's batch norm on a CPU.
            and (not x.is_cpu or _native.status().loaded)
            # torch.func's transforms and forward mode do not pass through the operation.
            and not transformed()
            and forward_ad._current_level < 0
        )


class _FusedSequential(nn.Sequential):
    """Stands in front of ``nn.Sequential``: a ReLU right behind a fused batch norm is computed by its operation."""

    def forward(self, x: Any) -> Any:
        return in_turn(list(self), x, _slope)


def _slope(norm: nn.Module, relu: nn.Module, x: Any) -> float | None:
    """Of the negative side of a (leaky) ReLU that can be computed with a batch norm."""
    kind = getattr(type(relu), "_fast_original", type(relu))
    if kind not in (nn.ReLU, nn.LeakyReLU) or not isinstance(norm, _FusedBatchNorm):
        return None
    if hooked(norm, relu) or not norm.can_fuse(x):
        return None
    return 0.0 if kind is nn.ReLU else float(relu.negative_slope)  # type: ignore[arg-type]


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _FusedBatchNorm,
    nn.BatchNorm2d: _FusedBatchNorm,
    nn.Sequential: _FusedSequential,
}
"""What goes in front of a class; exactly these, for a subclass may compute something else."""
