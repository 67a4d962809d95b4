"""Timing of whole meta-iterations: meta-gradients of one batch and the Adam update."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass

import torch

from mamlpp_fast.engine import EngineName, Precision
from mamlpp_fast.machine import peak_memory_mib
from mamlpp_fast.train.build import versions
from mamlpp_fast.workloads import Workload

__all__ = ["BenchResult", "bench", "cpu_name"]

_BATCHES = 4


@dataclass(frozen=True)
class BenchResult:
    """The times of a workload's iterations and what they amount to.

    Attributes:
        workload: its name.
        engine: the engine that ran.
        precision: its precision.
        device: the processor or GPU.
        seconds_per_iteration: ``min``, ``median`` and ``max`` over the iterations timed.
        iterations: iterations timed.
        peak_memory_mib: on a GPU what torch had allocated at most during them, on the CPU the process's peak
            resident memory.
        gflop_per_iteration: convolution work by :meth:`Workload.gflop`, the same for every engine.
        gflop_per_second: that over the median time.
        versions: of Python and the packages.
    """

    workload: str
    engine: str
    precision: str
    device: str
    seconds_per_iteration: dict[str, float]
    iterations: int
    peak_memory_mib: float
    gflop_per_iteration: float
    gflop_per_second: float
    versions: dict[str, str]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def describe(self) -> str:
        """Two lines for people."""
        t = self.seconds_per_iteration
        return (
            f"{self.workload}: {1e3 * t['median']:.1f} ms an iteration (min {1e3 * t['min']:.1f}, "
            f"max {1e3 * t['max']:.1f}; {self.iterations} iterations)\n"
            f"engine {self.engine}, {self.precision}, {self.device}: {self.gflop_per_second:.1f} GFLOP/s of "
            f"{self.gflop_per_iteration:.1f} GFLOP, peak memory {self.peak_memory_mib:.0f} MiB"
        )


def bench(
    workload: Workload,
    *,
    engine: EngineName = "auto",
    precision: Precision = "float32",
    device: torch.device | str = "cpu",
    iters: int = 10,
    warmup: int = 3,
) -> BenchResult:
    """Times ``iters`` iterations of a workload after ``warmup`` untimed ones, waiting for the device after each.

    Raises:
        ValueError: when the engine cannot serve the precision or device, or a count is out of range.
    """
    if iters < 1 or warmup < 0:
        raise ValueError(f"iters, warmup: expected iters >= 1 and warmup >= 0, got {iters} and {warmup}")
    learner = workload.learner(engine, precision, device)
    on_gpu = learner.device.type == "cuda"
    batches = [workload.batch(seed).to(learner.device, learner.dtype) for seed in range(_BATCHES)]
    seconds = []
    for i in range(-warmup, iters):
        if i == 0 and on_gpu:
            torch.cuda.reset_peak_memory_stats(learner.device)
        start = time.perf_counter()
        learner.meta_step(batches[i % _BATCHES])
        if on_gpu:
            torch.cuda.synchronize(learner.device)
        if i >= 0:
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    gflop = workload.gflop()
    return BenchResult(
        workload=workload.name,
        engine=learner.training_engine.name,
        precision=precision,
        device=torch.cuda.get_device_name(learner.device)
        if on_gpu
        else f"{cpu_name()}, {torch.get_num_threads()} threads",
        seconds_per_iteration={"min": min(seconds), "median": median, "max": max(seconds)},
        iterations=iters,
        peak_memory_mib=peak_memory_mib(learner.device),
        gflop_per_iteration=gflop,
        gflop_per_second=gflop / median,
        versions=versions(),
    )


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    name = "cpu"
    try:
        with open("/proc/cpuinfo") as file:
            name = next(
                (line.partition(":")[2].strip() for line in file if line.startswith("model name")), name
            )
    except OSError:
        pass
    return name
