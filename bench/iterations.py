"""Whole meta-iterations by engine, and how their cost grows.

    python -m bench.iterations [--workloads omniglot-5w1s,...] [--engines reference,autograd,fused,fused:bfloat16]
                               [--device cpu] [--seconds 20] [--passes N] [--scaling] [--json FILE]

Engines take turns iteration by iteration in one process; times are medians. Before any time is taken, an engine's
meta-gradient must be right: float64 to 1e-9 of the reference for the engines that have it, and the precision that is
timed at most twice as far from float64 as PyTorch's own, each on that of five batches where it is nearest. (On the
others it can be far: where rounding tips a value over a max-pool's or leaky ReLU's kink, the steps after it amplify
that. What is wrong is wrong on every batch.) Peak memory is taken in a process of its own. Operations are the
convolutions', bytes what the fused engine's calls name as operands; ceilings, taken in the same run, are the
multiply-add peak of the precision and the rate of a copy too large for any cache. FILE keeps the workloads that it has
from earlier runs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.harness import (
    Times,
    copy_bandwidth,
    earlier,
    interleaved,
    keep,
    parser_of,
    peak_flops,
    pool,
    taken,
)
from mamlpp_fast.engine import Precision
from mamlpp_fast.engine.fused.engine import FusedEngine
from mamlpp_fast.episodes import EpisodeBatch
from mamlpp_fast.learner import MAMLPlusPlus
from mamlpp_fast.workloads import WORKLOADS, Workload

_BATCHES = 5


def gradient(learner: MAMLPlusPlus, workload: Workload, seed: int = 0) -> torch.Tensor:
    """The meta-gradient of a workload's batch; see :func:`gradient_on`."""
    return gradient_on(learner, workload.batch(seed))


def gradient_on(learner: MAMLPlusPlus, batch: EpisodeBatch) -> torch.Tensor:
    """The meta-gradient of a batch, as one vector in float64."""
    learner.meta_gradient(batch.to(learner.device, learner.dtype))
    parts = [p.grad for m in (learner.model, learner.rates) for p in m.parameters() if p.grad is not None]
    return torch.cat([p.detach().double().flatten() for p in parts])


@functools.cache
def reference(workload: Workload, precision: Precision, seed: int = 0) -> torch.Tensor:
    """The reference engine's gradient, the same for every engine that is held against it."""
    return gradient(workload.learner("reference", precision, "cpu"), workload, seed)


def fault(workload: Workload, engine: str, precision: str, device: str) -> str | None:
    """What is wrong with an engine's meta-gradient on a small version of the workload, or None."""
    small = dataclasses.replace(workload, tasks=2, ways=min(workload.ways, 5))
    exact = reference(small, "float64")
    if precision == "float32":
        error = float(
            (gradient(small.learner(engine, "float64", device), small).to(exact) - exact).abs().max()
        )
        if not error <= 1e-9 * float(exact.abs().max()):
            return f"float64 meta-gradient off by {error:.1e}"
    # The reference engine has no other precisions; torch's autocast and tf32 are the autograd engine's.
    yardstick = "reference" if precision == "float32" else "autograd"
    learners = [small.learner(name, precision, device) for name in (engine, yardstick)]  # type: ignore[arg-type]
    nearest, allowed = math.inf, math.inf
    for seed in range(_BATCHES):
        exact = reference(small, "float64", seed=seed)
        own, theirs = (
            float((gradient(learner, small, seed).to(exact) - exact).norm() / exact.norm())
            for learner in learners
        )
        nearest, allowed = min(nearest, own), min(allowed, theirs)
        if nearest <= 1e-3:
            return None
    if nearest <= 2 * allowed:
        return None
    return f"meta-gradient {nearest:.1e} from float64's, PyTorch's own {allowed:.1e}"


