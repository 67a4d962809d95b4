"""The last layer and cross-entropy of 8 tasks, as the engine calls them, against PyTorch's, task by task.

Bytes: features and weights once for each tensor of their size that an order reads or writes. Operations: the products
of N·F·O, one forward, two backward, two in the tangent, four in the backward's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Job, Subjects, of_order
from mamlpp_fast import ops as _ops  # noqa: F401 - registers them

# tasks, images, features, classes
SHAPES = {"omniglot": (8, 20, 64, 20), "miniimagenet": (2, 75, 1200, 5)}
# Products of N·F·O, and tensors of the features' and of the weights' size that are read or written.
PRODUCTS = {"forward": 1, "forward+backward": 3, "forward+backward+double": 9}
MOVED = {"forward": 1, "forward+backward": 3, "forward+backward+double": 8}


def _torch_job(order: str, leaves: Sequence[Tensor], dots: Sequence[Tensor], labels: Tensor) -> Job:
    own = [[t.detach().clone().requires_grad_() for t in tensor] for tensor in leaves]
    tasks = list(zip(*own, labels, strict=True))

    def losses() -> list[Tensor]:
        return [F.cross_entropy(torch.addmm(b, f, w), y) for f, w, b, y in tasks]

    def no_grad() -> Sequence[Tensor]:
        with torch.no_grad():
            return losses()

    def backward() -> Sequence[Tensor]:
        return [
            g
            for loss, (f, w, b, _) in zip(losses(), tasks, strict=True)
            for g in torch.autograd.grad(loss, (f, w, b))
        ]

    def double() -> Sequence[Tensor]:
        found: list[Tensor] = []
        for loss, (f, w, b, _), *along in zip(losses(), tasks, *dots, strict=True):
            gradients = torch.autograd.grad(loss, (f, w, b), create_graph=True)
            found += torch.autograd.grad(gradients, (f, w, b), along)
        return found

    return of_order(order, no_grad, backward, double)


def make(order: str, shape: tuple[int, int, int, int]) -> Subjects:
    tasks, images, features, classes = shape
    leaves = [
        torch.randn(s) for s in ((tasks, images, features), (tasks, features, classes), (tasks, classes))
    ]
    leaves[1] /= features**0.5
    dots, grads, grad_dots = ([torch.randn_like(t) for t in leaves] for _ in range(3))
    labels = torch.randint(classes, (tasks, images))
    target = F.one_hot(labels, classes).float()
    logits, p, gz, gz_dot = (torch.empty_like(target) for _ in range(4))
    scale, loss = torch.tensor(1 / images), torch.empty(tasks)
    f, weight, bias = leaves
    ops = torch.ops.mamlpp_fast

    def forward() -> Sequence[Tensor]:
        ops.linear_cross_entropy(f, weight, bias, target, scale, logits, p, gz, loss)
        return loss.unbind()

    def by_task(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t for parts in zip(*tensors, strict=True) for t in parts]

    def backward() -> Sequence[Tensor]:
        forward()
        ops.linear_cross_entropy_backward(gz, f, weight, *grads)
        return by_task(grads)

    def double() -> Sequence[Tensor]:
        backward()
        ops.linear_cross_entropy_tangent(*dots, f, weight, p, scale, gz_dot)
        ops.linear_cross_entropy_backward_tangent(gz_dot, gz, *dots[:2], f, weight, *grad_dots)
        return by_task(grad_dots)

    return Subjects(
        of_order(order, forward, backward, double),
        _torch_job(order, leaves, dots, labels),
        _torch_job(order, [t.double() for t in leaves], [t.double() for t in dots], labels),
    )


def case(order: str, name: str, shape: tuple[int, int, int, int]) -> Case:
    tasks, images, features, classes = shape
    return Case(
        "linear_cross_entropy",
        order,
        f"{name}, {features} to {classes}, {tasks} tasks x {images}",
        "rows",
        "float32",
        partial(make, order, shape),
        MOVED[order] * tasks * features * (images + classes) * 4,
        PRODUCTS[order] * 2 * tasks * images * features * classes,
        terms=max(features, images * classes),
    )


def cases() -> Iterator[Case]:
    for name, shape in SHAPES.items():
        for order in PRODUCTS:
            yield case(order, name, shape)
