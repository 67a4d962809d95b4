"""What all benchmarks share: interleaved rounds, quartiles, the machine's ceilings and its description."""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamlpp_fast import _native
from mamlpp_fast.benchmarking import cpu_name
from mamlpp_fast.ops._library import OPERATIONS, served_by
from mamlpp_fast.train.build import versions

RESULTS = Path(__file__).resolve().parent / "results"
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
        flops: arithmetic of the formulas, a multiply-add counted twice.
        terms: products that one sum takes.
    """

    operation: str
    order: str
    size: str
    layout: str
    dtype: str
    make: Callable[[], Subjects]
    bytes: int
    flops: int
    terms: int = 1

    @property
    def name(self) -> str:
        return f"{self.operation} {self.order} {self.size} {self.layout} {self.dtype}"


def parser_of(doc: str | None, *, json: bool = True, **options: Any) -> argparse.ArgumentParser:
    """The arguments of a script that its docstring describes: ``--json FILE`` for a start."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **options
    )
    if json:
        parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


ORDERS = ("forward", "forward+backward", "forward+backward+double")


def of_order(order: str, *jobs: Job) -> Job:
    """The job of this order, of one for each of :data:`ORDERS`."""
    return dict(zip(ORDERS, jobs, strict=True))[order]


def task_by_task(
    order: str,
    forward: Callable[[], list[Tensor]],
    leaves: Sequence[Tensor],
    gy: Tensor,
    directions: Sequence[Tensor],
    axes: tuple[int, ...],
    *,
    tangent: bool = True,
) -> Job:
    """PyTorch's own operations on the images of each task, through autograd.

    Args:
        forward: a result [N, C, Ho, Wo] for every task.
        leaves: what is differentiated by, one a task, and `directions` of its kind.
        gy: gradients of the results, channels-last [T, N, Ho, Wo, C].
        axes: those of a leaf as ours has them.
        tangent: the double backward returns the gradient by gy too.
    """
    last = (0, 2, 3, 1)
    gradients = [t.permute(0, 3, 1, 2).detach().requires_grad_() for t in gy]

    def no_grad() -> Sequence[Tensor]:
        with torch.no_grad():
            return [y.permute(last) for y in forward()]

    def backward() -> Sequence[Tensor]:
        passes = zip(forward(), leaves, gradients, strict=True)
        return [torch.autograd.grad(y, leaf, g)[0].permute(axes) for y, leaf, g in passes]

    def double() -> Sequence[Tensor]:
        """The gradient of <gradient, direction> by gy (the tangent) and by the leaf."""
        results = []
        for y, leaf, g, d in zip(forward(), leaves, gradients, directions, strict=True):
            (found,) = torch.autograd.grad(y, leaf, g, create_graph=True)
            by_gy, by_leaf = torch.autograd.grad(found, (g, leaf), d)
            results += [by_gy.permute(last)] * tangent + [by_leaf.permute(axes)]
        return results

    return of_order(order, no_grad, backward, double)


@dataclass(frozen=True)
class Times:
    """Seconds of each round."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quartiles(self) -> list[float]:
        return _quartiles(self.seconds)

    def over(self, other: Times) -> list[float]:
        """Quartiles of this job's time over another's, round by round: what slows both leaves it alone."""
        return _quartiles([a / b for a, b in zip(self.seconds, other.seconds, strict=True)])


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4) if len(values) > 1 else values * 3


class Seconds(float):
    """What a job returns that has taken the time itself."""


def interleaved(
    jobs: dict[str, Callable[[], object]], seconds: float, *, at_least: int = 5, warm: bool = False
) -> dict[str, Times]:
    """Times every job in turn, round after round, for about so many seconds after two rounds of warming up.

    What a job returns is its time where it is :class:`Seconds`. ``warm`` runs each job once untimed right before,
    so that none starts on the caches that another left.
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
            own = job()
            wait()
            if round_ >= 2:
                times[name].seconds.append(own if isinstance(own, Seconds) else time.perf_counter() - start)
        round_ += 1
    return times


