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
    y: result [T, N, Ho, Wo, C]; gy: its gradient; gy_dot, uy: tangents of gy and y.
    gz, ggamma, gbeta: gradients of z and, task by task [T, C], of the parameters; ``_dot``: their tangents. A tangent
        of β changes none of them: the gate and the positions of the maxima are piecewise constant.
    r, t: mean(u) and mean(u·x̂) [T, C], written by the tangent, read by the backward's.
    group: neighbouring channels that share their statistics, over m·group elements; mean and rstd then repeat. With
        images as tasks that is group norm, and instance norm where it is 1. gamma and beta may have [R, C], each row
        for T / R neighbouring tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlpp_fast.ops._library import define_orders, launcher

_SAVED = "Tensor z, Tensor index, Tensor mean, Tensor rstd, Tensor gamma, Tensor beta, float slope"


def output_shape(shape: torch.Size | tuple[int, ...], pool: bool) -> tuple[int, int, int, int, int]:
    """Shape of the result for an input [T, N, H, W, C]."""
    tasks, images, height, width, channels = shape
    step = 2 if pool else 1
    return tasks, images, height // step, width // step, channels


def _check(
    *, z: Tensor, gamma: Tensor, beta: Tensor, pool: bool, gamma_dot: Tensor | None = None,
    beta_dot: Tensor | None = None, group: int = 1, **others: Any,
) -> None:  # fmt: skip
    """Raises unless the tensors belong together."""
    if z.dim() != 5:
        raise ValueError(f"z: expected [T, N, H, W, C], got {tuple(z.shape)}")
    tasks, images, height, width, channels = z.shape
    if group < 1 or channels % group != 0:
        raise ValueError(f"group: expected a divisor of {channels}, got {group}")
    if images * height * width * group < 2:
        raise ValueError(
            f"z: expected more than one element per task and channel to normalise, got {tuple(z.shape)}"
        )
    rows = {"gamma": gamma, "beta": beta, "gamma_dot": gamma_dot, "beta_dot": beta_dot}
    for name, parameter in rows.items():
        if parameter is None:
            continue
        *rows_of, last = parameter.shape
        if last != channels or len(rows_of) > 1 or any(r == 0 or tasks % r != 0 for r in rows_of):
            raise ValueError(
                f"{name}: expected [{channels}] or [{tasks}, {channels}], got {tuple(parameter.shape)}"
            )
    if pool and (height < 2 or width < 2):
        raise ValueError(f"z: expected at least 2x2 pixels to pool, got {tuple(z.shape)}")
    expected = output_shape(z.shape, pool)
    for name in ("y", "gy", "uy", "gy_dot", "index"):
        small = others.get(name)
        if small is not None and (pool or name != "index") and tuple(small.shape) != expected:
            raise ValueError(f"{name}: expected {expected}, got {tuple(small.shape)}")


def _spread(row: Tensor, dtype: torch.dtype) -> Tensor:
    """[C] or [T, C] as a factor of [T, N, H, W, C]."""
    return row.to(dtype)[..., None, None, None, :]


