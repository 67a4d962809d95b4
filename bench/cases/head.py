"""Linear head and cross-entropy of 8 tasks, as the engine calls it, against PyTorch's two operations task by task.

Bytes: every operand of every call once. Operations: the matrix products, 1 forward, 2 backward, 2 in the tangent and 4
in the tangent of the backward; a softmax beside them costs little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Job, Subjects
from mamlpp_fast.ops.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_backward,
    linear_cross_entropy_backward_tangent,
    linear_cross_entropy_tangent,
)

# tasks, images, features, ways
SHAPES = ((8, 20, 64, 20), (8, 5, 64, 5), (2, 75, 1200, 5))
PRODUCTS = {"forward": 1, "forward+backward": 3, "forward+backward+double": 9}


def _torch_job(
    order: str, f: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, dots: list[Tensor]
) -> Job:
    leaves = [[t.detach().requires_grad_() for t in own] for own in zip(f, weight, bias, strict=True)]

    def losses() -> list[Tensor]:
        return [F.cross_entropy(F.linear(*own), y) for own, y in zip(leaves, labels, strict=True)]

    def forward() -> Sequence[Tensor]:
        with torch.no_grad():
            return losses()

    def backward() -> Sequence[Tensor]:
        return [g for loss, own in zip(losses(), leaves, strict=True) for g in torch.autograd.grad(loss, own)]

    def double() -> Sequence[Tensor]:
        """Hessian times the direction, task by task."""
        found: list[Tensor] = []
        for loss, own, u in zip(losses(), leaves, zip(*dots, strict=True), strict=True):
            gradients = torch.autograd.grad(loss, own, create_graph=True)
            found += torch.autograd.grad(gradients, own, u)
        return found

    jobs: dict[str, Callable[[], Sequence[Tensor]]] = {
        "forward": forward,
        "forward+backward": backward,
        "forward+backward+double": double,
    }
    return jobs[order]


def make(order: str, shape: tuple[int, ...]) -> Subjects:
    tasks, images, features, ways = shape
    f, f_dot = torch.randn(2, tasks, images, features)
    weight, weight_dot = torch.randn(2, tasks, ways, features) / features**0.5
    bias, bias_dot = torch.randn(2, tasks, ways)
    labels = torch.randint(ways, (tasks, images))
    logits, probabilities, gz, z_dot, gz_dot = torch.empty(5, tasks, images, ways)
    loss = torch.empty(tasks)
    gradients = [torch.empty_like(t) for t in (f, weight, bias)]
    tangents = [torch.empty_like(t) for t in (f, weight, bias)]

    def forward() -> Sequence[Tensor]:
        return linear_cross_entropy(f, weight, bias, labels, logits, probabilities, loss).unbind()

    def backward() -> Sequence[Tensor]:
        forward()
        linear_cross_entropy_backward(f, weight, labels, probabilities, gz, *gradients)
        return [g for own in zip(*gradients, strict=True) for g in own]

    def double() -> Sequence[Tensor]:
        backward()
        linear_cross_entropy_tangent(f_dot, weight_dot, bias_dot, f, weight, z_dot)
        linear_cross_entropy_backward_tangent(
            z_dot, f_dot, weight_dot, f, weight, probabilities, gz, gz_dot, *tangents
        )
        return [g for own in zip(*tangents, strict=True) for g in own]

    jobs = {"forward": forward, "forward+backward": backward, "forward+backward+double": double}
    tensors, dots = (f, weight, bias), [f_dot, weight_dot, bias_dot]
    return Subjects(
        jobs[order],
        _torch_job(order, *tensors, labels, dots),
        _torch_job(order, *(t.double() for t in tensors), labels, [t.double() for t in dots]),
    )


def case(order: str, shape: tuple[int, ...]) -> Case:
    tasks, images, features, ways = shape
    whole = tasks * (images * features + ways * features + ways)
    logits = tasks * images * ways
    numbers = {
        "forward": whole + 2 * logits,
        "forward+backward": 3 * whole + 4 * logits,
        "forward+backward+double": 8 * whole + 9 * logits,
    }
    return Case(
        "linear_cross_entropy",
        order,
        f"{tasks} tasks x {images}, {features} to {ways}",
        "contiguous",
        "float32",
        partial(make, order, shape),
        4 * numbers[order],
        PRODUCTS[order] * 2 * logits * features,
        terms=max(features, images * ways),
    )


def cases() -> Iterator[Case]:
    for shape in SHAPES:
        for order in PRODUCTS:
            yield case(order, shape)
