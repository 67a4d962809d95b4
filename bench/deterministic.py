"""What deterministic mode costs: whole meta-iterations with and without it, in turn.

python -m bench.deterministic [--seconds 20] [--json FILE]
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import torch

from bench.harness import interleaved, keep, parser_of
from bench.iterations import job, learner_of
from mamlpp_fast.engine.deterministic import deterministic_algorithms
from mamlpp_fast.workloads import WORKLOADS


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each engine")
    options = parser.parse_args()
    workload = WORKLOADS["omniglot-5w1s"]
    rows: list[dict[str, Any]] = []
    for name in ("fused", "fused:bfloat16", "autograd"):
        engine, _, precision = name.partition(":")
        jobs = {}
        for mode, context in (("default", nullcontext), ("deterministic", deterministic_algorithms)):
            with context():
                learner = learner_of(workload, name, "cpu")
            jobs[mode] = job(learner, workload)
        times = interleaved(jobs, options.seconds)
        row = {"workload": workload.name, "engine": engine, "precision": precision or "float32"}
        row |= {f"{mode}_ms": 1e3 * t.median for mode, t in times.items()}
        row["cost"] = times["deterministic"].median / times["default"].median - 1
        rows.append(row)
        keep(options.json, rows)
        print(f"{name}, {torch.get_num_threads()} threads: {row}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
