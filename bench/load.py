"""Meta-iterations beside busy processes: how much longer those of the textbook loop take, and the fused engine's.

    python -m bench.load [--workloads omniglot-5w1s,omniglot-20w1s] [--busy 0,1,2] [--rounds 7] [--json FILE]

A round times both engines beside each number of busy processes in turn; times are medians, growth is against the first.
Both engines' meta-gradients are checked first, as in `bench.iterations`. A busy process computes in Python without end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from bench.harness import Times, interleaved, keep, parser_of
from bench.iterations import fault, job, learner_of
from bench.tables import spread, table
from mamlpp_fast.workloads import WORKLOADS, Workload

ENGINES = ("reference", "fused")


# Ends by itself once the process that started it is gone: a benchmark that is killed leaves nothing computing.
BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): sum(range(100_000))"


class Neighbours:
    """Busy processes, as many as wanted."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []

    def set_busy(self, count: int) -> None:
        while len(self._processes) < count:
            self._processes.append(subprocess.Popen([sys.executable, "-c", BUSY, str(os.getpid())]))
        while len(self._processes) > count:
            process = self._processes.pop()
            process.kill()
            process.wait()


def under_load(workload: Workload, busy: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """A row for each number of busy processes: times of both engines, and their growth over the first number's.

    Raises:
        ValueError: where an engine's meta-gradient is wrong.
    """
    for name in ENGINES:
        if wrong := fault(workload, name, "float32", "cpu"):
            raise ValueError(f"{workload.name}, {name}: {wrong}")
    jobs = {name: job(learner_of(workload, name, "cpu"), workload) for name in ENGINES}
    interleaved(jobs, 0.0, at_least=0)  # two rounds that warm up, none timed
    times = {(count, name): Times() for count in busy for name in ENGINES}
    neighbours = Neighbours()
    try:
        for _ in range(rounds):
            for count in busy:
                neighbours.set_busy(count)
                for name in ENGINES:
                    start = time.perf_counter()
                    jobs[name]()
                    times[count, name].seconds.append(time.perf_counter() - start)
    finally:
        neighbours.set_busy(0)
    rows = []
    for count in busy:
        row: dict[str, Any] = {"workload": workload.name, "busy": count}
        for name in ENGINES:
            own = times[count, name]
            row[f"{name}_ms"] = [1e3 * q for q in own.quartiles()]
            row[f"{name}_growth"] = own.median / times[busy[0], name].median
        rows.append(row | {"growth_ratio": row["fused_growth"] / row["reference_growth"]})
    return rows


def describe(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        line = [f"{row['workload']}, {row['busy']} busy"]
        for name in ENGINES:
            line += [spread(row[f"{name}_ms"], 0), f"{row[f'{name}_growth']:.2f}"]
        lines.append([*line, f"{row['growth_ratio']:.2f}"])
    header = ["ms an iteration", "reference", "growth", "fused", "growth", "growth over the reference's"]
    return table(header, lines)


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--workloads", default="omniglot-5w1s,omniglot-20w1s")
    parser.add_argument("--busy", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    busy = [int(count) for count in arguments.busy.split(",")]
    rows: list[dict[str, Any]] = []
    for name in arguments.workloads.split(","):
        rows += under_load(WORKLOADS[name], busy, arguments.rounds)
        keep(arguments.json, rows)
        print(describe(rows), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
