"""Closed forms of batch norm's three orders in PyTorch, for any device, with the checks and layouts of all backends.

Shapes and names as in ``per_step_batch_norm.py``; formulas in ``docs/derivations/per_step_batch_norm.md``. Bodies of
operations run with autograd off, so nothing here is differentiated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check(x: Tensor, weight: Tensor, bias: Tensor, step: int | None) -> None:
    if x.dtype not in _TYPES:
        raise TypeError(f"x: expected float64, float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() not in (2, 4, 5):
        raise ValueError(f"x: expected shape [N, C], [N, C, H, W] or [T, N, C, H, W], got {list(x.shape)}")
    channels = x.shape[_channel_axis(x)]
    if step is not None:
        if weight.dim() != 2 or weight.shape[1] != channels:
            raise ValueError(
                f"weight: expected shape [steps, {channels}] with a step, got {list(weight.shape)}"
            )
        if not 0 <= step < weight.shape[0]:
            raise ValueError(f"step: expected 0 <= step < {weight.shape[0]}, got {step}")
    elif list(weight.shape) != [channels] and not (
        x.dim() == 5 and list(weight.shape) == [x.shape[0], channels]
    ):
        tasks = f" or [{x.shape[0]}, {channels}]" if x.dim() == 5 else ""
        raise ValueError(
            f"weight: expected shape [{channels}]{tasks} without a step, got {list(weight.shape)}"
        )
    if bias.shape != weight.shape:
        raise ValueError(f"bias: expected the shape {list(weight.shape)} of weight, got {list(bias.shape)}")
    if x.numel() // max(channels, 1) < (2 * x.shape[0] if x.dim() == 5 else 2):
        raise ValueError(f"x: expected more than one value per channel, got shape {list(x.shape)}")


def _channel_axis(x: Tensor) -> int:
    return 2 if x.dim() == 5 else 1


def statistics_shape(x: Tensor) -> tuple[int, ...]:
    return (x.shape[0], x.shape[2]) if x.dim() == 5 else (x.shape[1],)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def is_channels_last(x: Tensor) -> bool:
    return x.dim() > 2 and not x.is_contiguous() and x.stride(_channel_axis(x)) == 1


def dense(x: Tensor, channels_last: bool) -> Tensor:
    """x itself or a copy of it, without gaps, in one of the two memory orders."""
    if not channels_last:
        return x.contiguous()
    axis = _channel_axis(x)
    return x.movedim(axis, -1).contiguous().movedim(-1, axis)


def _empty_like(x: Tensor) -> Tensor:
    if not is_channels_last(x):
        return x.new_empty(x.shape)
    axis = _channel_axis(x)
    return x.movedim(axis, -1).new_empty(x.movedim(axis, -1).shape).movedim(-1, axis)


def row(values: Tensor, step: int | None) -> Tensor:
    return values if step is None else values[step]


def spread(values: Tensor, x: Tensor) -> Tensor:
    """[C] or [T, C] → the type of sums, broadcast over x."""
    values = values.to(_accumulator(x))
    if x.dim() == 5:
        return values[..., None, :, None, None] if values.dim() == 2 else values[:, None, None]
    return values[:, None, None] if x.dim() == 4 else values


def _means(values: Tensor) -> Tensor:
    """Mean over what is normalised together, kept for broadcasting."""
    return values.mean({2: (0,), 4: (0, 2, 3), 5: (1, 3, 4)}[values.dim()], keepdim=True)


def _flat(statistic: Tensor, x: Tensor) -> Tensor:
    return statistic.reshape(statistics_shape(x))


def to_affine(per_channel: Tensor, weight: Tensor, step: int | None) -> Tensor:
    """Gradient of the rows of weight, from those of every task: [T, C] or [C] → the shape and type of weight."""
    if per_channel.dim() == 2 and (step is not None or weight.dim() == 1):
        per_channel = per_channel.sum(0)
    if step is None:
        return per_channel.to(weight.dtype, copy=False)
    result = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    result[step] = per_channel
    return result


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, step: int | None, eps: float, slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check(x, weight, bias, step)
    x = dense(x, is_channels_last(x))
    wide = x.to(_accumulator(x))
    mean = _means(wide)
    centred = wide - mean
    var = _means(centred.square())
    rstd = torch.rsqrt(var + eps)
    z = centred * (spread(row(weight, step), x) * rstd) + spread(row(bias, step), x)
    y = z if slope == 1 else torch.where(z > 0, z, slope * z)
    return y.to(x.dtype), _flat(mean, x), _flat(rstd, x), _flat(var, x)


def _gated(
    gy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x̂, the gradient behind the leaky ReLU, and the leaky ReLU's derivative (None: 1)."""
    centred = x.to(_accumulator(x)) - spread(mean, x)
    normal = centred * spread(rstd, x)
    wide = gy.to(_accumulator(x))
    if slope == 1:
        return normal, wide, None
    # The same expression as in the forward pass, so that rounding cannot move an element across the kink.
    z = centred * (spread(weight, x) * spread(rstd, x)) + spread(bias, x)
    gate = torch.where(z > 0, torch.ones_like(z), slope)
    return normal, wide * gate, gate


