"""Batch norm with rows for the inner steps, and what tells the norms of a model which step it is."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import handle_torch_function, has_torch_function_unary

__all__ = ["NORMS", "EvalStats", "PerStepBatchNorm2d", "per_step_norm", "set_eval_stats", "set_step"]

EvalStats = Literal["batch", "running"]


class PerStepBatchNorm2d(nn.Module):
    """Batch norm with weights, biases (BNWB) and running statistics (BNRS) of their own for every inner step.

    Despite its name it stands for PyTorch's batch norm of one and three dimensions as well.

    Row ``step`` is used by the support pass of inner step ``step`` and by the target pass that follows its update;
    steps beyond the last row use the last row. In training mode the statistics of the batch normalise, and the running
    statistics are updated as PyTorch does. In evaluation mode ``eval_stats`` decides: ``"batch"`` (the published
    numbers; no update) or ``"running"`` (the answer for an image does not depend on the others).

    Args:
        num_features: channels C of the input [N, C] or [N, C, ...]: [N, C, H, W], [N, C, L], [N, C, D, H, W].
        num_steps: rows K.
        eps: added to the variance.
        momentum: share of the new statistics in the running ones; None makes them means over all passes so far, which
            a buffer ``num_batches_tracked``, [K] or [], counts.
        affine: False leaves out weight and bias (both are None).
        bias: False leaves out the bias.
        per_step_affine: weight and bias [K, C]; otherwise [C], shared by all steps.
        per_step_stats: running statistics [K, C]; otherwise [C].
        negative_slope: when given, a leaky ReLU of that slope follows (0.0: a ReLU).
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        num_steps: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        bias: bool = True,
        per_step_affine: bool = True,
        per_step_stats: bool = True,
        negative_slope: float | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1 or num_steps < 1:
            raise ValueError(
                f"num_features and num_steps: expected at least 1, got {num_features} and {num_steps}"
            )
        self.num_features = num_features
        self.num_steps = num_steps
        self.eps = eps
        self.momentum = momentum
        self.per_step_affine = affine and per_step_affine
        self.per_step_stats = per_step_stats
        self.negative_slope = negative_slope
        self.step = 0
        self.eval_stats: EvalStats = "batch"
        affine_shape = (num_steps, num_features) if per_step_affine else (num_features,)
        stats_shape = (num_steps, num_features) if per_step_stats else (num_features,)
        if affine:
            self.weight = nn.Parameter(torch.ones(affine_shape))
        else:
            self.register_parameter("weight", None)
        if affine and bias:
            self.bias = nn.Parameter(torch.zeros(affine_shape))
        else:
            self.register_parameter("bias", None)
        self.register_buffer("running_mean", torch.zeros(stats_shape))
        self.register_buffer("running_var", torch.ones(stats_shape))
        if momentum is None:
            self.register_buffer("num_batches_tracked", torch.zeros(stats_shape[:-1], dtype=torch.long))

    @property
    def row(self) -> int:
        """The row of this step: steps beyond the last trained one use the last."""
        return min(self.step, self.num_steps - 1)

    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias [C] of the current step, None where there is none."""
        weight, bias = (
            p[self.row] if self.per_step_affine and p is not None else p for p in (self.weight, self.bias)
        )
        return weight, bias

    def running_stats(self) -> tuple[Tensor, Tensor]:
        """Running mean and variance [C] of the current step (views)."""
        if self.per_step_stats:
            return self.running_mean[self.row], self.running_var[self.row]
        return self.running_mean, self.running_var

    def forward(self, x: Tensor) -> Tensor:
        if has_torch_function_unary(x):
            # To a tensor subclass or a torch-function mode the whole norm is one operation.
            y: Tensor = handle_torch_function(per_step_norm, (x,), self, x)
            return y
        return self.normalise(x)

    def normalise(self, x: Tensor) -> Tensor:
        """What :meth:`forward` computes: the mathematics, for subclasses to compute otherwise."""
        weight, bias = self.affine()
        mean, var = self.running_stats()
        if not self.training and self.eval_stats == "running":
            y = F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
        elif not self.training:
            y = F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        elif self.momentum is not None:
            y = F.batch_norm(x, mean, var, weight, bias, True, self.momentum, self.eps)
        else:
            new = torch.zeros_like(mean), torch.zeros_like(var)
            y = F.batch_norm(
                x, *new, weight, bias, True, 1.0, self.eps
            )  # momentum 1: new is the batch's alone
            self.accumulate(*new)
        return y if self.negative_slope is None else F.leaky_relu(y, self.negative_slope)

    def accumulate(self, mean: Tensor, var: Tensor) -> None:
        """Takes mean and unbiased variance [C] of one more pass into the running ones of ``momentum=None``."""
        count = self.num_batches_tracked[self.row] if self.per_step_stats else self.num_batches_tracked
        count.add_(1)
        for running, new in zip(self.running_stats(), (mean, var), strict=True):
            running.add_((new - running) / count)

    def extra_repr(self) -> str:
        text = f"{self.num_features}, num_steps={self.num_steps}, eps={self.eps}, momentum={self.momentum}"
        for part in ("weight", "bias"):
            text += f", no {part}" if getattr(self, part) is None else ""
        for flag in ("per_step_affine", "per_step_stats"):
            text += "" if getattr(self, flag) else f", {flag}=False"
        return text if self.negative_slope is None else text + f", negative_slope={self.negative_slope}"


def per_step_norm(module: PerStepBatchNorm2d, x: Tensor) -> Tensor:
    """``module(x)`` as a function: what torch-function modes and tensor subclasses see of a per-step batch norm."""
    return module.normalise(x)


def set_step(model: nn.Module, step: int) -> None:
    """Tells every per-step batch norm of ``model`` which inner step (from 0) the next passes belong to."""
    for module in model.modules():
        if isinstance(module, PerStepBatchNorm2d):
            module.step = step


def set_eval_stats(model: nn.Module, stats: EvalStats) -> None:
    """Chooses the statistics that norms normalise with in evaluation mode.

    Per-step batch norms obey, and so do those norms with running statistics that
    :func:`mamlpp_fast.convert_batch_norm` left in place. Of a model that was not converted, PyTorch's own norms are
    left alone: in evaluation mode they use their running statistics.
    """
    for module in model.modules():
        if isinstance(module, (PerStepBatchNorm2d, _NormBase)) and "eval_stats" in vars(module):
            vars(module)["eval_stats"] = stats


# _NormBase: PyTorch's batch and instance norms.
NORMS = (PerStepBatchNorm2d, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
