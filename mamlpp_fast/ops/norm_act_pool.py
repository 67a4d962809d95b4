"""Batch norm, leaky ReLU and 2x2 max-pool of a batch of tasks in one operation, with its tangents.

Activations are channels-last, ``[T, N, H, W, C]``; every (task, channel) is normalised over its m = N·H·W
elements with the statistics of this very batch. Four orders: forward, backward, the tangent of the forward (along
a tangent u of z, and of γ and β where they move) and the tangent of the backward; a Hessian-vector product is the last
two in turn. Every op writes into the tensors that its schema marks and returns nothing. Formulas:
``docs/derivations/norm_act_pool.md``.

Common arguments:
    z: input [T, N, H, W, C], contiguous.
    gamma, beta: affine parameters, [C] or [T, C]; gamma_dot, beta_dot: their tangents, likewise, or None where they
        do not move.
    slope: of the leaky ReLU; 1 leaves it out, 0 is the ReLU.
    pool: whether a 2x2 max-pool of stride 2 follows. An odd last row or column is in no window, yet counts in
        the statistics. Shapes [T, N, Ho, Wo, C] below mean H // 2 and W // 2 with it, H and W without.
    index: uint8 [T, N, Ho, Wo, C], position 2·row + column of the maximum in its window (the first of equal
        ones); without `pool` it is not touched and may have any shape.
    mean, rstd: statistics [T, C], rstd = 1/√(var + ε).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlpp_fast.ops._library import define, launcher

_SAVED = "Tensor z, Tensor index, Tensor mean, Tensor rstd, Tensor gamma, Tensor beta, float slope"


def output_shape(shape: torch.Size | tuple[int, ...], pool: bool) -> tuple[int, int, int, int, int]:
    """Shape of the result for an input [T, N, H, W, C]."""
    tasks, images, height, width, channels = shape
    step = 2 if pool else 1
    return tasks, images, height // step, width // step, channels


def _check(
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    pool: bool,
    gamma_dot: Tensor | None = None,
    beta_dot: Tensor | None = None,
    **small: Tensor,
) -> None:
    """Raises unless the tensors belong together; `small` are those of the result's shape."""
    if z.dim() != 5:
        raise ValueError(f"z: expected [T, N, H, W, C], got {tuple(z.shape)}")
    tasks, images, height, width, channels = z.shape
    if images * height * width < 2:
        raise ValueError(
            f"z: expected more than one element per task and channel to normalise, got {tuple(z.shape)}"
        )
    rows = {"gamma": gamma, "beta": beta, "gamma_dot": gamma_dot, "beta_dot": beta_dot}
    for name, parameter in rows.items():
        if parameter is not None and tuple(parameter.shape) not in ((channels,), (tasks, channels)):
            raise ValueError(
                f"{name}: expected [{channels}] or [{tasks}, {channels}], got {tuple(parameter.shape)}"
            )
    if pool and (height < 2 or width < 2):
        raise ValueError(f"z: expected at least 2x2 pixels to pool, got {tuple(z.shape)}")
    expected = output_shape(z.shape, pool)
    for name, tensor in small.items():
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name}: expected {expected}, got {tuple(tensor.shape)}")


def _spread(row: Tensor, dtype: torch.dtype) -> Tensor:
    """[C] or [T, C] as a factor of [T, N, H, W, C]."""
    return row.to(dtype)[..., None, None, None, :]


def _windows(x: Tensor) -> Tensor:
    """The 2x2 windows [T, N, Ho, Wo, C, 4] of a dense tensor."""
    tasks, images, height, width, channels = x.shape
    rows, columns = height // 2, width // 2
    even = x[:, :, : 2 * rows, : 2 * columns]
    parts = even.reshape(tasks, images, rows, 2, columns, 2, channels)
    return parts.permute(0, 1, 2, 4, 6, 3, 5).flatten(-2)


