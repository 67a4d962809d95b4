"""Batch norm with leaky ReLU through autograd, to three orders.

Bytes: forward reads x and writes y; backward reads x and gy and writes gx; double backward reads x, gy and u and writes
two gradients. Operations of an element: forward 7 (mean 1, variance 3, scale and shift 2, leaky ReLU 1), backward 10
(slope 1, normalised x 2, two sums 3, gradient 4), double backward 24.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Job, Subjects, of_order
from mamlpp_fast import ops

SHAPES = [(20, 64, 28, 28), (20, 64, 14, 14), (20, 64, 7, 7), (25, 48, 84, 84)]
SLOPE = 0.01
OPERATIONS = {"forward": 7, "forward+backward": 17, "forward+backward+double": 41}
TENSORS_MOVED = {"forward": 2, "forward+backward": 5, "forward+backward+double": 10}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.per_step_batch_norm(x, weight, bias, negative_slope=SLOPE)


def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.leaky_relu(F.batch_norm(x, None, None, weight, bias, True, 0.0, 1e-5), SLOPE)


def job(f: Callable[[Tensor, Tensor, Tensor], Tensor], order: str, tensors: Sequence[Tensor]) -> Job:
    """Everything up to `order`, on leaves x, weight, bias, gy and a direction u."""
    x, weight, bias, gy, u = (t.detach().clone() for t in tensors)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def forward() -> Sequence[Tensor]:
        with torch.no_grad():
            return [f(*leaves)]

    def backward() -> Sequence[Tensor]:
        return torch.autograd.grad(f(*leaves), leaves, gy)

    def double() -> Sequence[Tensor]:
        gy.requires_grad_()
        gx, *_ = torch.autograd.grad(f(*leaves), leaves, gy, create_graph=True)
        return torch.autograd.grad(gx, (gy, x, weight), u)

    return of_order(order, forward, backward, double)


def make(order: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Subjects:
    x, gy, u = (torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout]) for _ in range(3))
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = (torch.rand(shape[1]) + 0.5).to(wide), torch.randn(shape[1]).to(wide)
    tensors = [x, weight, bias, gy, u]
    return Subjects(
        job(ours, order, tensors),
        job(torchs, order, tensors),
        job(torchs, order, [t.double() for t in tensors]),
    )


def case(order: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Case:
    numbers = torch.Size(shape).numel()
    return Case(
        "per_step_batch_norm",
        order,
        str(list(shape)),
        layout,
        str(dtype).removeprefix("torch."),
        partial(make, order, shape, layout, dtype),
        TENSORS_MOVED[order] * numbers * dtype.itemsize,
        OPERATIONS[order] * numbers,
        # In float64 PyTorch's own is the measure: what remains is the order of summation.
        numbers // shape[1] if dtype == torch.float64 else 1,
    )


def cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for shape in SHAPES if dtype != torch.float64 else SHAPES[1:2]:
            for layout in LAYOUTS:
                for order in TENSORS_MOVED:
                    yield case(order, shape, layout, dtype)
