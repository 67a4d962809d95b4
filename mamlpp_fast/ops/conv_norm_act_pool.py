"""First layer of a network: 3x3 convolution, batch norm, leaky ReLU and 2x2 max-pool in one, without the feature map.

With one or three input channels the output z of the convolution is most of a network's memory and little of its work.
It is linear in the few pixels of a patch, so its statistics follow from the mean and covariance of the patches, which
do not change while the weights adapt, and so do the dense sums of every backward rule. What is left are passes over
the pooled grid that recompute the four products of a window. Exact algebra: ``docs/derivations/conv_norm_act_pool.md``.

The orders are those of ``norm_act_pool``, but that the weights move instead of z; every op writes into the tensors that
its schema marks and returns nothing. The slope is not negative, the stride 1. ``patch_moments`` pads and centres the
images and takes the moments of their patches, once for all weights of a task; images take no gradient. With
K = kh·kw·Ci values of a patch, in the native kernels of at most 9 taps:
    padded: images [T, N, H + 2p, W + 2p, Ci] minus their mean, border included.
    moments: float64 [T, K + 2, K]: mean of the patches, mean of the centred ones, their covariance.
    w: weights [T, kh, kw, Ci, C]; v: their tangent.
    gamma, beta: affine parameters, [C] or [T, C]; gamma_dot, beta_dot: their tangents, likewise, or None where they
        do not move.
    y: result [T, N, Ho, Wo, C]; index: uint8, position 2·row + column of the maximum in its window.
    mean, rstd: statistics of the convolution's output [T, C], rstd = 1/√(var + ε).
    sums: Σ g·(patch − mean) [T, K, C], written by the backward; t: mean(u·x̂) [T, C], written by the tangent; the
        backward's tangent reads both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlpp_fast.ops._library import Shared, define, define_orders, launcher

_SAVED = (
    "Tensor y, Tensor index, Tensor padded, Tensor moments, Tensor w, Tensor gamma, Tensor rstd, float slope"
)


def output_shape(padded: torch.Size | tuple[int, ...], w: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the result [T, N, Ho, Wo, C] of padded images and weights of these shapes."""
    return (*padded[:2], (padded[2] - w[1] + 1) // 2, (padded[3] - w[2] + 1) // 2, w[4])


def _check(*, padded: Tensor, moments: Tensor, w: Tensor, slope: float, **others: Any) -> None:
    """Raises unless the tensors belong together."""
    if slope < 0:
        raise ValueError(f"slope: expected at least 0, got {slope}")
    if padded.dim() != 5 or w.dim() != 5 or w.shape[0] != padded.shape[0] or w.shape[3] != padded.shape[4]:
        raise ValueError(
            "padded, w: expected [T, N, H, W, Ci] and [T, kh, kw, Ci, C], "
            f"got {tuple(padded.shape)} and {tuple(w.shape)}"
        )
    values = w.shape[1] * w.shape[2] * w.shape[3]
    if tuple(moments.shape) != (w.shape[0], values + 2, values) or moments.dtype != torch.float64:
        raise ValueError(
            f"moments: expected float64 [{w.shape[0]}, {values + 2}, {values}], "
            f"got {moments.dtype} {tuple(moments.shape)}"
        )
    expected = output_shape(padded.shape, w.shape)
    if min(expected[2:4]) < 1:
        raise ValueError(f"padded: expected at least 2x2 outputs to pool, got images {tuple(padded.shape)}")
    for name in ("y", "index", "gy", "uy", "gy_dot"):
        if (small := others.get(name)) is not None and tuple(small.shape) != expected:
            raise ValueError(f"{name}: expected {expected}, got {tuple(small.shape)}")


def _patches(padded: Tensor, kh: int, kw: int) -> Tensor:
    """Every patch of the images, [T, N, H, W, K]."""
    windows = padded.unfold(2, kh, 1).unfold(3, kw, 1)
    return windows.permute(0, 1, 2, 3, 5, 6, 4).flatten(-3)


def _windows(patches: Tensor) -> Tensor:
    """The four patches of each window of the pool, [T, N, Ho, Wo, 4, K]."""
    rows, columns = patches.shape[2] // 2, patches.shape[3] // 2
    even = patches[:, :, : 2 * rows, : 2 * columns]
    parts: Tensor = even.unflatten(3, (columns, 2)).unflatten(2, (rows, 2))
    return parts.transpose(3, 4).flatten(4, 5)


class _Weights:
    """Closed forms of a task's weights: matrices [T, K, C] and rows [T, 1, C], in the statistics' precision."""

    def __init__(self, padded: Tensor, moments: Tensor, w: Tensor, gamma: Tensor) -> None:
        kh, kw = w.shape[1:3]
        wide = moments.dtype
        self.elements = padded.shape[1] * (padded.shape[2] - kh + 1) * (padded.shape[3] - kw + 1)
        self.w = w.flatten(1, 3).to(wide)
        self.true_mean, self.centred_mean, self.covariance = moments[:, :1], moments[:, 1:2], moments[:, 2:]
        self.cw = self.covariance @ self.w
        self.gamma = self.row(gamma)

    def row(self, row: Tensor) -> Tensor:
        """[C] or [T, C] as [T, 1, C]."""
        return row.to(self.w.dtype).expand(self.w.shape[0], self.w.shape[2])[:, None]

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        total: Tensor = (a * b).sum(1, keepdim=True)
        return total


def _gate(y: Tensor, slope: float) -> Tensor:
    """Derivative of the leaky ReLU, from the sign of its result."""
    return torch.where(y > 0, torch.ones_like(y), slope)


def _centred_sums(
    gy: Tensor, y: Tensor, index: Tensor, padded: Tensor, k: _Weights, w: Tensor, slope: float
) -> tuple[Tensor, Tensor]:
    """Sums over the images of g times the centred patch it stems from, and of g: [T, K, C], [T, 1, C]."""
    four = _windows(_patches(padded, *w.shape[1:3])).to(k.w.dtype)
    g = (gy * _gate(y, slope)).to(k.w.dtype)
    sums = sum(
        torch.einsum("tnhwk,tnhwc->tkc", four[..., position, :], torch.where(index == position, g, 0.0))
        for position in range(4)
    )
    assert isinstance(sums, Tensor)
    total = g.sum((1, 2, 3))[:, None]
    return sums - k.centred_mean.mT * total, total


def _moments(images: Tensor, kh: int, kw: int, padding: int, padded: Tensor, moments: Tensor) -> None:
    centre = images.to(moments.dtype).mean((1, 2, 3))
    rim = (0, 0, padding, padding, padding, padding)
    padded.copy_(F.pad(images, rim) - centre.to(padded.dtype)[:, None, None, None])
    patches = _patches(padded, kh, kw).to(moments.dtype).flatten(1, 3)
    mean = patches.mean(1, keepdim=True)
    # The shift as it was rounded into `padded`, so that the two agree.
    moments[:, :1].copy_(mean + centre.to(padded.dtype).to(mean.dtype).repeat(1, kh * kw)[:, None])
    moments[:, 1:2].copy_(mean)
    away = patches - mean
    moments[:, 2:].copy_(away.mT @ away / patches.shape[1])


def _forward(
    padded: Tensor, moments: Tensor, w: Tensor, gamma: Tensor, beta: Tensor, eps: float, slope: float,
    y: Tensor, index: Tensor, mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    k = _Weights(padded, moments, w, gamma)
    scale_of = (k.dot(k.w, k.cw) + eps).rsqrt()
    mean.copy_((k.true_mean @ k.w)[:, 0])
    rstd.copy_(scale_of[:, 0])
    folded = k.w * (k.gamma * scale_of)
    shift = beta.to(folded.dtype).expand(mean.shape)[:, None] - k.centred_mean @ folded
    four = _windows(_patches(padded, *w.shape[1:3]))
    before = torch.einsum("tnhwpk,tkc->tnhwpc", four, folded.to(padded.dtype))
    best, position = (before + shift.to(padded.dtype)[:, None, None, None]).max(4)
    y.copy_(torch.where(best > 0, best, best * slope))
    index.copy_(position)


def _backward(
    gy: Tensor, y: Tensor, index: Tensor, padded: Tensor, moments: Tensor, w: Tensor, gamma: Tensor, rstd: Tensor,
    slope: float, gw: Tensor, sums: Tensor, ggamma: Tensor, gbeta: Tensor,
) -> None:  # fmt: skip
    k = _Weights(padded, moments, w, gamma)
    b, total = _centred_sums(gy, y, index, padded, k, w, slope)
    inverse = rstd.to(b.dtype)[:, None]
    along = inverse * k.dot(k.w, b)
    sums.copy_(b)
    gw.copy_((k.gamma * inverse * (b - along * inverse * k.cw)).view_as(gw))
    ggamma.copy_(along[:, 0])
    gbeta.copy_(total[:, 0])


def _tangent(
    v: Tensor, y: Tensor, index: Tensor, padded: Tensor, moments: Tensor, w: Tensor, gamma: Tensor, rstd: Tensor,
    slope: float, uy: Tensor, t: Tensor, gamma_dot: Tensor | None = None, beta_dot: Tensor | None = None,
) -> None:  # fmt: skip
    k = _Weights(padded, moments, w, gamma)
    direction, inverse = v.flatten(1, 3).to(k.w.dtype), rstd.to(k.w.dtype)[:, None]
    along = inverse * k.dot(direction, k.cw)
    t.copy_(along[:, 0])
    folded = k.gamma * inverse * (direction - along * inverse * k.w)
    if gamma_dot is not None:
        folded += k.row(gamma_dot) * inverse * k.w
    four = _windows(_patches(padded, *w.shape[1:3]))
    dense = torch.einsum("tnhwpk,tkc->tnhwpc", four, folded.to(padded.dtype))
    dense -= (k.centred_mean @ folded).to(padded.dtype)[:, None, None, None]
    if beta_dot is not None:
        dense += k.row(beta_dot).to(padded.dtype)[:, None, None, None]
    picked = dense.gather(4, index[:, :, :, :, None].long())[:, :, :, :, 0]
    uy.copy_(picked * _gate(y, slope))


def _backward_tangent(
    gy_dot: Tensor, v: Tensor, y: Tensor, index: Tensor, padded: Tensor, moments: Tensor, w: Tensor, gamma: Tensor,
    rstd: Tensor, slope: float, sums: Tensor, t: Tensor, gw_dot: Tensor, ggamma_dot: Tensor, gbeta_dot: Tensor,
    gamma_dot: Tensor | None = None,
) -> None:  # fmt: skip
    k = _Weights(padded, moments, w, gamma)
    b_dot, total = _centred_sums(gy_dot, y, index, padded, k, w, slope)
    b, direction = sums.to(b_dot.dtype), v.flatten(1, 3).to(b_dot.dtype)
    inverse, along_u = rstd.to(b.dtype)[:, None], t.to(b.dtype)[:, None]
    q = inverse * k.dot(k.w, b) / k.elements
    q_dot = inverse * (k.dot(k.w, b_dot) + k.dot(direction, b)) / k.elements - inverse * along_u * q
    dense = (2 * inverse * q * along_u - q_dot) * k.cw - q * (k.covariance @ direction)
    product = b_dot - inverse * along_u * b + inverse * k.elements * dense
    found = k.gamma * inverse * product
    if gamma_dot is not None:
        found += k.row(gamma_dot) * inverse * (b - inverse * k.elements * q * k.cw)
    gw_dot.copy_(found.view_as(gw_dot))
    ggamma_dot.copy_(q_dot[:, 0] * k.elements)
    gbeta_dot.copy_(total[:, 0])


_SHARED = Shared(frozenset({"w"}), {"gamma": 1, "beta": 1, "gw": 5})
define(
    "patch_moments(Tensor images, int kh, int kw, int padding, Tensor(a!) padded, Tensor(b!) moments) -> ()",
    fallback=_moments,
    triton=launcher("conv_norm_act_pool", "moments"),
)
define_orders(
    "conv_norm_act_pool",
    (
        _forward,
        "Tensor padded, Tensor moments, Tensor w, Tensor gamma, Tensor beta, float eps, float slope, "
        "Tensor(a!) y, Tensor(b!) index, Tensor(c!) mean, Tensor(d!) rstd",
    ),
    (_backward, f"Tensor gy, {_SAVED}, Tensor(a!) gw, Tensor(b!) sums, Tensor(c!) ggamma, Tensor(d!) gbeta"),
    (
        _tangent,
        f"Tensor v, {_SAVED}, Tensor(a!) uy, Tensor(b!) t, Tensor? gamma_dot=None, Tensor? beta_dot=None",
    ),
    (
        _backward_tangent,
        f"Tensor gy_dot, Tensor v, {_SAVED}, Tensor sums, Tensor t, "
        "Tensor(a!) gw_dot, Tensor(b!) ggamma_dot, Tensor(c!) gbeta_dot, Tensor? gamma_dot=None",
    ),
    check=_check,
    shared=_SHARED,
)
