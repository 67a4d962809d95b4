"""Loops of other people's kind before and after a line of theirs is changed, and the learner on the same problem.

    python -m bench.peers.environments --only higher,learn2learn       # once, for the scripts of these
    python -m bench.drop_in [--only TEXT;...] [--tasks 2] [--seconds 4] [--json FILE]

What each loop is stands in `bench.drop_in_loops`, but for the scripts of `higher` and `learn2learn`: these run with
either import line in a process of their own. The results of "before", "after" and of `MAMLPlusPlus`, where it computes
the same, must agree in float64 to 1e-9 (1e-8 where the inner optimizer is Adam) before any time is taken; times are in
float32, in turn. FILE keeps the lines that it has from earlier runs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import learn2learn_scripts
from bench.compare import name_of
from bench.drop_in_loops import LOOPS, Build
from bench.harness import Seconds, before_after, earlier, interleaved, keep, parser_of, taken
from bench.peers import higher_scripts
from bench.peers.client import Failed, Peer, Worker
from bench.peers.environments import default_cache, python_of, recorded
from bench.peers.problem import Arrays, Sizes, make

__all__ = ["Row", "largest_error", "measure", "rows"]

_ADAM = 1e-8
"""What a script with an inner Adam may differ by, which divides a bias's gradient, all rounding, by its own size."""


class Local:
    """A loop in this process."""

    def __init__(self, build: Build) -> None:
        self._build = build

    def setup(self, sizes: Sizes, dtype: str) -> None:
        self._step = self._build(sizes, getattr(torch, dtype))

    def found(self) -> Arrays:
        return {str(i): t.detach().numpy() for i, t in enumerate(self._step())}

    def __call__(self) -> None:
        self._step()


class Remote:
    """A script in a process of its own, which is its owner's to close.

    Args:
        iterations: that it makes each time it is timed.
    """

    def __init__(self, worker: Worker, iterations: int = 1) -> None:
        self.worker = worker
        self._iterations = iterations

    def setup(self, sizes: Sizes, dtype: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            make(sizes).save(Path(folder) / "problem.npz")
            self.worker.ask("setup", path=f"{folder}/problem.npz", device="cpu", dtype=dtype)

    def found(self) -> Arrays:
        return self.worker.computed()

    def __call__(self) -> Seconds:
        """Those of an iteration, as the script's process takes them: asking takes a few milliseconds."""
        (seconds,) = self.worker.ask("time", runs=1)["seconds"]
        return Seconds(float(seconds) / self._iterations)


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        jobs: makes "before", "after" and, where there is one, "learner"; the stack closes what they need.
    """

    script: str
    changed: str
    sizes: Sizes
    jobs: Callable[[ExitStack], dict[str, Local | Remote]]
    tolerance: float = 1e-9


def rows(tasks: int) -> Iterator[Row]:
    """All lines, with so many tasks where a loop has tasks; of large images one."""
    for loop in LOOPS:
        for sizes in loop.sizes:
            yield Row(
                loop.name,
                loop.changed,
                replace(sizes, tasks=tasks if sizes.image_size < 84 else 1),
                partial(_locals, loop.jobs),
            )
    for library, scripts, iterations in (
        ("higher", higher_scripts, 1),
        ("learn2learn", learn2learn_scripts, learn2learn_scripts.ITERATIONS),
    ):
        for name in scripts.SCRIPTS:
            jobs = partial(_remotes, library, scripts.__name__, name, iterations)
            tolerance = _ADAM if name == "maml-adam" else 1e-9
            yield Row(f"{library}: {name}", "import", Sizes(5, tasks), jobs, tolerance)


def _locals(builds: dict[str, Build], stack: ExitStack) -> dict[str, Local | Remote]:
    return {which: Local(build) for which, build in builds.items()}


def _remotes(
    library: str, module: str, name: str, iterations: int, stack: ExitStack
) -> dict[str, Local | Remote]:
    return {
        which: Remote(stack.enter_context(worker(library, module, name, which)), iterations)
        for which in ("before", "after")
    }


def worker(library: str, module: str, name: str, which: str) -> Worker:
    """The process of a script with one of the import lines: theirs in the environment of their library."""
    python = Path(sys.executable)
    if which == "before":
        if (fault := recorded(default_cache(), library)["fault"]) is not None:
            raise Failed(fault)
        python = python_of(default_cache() / library)
    return Worker(Peer(which, module, f"{name}:{which}"), python, torch.get_num_threads())


def largest_error(found: Arrays, exact: Arrays) -> tuple[float, str]:
    """The largest difference of any tensor relative to its largest value, and where; infinite for one on one side only.

    Or relative to 1e-4 of the largest of all, as the engines' own checks do it: the gradient of a bias in front of
    batch norm is zero, where PyTorch has rounding noise of the other gradients' size.
    """
    if found.keys() != exact.keys():
        return float("inf"), ", ".join(sorted(found.keys() ^ exact.keys()))
    floor = 1e-4 * max(float(abs(value).max()) for value in exact.values())
    errors = {
        name: float(abs(found[name] - value).max()) / max(float(abs(value).max()), floor, 1e-300)
        for name, value in exact.items()
    }
    worst = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    return (errors[worst] if errors[worst] == errors[worst] else float("inf")), worst


def measure(row: Row, seconds: float) -> dict[str, Any]:
    """Of a line: the difference in float64 and, where that is small enough, the times in float32; else the fault."""
    sizes = row.sizes
    about: dict[str, Any] = {"script": row.script, "changed": row.changed, "tasks": sizes.tasks}
    about |= {"ways": sizes.ways, "shots": sizes.shots, "size": sizes.image_size}
    with ExitStack() as stack:
        try:
            jobs = row.jobs(stack)
            for job in jobs.values():
                job.setup(replace(sizes, tasks=1, ways=min(sizes.ways, 5), shots=1), "float64")
            exact = jobs["before"].found()
            errors = {w: largest_error(job.found(), exact) for w, job in jobs.items() if w != "before"}
            error, where = max(errors.values())
            about |= {"largest_error_float64": error, "error_in": where, "tensors": len(exact)}
            if not error < row.tolerance:
                raise Failed(f"differs by {error:.1e} in {where}")
            for job in jobs.values():
                job.setup(sizes, "float32")
            times = interleaved({**jobs, "again": jobs["after"]}, seconds, at_least=3)
        except Failed as error_:
            return about | {"fault": str(error_)}
    about |= before_after(times)
    if "learner" in times:
        about["learner_ms"] = [1e3 * q for q in times["learner"].quartiles()]
        about["over_learner"] = times["after"].median / times["learner"].median
    return about


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--only", default="", help="lines with one of these texts in them, separated by semicolons"
    )
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each line")
    arguments = parser.parse_args()
    done = {name_of(row): row for row in earlier(arguments.json)}
    faults = 0
    for row in rows(arguments.tasks):
        if not any(text in f"{row.script}, {row.changed}" for text in arguments.only.split(";")):
            continue
        found = measure(row, arguments.seconds) | taken()
        done[name_of(found)] = found
        faults += "fault" in found
        print(json.dumps(found), flush=True)
        keep(arguments.json, list(done.values()))
    return faults


if __name__ == "__main__":
    sys.exit(main())
