"""The inner update of 8 tasks x the Conv4 parameters: one flat buffer against a loop over tasks and tensors.

Bytes: the update reads parameters and gradients and writes parameters; with gradients, the adjoint reads the cotangent
and the gradients and writes their gradient. Operations of an element: 2 forward, 3 backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

import mamlpp_fast as mf
from bench.harness import Case, Subjects
from mamlpp_fast.ops import lslr_update

TASKS, STEPS, STEP = 8, 5, 2
BUFFERS = {"forward": 3, "forward+backward": 6}
OPERATIONS = {"forward": 2, "forward+backward": 5}


def conv4_shapes() -> list[torch.Size]:
    """The parameters that adapt."""
    return [p.shape for name, p in mf.Conv4(1, 20).named_parameters() if "norm" not in name]


def make(order: str, shapes: list[torch.Size], tasks: int) -> Subjects:
    sizes = [shape.numel() for shape in shapes]
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    theta = torch.randn(sum(sizes)).repeat(tasks, 1)
    grad, cotangent = torch.randn_like(theta), torch.randn_like(theta)
    rates = torch.rand(len(shapes), STEPS)

    def parts(buffer: Tensor) -> list[Tensor]:
        return [p.view(s) for row in buffer for p, s in zip(row.split(sizes), shapes, strict=True)]

    def split(buffer: Tensor) -> list[Tensor]:
        return [p.clone().requires_grad_() for p in parts(buffer)]

    def loop(dtype: torch.dtype) -> Callable[[], Sequence[Tensor]]:
        own = [split(t.to(dtype)) for t in (theta, grad)]
        cotangents = [c.detach() for c in split(cotangent.to(dtype))]
        lr = rates.detach().to(dtype).requires_grad_()

        def update() -> list[Tensor]:
            return [p - lr[i % len(shapes), STEP] * g for i, (p, g) in enumerate(zip(*own, strict=True))]

        def forward() -> Sequence[Tensor]:
            with torch.no_grad():
                return update()

        def backward() -> Sequence[Tensor]:
            return torch.autograd.grad(update(), [*own[0], *own[1], lr], cotangents)

        return forward if order == "forward" else backward

    leaves = [t.clone().requires_grad_() for t in (theta, grad, rates)]

    def forward() -> Sequence[Tensor]:
        with torch.no_grad():
            return [lslr_update(*leaves, offsets, STEP)]

    def backward() -> Sequence[Tensor]:
        return torch.autograd.grad(lslr_update(*leaves, offsets, STEP), leaves, cotangent)

    def tensors(buffers: Sequence[Tensor]) -> list[Tensor]:
        return [*(p for flat in buffers[:2] for p in parts(flat)), *buffers[2:]]

    return Subjects(
        forward if order == "forward" else backward, loop(torch.float32), loop(torch.float64), tensors
    )


def case(order: str, shapes: list[torch.Size], tasks: int) -> Case:
    size = tasks * sum(shape.numel() for shape in shapes)
    return Case(
        "lslr_update",
        order,
        f"[{tasks}, {size // tasks}]",
        "flat",
        "float32",
        partial(make, order, shapes, tasks),
        BUFFERS[order] * size * 4,
        OPERATIONS[order] * size,
        terms=size,
    )


def cases() -> Iterator[Case]:
    for order in BUFFERS:
        yield case(order, conv4_shapes(), TASKS)