def pool(into: dict[str, Times], times: dict[str, Times]) -> None:
    """Adds the rounds of another pass."""
    for name, found in times.items():
        into.setdefault(name, Times()).seconds.extend(found.seconds)


def before_after(times: dict[str, Times]) -> dict[str, Any]:
    """Of the jobs "before" and "after" a change: quartiles, and how many times as fast it is; the noise of "again"."""
    before, after = times["before"], times["after"]
    row = {
        "before_ms": [1e3 * q for q in before.quartiles()],
        "after_ms": [1e3 * q for q in after.quartiles()],
        "ratio": before.median / after.median,
        "ratio_quartiles": before.over(after),
    }
    if "again" in times:
        row["noise"] = abs(times["again"].median / after.median - 1)
    return row


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


def peak_flops(dtype: str = "float32", device: str | torch.device | None = None) -> float:
    """Multiply-add peak [FLOP/s]: vector FMA in registers, all threads; on a GPU a large matrix product in tf32.

    In bfloat16 where the machine multiplies that, in float64 half of float32's, else in float32. Without the native
    library a matrix product stands for it on a CPU too.
    """
    ops = torch.ops.mamlpp_fast
    if torch.cuda.is_available() or not hasattr(ops, "fma_peak"):
        size = 8192 if torch.cuda.is_available() else 1024
        a, b, out = torch.randn(3, size, size, device=device).to(getattr(torch, dtype))
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        product = captured(lambda: torch.mm(a, b, out=out), 1)
        torch.backends.cuda.matmul.fp32_precision = before
        return 2 * size**3 / interleaved({"product": product}, 0.5)["product"].median
    op = ops.bf16_peak if dtype == "bfloat16" and ops.bf16_peak(1) > 0 else ops.fma_peak
    per_call = op(1) * _PEAK_ROUNDS
    job = lambda: op(_PEAK_ROUNDS)  # noqa: E731
    one_thread = per_call / interleaved({"peak": job}, 0.2)["peak"].median
    return one_thread * torch.get_num_threads() / (2 if dtype == "float64" else 1)


