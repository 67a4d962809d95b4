"""PyTorch's own batch norm as the witness, and how the three orders are taken and compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad
from torch.testing import assert_close


def witness(x: Tensor, weight: Tensor, bias: Tensor, *, step: int | None = None, **options: Any) -> Tensor:
    """The operation in PyTorch's own batch norm, one task at a time."""
    if x.dim() == 5 and step is None and weight.dim() == 2:
        return torch.stack([witness(*own, **options) for own in zip(x, weight, bias, strict=True)])
    if x.dim() == 5:
        return torch.stack([witness(own, weight, bias, step=step, **options) for own in x])
    rows = (weight, bias) if step is None else (weight[step], bias[step])
    return _plain(x, *rows, **options)


def _plain(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, negative_slope: float | None = None
) -> Tensor:
    y = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    return y if negative_slope is None else F.leaky_relu(y, negative_slope)


def channels_last(x: Tensor) -> Tensor:
    axis = 2 if x.dim() == 5 else 1
    return x.movedim(axis, -1).contiguous().movedim(-1, axis)


def sliced(x: Tensor) -> Tensor:
    """The values of x in every other column of a larger tensor."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"), dtype=x.dtype)
    wide[..., 1::2] = x
    return wide[..., 1::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels-last": channels_last,
    "sliced": sliced,
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
}


def random(
    shape: tuple[int, ...], affine: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = torch.randn(shape) * 2 + 1, torch.randn(affine) + 0.5, torch.randn(affine)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def derivatives(
    f: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gy: Tensor,
    cotangents: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> dict[str, Tensor]:
    """y, its gradients for gy, and the gradients of those for cotangents of gx, gweight, gbias (None: not used)."""
    x, weight, bias, gy = (t.detach().requires_grad_() for t in (x, weight, bias, gy))
    y = f(x, weight, bias)
    first = grad(y, (x, weight, bias), gy, create_graph=True)
    used = [(g, c) for g, c in zip(first, cotangents, strict=True) if c is not None]
    second = grad([g for g, _ in used], (gy, x, weight), [c for _, c in used], allow_unused=True)
    names = ("y", "gx", "gweight", "gbias", "c_gy", "c_x", "c_weight")
    found = zip(names, (y, *first, *second), strict=True)
    like = {"c_weight": weight}
    return {n: (torch.zeros_like(like[n]) if t is None else t).detach() for n, t in found}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    """Relative to the largest element of each tensor: small elements are differences of large ones."""
    for name, e in expected.items():
        assert_close(
            found[name],
            e,
            rtol=rtol,
            atol=rtol * max(float(e.abs().max()), 1e-3),
            msg=lambda m, n=name: f"{n}: {m}",
        )
