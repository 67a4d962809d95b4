"""The first layer of 8 or 2 tasks, as the engine calls it, against PyTorch's four operations task by task.

Ours never stores the feature map; PyTorch's times are those of convolution, batch norm, leaky ReLU and max-pool on
channels-last tensors. Bytes: images and pooled results, once a pass. Operations: the products of the convolution, once
an order and once more in the tangent of the backward.

Where rounding decides which pixel of a window is the largest, or its sign, no gradient passes; the tangent itself,
timed with the rest, is compared in the tests alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Job, Subjects, of_order, task_by_task
from mamlpp_fast.ops.conv_norm_act_pool import output_shape

EPS, SLOPE = 1e-5, 0.01
# Images [T, N, H, W, Ci], filters.
SHAPES = {"omniglot": ((8, 20, 28, 28, 1), 64), "miniimagenet": ((2, 5, 84, 84, 3), 48)}
PASSES = {"forward": 1, "forward+backward": 2, "forward+backward+double": 4}


def _torch_job(order: str, x: Tensor, w: Tensor, affine: list[Tensor], gy: Tensor, v: Tensor) -> Job:
    images = [t.permute(0, 3, 1, 2) for t in x]
    weights = [t.permute(3, 2, 0, 1).detach().requires_grad_() for t in w]
    rows = [p.detach().clone().requires_grad_() for p in affine]

    def forward() -> list[Tensor]:
        features = (F.conv2d(i, weight, padding=1) for i, weight in zip(images, weights, strict=True))
        normal = (F.batch_norm(z, None, None, *rows, True, 0.0, EPS) for z in features)
        return [F.max_pool2d(F.leaky_relu(z, SLOPE), 2) for z in normal]

    directions = [t.permute(3, 2, 0, 1) for t in v]
    return task_by_task(order, forward, weights, gy, directions, (2, 3, 1, 0), tangent=False)


def _clear(x: Tensor, w: Tensor, affine: list[Tensor]) -> Tensor:
    """1 where rounding decides neither a window's largest value nor its sign, else 0 [T, N, Ho, Wo, C]."""
    rows, found = [p.double() for p in affine], []
    for images, weight in zip(x.double(), w.double(), strict=True):
        z = F.conv2d(images.permute(0, 3, 1, 2), weight.permute(3, 2, 0, 1), padding=1)
        z = F.batch_norm(z, None, None, *rows, True, 0.0, EPS)
        first, second = z.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2).topk(2).values.unbind(-1)
        found.append(((first - second > 1e-5) & (first.abs() > 1e-5)).permute(0, 2, 3, 1))
    return torch.stack(found).to(x.dtype)


def make(order: str, images: tuple[int, ...], filters: int) -> Subjects:
    tasks, count, height, width, channels = images
    x, values = torch.randn(images), 9 * channels
    w, v, gw, gw_dot = torch.randn(4, tasks, 3, 3, channels, filters)
    padded = torch.empty(tasks, count, height + 2, width + 2, channels)
    moments = torch.empty(tasks, values + 2, values, dtype=torch.float64)
    small = output_shape(padded.shape, w.shape)
    y, uy, zero = torch.empty(small), torch.empty(small), torch.zeros(small)
    index, sums = torch.empty(small, dtype=torch.uint8), torch.empty(tasks, values, filters)
    affine = [torch.rand(filters) + 0.5, torch.randn(filters)]
    gy = torch.randn(small) * _clear(x, w, affine)
    mean, rstd, ggamma, gbeta, t = torch.empty(5, tasks, filters)
    ops = torch.ops.mamlpp_fast
    ops.patch_moments(x, 3, 3, 1, padded, moments)  # once a batch of tasks, not once a pass
    saved = (y, index, padded, moments, w, affine[0], rstd, SLOPE)

    def forward() -> Sequence[Tensor]:
        ops.conv_norm_act_pool(padded, moments, w, *affine, EPS, SLOPE, y, index, mean, rstd)
        return y.unbind()

    def backward() -> Sequence[Tensor]:
        forward()
        ops.conv_norm_act_pool_backward(gy, *saved, gw, sums, ggamma, gbeta)
        return gw.unbind()

    def double() -> Sequence[Tensor]:
        backward()
        ops.conv_norm_act_pool_tangent(v, *saved, uy, t)
        ops.conv_norm_act_pool_backward_tangent(zero, v, *saved, sums, t, gw_dot, ggamma, gbeta)
        return gw_dot.unbind()

    exact = (x.double(), w.double(), [a.double() for a in affine], gy.double(), v.double())
    return Subjects(
        of_order(order, forward, backward, double),
        _torch_job(order, x, w, affine, gy, v),
        _torch_job(order, *exact),
    )


def cases() -> Iterator[Case]:
    for name, (images, filters) in SHAPES.items():
        tasks, count, height, width, channels = images
        pooled = tasks * count * (height // 2) * (width // 2) * filters
        size = f"{name} {height}x{width}, {channels} to {filters}, {tasks} tasks x {count}"
        for order, passes in PASSES.items():
            yield Case(
                "conv_norm_act_pool",
                order,
                size,
                "channels-last",
                "float32",
                partial(make, order, images, filters),
                # Images in; pooled values and positions in or out.
                passes * (torch.Size(images).numel() * 4 + pooled * 5),
                passes * 2 * 4 * pooled * 9 * channels,
            )
