"""Task-batched convolutions against PyTorch's own, one call a task, in the layout each is fastest with.

Operations count padding, as PyTorch does: the direct kernels skip it and Winograd needs fewer products, so a share of
the peak may exceed 100 %. ``MAMLPP_FAST_WINOGRAD=0`` times the direct kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Job, Subjects
from mamlpp_fast import ops as _ops  # noqa: F401 - registers them

# tasks, images, side, channels in, channels out
SHAPES = {
    "omniglot 28x28": (8, 20, 28, 1, 64),
    "omniglot 14x14": (8, 20, 14, 64, 64),
    "omniglot 7x7": (8, 20, 7, 64, 64),
    "omniglot 3x3": (8, 20, 3, 64, 64),
    "miniimagenet 84x84": (2, 5, 84, 3, 48),
    "miniimagenet 42x42": (2, 5, 42, 48, 48),
    "miniimagenet 21x21": (2, 5, 21, 48, 48),
    "miniimagenet 10x10": (2, 5, 10, 48, 48),
}
ORDERS = ("forward", "to input", "to weight", "gradients")
RESULTS = {"gradients": ("to input", "to weight")}
"""Of an order that has several: both gradients in one call, for a GPU, where it is one launch."""
AXES = {"to weight": (2, 3, 1, 0)}


def _torch_job(order: str, x: Tensor, w: Tensor, g: Tensor) -> Job:
    images = x.permute(0, 1, 4, 2, 3).contiguous()
    grads = g.permute(0, 1, 4, 2, 3).contiguous()
    filters = w.permute(0, 4, 3, 1, 2).contiguous()

    def backward(*which: int) -> list[Tensor]:
        mask = [i in which for i in range(3)]
        found = [
            torch.ops.aten.convolution_backward(
                gt, xt, wt, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
            )
            for gt, xt, wt in zip(grads, images, filters, strict=True)
        ]
        return [task[i] for i in which for task in found]

    jobs: dict[str, Callable[[], Sequence[Tensor]]] = {
        "forward": lambda: [F.conv2d(xt, wt, padding=1) for xt, wt in zip(images, filters, strict=True)],
        "to input": lambda: backward(0),
        "to weight": lambda: backward(1),
        "gradients": lambda: backward(0, 1),
    }
    return jobs[order]


def make(order: str, shape: tuple[int, ...], dtype: torch.dtype) -> Subjects:
    tasks, images, side, ci, co = shape
    x = torch.randn(tasks, images, side, side, ci).to(dtype)
    w = torch.randn(tasks, 3, 3, ci, co).to(dtype)
    g = torch.randn(tasks, images, side, side, co).to(dtype)
    outputs = {"forward": g, "to input": x, "to weight": w}
    results = RESULTS.get(order, (order,))
    outs = [torch.empty_like(outputs[result], dtype=torch.float32) for result in results]
    axes = [AXES.get(result, (0, 2, 3, 1)) for result in results for _ in range(tasks)]

    op, *operands = {
        "forward": (torch.ops.mamlpp_fast.task_conv2d, x, w, None, None),
        "to input": (torch.ops.mamlpp_fast.task_conv2d_to_input, g, w, None, None),
        "to weight": (torch.ops.mamlpp_fast.task_conv2d_to_weight, x, g, None, None),
        "gradients": (torch.ops.mamlpp_fast.task_conv2d_gradients, x, w, g, None, None, None),
    }[order]

    def ours() -> Sequence[Tensor]:
        op(*operands, 1, 1, *outs)
        return [t for out in outs for t in out]

    def arranged(job: Job) -> Job:
        return lambda: [t.permute(order) for t, order in zip(job(), axes, strict=True)]

    return Subjects(
        ours,
        arranged(_torch_job(order, x, w, g)),
        arranged(_torch_job(order, x.double(), w.double(), g.double())),
    )


def case(order: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    tasks, images, side, ci, co = shape
    pixels = tasks * images * side * side
    sizes = {"forward": pixels * co, "to input": pixels * ci, "to weight": tasks * 9 * ci * co}
    results = RESULTS.get(order, (order,))
    terms = {"forward": 9 * ci, "to input": 9 * co, "to weight": pixels // tasks}
    written = sum(sizes[result] for result in results)
    read = sum(sizes.values()) - (written if len(results) == 1 else 0)
    return Case(
        "task_conv2d" if len(results) == 1 else f"task_conv2d_{order}",
        order,
        f"{name}, {ci} to {co}, {tasks} tasks x {images}",
        "channels-last",
        str(dtype).removeprefix("torch."),
        partial(make, order, shape, dtype),
        read * dtype.itemsize + written * 4,
        2 * pixels * 9 * ci * co * len(results),
        max(terms[result] for result in results),
    )


def cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for name, shape in SHAPES.items():
            for order in ORDERS:
                if shape[3] <= 3 and order in ("to input", "gradients"):
                    continue
                if order not in RESULTS or torch.get_default_device().type != "cpu":
                    yield case(order, name, shape, dtype)