def copy_bandwidth(device: str | torch.device | None = None) -> float:
    """Bytes a second, read and written, of a copy too large for any cache."""
    nbytes = 2**28
    source = torch.empty(nbytes // 2, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return nbytes / interleaved({"copy": lambda: target.copy_(source)}, 0.3)["copy"].median


def rows(cases: Sequence[Case], seconds: float, passes: int = 1) -> Iterator[dict[str, Any]]:
    """A row for each case: the check's verdict and, where it passed, times, rates and shares of the ceilings.

    All cases are gone through ``passes`` times, ``seconds`` each time, so that the quartiles hold what a shared
    machine does from minute to minute. The ceiling of memory is what a copy of as many bytes reaches in the same
    rounds. The roof is the lower of the multiply-add peak and that copy's rate times the operations a byte.
    """
    peaks = {dtype: peak_flops(dtype) for dtype in ("float32", "bfloat16", "float64")}
    faults: list[str | None] = []
    pooled: list[dict[str, Times]] = [{} for _ in cases]
    for pass_ in range(passes):
        for i, case in enumerate(cases):
            torch.manual_seed(0)
            subjects = case.make()
            if pass_ == 0:
                faults.append(check(case, subjects))
            if faults[i] is None:
                pool(pooled[i], _timed(case, subjects, seconds))
            if pass_ == passes - 1:
                yield _row(case, faults[i], pooled[i], peaks[case.dtype])


def _timed(case: Case, subjects: Subjects, seconds: float) -> dict[str, Times]:
    """Ours, PyTorch's and a copy of as many bytes in turn; ``again`` is ours once more."""
    source = torch.empty(max(case.bytes // 2, 1), dtype=torch.uint8)
    source.random_()
    target = torch.empty_like(source)
    ours = captured(subjects.ours)
    jobs: dict[str, Callable[[], object]] = {
        "torch": captured(subjects.torch),
        "ours": ours,
        "copy": captured(lambda: target.copy_(source)),
        "again": ours,
    }
    times = interleaved(jobs, seconds, warm=True)
    if torch.cuda.is_available():
        times = {name: Times([s / GRAPH_REPEATS for s in t.seconds]) for name, t in times.items()}
    return times


def _row(case: Case, fault: str | None, times: dict[str, Times], peak: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "operation": case.operation,
        "order": case.order,
        "size": case.size,
        "layout": case.layout,
        "dtype": case.dtype,
        "backend": backend_of(case.operation),
    }
    if fault is not None:
        return row | {"fault": fault}
    ours, copy = times["ours"].median, times["copy"].median
    roof = min(peak, case.flops / copy)
    return row | {
        "ours_us": [1e6 * q for q in times["ours"].quartiles()],
        "torch_us": [1e6 * q for q in times["torch"].quartiles()],
        "ratio": times["torch"].median / ours,
        "ratio_quartiles": times["torch"].over(times["ours"]),
        "noise": abs(times["again"].median / ours - 1),
        "bytes": case.bytes,
        "flops": case.flops,
        "gb_per_s": case.bytes / ours / 1e9,
        "gflop_per_s": case.flops / ours / 1e9,
        "copy_gb_per_s": case.bytes / copy / 1e9,
        "peak_gflop_per_s": peak / 1e9,
        "share_of_copy": copy / ours,
        "share_of_peak": case.flops / ours / peak,
        "share_of_roof": case.flops / ours / roof,
    }


def backend_of(operation: str) -> str:
    """What serves an operation on the device in use: ``native``, ``triton`` or ``python``, the closed form."""
    key = "CUDA" if torch.cuda.is_available() else "CPU"
    return served_by(operation, key) if operation in OPERATIONS else "python"


@functools.cache
def _commit() -> str | None:
    """The commit measured, with a plus where files other than results had changed."""
    git = ["git", "-C", str(RESULTS.parent.parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", ".", ":!bench/results", ":!docs", ":!*.md"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout else "")


def machine() -> dict[str, Any]:
    """What the numbers were taken on, when, and of which commit."""
    native = _native.status()
    return {
        "name": machine_name(),
        "cpu": cpu_name(),
        "vendor": _vendor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isa": native.isa,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": _commit(),
    }


def machine_name() -> str:
    """The folder under bench/results that this machine's results go to."""
    if torch.cuda.is_available():
        return "gpu-" + _slug(torch.cuda.get_device_name())
    return _slug(f"cpu-{len(os.sched_getaffinity(0))}-{_vendor()}-{_native.status().isa or 'no-native'}")


def _vendor() -> str:
    """``intel``, ``amd``, or what the system calls the processor's maker."""
    try:
        found = re.search(r"^vendor_id\s*:\s*(\S+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    name = found[1] if found else cpu_name()
    return {"GenuineIntel": "intel", "AuthenticAMD": "amd"}.get(name, _slug(name))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def taken() -> dict[str, Any]:
    """When a row is measured, and of which commit."""
    here = machine()
    return {key: here[key] for key in ("date", "commit")}


def earlier(path: Path | None) -> list[dict[str, Any]]:
    """The rows that a file has, each with when it was taken."""
    if path is None or not path.exists():
        return []
    content = json.loads(path.read_text())
    then = {key: content["machine"].get(key) for key in ("date", "commit")}
    return [then | row for row in content["rows"]]


def by_rows(value: Any) -> str:
    """JSON in which each row of a list is a line: measured again, it is a line of a diff."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
    if isinstance(value, dict) and any(isinstance(v, dict | list) for v in value.values()):
        return "{\n" + ",\n".join(f"{json.dumps(k)}: {by_rows(v)}" for k, v in value.items()) + "\n}"
    return json.dumps(value)


def keep(path: Path | None, rows: Sequence[dict[str, Any]], **about: Any) -> None:
    """Writes rows and machine as JSON; called after every row, it leaves a run that is cut short what it has."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine() | about, "rows": rows}
        path.write_text(by_rows(content) + "\n")
