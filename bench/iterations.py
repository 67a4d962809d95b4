"""Whole meta-iterations by engine, and how their cost grows.

    python -m bench.iterations [--workloads omniglot-5w1s,...] [--engines reference,autograd,fused,fused:bfloat16]
                               [--device cpu] [--seconds 20] [--scaling] [--json FILE]

Engines take turns iteration by iteration in one process; times are medians. Before any time is taken, an engine's
meta-gradient of the first batch must be right: float64 to 1e-9 of the reference for the engines that have it, and the
precision that is timed at most twice as far from float64 as PyTorch's own. (That can be far: five unrolled steps
through max-pooling amplify rounding.) Peak memory is taken in a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.harness import interleaved, keep, peak_flops
from mamlpp_fast.engine import Precision
from mamlpp_fast.learner import MAMLPlusPlus
from mamlpp_fast.workloads import WORKLOADS, Workload


def gradient(learner: MAMLPlusPlus, workload: Workload) -> torch.Tensor:
    learner.meta_gradient(workload.batch(0).to(learner.device, learner.dtype))
    parts = [p.grad for m in (learner.model, learner.rates) for p in m.parameters() if p.grad is not None]
    return torch.cat([p.detach().double().flatten() for p in parts])


@functools.cache
def reference(workload: Workload, precision: Precision, device: str = "cpu") -> torch.Tensor:
    """The reference engine's gradient, the same for every engine that is held against it."""
    return gradient(workload.learner("reference", precision, device), workload)


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
    scale = float(exact.norm())
    own = gradient(small.learner(engine, precision, device), small).to(exact)  # type: ignore[arg-type]
    if precision == "float32":
        yardstick = reference(small, precision, device)
    else:
        # The reference engine has no such precision; torch's autocast and tf32 are the autograd engine's.
        yardstick = gradient(small.learner("autograd", precision, device), small)  # type: ignore[arg-type]
    error, allowed = (float((g.to(exact) - exact).norm()) / scale for g in (own, yardstick))
    if error <= max(2 * allowed, 1e-3):
        return None
    return f"meta-gradient {error:.1e} from float64's, PyTorch's own {allowed:.1e}"


def peak_memory(workload: str, engine: str, precision: str, device: str) -> float:
    command = [
        sys.executable,
        "-m",
        "mamlpp_fast",
        "bench",
        workload,
        "--json",
        "--iters",
        "1",
        "--warmup",
        "1",
    ]
    options = ["--engine", engine, "--precision", precision, "--device", device]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["peak_memory_mib"])


def compare(workload: Workload, engines: list[str], device: str, seconds: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    jobs = {}
    for name in engines:
        engine, _, precision = name.partition(":")
        precision = precision or "float32"
        row = {"workload": workload.name, "engine": engine, "precision": precision}
        rows.append(row)
        wrong = fault(workload, engine, precision, device)
        if wrong is not None:
            row["fault"] = wrong
            continue
        learner = workload.learner(engine, precision, device)  # type: ignore[arg-type]
        batch = workload.batch(0).to(learner.device, learner.dtype)
        jobs[name] = lambda learner=learner, batch=batch: learner.meta_step(batch)
        row["peak_memory_mib"] = peak_memory(workload.name, engine, precision, device)
    times = interleaved(jobs, seconds, at_least=3)
    base, peak = times.get("reference"), peak_flops()
    for name, row in zip(engines, rows, strict=True):
        if name in times:
            row["ms"] = [1e3 * q for q in times[name].quartiles()]
            row["gflop_per_s"] = workload.gflop() / times[name].median
            row["share_of_peak"] = 1e9 * row["gflop_per_s"] / peak
            row["ratio"] = base.median / times[name].median if base else None
    return rows


def scaling(device: str, seconds: float) -> list[dict[str, Any]]:
    """The fused engine on omniglot-5w1s with one size changed at a time."""
    base = WORKLOADS["omniglot-5w1s"]
    series: dict[str, list[int]] = {
        "tasks": [2, 4, 8, 16, 32],
        "steps": [1, 2, 3, 5, 8],
        "ways": [5, 10, 20],
        "filters": [16, 32, 64, 96],
    }
    rows = []
    for what, values in series.items():
        jobs = {}
        for value in values:
            workload = dataclasses.replace(base, **{what: value})
            learner = workload.learner("fused", "float32", device)
            batch = workload.batch(0).to(learner.device, learner.dtype)
            jobs[str(value)] = lambda learner=learner, batch=batch: learner.meta_step(batch)
        for name, times in interleaved(jobs, seconds, at_least=3).items():
            value = int(name)
            rows.append(
                {
                    "varies": what,
                    "value": value,
                    "ms": 1e3 * times.median,
                    "ms_each": 1e3 * times.median / value,
                }
            )
    threads = torch.get_num_threads()
    learner = base.learner("fused", "float32", device)
    batch = base.batch(0).to(learner.device, learner.dtype)
    for count in range(1, threads + 1) if device == "cpu" else ():
        torch.set_num_threads(count)
        times = interleaved({"": lambda: learner.meta_step(batch)}, seconds / 4, at_least=3)[""]
        rows.append(
            {
                "varies": "threads",
                "value": count,
                "ms": 1e3 * times.median,
                "ms_each": 1e3 * times.median * count,
            }
        )
    torch.set_num_threads(threads)
    return rows


def describe(row: dict[str, Any]) -> str:
    if "varies" in row:
        return f"{row['varies']:8} {row['value']:4} {row['ms']:9.1f} ms {row['ms_each']:9.2f} ms each"
    name = f"{row['workload']:24} {row['engine']:10} {row['precision']:9}"
    if "fault" in row:
        return f"{name} FAILS ITS CHECK: {row['fault']}"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:5.2f} x reference"
    return (
        f"{name} {row['ms'][1]:9.1f} ms ({row['ms'][0]:.1f} to {row['ms'][2]:.1f}) {ratio} "
        f"{row['gflop_per_s']:7.1f} GFLOP/s {row['share_of_peak']:5.0%} of FMA peak, {row['peak_memory_mib']:6.0f} MiB"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--engines", default="reference,autograd,fused,fused:bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each workload")
    parser.add_argument("--scaling", action="store_true", help="how the cost grows, instead")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    if arguments.scaling:
        found = scaling(arguments.device, arguments.seconds)
        print(*map(describe, found), sep="\n")
    else:
        for name in arguments.workloads.split(","):
            rows = compare(WORKLOADS[name], arguments.engines.split(","), arguments.device, arguments.seconds)
            print(*map(describe, rows), sep="\n", flush=True)
            found += rows
            keep(arguments.json, found)
    keep(arguments.json, found)
    return int(any("fault" in row for row in found))


if __name__ == "__main__":
    sys.exit(main())
