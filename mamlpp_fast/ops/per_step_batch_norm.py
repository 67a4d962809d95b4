"""Batch norm with training statistics, per-step affine parameters and a fused leaky ReLU, in three orders.

``per_step_batch_norm`` → ``per_step_batch_norm_backward`` → ``per_step_batch_norm_double_backward``, chained by
``differentiate``; formulas and names (p, q, r, t, w) in ``docs/derivations/per_step_batch_norm.md``.

Shapes, for all of them:
    x, y, gy, gx, u, ...: [N, C], [N, C, H, W] or, with a task axis, [T, N, C, H, W]; any strides. Results are
        channels-last where x is, contiguous otherwise. Normalised over everything but the channel (and the task).
    weight, bias: [C]; [steps, C] with a step (row ``step`` is used, the others get zero gradient); or [T, C] with
        a task axis and no step. Of any of the floating types, whatever the type of x.
    mean, rstd, var: [C], with a task axis [T, C]; float32, for float64 x float64. rstd = 1/√(var + ε), var biased.
    slope: of the leaky ReLU; 1 leaves it out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mamlpp_fast.ops import _batch_norm_closed_form as closed_form
from mamlpp_fast.ops._library import define, differentiate, launcher, transformed

__all__ = [
    "kept_versions",
    "per_step_batch_norm",
    "per_step_batch_norm_with_stats",
    "update_running_stats",
]

_SAVED = "Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, int? step, float slope"


_forward = define(
    "per_step_batch_norm(Tensor x, Tensor weight, Tensor bias, int? step, float eps, float slope)"
    " -> (Tensor y, Tensor mean, Tensor rstd, Tensor var)",
    fallback=closed_form.forward,
    fake=closed_form.forward_fake,
    triton=launcher("per_step_batch_norm", "forward"),
)
_backward = define(
    f"per_step_batch_norm_backward(Tensor gy, {_SAVED}) -> (Tensor gx, Tensor gweight, Tensor gbias)",
    fallback=closed_form.backward,
    fake=closed_form.backward_fake,
    triton=launcher("per_step_batch_norm", "backward"),
)
_double_backward = define(
    f"per_step_batch_norm_double_backward(Tensor? u, Tensor? a, Tensor? b, Tensor gy, {_SAVED})"
    " -> (Tensor c_gy, Tensor c_x, Tensor c_weight)",
    fallback=closed_form.double_backward,
    fake=closed_form.double_backward_fake,
    triton=launcher("per_step_batch_norm", "double_backward"),
)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.step, _, ctx.slope = inputs
    _, mean, rstd, var = output
    ctx.mark_non_differentiable(mean, rstd, var)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _differentiate_forward(ctx: Any, gy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if gy is None:
        return (None,) * 6
    return (*_backward(gy, *ctx.saved_tensors, ctx.step, ctx.slope), None, None, None)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.step, ctx.slope = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _differentiate_backward(
    ctx: Any, u: Tensor | None, a: Tensor | None, b: Tensor | None
) -> tuple[Tensor | None, ...]:
    if u is None and a is None and b is None:
        return (None,) * 8
    # The leaky ReLU's kink aside, gx, gweight and gbias do not depend on bias.
    return (*_double_backward(u, a, b, *ctx.saved_tensors, ctx.step, ctx.slope), *(None,) * 5)


def _differentiate_double_backward(ctx: Any, *_: Tensor | None) -> None:
    raise NotImplementedError(
        "per_step_batch_norm: the third derivative is not implemented; "
        "differentiate torch.nn.functional.batch_norm instead"
    )


differentiate("per_step_batch_norm", _differentiate_forward, _save_forward)
differentiate("per_step_batch_norm_backward", _differentiate_backward, _save_backward)
differentiate("per_step_batch_norm_double_backward", _differentiate_double_backward)


def _update(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float,
    step: int | None,
) -> None:  # fmt: skip
    if count < 2:
        raise ValueError(f"count: expected at least 2, got {count}")
    if (running_mean.dim() == 2) != (step is not None) or running_var.shape != running_mean.shape:
        raise ValueError(
            "running_mean, running_var: expected both [steps, C] with a step, both [C] without, "
            f"got {list(running_mean.shape)} and {list(running_var.shape)}, step {step}"
        )
    if step is not None and not 0 <= step < running_mean.shape[0]:
        raise ValueError(f"step: expected 0 <= step < {running_mean.shape[0]}, got {step}")
    row_mean, row_var = closed_form.row(running_mean, step), closed_form.row(running_var, step)
    if mean.shape[-1:] != row_mean.shape or mean.dim() > 2 or var.shape != mean.shape:
        raise ValueError(
            f"mean, var: expected shape {list(row_mean.shape)} or [T, {row_mean.shape[0]}], "
            f"got {list(mean.shape)} and {list(var.shape)}"
        )
    unbias = count / (count - 1)
    for task_mean, task_var in zip(
        mean.view(-1, *row_mean.shape), var.view(-1, *row_mean.shape), strict=True
    ):
        row_mean.mul_(1 - momentum).add_(task_mean, alpha=momentum)
        row_var.mul_(1 - momentum).add_(task_var, alpha=momentum * unbias)


_update_running_stats = define(
    "update_running_stats(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, int count, "
    "float momentum, int? step) -> ()",
    fallback=_update,
)


def per_step_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    step: int | None = None,
    eps: float = 1e-5,
    negative_slope: float | None = None,
) -> Tensor:
    """Batch norm with the statistics of x, and a leaky ReLU behind it if asked for.

    Equivalent to ``F.leaky_relu(F.batch_norm(x, None, None, weight[step], bias[step], True, 0.0, eps),
    negative_slope)``, for each task of a task axis. Differentiable twice, in x, weight and bias; a third derivative
    raises NotImplementedError, and so does forward mode (``torch.autograd.forward_ad``). Under the transforms of
    ``torch.func`` it is computed by PyTorch's elementary operations, at their speed, and differentiable to any order.

    Args:
        x: [N, C], [N, C, H, W] or [T, N, C, H, W], contiguous or channels-last (others are copied); float64,
            float32, bfloat16 or float16. Sums are kept in float32 or wider.
        weight, bias: γ and β. [C], shared by all; [steps, C] with ``step``; [T, C], each task its own.
        step: row of weight and bias (BNWB of MAML++, arXiv:1810.09502, section 4); the gradient of the others is 0.
        eps: ε, added to the variance.
        negative_slope: slope of the leaky ReLU for negative values; 0 is the ReLU, None leaves it out.

    Returns:
        y, of the shape, type and memory format of x.

    Raises:
        ValueError: shapes do not belong together, step is out of range, or there is one value per channel.
        TypeError: x is not of a floating type.
        NotImplementedError: in forward mode without ``torch.func``.
    """
    y, _, _ = per_step_batch_norm_with_stats(
        x, weight, bias, step=step, eps=eps, negative_slope=negative_slope
    )
    return y


def per_step_batch_norm_with_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    step: int | None = None,
    eps: float = 1e-5,
    negative_slope: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`per_step_batch_norm`, with the statistics it used, for :func:`update_running_stats`.

    Args, Raises: as :func:`per_step_batch_norm`.

    Returns:
        y; mean and biased variance of x, [C] or [T, C], float32 or wider, not differentiable.
    """
    slope = 1.0 if negative_slope is None else negative_slope
    if transformed():
        y, mean, _, var = closed_form.forward(x, weight, bias, step, eps, slope)
        return y, mean.detach(), var.detach()
    y, mean, _, var = _forward(x, weight, bias, step, eps, slope)
    return y, mean, var


def update_running_stats(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    count: int,
    momentum: float,
    step: int | None = None,
) -> None:
    """Moves running statistics towards those of a batch, in place, with the unbiased variance as PyTorch does.

    ``running = (1 − momentum)·running + momentum·batch``; with a task axis, for one task after the other. An
    operation of its own, because one that writes into an argument cannot have an autograd formula.

    Args:
        running_mean, running_var: [C]; or [steps, C] with ``step`` (BNRS of MAML++), whose other rows stay.
        mean, var: of :func:`per_step_batch_norm_with_stats`, [C] or [T, C]; var biased.
        count: values behind each of them, N·H·W.
        momentum: share of the new statistics, in [0, 1].
        step: row.

    Raises:
        ValueError: shapes do not belong together, step is out of range, or count is below 2.
    """
    _update_running_stats(running_mean, running_var, mean, var, count, momentum, step)


def kept_versions(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Running statistics to write to as PyTorch's batch norm does: graphs that have saved them are still gone through.

    PyTorch's nodes save them in training as well, and read nothing of them.
    """
    return (mean, var) if torch.compiler.is_compiling() else (mean.data, var.data)
