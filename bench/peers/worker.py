"""One peer in a process of its own: answers lines of JSON on stdin by lines of JSON on stdout.

    python -m bench.peers.worker MODULE [ARGUMENT]

MODULE has ``build(problem, device, argument)``, which returns a function that computes the mean target loss and the
meta-gradients by name, and returns when the device is done. What a request asks:

    {"do": "setup", "path": NPZ, "device": "cpu", "dtype": "float32"}   {"import_seconds": of the libraries,
                                                                         "first_seconds": of building and the first
                                                                         run, "setup_cpu_seconds": of both}
    {"do": "check", "path": NPZ}                                        {} (the NPZ: the last run's loss and gradients)
    {"do": "time", "runs": N}                                           {"seconds": [...], "peak_mib": ...}

A request that fails is answered with {"error": ...}.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.problem import Problem

Step = Callable[[], tuple[Any, Mapping[str, Any]]]


class Worker:
    """The peer, once it is set up, and what may be asked of it."""

    def __init__(self, module: str, argument: str | None) -> None:
        self.module = module
        self.argument = argument
        self.step: Step | None = None
        self.result: tuple[Any, Mapping[str, Any]] | None = None
        self.device = "cpu"

    def setup(self, path: str, device: str, dtype: str) -> dict[str, Any]:
        self.device = device
        problem = Problem.load(Path(path), dtype)
        start, before = time.perf_counter(), sum(os.times()[:4])
        module = importlib.import_module(self.module)
        imported = time.perf_counter()
        self.step = module.build(problem, device, self.argument)
        self._run()
        # Importing apart, for the libraries may have to come from a slow disk. Processor time of all of it, compilers
        # included, tells whether the machine had other things to do.
        return {
            "import_seconds": imported - start,
            "first_seconds": time.perf_counter() - imported,
            "setup_cpu_seconds": sum(os.times()[:4]) - before,
        }

    def check(self, path: str) -> dict[str, Any]:
        if self.result is None:
            raise RuntimeError("setup comes first")
        loss, gradients = self.result
        np.savez(path, loss=_array(loss), **{f"gradient/{n}": _array(g) for n, g in gradients.items()})
        return {}

    def time(self, runs: int) -> dict[str, Any]:
        _forget_peak()
        seconds = []
        for _ in range(runs):
            start = time.perf_counter()
            self._run()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "peak_mib": self._peak_mib()}

    def _run(self) -> None:
        if self.step is None:
            raise RuntimeError("setup comes first")
        self.result = self.step()

    def _peak_mib(self) -> float | None:
        if self.device == "cpu":
            return _peak_resident_mib()
        if "jax" in sys.modules:
            found = sys.modules["jax"].devices("gpu")[0].memory_stats() or {}
            return float(found["peak_bytes_in_use"]) / 2**20 if "peak_bytes_in_use" in found else None
        return float(sys.modules["torch"].cuda.max_memory_allocated() / 2**20)


def _array(value: Any) -> np.ndarray[Any, Any]:
    """A tensor of any of the libraries as float64."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return np.asarray(value, dtype=np.float64)


def _forget_peak() -> None:
    """Lets the peak of resident memory start again, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_resident_mib() -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    # Answers alone go to the driver; whatever a library prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
    actions: dict[str, Callable[..., dict[str, Any]]] = {
        "setup": worker.setup,
        "check": worker.check,
        "time": worker.time,
    }
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = actions[request.pop("do")](**request)
        except Exception as error:  # whatever a library throws is its result here
            text = str(error).strip()
            answer = {"error": f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