def peak_memory(workload: Workload, engine: str, precision: str, device: str) -> float:
    """MiB of one iteration after the first: on a CPU of a process of its own, on a GPU what torch allocates for it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step = job(workload.learner(engine, precision, device), workload)  # type: ignore[arg-type]
        step()
        step()
        return float(torch.cuda.max_memory_allocated(device) - before) / 2**20
    options = f"--json --iters 1 --warmup 1 --engine {engine} --precision {precision} --device {device}"
    command = [sys.executable, "-m", "mamlpp_fast", "bench", workload.name, *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["peak_memory_mib"])


def nbytes(learner: MAMLPlusPlus, workload: Workload) -> int | None:
    """Bytes of all operands of an iteration's calls; known of the fused engine alone."""
    if not isinstance(learner.engine, FusedEngine):
        return None
    batch = workload.batch(0).to(learner.device, learner.dtype)
    prepared = learner.engine.prepare(batch, not workload.final, True)
    groups = prepared.form.total_tasks // prepared.form.tasks
    return groups * sum(i.nbytes for i in prepared.program.instructions)


class Ceilings:
    """What the device can do, taken once a run."""

    def __init__(self, device: str) -> None:
        self.copy = copy_bandwidth(device=device)
        self.peaks = {dtype: peak_flops(dtype, device) for dtype in ("float32", "bfloat16")}

    def rates(self, learner: MAMLPlusPlus, workload: Workload, times: Times) -> dict[str, Any]:
        """Times of iterations of this learner, what they amount to, and their shares of the ceilings."""
        ms = [1e3 * q for q in times.quartiles()]
        flops, moved = 1e9 * workload.gflop(), nbytes(learner, workload)
        peak = self.peaks["bfloat16" if learner.precision == "bfloat16" else "float32"]
        row = {
            "ms": ms,
            "flops": flops,
            "gflop_per_s": flops / times.median / 1e9,
            "peak_gflop_per_s": peak / 1e9,
            "share_of_peak": flops / times.median / peak,
        }
        if moved is not None:
            row |= {
                "bytes": moved,
                "gb_per_s": moved / times.median / 1e9,
                "copy_gb_per_s": self.copy / 1e9,
                "share_of_copy": moved / times.median / self.copy,
            }
        return row


def learner_of(workload: Workload, name: str, device: str) -> MAMLPlusPlus:
    """``name`` is an engine, or an engine, a colon and a precision."""
    engine, _, precision = name.partition(":")
    return workload.learner(engine, precision or "float32", device)  # type: ignore[arg-type]


def job(learner: MAMLPlusPlus, workload: Workload) -> Callable[[], object]:
    batch = workload.batch(0).to(learner.device, learner.dtype)
    return lambda: learner.meta_step(batch)


class Comparison:
    """The engines on one workload: checked once, timed in as many passes as asked, rates from all rounds."""

    def __init__(self, workload: Workload, engines: list[str], device: str) -> None:
        self.workload, self.device = workload, device
        self.rows: dict[str, dict[str, Any]] = {}
        self.times: dict[str, Times] = {}
        for name in engines:
            engine, _, precision = name.partition(":")
            precision = precision or "float32"
            row = {"workload": workload.name, "engine": engine, "precision": precision} | taken()
            self.rows[name] = row
            wrong = fault(workload, engine, precision, device)
            if wrong is None:
                row["peak_memory_mib"] = peak_memory(workload, engine, precision, device)
            else:
                row["fault"] = wrong

    def time(self, seconds: float, ceilings: Ceilings) -> list[dict[str, Any]]:
        """The rows, after another pass."""
        learners = {
            name: learner_of(self.workload, name, self.device)
            for name, row in self.rows.items()
            if "fault" not in row
        }
        jobs = {name: job(learner, self.workload) for name, learner in learners.items()}
        pool(self.times, interleaved(jobs, seconds, at_least=3))
        base = self.times.get("reference")
        for name, learner in learners.items():
            times = self.times[name]
            self.rows[name] |= ceilings.rates(learner, self.workload, times)
            self.rows[name]["ratio_quartiles"] = base.over(times) if base else None
        return list(self.rows.values())


SCALING = {
    "tasks": [2, 4, 8, 16, 32],
    "steps": [1, 2, 3, 5, 8],
    "ways": [2, 5, 10, 20],
    "filters": [16, 32, 64, 96, 128],
}


