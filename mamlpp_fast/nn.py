"""Modules of MAML++: per-step batch norm on the fused operations, and what a network needs around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from mamlpp_fast import ops, reference
from mamlpp_fast.reference import set_eval_stats, set_step

__all__ = [
    "InertBiasConv2d",
    "PerStepBatchNorm2d",
    "convert_batch_norm",
    "plain_batch_norm",
    "set_eval_stats",
    "set_step",
]


_M = TypeVar("_M", bound=nn.Module)


class PerStepBatchNorm2d(reference.PerStepBatchNorm2d):
    """:class:`mamlpp_fast.reference.PerStepBatchNorm2d` on the fused kernels: same arguments, state and result.

    Forward, backward and double backward are one operation each, the leaky ReLU included when ``negative_slope`` is
    given. Inside :func:`plain_batch_norm` it runs PyTorch's own batch norm instead.
    """

    plain = False

    def normalise(self, x: Tensor) -> Tensor:
        if self.plain or (not self.training and self.eval_stats == "running"):
            return super().normalise(x)
        step = self.row if self.per_step_affine else None
        if not self.training:
            return ops.per_step_batch_norm(
                x, self.weight, self.bias, step=step, eps=self.eps, negative_slope=self.negative_slope
            )
        y, mean, var = ops.per_step_batch_norm_with_stats(
            x, self.weight, self.bias, step=step, eps=self.eps, negative_slope=self.negative_slope
        )
        ops.update_running_stats(
            self.running_mean,
            self.running_var,
            mean,
            var,
            count=x.numel() // x.shape[1],
            momentum=self.momentum,
            step=self.row if self.per_step_stats else None,
        )
        return y


@contextmanager
def plain_batch_norm(model: nn.Module) -> Iterator[None]:
    """Within it, the per-step batch norms of ``model`` run plain PyTorch: the reference path."""
    modules = [m for m in model.modules() if isinstance(m, PerStepBatchNorm2d)]
    before = [m.plain for m in modules]
    for m in modules:
        m.plain = True
    try:
        yield
    finally:
        for m, plain in zip(modules, before, strict=True):
            m.plain = plain


class InertBiasConv2d(nn.Conv2d):
    """A convolution whose bias is kept but takes no gradient, for use in front of batch norm.

    Batch statistics subtract any constant, so the true gradient of such a bias is zero; what autograd computes is
    rounding noise, which Adam would turn into steps of full size.
    """

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.detach()
        return F.conv2d(x, self.weight, bias, self.stride, self.padding, self.dilation, self.groups)


def convert_batch_norm(
    model: _M, num_steps: int, *, per_step_affine: bool = True, per_step_stats: bool = True
) -> _M:
    """Replaces every ``nn.BatchNorm2d`` of ``model`` by a :class:`PerStepBatchNorm2d`, in place.

    Weights, biases and running statistics are repeated for each step. Tell the model the inner step with
    :func:`set_step` (:func:`mamlpp_fast.adapt` does). Without both flags weights and statistics keep their shapes. A
    batch norm used in several places stays one. Optimizers must be made after, of the new parameters.

    In evaluation mode the new batch norms, unlike PyTorch's, use the statistics of the batch until
    :func:`set_eval_stats` chooses ``"running"``.

    Args:
        model: the network; returned too (a batch norm itself is returned converted, as another object).
        num_steps: inner steps K.
        per_step_affine: a weight and bias per step (BNWB).
        per_step_stats: running statistics per step (BNRS).

    Raises:
        ValueError: for a batch norm without weights, or ``num_steps`` below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: expected at least 1, got {num_steps}")
    new: dict[nn.Module, nn.Module] = {}
    for old in model.modules():
        if isinstance(old, nn.BatchNorm2d):
            new[old] = _converted(old, num_steps, per_step_affine, per_step_stats)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                setattr(parent, name, new[child])
    return cast(_M, new.get(model, model))


def _converted(old: nn.BatchNorm2d, num_steps: int, per_step_affine: bool, per_step_stats: bool) -> nn.Module:
    if not old.affine:
        raise ValueError("model: expected batch norms with weight and bias, got one with affine=False")
    new = PerStepBatchNorm2d(
        old.num_features,
        num_steps,
        eps=old.eps,
        momentum=0.1 if old.momentum is None else old.momentum,
        per_step_affine=per_step_affine,
        per_step_stats=per_step_stats,
    ).to(old.weight)
    new.train(old.training)
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = getattr(old, name)
        if value is not None:
            getattr(new, name).data.copy_(value.data)
    for name in ("weight", "bias"):
        getattr(new, name).requires_grad_(getattr(old, name).requires_grad)
    return new
