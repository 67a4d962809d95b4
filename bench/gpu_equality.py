"""Whether the fused engine on a GPU gives what the reference gives, captured and replayed, step after step.

    python -m bench.gpu_equality [--device cuda] [--tiny] [--first]

Each check stands by itself: one that raises is reported like one that fails. ``--first`` is a capture and a replay of
one workload alone.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator

import torch

from bench.harness import parser_of
from bench.iterations import fault, gradient
from mamlpp_fast.workloads import WORKLOADS, Workload


def replays(workload: Workload, device: str) -> str | None:
    """The first call captures, the second replays; a third runs another batch in between."""
    learner = workload.learner("fused", "float32", device)
    first = gradient(learner, workload)
    learner.meta_gradient(workload.batch(1).to(learner.device, learner.dtype))
    again = gradient(learner, workload)
    # Parameters have not moved; running statistics take no part in a training pass.
    return (
        None if torch.equal(first, again) else f"replay differs by {float((first - again).abs().max()):.1e}"
    )


def steps_together(workload: Workload, device: str) -> str | None:
    """Ten Adam steps in float64 against the reference."""
    ours, theirs = workload.learner("fused", "float64", device), workload.learner("reference", "float64")
    for seed in range(10):
        for learner in (ours, theirs):
            learner.meta_step(workload.batch(seed).to(learner.device, learner.dtype))
    worst = max(
        float((a.detach().cpu() - b.detach()).abs().max())
        for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True)
    )
    return None if worst < 1e-6 else f"parameters apart by {worst:.1e}"


def checks(device: str, tiny: bool) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """The cheapest first: those against the reference in float64 wait for a CPU."""
    workloads = [WORKLOADS[name] for name in (("omniglot-20w1s",) if tiny else WORKLOADS)]
    if tiny:
        sizes = {"tasks": 2, "ways": 5, "filters": 16, "image_size": 16, "steps": 2}
        workloads = [dataclasses.replace(w, **sizes) for w in workloads]  # type: ignore[arg-type]
    for workload in sorted(workloads, key=lambda w: w.name != "omniglot-20w1s"):
        small = dataclasses.replace(workload, tasks=2)
        yield f"{workload.name} capture and replay", functools.partial(replays, small, device)
    small = dataclasses.replace(workloads[0], tasks=2, ways=3, steps=2)
    yield "ten steps", functools.partial(steps_together, small, device)
    precisions = ("float32",) if device == "cpu" else ("float32", "tf32", "bfloat16")
    for precision in precisions:
        for workload in workloads:
            check = functools.partial(fault, workload, "fused", precision, device)
            yield f"{workload.name} {precision} meta-gradient", check


def result(check: Callable[[], str | None]) -> str | None:
    try:
        return check()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main() -> int:
    parser = parser_of(__doc__, json=False)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--first", action="store_true")
    arguments = parser.parse_args()
    wrong = 0
    for name, check in itertools.islice(
        checks(arguments.device, arguments.tiny), 1 if arguments.first else None
    ):
        found = result(check)
        wrong += found is not None
        print(f"{name}: {found or 'right'}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