def _pick(x: Tensor, index: Tensor, pool: bool) -> Tensor:
    """Elements of a dense tensor that the pool passed on."""
    return _windows(x).gather(-1, index[..., None].long())[..., 0] if pool else x


def _place(g: Tensor, index: Tensor, like: Tensor, pool: bool) -> Tensor:
    """Transpose of `_pick`: a dense tensor, zero wherever the pool dropped the element."""
    if not pool:
        return g
    tasks, images, rows, columns, channels = g.shape
    windows = torch.zeros(*g.shape, 4, dtype=g.dtype, device=g.device)
    windows.scatter_(-1, index[..., None].long(), g[..., None])
    parts = windows.unflatten(-1, (2, 2)).permute(0, 1, 2, 5, 3, 6, 4)
    even = parts.reshape(tasks, images, 2 * rows, 2 * columns, channels)
    return F.pad(even, (0, 0, 0, like.shape[3] - 2 * columns, 0, like.shape[2] - 2 * rows))


def _mean(x: Tensor) -> Tensor:
    return x.mean((1, 2, 3))


def _normal(z: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (z.to(mean.dtype) - _spread(mean, mean.dtype)) * _spread(rstd, mean.dtype)


def _gate(normal: Tensor, gamma: Tensor, beta: Tensor, slope: float) -> Tensor:
    """Derivative of the leaky ReLU."""
    before = normal * _spread(gamma, normal.dtype) + _spread(beta, normal.dtype)
    return torch.where(before > 0, torch.ones_like(before), slope)


def _forward(
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    slope: float,
    pool: bool,
    y: Tensor,
    index: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    _check(z, gamma, beta, pool, y=y, **({"index": index} if pool else {}))
    wide = z.to(mean.dtype)
    variance, centre = torch.var_mean(wide, (1, 2, 3), correction=0)
    mean.copy_(centre)
    rstd.copy_((variance + eps).rsqrt())
    before = _normal(z, mean, rstd) * _spread(gamma, mean.dtype) + _spread(beta, mean.dtype)
    after = torch.where(before > 0, before, before * slope)
    if pool:
        index.copy_(_windows(after).argmax(-1))
    y.copy_(_pick(after, index, pool))


def _backward(
    gy: Tensor,
    z: Tensor,
    index: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor,
    beta: Tensor,
    slope: float,
    pool: bool,
    gz: Tensor,
    ggamma: Tensor,
    gbeta: Tensor,
) -> None:
    _check(z, gamma, beta, pool, gy=gy, **({"index": index} if pool else {}))
    dtype = mean.dtype
    normal = _normal(z, mean, rstd)
    g = _place(gy.to(dtype), index, z, pool) * _gate(normal, gamma, beta, slope)
    p, q = _mean(g), _mean(g * normal)
    scale = _spread(gamma.to(dtype) * rstd, dtype)
    elements = z.shape[1] * z.shape[2] * z.shape[3]
    gz.copy_(scale * (g - _spread(p, dtype) - normal * _spread(q, dtype)))
    ggamma.copy_(q * elements)
    gbeta.copy_(p * elements)


def _tangent(
    u: Tensor,
    z: Tensor,
    index: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor,
    beta: Tensor,
    slope: float,
    pool: bool,
    uy: Tensor,
    r: Tensor,
    t: Tensor,
    gamma_dot: Tensor | None = None,
    beta_dot: Tensor | None = None,
) -> None:
    _check(z, gamma, beta, pool, gamma_dot, beta_dot, uy=uy, **({"index": index} if pool else {}))
    dtype = mean.dtype
    normal, wide = _normal(z, mean, rstd), u.to(dtype)
    r.copy_(_mean(wide))
    t.copy_(_mean(wide * normal))
    scale = _spread(gamma.to(dtype) * rstd, dtype)
    dense = scale * (wide - _spread(r, dtype) - normal * _spread(t, dtype))
    if gamma_dot is not None:
        dense += _spread(gamma_dot, dtype) * normal
    if beta_dot is not None:
        dense += _spread(beta_dot, dtype)
    uy.copy_(_pick(dense * _gate(normal, gamma, beta, slope), index, pool))


def _backward_tangent(
    gy_dot: Tensor,
    gy: Tensor,
    u: Tensor,
    z: Tensor,
    index: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor,
    beta: Tensor,
    slope: float,
    r: Tensor,
    t: Tensor,
    pool: bool,
    gz_dot: Tensor,
    ggamma_dot: Tensor,
    gbeta_dot: Tensor,
    gamma_dot: Tensor | None = None,
) -> None:
    _check(z, gamma, beta, pool, gamma_dot, gy_dot=gy_dot, gy=gy, **({"index": index} if pool else {}))
    dtype = mean.dtype
    normal, wide = _normal(z, mean, rstd), u.to(dtype)
    gate = _gate(normal, gamma, beta, slope)
    g = _place(gy.to(dtype), index, z, pool) * gate
    g_dot = _place(gy_dot.to(dtype), index, z, pool) * gate
    p, q, w = _mean(g), _mean(g * normal), _mean(g * wide)
    p_dot = _mean(g_dot)
    q_dot = _mean(g_dot * normal) + rstd * (w - r * p - t * q)
    scale = gamma.to(dtype) * rstd
    # The pass over the dense grid is linear in normal, u and the two gradients: see the derivation.
    along_normal = _spread(scale * (2 * rstd * q * t - q_dot), dtype) * normal
    along_u = _spread(scale * rstd * q, dtype) * wide
    constant = _spread(scale * (rstd * (q * r + t * p) - p_dot), dtype)
    gradients = _spread(scale, dtype) * (g_dot - _spread(rstd * t, dtype) * g)
    dot = gradients + along_normal - along_u + constant
    if gamma_dot is not None:
        scale_dot = _spread(gamma_dot.to(dtype) * rstd, dtype)
        dot += scale_dot * (g - _spread(p, dtype) - normal * _spread(q, dtype))
    gz_dot.copy_(dot)
    elements = z.shape[1] * z.shape[2] * z.shape[3]
    ggamma_dot.copy_(q_dot * elements)
    gbeta_dot.copy_(p_dot * elements)


def _fake(*args: Tensor | float | None) -> None:
    return None


_norm_act_pool = define(
    "norm_act_pool(Tensor z, Tensor gamma, Tensor beta, float eps, float slope, bool pool, "
    "Tensor(a!) y, Tensor(b!) index, Tensor(c!) mean, Tensor(d!) rstd) -> ()",
    fallback=_forward,
    fake=_fake,
    triton=launcher("norm_act_pool", "forward"),
)
_norm_act_pool_backward = define(
    f"norm_act_pool_backward(Tensor gy, {_SAVED}, bool pool, "
    "Tensor(a!) gz, Tensor(b!) ggamma, Tensor(c!) gbeta) -> ()",
    fallback=_backward,
    fake=_fake,
    triton=launcher("norm_act_pool", "backward"),
)
_norm_act_pool_tangent = define(
    f"norm_act_pool_tangent(Tensor u, {_SAVED}, bool pool, Tensor(a!) uy, Tensor(b!) r, Tensor(c!) t, "
    "Tensor? gamma_dot=None, Tensor? beta_dot=None) -> ()",
    fallback=_tangent,
    fake=_fake,
    triton=launcher("norm_act_pool", "tangent"),
)
_norm_act_pool_backward_tangent = define(
    f"norm_act_pool_backward_tangent(Tensor gy_dot, Tensor gy, Tensor u, {_SAVED}, Tensor r, Tensor t, "
    "bool pool, Tensor(a!) gz_dot, Tensor(b!) ggamma_dot, Tensor(c!) gbeta_dot, Tensor? gamma_dot=None) -> ()",
    fallback=_backward_tangent,
    fake=_fake,
    triton=launcher("norm_act_pool", "backward_tangent"),
)


def norm_act_pool(
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    y: Tensor,
    index: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    eps: float,
    slope: float,
    pool: bool,
) -> Tensor:
    """Normalises, applies the leaky ReLU and pools; the other arguments are those of the module's docstring.

    Args:
        y: result [T, N, Ho, Wo, C], overwritten; as are `index`, `mean` and `rstd`.
        eps: added to the variance.

    Returns:
        `y`.

    Raises:
        ValueError: shapes do not belong together, or only one element to normalise.
    """
    _check(z, gamma, beta, pool, y=y, **({"index": index} if pool else {}))
    _norm_act_pool(z, gamma, beta, eps, slope, pool, y, index, mean, rstd)
    return y


def norm_act_pool_backward(
    gy: Tensor,
    z: Tensor,
    index: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor,
    beta: Tensor,
    gz: Tensor,
    ggamma: Tensor,
    gbeta: Tensor,
    *,
    slope: float,
    pool: bool,
) -> Tensor:
    """Gradients of `norm_act_pool` for a gradient gy [T, N, Ho, Wo, C] of its result.

    Args:
        gz: gradient of z [T, N, H, W, C], overwritten.
        ggamma, gbeta: gradients of the affine parameters of every task [T, C], overwritten.

    Returns:
        `gz`.
    """
    _check(z, gamma, beta, pool, gy=gy, **({"index": index} if pool else {}))
    _norm_act_pool_backward(gy, z, index, mean, rstd, gamma, beta, slope, pool, gz, ggamma, gbeta)
    return gz


def norm_act_pool_tangent(
    u: Tensor,
    z: Tensor,
    index: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor,
    beta: Tensor,
    uy: Tensor,
    r: Tensor,
    t: Tensor,
    *,
    slope: float,
    pool: bool,
    gamma_dot: Tensor | None = None,
    beta_dot: Tensor | None = None,
) -> Tensor:
    """Tangent of `norm_act_pool` along a tangent u [T, N, H, W, C] of z, and of γ and β where given.

    Args:
        uy: tangent of the result [T, N, Ho, Wo, C], overwritten.
        r, t: mean(u) and mean(u·x̂) [T, C], overwritten; `norm_act_pool_backward_tangent` reads them.

    Returns:
        `uy`.
    """
    _check(z, gamma, beta, pool, gamma_dot, beta_dot, uy=uy, **({"index": index} if pool else {}))
    _norm_act_pool_tangent(u, z, index, mean, rstd, gamma, beta, slope, pool, uy, r, t, gamma_dot, beta_dot)
    return uy


def norm_act_pool_backward_tangent(
    gy_dot: Tensor,
    gy: Tensor,
    u: Tensor,
    z: Tensor,
    index: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor,
    beta: Tensor,
    r: Tensor,
    t: Tensor,
    gz_dot: Tensor,
    ggamma_dot: Tensor,
    gbeta_dot: Tensor,
    *,
    slope: float,
    pool: bool,
    gamma_dot: Tensor | None = None,
) -> Tensor:
    """Tangent of `norm_act_pool_backward` along tangents u of z and gy_dot of gy, and of γ where given.

    A tangent of β changes nothing here: the gate and the positions of the maxima are piecewise constant.

    Args:
        gy_dot, gy: tangent of the result's gradient, and that gradient, [T, N, Ho, Wo, C].
        u: tangent of z [T, N, H, W, C]; r, t: what `norm_act_pool_tangent` wrote for it.
        gz_dot: tangent of the gradient of z [T, N, H, W, C], overwritten.
        ggamma_dot, gbeta_dot: tangents of the parameters' gradients [T, C], overwritten.

    Returns:
        `gz_dot`.
    """
    _check(z, gamma, beta, pool, gamma_dot, gy_dot=gy_dot, gy=gy, **({"index": index} if pool else {}))
    _norm_act_pool_backward_tangent(
        *(gy_dot, gy, u, z, index, mean, rstd, gamma, beta, slope, r, t, pool),
        *(gz_dot, ggamma_dot, gbeta_dot, gamma_dot),
    )
    return gz_dot
