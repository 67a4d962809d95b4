"""Task-batched convolutions against the machine's multiply-add peak and PyTorch's own convolution, one thread.

    python bench/bench_task_conv2d.py [--shapes omniglot-14,imagenet-42] [--seconds 1]

Every shape's kernels, PyTorch's (one call a task) and the peak take turns in one process; a column is a median over
processor time, so that other work on the machine disturbs it least. GFLOP/s count padding, as PyTorch does: the
direct kernels skip it and Winograd needs fewer products, so their share of the peak may exceed 100 %.
``MAMLPP_FAST_WINOGRAD=0`` times the direct kernels, ``=2`` and ``=4`` F(2x2) and F(4x4).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlpp_fast import _native
from mamlpp_fast.ops.task_conv2d import task_conv2d, task_conv2d_to_input, task_conv2d_to_weight

# tasks, images, side, channels in, channels out
SHAPES = {
    "omniglot-28": (8, 20, 28, 1, 64),
    "omniglot-14": (8, 20, 14, 64, 64),
    "omniglot-7": (8, 20, 7, 64, 64),
    "omniglot-3": (8, 20, 3, 64, 64),
    "imagenet-84": (2, 5, 84, 3, 48),
    "imagenet-42": (2, 5, 42, 48, 48),
    "imagenet-21": (2, 5, 21, 48, 48),
    "imagenet-10": (2, 5, 10, 48, 48),
    "imagenet-42-target": (1, 75, 42, 48, 48),
    "imagenet-10-target": (1, 75, 10, 48, 48),
}
_PEAK_ROUNDS = 200_000


def _torch_products(x: Tensor, w: Tensor, g: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The three products of all tasks by PyTorch, in the layout it is fastest with."""
    images = x.permute(0, 1, 4, 2, 3).contiguous()
    grads = g.permute(0, 1, 4, 2, 3).contiguous()
    filters = w.permute(0, 4, 3, 1, 2).contiguous()

    def backward(mask: list[bool], which: int) -> Tensor:
        return torch.stack(
            [
                torch.ops.aten.convolution_backward(
                    gt, xt, wt, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
                )[which]
                for gt, xt, wt in zip(grads, images, filters, strict=True)
            ]
        )

    return {
        "forward": lambda: torch.stack(
            [F.conv2d(xt, wt, padding=1) for xt, wt in zip(images, filters, strict=True)]
        ),
        "to input": lambda: backward([True, False, False], 0),
        "to weight": lambda: backward([False, True, False], 1),
    }


def _seconds(job: Callable[[], object]) -> float:
    start = time.thread_time()
    job()
    return time.thread_time() - start


def measure(name: str, seconds: float) -> None:
    """Prints the rows of one shape: GFLOP/s, share of the peak, ratio to PyTorch, largest relative error of both."""
    tasks, images, side, ci, co = SHAPES[name]
    x, w = torch.randn(tasks, images, side, side, ci), torch.randn(tasks, 3, 3, ci, co)
    g = torch.randn(tasks, images, side, side, co)
    out, to_input, to_weight = torch.empty_like(g), torch.empty_like(x), torch.empty_like(w)
    ours = {
        "forward": lambda: task_conv2d(x, w, out),
        "to input": lambda: task_conv2d_to_input(g, w, to_input),
        "to weight": lambda: task_conv2d_to_weight(x, g, to_weight),
    }
    theirs = _torch_products(x, w, g)
    exact = _torch_products(x[:1].double(), w[:1].double(), g[:1].double())
    gflop = 2e-9 * tasks * images * side * side * 9 * ci * co
    for product, job in ours.items():
        if ci <= 3 and product == "to input":
            continue
        reference = exact[product]()[0]
        axes = (2, 3, 1, 0) if product == "to weight" else (0, 2, 3, 1)
        scale = reference.abs().max()
        own_error = ((job()[0].double() - reference.permute(axes)).abs().max() / scale).item()
        torch_error = ((theirs[product]()[0].double() - reference).abs().max() / scale).item()
        times: list[list[float]] = [[], [], []]
        began = time.monotonic()
        while len(times[0]) < 5 or time.monotonic() - began < seconds:
            times[0].append(_seconds(job))
            times[1].append(_seconds(theirs[product]))
            times[2].append(_seconds(lambda: torch.ops.mamlpp_fast.fma_peak(_PEAK_ROUNDS)))
        mine, other, peak = map(statistics.median, times)
        peak_rate = torch.ops.mamlpp_fast.fma_peak(1) * _PEAK_ROUNDS / peak / 1e9
        print(
            f"{name:20} {product:10} {gflop / mine:7.1f} GFLOP/s {gflop / mine / peak_rate:6.0%} of peak"
            f" {other / mine:6.2f} x PyTorch   error {own_error:.1e} ({torch_error:.1e})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma-separated names")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each product")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    winograd = os.environ.get("MAMLPP_FAST_WINOGRAD") or "by shape"
    print(f"isa {_native.status().isa}, Winograd {winograd}")
    for name in arguments.shapes.split(","):
        measure(name, arguments.seconds)


if __name__ == "__main__":
    main()
