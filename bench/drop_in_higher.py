"""Scripts written for ``higher``, before and after their import line is changed: one import, nothing else.

    python -m bench.peers.environments --only higher      # once
    python -m bench.drop_in_higher [--rounds 7] [--only NAME,...] [--json FILE]

Each script is one meta-gradient on an Omniglot-like Conv4. Either import runs in a process of its own. Losses,
meta-gradients and fast parameters must agree in float64 before any time is taken in float32, a run each in turn.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench.harness import Times, before_after, keep
from bench.peers.client import Failed, Peer, Worker
from bench.peers.environments import default_cache, python_of, recorded
from bench.peers.higher_scripts import SCRIPTS
from bench.peers.problem import Arrays, Sizes, make

__all__ = ["largest_error", "measure"]

_TOLERANCE = 1e-6


def largest_error(found: Arrays, exact: Arrays) -> tuple[float, str]:
    """The largest error of any tensor relative to its largest value, and where; a tensor on one side only is infinite.

    A bias in front of batch norm has no gradient but rounding noise: errors are relative to 1e-3 at least.
    """
    if found.keys() != exact.keys():
        return math.inf, ", ".join(sorted(found.keys() ^ exact.keys()))
    errors = {}
    for name, value in exact.items():
        error = float(abs(found[name] - value).max()) / max(float(abs(value).max()), 1e-3)
        errors[name] = math.inf if math.isnan(error) else error
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


def _worker(name: str, which: str, threads: int) -> Worker:
    python = Path(sys.executable)
    if which == "before":
        if (fault := recorded(default_cache(), "higher")["fault"]) is not None:
            raise Failed(fault)
        python = python_of(default_cache() / "higher")
    return Worker(Peer(which, "bench.peers.higher_scripts", f"{name}:{which}"), python, threads)


def measure(name: str, sizes: Sizes, rounds: int, threads: int) -> dict[str, Any]:
    """The row of a script.

    Raises:
        Failed: when the two differ, or one does not run.
    """
    row: dict[str, Any] = {"script": name, "ways": sizes.ways, "tasks": sizes.tasks, "filters": sizes.filters}
    with ExitStack() as stack:
        path = str(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "problem.npz")
        make(sizes).save(Path(path))
        results: dict[str, Arrays] = {}
        for which in ("before", "after"):
            with _worker(name, which, threads) as worker:
                worker.ask("setup", path=path, device="cpu", dtype="float64")
                results[which] = worker.computed()
        row["largest_error_float64"], row["error_in"] = largest_error(results["after"], results["before"])
        row["tensors"] = len(results["before"])
        if not row["largest_error_float64"] <= _TOLERANCE:
            raise Failed(f"{name}: error {row['largest_error_float64']:.1e} in {row['error_in']}")
        workers = {w: stack.enter_context(_worker(name, w, threads)) for w in ("before", "after")}
        times = {which: Times() for which in workers}
        for worker in workers.values():
            worker.ask("setup", path=path, device="cpu", dtype="float32")
            worker.ask("time", runs=1)
        for _ in range(rounds):
            for which, worker in workers.items():
                answer = worker.ask("time", runs=1)
                times[which].seconds.extend(answer["seconds"])
                row[f"{which}_peak_mib"] = max(row.get(f"{which}_peak_mib", 0), answer["peak_mib"])
    return row | before_after(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(SCRIPTS))
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--filters", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    sizes = Sizes(ways=arguments.ways, tasks=arguments.tasks, filters=arguments.filters)
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for name in arguments.only.split(","):
        try:
            rows.append(measure(name, sizes, arguments.rounds, arguments.threads))
        except Failed as error:
            raise SystemExit(f"{error}: no time is taken") from error
        print(rows[-1], flush=True)
        keep(arguments.json, rows, before=recorded(default_cache(), "higher")["versions"])


if __name__ == "__main__":
    main()