def scaling(device: str, seconds: float, passes: int, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """The fused engine on omniglot-5w1s with one size changed at a time; ratios to the unchanged, round by round.

    "Each" is the time divided by the value, multiplied for threads.
    """
    base = WORKLOADS["omniglot-5w1s"]
    threads = torch.get_num_threads()
    sweeps = {
        what: {value: dataclasses.replace(base, **{what: value}) for value in values}
        for what, values in SCALING.items()
    }
    if device == "cpu" and threads > 1:
        sweeps["threads"] = dict.fromkeys(range(1, threads + 1), base)
    pooled: dict[str, dict[str, Times]] = {what: {} for what in sweeps}
    for pass_ in range(passes):
        for what, workloads in sweeps.items():
            by_threads = what == "threads"
            learners = {w: learner_of(w, "fused", device) for w in set(workloads.values())}
            jobs = {str(value): job(learners[w], w) for value, w in workloads.items()}
            if by_threads:
                jobs = {name: functools.partial(_on_threads, int(name), step) for name, step in jobs.items()}
            times = pooled[what]
            pool(times, interleaved(jobs, seconds, at_least=3, warm=by_threads))
            torch.set_num_threads(threads)
            if pass_ < passes - 1:
                continue
            unchanged = times[str(threads if by_threads else getattr(base, what))]
            for value, workload in workloads.items():
                own = times[str(value)]
                rates = ceilings.rates(learners[workload], workload, own)
                if by_threads:
                    rates["share_of_peak"] *= threads / value  # of the threads that ran
                each = own.median * (value if by_threads else 1 / value)
                row = {"varies": what, "value": value, "ms_each": 1e3 * each}
                yield row | {"ratio_quartiles": own.over(unchanged)} | rates


def _on_threads(count: int, step: Callable[[], object]) -> None:
    torch.set_num_threads(count)
    step()


def describe(row: dict[str, Any]) -> str:
    if "varies" in row:
        return (
            f"{row['varies']:8} {row['value']:4} {row['ms'][1]:9.1f} ms {row['ms_each']:9.2f} ms each "
            f"{row['gflop_per_s']:7.1f} GFLOP/s {row['share_of_peak']:5.0%} of peak"
        )
    name = f"{row['workload']:24} {row['engine']:10} {row['precision']:9}"
    if "fault" in row:
        return f"{name} FAILS ITS CHECK: {row['fault']}"
    ratio = "" if row["ratio_quartiles"] is None else f"{row['ratio_quartiles'][1]:5.2f} x reference"
    return (
        f"{name} {row['ms'][1]:9.1f} ms ({row['ms'][0]:.1f} to {row['ms'][2]:.1f}) {ratio} "
        f"{row['gflop_per_s']:7.1f} GFLOP/s {row['share_of_peak']:5.0%} of peak, {row['peak_memory_mib']:6.0f} MiB"
    )


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--engines", default="reference,autograd,fused,fused:bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each workload or size, and pass")
    parser.add_argument("--passes", type=int, default=1, help="through all of them, times pooled")
    parser.add_argument("--scaling", action="store_true", help="how the cost grows, instead")
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    ceilings = Ceilings(arguments.device)
    if arguments.scaling:
        for row in scaling(arguments.device, arguments.seconds, arguments.passes, ceilings):
            print(describe(row), flush=True)
            found.append(row)
            keep(arguments.json, found)
        return 0
    comparisons: dict[str, Comparison] = {}
    workloads = arguments.workloads.split(",")
    before = earlier(arguments.json)
    for _ in range(arguments.passes):
        for name in workloads:
            if name not in comparisons:
                comparisons[name] = Comparison(
                    WORKLOADS[name], arguments.engines.split(","), arguments.device
                )
            for row in comparisons[name].time(arguments.seconds, ceilings):
                print(describe(row), flush=True)
            found = [row for comparison in comparisons.values() for row in comparison.rows.values()]
            kept = found + [row for row in before if row["workload"] not in comparisons]
            order = list(WORKLOADS)
            keep(arguments.json, sorted(kept, key=lambda row: order.index(row["workload"])))
    return int(any("fault" in row for row in found))


if __name__ == "__main__":
    sys.exit(main())
