"""Running statistics after many passes, in one call: what :mod:`mamlpp_fast.engine.running` derives.

``mean ← decay · mean + share · means (+ (1 − decay) · bias)`` and ``var ← decay · var + unbiased · (1 / rstd² − ε)``,
row by row, in float64.
"""

from __future__ import annotations

from torch import Tensor

from mamlpp_fast.ops._library import define, launcher

__all__ = ["blended"]


def blended(
    running_mean: Tensor, running_var: Tensor, means: Tensor, rstds: Tensor, decay: Tensor, share: Tensor,
    unbiased: Tensor, bias: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The new statistics [R, C], in float64."""
    passes = share.shape[1]
    mean = running_mean * decay + share @ means.double().reshape(passes, -1)
    if bias is not None:
        mean = mean + (1 - decay) * bias
    variances = rstds.double().reshape(passes, -1).pow(-2) - eps
    return mean, running_var * decay + unbiased @ variances


def _check(running_mean: Tensor, means: Tensor, decay: Tensor, share: Tensor, **_: object) -> None:
    rows, channels = running_mean.shape
    if means.dim() != 5 or means.numel() != share.shape[1] * channels or decay.shape != (rows, 1):
        raise ValueError(
            "running_blend: expected statistics [R, C], means [K, 2, G, T, C], decay [R, 1] and shares [R, K·2·G·T], "
            f"got {tuple(running_mean.shape)}, {tuple(means.shape)}, {tuple(decay.shape)} and {tuple(share.shape)}"
        )


def _closed(
    running_mean: Tensor, running_var: Tensor, means: Tensor, rstds: Tensor, decay: Tensor, share: Tensor,
    unbiased: Tensor, bias: Tensor | None, eps: float,
) -> None:  # fmt: skip
    mean, var = blended(running_mean, running_var, means, rstds, decay, share, unbiased, bias, eps)
    running_mean.copy_(mean)
    running_var.copy_(var)


define(
    "running_blend(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor means, Tensor rstds, Tensor decay, "
    "Tensor share, Tensor unbiased, Tensor? bias, float eps) -> ()",
    fallback=_closed,
    triton=launcher("running_blend", "blend"),
    check=_check,
)
