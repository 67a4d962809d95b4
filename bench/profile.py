"""Where an iteration of the fused engine spends its time, by step of the network and by operation.

    python -m bench.profile [WORKLOAD] [--precision float32] [--device D] [--json FILE]

Every call of the program is timed by itself, and the device waited for after each: on a GPU the sum is more than the
captured graph takes, and the difference is launches.
"""

from __future__ import annotations

from collections import Counter

import torch

from bench.harness import interleaved, keep, parser_of
from mamlpp_fast.engine.fused.engine import FusedEngine
from mamlpp_fast.workloads import WORKLOADS


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("workload", nargs="?", default="omniglot-20w1s", choices=list(WORKLOADS))
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    workload = WORKLOADS[arguments.workload]
    learner = workload.learner("fused", arguments.precision, arguments.device)
    batch = workload.batch(0).to(learner.device, learner.dtype)
    whole = interleaved({"": lambda: learner.meta_step(batch)}, 2.0, at_least=3)[""].median
    assert isinstance(learner.engine, FusedEngine)
    prepared = learner.engine.prepare(batch, not workload.final, True)
    groups = prepared.form.total_tasks // prepared.form.tasks
    seconds = {key: s * groups for key, s in prepared.program.profile().items()}
    flops: Counter[tuple[str, str]] = Counter()
    for i in prepared.program.instructions:
        flops[i.label, i.name] += i.flops * groups
    by_call: Counter[tuple[str, str]] = Counter()
    for (_, label, name), s in seconds.items():
        by_call[label, name] += s  # type: ignore[assignment]
    total = sum(by_call.values())
    print(
        f"{workload.name}, {arguments.precision}: {1e3 * whole:.2f} ms an iteration, {1e3 * total:.2f} ms call by call"
    )
    rows = []
    for (label, name), s in by_call.most_common():
        rate = flops[label, name] / s / 1e9
        rows.append({"step": label, "call": name, "ms": 1e3 * s, "gflop_per_s": rate})
        print(
            f"{label:24} {name:36} {1e3 * s:9.3f} ms {s / total:5.1%} {f'{rate:8.0f} GFLOP/s' if rate else ''}"
        )
    keep(arguments.json, rows, iteration_ms=1e3 * whole)


if __name__ == "__main__":
    main()
