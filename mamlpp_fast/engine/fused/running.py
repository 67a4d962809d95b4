"""Running statistics of many passes in closed form.

One pass replaces r by (1 − m) r + m s. A sequence of passes s_1 … s_J on one row therefore gives
r (1 − m)^J + Σ m (1 − m)^(J−j) s_j: the product of a matrix, which the order of the passes alone decides, with the
statistics that they left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mamlpp_fast.reference import PerStepBatchNorm2d

__all__ = ["RunningStats"]


@dataclass
class RunningStats:
    """Update of one batch norm's running statistics by the passes of a group of tasks.

    The order is the reference's: task after task, step after step, support pass before target pass.

    Attributes:
        module: the batch norm; its buffers are updated in place.
        bias: of the convolution in front, which the passes left out; None without.
        decay, complement: (1 − m)^J of each row, and 1 minus it, [R, 1].
        share, unbiased_share: weights of the passes in mean and variance, [R, J].
        passes: how many are made, for ``num_batches_tracked``.
        scratch: [J, C] and [R, C].
    """

    module: PerStepBatchNorm2d | nn.BatchNorm2d
    bias: nn.Parameter | None
    decay: Tensor
    complement: Tensor
    share: Tensor
    unbiased_share: Tensor
    passes: int
    scratch: tuple[Tensor, Tensor]

    @classmethod
    def of(
        cls,
        module: PerStepBatchNorm2d | nn.BatchNorm2d,
        bias: nn.Parameter | None,
        elements: int,
        made: Tensor,
        images: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> RunningStats:
        """Weights for ``made`` [steps, 2, tasks], the support (0) and target (1) passes that take place.

        Args:
            elements: per image that one statistic is taken over.
            images: of a support and of a target pass.
        """
        steps, _, tasks = made.shape
        per_step = isinstance(module, PerStepBatchNorm2d) and module.per_step_stats
        rows = module.num_steps if isinstance(module, PerStepBatchNorm2d) and per_step else 1
        momentum = module.momentum
        assert momentum is not None
        share = torch.zeros(rows, steps, 2, tasks, dtype=torch.float64)
        decay = torch.ones(rows, 1, dtype=torch.float64)
        for task in range(tasks):
            for step in range(steps):
                for side in (0, 1):
                    if made[step, side, task]:
                        row = min(step, rows - 1)
                        share[row] *= 1 - momentum
                        decay[row] *= 1 - momentum
                        share[row, step, side, task] = momentum
        counts = torch.tensor([float(n * elements) for n in images], dtype=torch.float64)
        unbiased = share * (counts / (counts - 1))[:, None]

        def to(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype)

        size = (steps * 2 * tasks, module.num_features)
        scratch = (
            torch.zeros(size, dtype=dtype, device=device),
            torch.zeros(rows, module.num_features, dtype=dtype, device=device),
        )
        return cls(
            module,
            bias,
            to(decay),
            to(1 - decay),
            to(share.flatten(1)),
            to(unbiased.flatten(1)),
            int(made.sum()),
            scratch,
        )

    def update(self, mean: Tensor, rstd: Tensor) -> None:
        """Takes in the statistics [steps, 2, tasks, C] of a group of tasks; variance is 1 / rstd² − ε."""
        if self.module.running_mean is None or self.module.running_var is None:
            return
        rows = self.decay.shape[0]
        running_mean = self.module.running_mean.view(rows, -1)
        running_var = self.module.running_var.view(rows, -1)
        means, variance = mean.flatten(0, 2), self.scratch[0]
        # The buffers may be of lower precision than the statistics.
        new = torch.mul(running_mean, self.decay, out=self.scratch[1]).addmm_(self.share, means)
        if self.bias is not None:
            new.addcmul_(self.complement, self.bias.detach())
        running_mean.copy_(new)
        torch.pow(rstd.flatten(0, 2), -2, out=variance)
        variance.sub_(self.module.eps)
        new = torch.mul(running_var, self.decay, out=self.scratch[1]).addmm_(self.unbiased_share, variance)
        running_var.copy_(new)
        if isinstance(self.module, nn.BatchNorm2d) and self.module.num_batches_tracked is not None:
            self.module.num_batches_tracked.add_(self.passes)