def backward(
    gy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, step: int | None, slope: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    last = is_channels_last(x)
    x, gy = dense(x, last), dense(gy, last)
    gamma = row(weight, step)
    normal, g, _ = _gated(gy, x, gamma, row(bias, step), mean, rstd, slope)
    p, q = _means(g), _means(g * normal)
    gx = spread(gamma, x) * spread(rstd, x) * (g - p - normal * q)
    count = x.numel() // p.numel()
    return (
        gx.to(x.dtype),
        to_affine(_flat(count * q, x), weight, step),
        to_affine(_flat(count * p, x), bias, step),
    )


def double_backward(
    u: Tensor | None, a: Tensor | None, b: Tensor | None, gy: Tensor, x: Tensor, weight: Tensor, bias: Tensor,
    mean: Tensor, rstd: Tensor, step: int | None, slope: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    last = is_channels_last(x)
    x, gy = dense(x, last), dense(gy, last)
    u = torch.zeros_like(x) if u is None else dense(u, last)
    gamma = row(weight, step)
    normal, g, gate = _gated(gy, x, gamma, row(bias, step), mean, rstd, slope)
    wide = u.to(_accumulator(x))
    inverse = spread(rstd, x)
    scale = spread(gamma, x) * inverse
    p, q, r, t, w = _means(g), _means(g * normal), _means(wide), _means(wide * normal), _means(wide * g)
    c_g = scale * (wide - r - normal * t)
    c_x = -scale * inverse * ((w - r * p - 3 * t * q) * normal + t * (g - p) + q * (wide - r))
    if a is not None:
        ratio = spread(row(a, step), x)
        c_g = c_g + ratio * normal
        c_x = c_x + ratio * inverse * (g - p - normal * q)
    if b is not None:
        c_g = c_g + spread(row(b, step), x)
    count = x.numel() // p.numel()
    c_weight = _flat(count * (w - r * p - t * q) * inverse, x)
    c_gy = c_g if gate is None else c_g * gate
    return c_gy.to(x.dtype), c_x.to(x.dtype), to_affine(c_weight, weight, step)


def forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor, step: int | None, eps: float, slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check(x, weight, bias, step)
    mean, rstd, var = (x.new_empty(statistics_shape(x), dtype=_accumulator(x)) for _ in range(3))
    return _empty_like(x), mean, rstd, var


def backward_fake(gy: Tensor, x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(x), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def double_backward_fake(
    u: Tensor | None, a: Tensor | None, b: Tensor | None, gy: Tensor, x: Tensor, weight: Tensor, *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_like(x), _empty_like(x), weight.new_empty(weight.shape)
