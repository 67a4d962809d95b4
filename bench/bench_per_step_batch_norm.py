"""Batch norm with leaky ReLU: ours against PyTorch's, through autograd, in one process.

    python -m bench.bench_per_step_batch_norm [--threads N] [--rounds N] [--clock wall|cpu] [--json FILE]
    pytest bench/bench_per_step_batch_norm.py --benchmark-enable

Rounds of the two alternate. Bytes are the least an order can move: forward reads x and writes y, backward reads x
and gy and writes gx, double backward reads x, gy and u and writes two gradients; the share is of the bandwidth that
`Tensor.copy_` reaches on the same sizes. ``--clock cpu`` counts processor time, for one thread on a machine that others
use too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mamlpp_fast import ops

SHAPES = [(20, 64, 28, 28), (20, 64, 14, 14)]
SLOPE = 0.01
TENSORS_MOVED = {"forward": 2, "forward+backward": 5, "forward+backward+double": 10}


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.per_step_batch_norm(x, weight, bias, negative_slope=SLOPE)


def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.leaky_relu(F.batch_norm(x, None, None, weight, bias, True, 0.0, 1e-5), SLOPE)


def workload(
    f: Callable[[Tensor, Tensor, Tensor], Tensor], order: str, shape: tuple[int, ...], channels_last: bool
) -> Callable[[], object]:
    """One call of it computes everything up to `order`."""
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, gy, u = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(3))
    leaves = (
        x.requires_grad_(),
        torch.randn(shape[1]).requires_grad_(),
        torch.randn(shape[1]).requires_grad_(),
    )

    def forward() -> object:
        with torch.no_grad():
            return f(*leaves)

    def backward() -> object:
        return torch.autograd.grad(f(*leaves), leaves, gy)

    def double() -> object:
        gy.requires_grad_()
        gx, *_ = torch.autograd.grad(f(*leaves), leaves, gy, create_graph=True)
        return torch.autograd.grad(gx, (gy, x, leaves[1]), u)

    return {"forward": forward, "forward+backward": backward, "forward+backward+double": double}[order]


def medians(
    calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median seconds of each, taken in turn, after a fifth as many rounds of warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + rounds // 5):
        for name, call in calls.items():
            start = clock()
            call()
            if round_ >= rounds // 5:
                seconds[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure(rounds: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    rows = []
    for shape in SHAPES:
        source, target = torch.randn(2, *shape)
        size = source.numel() * source.element_size()
        for channels_last in (False, True):
            for order, tensors in TENSORS_MOVED.items():
                calls = {
                    name: workload(f, order, shape, channels_last)
                    for name, f in (("torch", torchs), ("ours", ours))
                }
                found = medians({**calls, "copy": lambda t=target, s=source: t.copy_(s)}, rounds, clock)
                bandwidth = 2 * size / found["copy"]
                rows.append(
                    {
                        "shape": list(shape),
                        "layout": "channels-last" if channels_last else "contiguous",
                        "order": order,
                        "torch_us": found["torch"] * 1e6,
                        "ours_us": found["ours"] * 1e6,
                        "ratio": found["torch"] / found["ours"],
                        "mib_moved": tensors * size / 2**20,
                        "share_of_copy_bandwidth": tensors * size / found["ours"] / bandwidth,
                    }
                )
    return rows


@pytest.mark.parametrize("f", [torchs, ours])
@pytest.mark.parametrize("order", TENSORS_MOVED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm(
    benchmark: Any, f: Callable[[Tensor, Tensor, Tensor], Tensor], order: str, shape: tuple[int, ...]
) -> None:
    benchmark.group = f"{order} {shape}"
    benchmark(workload(f, order, shape, channels_last=False))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = measure(arguments.rounds, time.process_time if arguments.clock == "cpu" else time.perf_counter)
    print(
        f"torch {torch.__version__}, {arguments.threads} threads, {arguments.clock} time, "
        f"medians of {arguments.rounds} rounds"
    )
    for row in rows:
        print(
            f"{row['shape']!s:18} {row['layout']:13} {row['order']:23} torch {row['torch_us']:8.0f} us  "
            f"ours {row['ours_us']:7.0f} us  {row['ratio']:5.2f}x  {row['mib_moved']:5.1f} MiB  "
            f"{row['share_of_copy_bandwidth']:4.0%} of copy"
        )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(
                {
                    "torch": torch.__version__,
                    "threads": arguments.threads,
                    "clock": arguments.clock,
                    "rows": rows,
                },
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
