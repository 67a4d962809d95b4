"""Running statistics of many passes in closed form.

One pass replaces a row r by (1 − m) r + m s, with s the statistics of the batch, which do not depend on r. So a
sequence of passes s_1 … s_J on one row gives r (1 − m)^J + Σ m (1 − m)^(J−j) s_j: the product of a matrix, which the
order of the passes alone decides, with the statistics that they left; what follows only scales what came before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import mamlpp_fast.ops.running_blend  # noqa: F401 - registers the operation
from mamlpp_fast.engine import base

__all__ = ["RunningStats", "decay", "made_passes", "row_of"]


def row_of(step: int, rows: int) -> int:
    """The row that a step uses: steps beyond the last use the last."""
    return min(step, rows - 1)


def made_passes(steps: int, multi_step: bool) -> Tensor:
    """Which passes a task makes, [steps, 2]: support (0) in every step, target (1) in every one or in the last."""
    made = torch.ones(steps, 2, dtype=torch.bool)
    if not multi_step:
        made[:-1, 1] = False
    return made


def decay(momentum: float, passes: Tensor) -> Tensor:
    """What ``passes`` of a row leave of it: (1 − m)^J."""
    return (1.0 - momentum) ** passes.to(torch.float64)


@dataclass
class RunningStats:
    """Update of one batch norm's running statistics by the passes of all tasks.

    The order is the reference's: task after task, step after step, support pass before target pass.

    Attributes:
        mean, var: names of the buffers, and ``counted`` of the number of batches, None without.
        bias: of the convolution in front, which the passes left out; None without.
        eps: of the norm.
        decay, complement: (1 − m)^J of each row, and 1 minus it, [R, 1].
        share, unbiased_share: weights of the passes in mean and variance, [R, J].
        passes: how many are made, for ``counted``.
        scratch: [J, C] and [R, C].
    """

    mean: str
    var: str
    counted: str | None
    bias: str | None
    eps: float
    decay: Tensor
    complement: Tensor
    share: Tensor
    unbiased_share: Tensor
    passes: int
    scratch: tuple[Tensor, Tensor]

    @classmethod
    def of(
        cls,
        names: tuple[str, str, str | None, str | None],
        *,
        rows: int,
        channels: int,
        momentum: float,
        eps: float,
        made: Tensor,
        tasks: int,
        counts: tuple[int, int],
        like: Tensor,
    ) -> RunningStats:
        """Weights for ``made`` [steps, 2], the support (0) and target (1) passes of each of ``tasks`` tasks.

        Args:
            names: of the buffers mean, variance and number of batches, and of the bias.
            rows: of the buffers.
            counts: values that a channel's statistics are taken over in a support and in a target pass.
            like: gives device and dtype.
        """
        steps = len(made)
        share = torch.zeros(rows, steps, 2, tasks, dtype=torch.float64)
        passes = torch.zeros(rows, 1, dtype=torch.float64)
        for task in range(tasks):
            for step in range(steps):
                for side in (0, 1):
                    if made[step, side]:
                        row = row_of(step, rows)
                        share[row] *= 1 - momentum
                        passes[row] += 1
                        share[row, step, side, task] = momentum
        values = torch.tensor([float(n) for n in counts], dtype=torch.float64)
        unbiased = share * (values / (values - 1))[:, None]
        kept = decay(momentum, passes)
        mean, var, counted, bias = names
        return cls(
            mean,
            var,
            counted,
            bias,
            eps,
            kept.to(like),
            (1 - kept).to(like),
            share.flatten(1).to(like),
            unbiased.flatten(1).to(like),
            int(made.sum()) * tasks,
            (like.new_zeros(steps * 2 * tasks, channels), like.new_zeros(rows, channels)),
        )

    def update(self, tensors: Mapping[str, Tensor], mean: Tensor, rstd: Tensor) -> None:
        """Takes in the statistics [steps, 2, tasks, C] of all tasks; variance is 1 / rstd² − ε.

        Args:
            tensors: the model's parameters and buffers by name.
            mean, rstd: with any strides; tasks may be several axes.
        """
        rows = self.decay.shape[0]
        running_mean, running_var = (tensors[name].view(rows, -1) for name in (self.mean, self.var))
        if base.launches_cost(running_mean.device):
            bias = None if self.bias is None else tensors[self.bias].detach()
            torch.ops.mamlpp_fast.running_blend(
                running_mean,
                running_var,
                mean,
                rstd,
                self.decay,
                self.share,
                self.unbiased_share,
                bias,
                self.eps,
            )
            if self.counted is not None:
                tensors[self.counted].add_(self.passes)
            return
        means = variance = self.scratch[0]
        means.view(mean.shape).copy_(mean)
        # The buffers may be of lower precision than the statistics.
        new = torch.mul(running_mean, self.decay, out=self.scratch[1]).addmm_(self.share, means)
        if self.bias is not None:
            new.addcmul_(self.complement, tensors[self.bias].detach())
        running_mean.copy_(new)
        torch.pow(rstd, -2, out=variance.view(rstd.shape))
        variance.sub_(self.eps)
        new = torch.mul(running_var, self.decay, out=self.scratch[1]).addmm_(self.unbiased_share, variance)
        running_var.copy_(new)
        if self.counted is not None:
            tensors[self.counted].add_(self.passes)