def _each(row: Tensor, tasks: int) -> Tensor:
    """[R, C] as [T, C]; [C] as it is."""
    return row if row.dim() == 1 else row.repeat_interleave(tasks // row.shape[0], 0)


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


def _mean(x: Tensor, group: int = 1) -> Tensor:
    """[T, C], over a channel's elements, or a group's."""
    return _common(x.mean((1, 2, 3)), group)


def _common(row: Tensor, group: int) -> Tensor:
    if group == 1:
        return row
    means: Tensor = row.unflatten(-1, (-1, group)).mean(-1)
    return means.repeat_interleave(group, -1)


def _normal(z: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (z.to(mean.dtype) - _spread(mean, mean.dtype)) * _spread(rstd, mean.dtype)


def _gate(normal: Tensor, gamma: Tensor, beta: Tensor, slope: float) -> Tensor:
    """Derivative of the leaky ReLU."""
    before = normal * _spread(gamma, normal.dtype) + _spread(beta, normal.dtype)
    return torch.where(before > 0, torch.ones_like(before), slope)


def _forward(
    z: Tensor, gamma: Tensor, beta: Tensor, eps: float, slope: float, pool: bool, y: Tensor, index: Tensor,
    mean: Tensor, rstd: Tensor, group: int = 1,
) -> None:  # fmt: skip
    gamma, beta = _each(gamma, len(z)), _each(beta, len(z))
    wide = z.to(mean.dtype)
    variance, level = torch.var_mean(wide, (1, 2, 3), correction=0)
    centre = _common(level, group)
    variance = _common(variance + (level - centre).square(), group)
    mean.copy_(centre)
    rstd.copy_((variance + eps).rsqrt())
    before = _normal(z, mean, rstd) * _spread(gamma, mean.dtype) + _spread(beta, mean.dtype)
    after = torch.where(before > 0, before, before * slope)
    if pool:
        index.copy_(_windows(after).argmax(-1))
    y.copy_(_pick(after, index, pool))


def _backward(
    gy: Tensor, z: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, slope: float,
    pool: bool, gz: Tensor, ggamma: Tensor, gbeta: Tensor, group: int = 1,
) -> None:  # fmt: skip
    gamma, beta = _each(gamma, len(z)), _each(beta, len(z))
    dtype = mean.dtype
    normal = _normal(z, mean, rstd)
    g = _place(gy.to(dtype), index, z, pool) * _gate(normal, gamma, beta, slope)
    e = _spread(gamma, dtype) * g
    p, q = _mean(e, group), _mean(e * normal, group)
    gz.copy_(_spread(rstd, dtype) * (e - _spread(p, dtype) - normal * _spread(q, dtype)))
    ggamma.copy_((g * normal).sum((1, 2, 3)))
    gbeta.copy_(g.sum((1, 2, 3)))


def _tangent(
    u: Tensor, z: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, slope: float,
    pool: bool, uy: Tensor, r: Tensor, t: Tensor, gamma_dot: Tensor | None = None, beta_dot: Tensor | None = None,
    group: int = 1,
) -> None:  # fmt: skip
    gamma, beta = _each(gamma, len(z)), _each(beta, len(z))
    dtype = mean.dtype
    normal, wide = _normal(z, mean, rstd), u.to(dtype)
    r.copy_(_mean(wide, group))
    t.copy_(_mean(wide * normal, group))
    scale = _spread(gamma.to(dtype) * rstd, dtype)
    dense = scale * (wide - _spread(r, dtype) - normal * _spread(t, dtype))
    if gamma_dot is not None:
        dense += _spread(_each(gamma_dot, len(z)), dtype) * normal
    if beta_dot is not None:
        dense += _spread(_each(beta_dot, len(z)), dtype)
    uy.copy_(_pick(dense * _gate(normal, gamma, beta, slope), index, pool))


def _backward_tangent(
    gy_dot: Tensor, gy: Tensor, u: Tensor, z: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor,
    beta: Tensor, slope: float, r: Tensor, t: Tensor, pool: bool, gz_dot: Tensor, ggamma_dot: Tensor,
    gbeta_dot: Tensor, gamma_dot: Tensor | None = None, group: int = 1,
) -> None:  # fmt: skip
    gamma, beta = _each(gamma, len(z)), _each(beta, len(z))
    dtype = mean.dtype
    normal, wide = _normal(z, mean, rstd), u.to(dtype)
    gate = _gate(normal, gamma, beta, slope)
    g = _place(gy.to(dtype), index, z, pool) * gate
    g_dot = _place(gy_dot.to(dtype), index, z, pool) * gate
    turned = _spread(rstd, dtype) * (wide - _spread(r, dtype) - normal * _spread(t, dtype))
    ggamma_dot.copy_((g_dot * normal + g * turned).sum((1, 2, 3)))
    gbeta_dot.copy_(g_dot.sum((1, 2, 3)))
    e, e_dot = _spread(gamma, dtype) * g, _spread(gamma, dtype) * g_dot
    if gamma_dot is not None:
        e_dot += _spread(_each(gamma_dot, len(z)), dtype) * g
    p, q, w = _mean(e, group), _mean(e * normal, group), _mean(e * wide, group)
    p_dot = _mean(e_dot, group)
    q_dot = _mean(e_dot * normal, group) + rstd * (w - r * p - t * q)
    # The pass over the dense grid is linear in normal, u and the two gradients: see the derivation.
    along_normal = _spread(rstd * (2 * rstd * q * t - q_dot), dtype) * normal
    along_u = _spread(rstd * rstd * q, dtype) * wide
    constant = _spread(rstd * (rstd * (q * r + t * p) - p_dot), dtype)
    gradients = _spread(rstd, dtype) * (e_dot - _spread(rstd * t, dtype) * e)
    gz_dot.copy_(gradients + along_normal - along_u + constant)


def _triton(name: str, closed: Callable[..., None]) -> Callable[..., None]:
    """The kernels have a statistic for each channel; where groups share one the closed form serves."""
    kernel = launcher("norm_act_pool", name)

    def launch(*args: Any) -> None:
        bound = signature(closed).bind(*args)
        bound.apply_defaults()
        *rest, group = bound.args
        if group == 1:
            kernel(*rest)
        else:
            closed(*rest, group)

    return launch


define_orders(
    "norm_act_pool",
    (
        _forward,
        "Tensor z, Tensor gamma, Tensor beta, float eps, float slope, bool pool, "
        "Tensor(a!) y, Tensor(b!) index, Tensor(c!) mean, Tensor(d!) rstd, int group=1",
    ),
    (
        _backward,
        f"Tensor gy, {_SAVED}, bool pool, Tensor(a!) gz, Tensor(b!) ggamma, Tensor(c!) gbeta, int group=1",
    ),
    (
        _tangent,
        f"Tensor u, {_SAVED}, bool pool, Tensor(a!) uy, Tensor(b!) r, Tensor(c!) t, "
        "Tensor? gamma_dot=None, Tensor? beta_dot=None, int group=1",
    ),
    (
        _backward_tangent,
        f"Tensor gy_dot, Tensor gy, Tensor u, {_SAVED}, Tensor r, Tensor t, bool pool, "
        "Tensor(a!) gz_dot, Tensor(b!) ggamma_dot, Tensor(c!) gbeta_dot, Tensor? gamma_dot=None, int group=1",
    ),
    check=_check,
    triton=_triton,
)
