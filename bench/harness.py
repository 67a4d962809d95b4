"""What all benchmarks share: interleaved rounds, quartiles, the machine's ceilings and its description."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamlpp_fast import _native
from mamlpp_fast.benchmarking import cpu_name
from mamlpp_fast.train.build import versions

__all__ = ["Case", "Subjects", "Times", "check", "interleaved", "keep", "machine", "peak_flops", "rows"]

Job = Callable[[], Sequence[Tensor]]
_PEAK_ROUNDS = 100_000
GRAPH_REPEATS = 20


@dataclass(frozen=True)
class Subjects:
    """Three ways to the same tensors: ours, PyTorch's, and PyTorch's in float64 for the check.

    ``arrange`` makes of our result, for the check alone, what the others return.
    """

    ours: Job
    torch: Job
    exact: Job
    arrange: Callable[[Sequence[Tensor]], Sequence[Tensor]] = lambda result: result


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    Attributes:
        operation, order, size, layout, dtype: what a row of the table is known by.
        make: builds the tensors; called when the case's turn comes.
        bytes: the least that must be read and written.
        flops: multiply-adds counted twice; 0 for what memory bounds.
        terms: products that one sum takes.
    """

    operation: str
    order: str
    size: str
    layout: str
    dtype: str
    make: Callable[[], Subjects]
    bytes: int
    flops: int = 0
    terms: int = 1

    @property
    def name(self) -> str:
        return f"{self.operation} {self.order} {self.size} {self.layout} {self.dtype}"


@dataclass(frozen=True)
class Times:
    """Seconds of each round."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quartiles(self) -> list[float]:
        return statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else self.seconds * 3


def interleaved(
    jobs: dict[str, Callable[[], object]],
    seconds: float,
    *,
    at_least: int = 5,
    warm: bool = False,
) -> dict[str, Times]:
    """Times every job in turn, round after round, for about so many seconds after two rounds of warming up.

    ``warm`` runs each job once untimed right before, so that none starts on the caches that another left.
    On a GPU the clock runs from an idle device until it is idle again.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    times = {name: Times() for name in jobs}
    end = math.inf
    round_ = 0
    while round_ < at_least + 2 or time.perf_counter() < end:
        if round_ == 2:
            end = time.perf_counter() + seconds
        for name, job in jobs.items():
            if warm:
                job()
            wait()
            start = time.perf_counter()
            job()
            wait()
            if round_ >= 2:
                times[name].seconds.append(time.perf_counter() - start)
        round_ += 1
    return times


def captured(job: Callable[[], object], repeats: int = GRAPH_REPEATS) -> Callable[[], object]:
    """On a GPU, the job `repeats` times over as one CUDA graph: kernels without launches. On a CPU the job."""
    if not torch.cuda.is_available():
        return job
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            job()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            job()
    return graph.replay


def check(case: Case, subjects: Subjects) -> str | None:
    """What is wrong with our result, or None: each tensor at most twice as far from float64 as PyTorch's.

    Relative to the tensor's largest value, the rounding of any order of summation is always allowed: 4 ε, or √n ε / 2
    for n terms.
    """
    eps = torch.finfo(getattr(torch, case.dtype)).eps
    allowed = max(4.0, math.sqrt(case.terms) / 2) * eps
    results = zip(subjects.arrange(subjects.ours()), subjects.torch(), subjects.exact(), strict=True)
    for i, (ours, theirs, exact) in enumerate(results):
        scale = float(exact.abs().max()) or 1.0
        error, other = (float((t.double() - exact).abs().max()) / scale for t in (ours, theirs))
        if not error <= max(2 * other, allowed):
            return f"tensor {i}: error {error:.1e}, PyTorch's {other:.1e}"
    return None


def peak_flops(dtype: str = "float32") -> float:
    """Multiply-add peak [FLOP/s]: vector FMA in registers, all threads; on a GPU a large matrix product in tf32.

    In bfloat16 where the machine multiplies that, else in float32.
    """
    if torch.cuda.is_available():
        a, b, out = torch.randn(3, 8192, 8192).to(getattr(torch, dtype))
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        product = captured(lambda: torch.mm(a, b, out=out), 1)
        torch.backends.cuda.matmul.fp32_precision = before
        return 2 * 8192**3 / interleaved({"product": product}, 0.5)["product"].median
    ops = torch.ops.mamlpp_fast
    op = ops.bf16_peak if dtype == "bfloat16" and ops.bf16_peak(1) > 0 else ops.fma_peak
    per_call = op(1) * _PEAK_ROUNDS
    job = lambda: op(_PEAK_ROUNDS)  # noqa: E731
    one_thread = per_call / interleaved({"peak": job}, 0.2)["peak"].median
    return one_thread * torch.get_num_threads()


def rows(cases: Iterator[Case], seconds: float) -> Iterator[dict[str, Any]]:
    """A row for each case: the check's verdict and, where it passed, times, rates and shares of the ceilings.

    The ceiling of memory is what a copy of as many bytes reaches in the same rounds.
    """
    peaks = {dtype: peak_flops(dtype) for dtype in ("float32", "bfloat16")}
    for case in cases:
        torch.manual_seed(0)
        subjects = case.make()
        row: dict[str, Any] = {
            "operation": case.operation,
            "order": case.order,
            "size": case.size,
            "layout": case.layout,
            "dtype": case.dtype,
        }
        fault = check(case, subjects)
        if fault is not None:
            yield row | {"fault": fault}
            continue
        source = torch.empty(max(case.bytes // 2, 1), dtype=torch.uint8)
        source.random_()
        target = torch.empty_like(source)
        ours_job = captured(subjects.ours)
        times = interleaved(
            {
                "torch": captured(subjects.torch),
                "ours": ours_job,
                "copy": captured(lambda s=source, t=target: t.copy_(s)),  # type: ignore[misc]
                "again": ours_job,
            },
            seconds,
            warm=True,
        )
        if torch.cuda.is_available():
            times = {name: Times([s / GRAPH_REPEATS for s in t.seconds]) for name, t in times.items()}
        ours = times["ours"].median
        row |= {
            "ours_us": [1e6 * q for q in times["ours"].quartiles()],
            "torch_us": [1e6 * q for q in times["torch"].quartiles()],
            "ratio": times["torch"].median / ours,
            "noise": abs(times["again"].median / ours - 1),
            "bytes": case.bytes,
            "gb_per_s": case.bytes / ours / 1e9,
            "share_of_copy": times["copy"].median / ours,
        }
        if case.flops:
            peak = peaks["bfloat16" if case.dtype == "bfloat16" else "float32"]
            row |= {"gflop_per_s": case.flops / ours / 1e9, "share_of_peak": case.flops / ours / peak}
        yield row


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    native = _native.status()
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isa": native.isa,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(),
    }


def keep(path: Path | None, rows: Sequence[dict[str, Any]], **about: Any) -> None:
    """Writes rows and machine as JSON; called after every row, it leaves a run that is cut short what it has."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine() | about, "rows": rows}
        path.write_text(json.dumps(content, indent=1) + "\n")
