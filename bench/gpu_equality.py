"""Whether the fused engine on a GPU gives what the reference gives, captured and replayed, step after step.

python -m bench.gpu_equality [--device cuda] [--tiny]
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator

import torch

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


def checks(device: str, tiny: bool) -> Iterator[tuple[str, str | None]]:
    names = ("omniglot-5w1s",) if tiny else tuple(WORKLOADS)
    for name in names:
        workload = WORKLOADS[name]
        if tiny:
            workload = dataclasses.replace(workload, tasks=2, filters=16, image_size=16, steps=2)
        precisions = ("float32",) if device == "cpu" else ("float32", "tf32", "bfloat16")
        for precision in precisions:
            yield f"{name} {precision} meta-gradient", fault(workload, "fused", precision, device)
        small = dataclasses.replace(workload, tasks=2)
        yield f"{name} capture and replay", replays(small, device)
    small = dataclasses.replace(small, ways=3, steps=2)
    yield "ten steps", steps_together(small, device)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    wrong = 0
    for name, found in checks(arguments.device, arguments.tiny):
        wrong += found is not None
        print(f"{name}: {found or 'right'}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
