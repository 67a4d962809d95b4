"""Smooth functions of single numbers with two derivatives each: `pointwise` is f(x), `pointwise_slope` g·f′(x) and
`pointwise_bend` ġ·f′(x) + g·u·f″(x), so a gradient or a tangent, and the tangent of a gradient.

All tensors are contiguous and of one shape and type; `function` counts :data:`FUNCTIONS`, `a` is their number. Every op
writes into its last argument and returns nothing.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlpp_fast.ops._library import define

__all__ = ["FUNCTIONS"]

FUNCTIONS = ("gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "elu", "sine", "cosine")
"""The order of the native kernels; `a` is the scale of elu, and what sine and cosine multiply x by."""

_Orders = tuple[Tensor, Tensor, Tensor]


def _orders(x: Tensor, function: int, a: float) -> _Orders:
    """The function and its two derivatives."""
    name = FUNCTIONS[function]
    if name == "gelu":
        below = 0.5 * torch.erfc(x * -math.sqrt(0.5))
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        near = x.clamp(-40, 40)  # beyond, the density is zero, and so are its products
        return x * below, below + near * density, density * (2 - near * near)
    if name == "gelu_tanh":
        c, near = 2 * math.sqrt(2 / math.pi), x.clamp(-40, 40)
        s = torch.sigmoid(c * near * (1 + 0.044715 * near * near))
        d, dd, ds = c * (1 + 3 * 0.044715 * near * near), c * 6 * 0.044715 * near, s * (1 - s)
        return x * s, s + near * ds * d, ds * (2 * d + near * (dd + (1 - 2 * s) * d * d))
    if name == "silu":
        s, near = torch.sigmoid(x), x.clamp(-800, 800)
        ds = s * torch.sigmoid(-x)  # 1 - s would lose its digits
        return x * s, s + near * ds, ds * (2 + near * (1 - 2 * s))
    if name == "sigmoid":
        s, rest = torch.sigmoid(x), torch.sigmoid(-x)
        return s, s * rest, s * rest * (1 - 2 * s)
    if name == "tanh":
        t = torch.tanh(x)
        return t, 1 - t * t, -2 * t * (1 - t * t)
    if name == "elu":
        y = F.elu(x, a)
        slope = torch.where(x > 0, torch.ones_like(x), a * torch.exp(x))
        return y, slope, torch.where(x > 0, torch.zeros_like(x), slope)
    sine, cosine = torch.sin(a * x), torch.cos(a * x)
    first, then = (sine, cosine) if name == "sine" else (cosine, -sine)
    return first, a * then, -a * a * first


def _check(x: Tensor, *others: Tensor) -> None:
    for other in others:
        if other.shape != x.shape:
            raise ValueError(f"pointwise: expected {tuple(x.shape)}, got {tuple(other.shape)}")


def _value(x: Tensor, function: int, a: float, y: Tensor) -> None:
    _check(x, y)
    y.copy_(_orders(x, function, a)[0])


def _slope(x: Tensor, g: Tensor, function: int, a: float, out: Tensor) -> None:
    _check(x, g, out)
    out.copy_(g * _orders(x, function, a)[1])


def _bend(x: Tensor, g_dot: Tensor, g: Tensor, u: Tensor, function: int, a: float, out: Tensor) -> None:
    _check(x, g_dot, g, u, out)
    _, slope, curve = _orders(x, function, a)
    out.copy_(g_dot * slope + g * u * curve)


define("pointwise(Tensor x, int function, float a, Tensor(a!) y) -> ()", fallback=_value)
define("pointwise_slope(Tensor x, Tensor g, int function, float a, Tensor(a!) out) -> ()", fallback=_slope)
define(
    "pointwise_bend(Tensor x, Tensor g_dot, Tensor g, Tensor u, int function, float a, Tensor(a!) out) -> ()",
    fallback=_bend,
)
