"""Batch norm + leaky ReLU + max-pool of 8 tasks, as the engine calls it, against PyTorch's three operations.

PyTorch runs task by task through autograd on channels-last tensors. Bytes: forward reads z twice over (statistics, then
values) and writes the pooled result with its index; backward and the two tangents likewise read a dense operand once a
pass. Operations of an element of z: forward 8, backward 8, the tangents 24 together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Job, Subjects, of_order, task_by_task
from mamlpp_fast.ops.norm_act_pool import output_shape

EPS, SLOPE = 1e-5, 0.01
OPERATIONS = {"forward": 8, "forward+backward": 16, "forward+backward+double": 40}
# Dense tensors' worth of bytes: a pooled value is a quarter of one, its index a sixteenth.
_DENSE = {
    "forward": 2.3125,
    "forward+backward": 2.3125 + 3.625,
    "forward+backward+double": 2.3125 + 3.625 + 10.4375,
}


def _torch_job(order: str, z: Tensor, gamma: Tensor, beta: Tensor, gy: Tensor, u: Tensor) -> Job:
    images = [t.permute(0, 3, 1, 2).detach().requires_grad_() for t in z]
    affine = [p.detach().clone().requires_grad_() for p in (gamma, beta)]

    def forward() -> list[Tensor]:
        normal = (F.batch_norm(x, None, None, *affine, True, 0.0, EPS) for x in images)
        return [F.max_pool2d(F.leaky_relu(x, SLOPE), 2) for x in normal]

    directions = [t.permute(0, 3, 1, 2) for t in u]
    return task_by_task(order, forward, images, gy, directions, (0, 2, 3, 1))


def make(order: str, shape: tuple[int, ...]) -> Subjects:
    tasks, channels = shape[0], shape[-1]
    small = output_shape(shape, True)
    z, u, gz, hz = (torch.randn(shape) for _ in range(4))
    gy, y, uy = (torch.randn(small) for _ in range(3))
    zero = torch.zeros(small)
    index = torch.empty(small, dtype=torch.uint8)
    gamma, beta = torch.rand(channels) + 0.5, torch.randn(channels)
    mean, rstd, ggamma, gbeta, r, t = (torch.empty(tasks, channels) for _ in range(6))
    saved = (z, index, mean, rstd, gamma, beta, SLOPE)
    ops = torch.ops.mamlpp_fast

    def forward() -> Sequence[Tensor]:
        ops.norm_act_pool(z, gamma, beta, EPS, SLOPE, True, y, index, mean, rstd)
        return y.unbind()

    def backward() -> Sequence[Tensor]:
        forward()
        ops.norm_act_pool_backward(gy, *saved, True, gz, ggamma, gbeta)
        return gz.unbind()

    def double() -> Sequence[Tensor]:
        backward()
        ops.norm_act_pool_tangent(u, *saved, True, uy, r, t)
        ops.norm_act_pool_backward_tangent(zero, gy, u, *saved, r, t, True, hz, ggamma, gbeta)
        return [part for pair in zip(uy, hz, strict=True) for part in pair]

    tensors = (z, gamma, beta, gy, u)
    return Subjects(
        of_order(order, forward, backward, double),
        _torch_job(order, *tensors),
        _torch_job(order, *(tensor.double() for tensor in tensors)),
    )


def case(order: str, shape: tuple[int, ...]) -> Case:
    dense = torch.Size(shape).numel()
    return Case(
        "norm_act_pool",
        order,
        str(list(shape)),
        "channels-last",
        "float32",
        partial(make, order, shape),
        int(_DENSE[order] * dense * 4),
        OPERATIONS[order] * dense,
    )


def cases() -> Iterator[Case]:
    for side in (28, 14, 7):
        for order in _DENSE:
            yield case(order, (8, 20, side, side, 64))
