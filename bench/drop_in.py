"""Textbook MAML on Conv4 before and after three changed lines: `convert_batch_norm`, `LSLR`, `adapt`.

    python -m bench.drop_in [--tasks 2] [--ways 20] [--seconds 20] [--json FILE]

Both loops take one task at a time through plain autograd, five inner steps, second order. Meta-gradients must agree in
float64 before any time is taken.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import mamlpp_fast as mf
from bench.harness import before_after, interleaved, keep

STEPS, RATE = 5, 0.1
Task = tuple[Tensor, Tensor, Tensor, Tensor]


def conv4(ways: int) -> nn.Sequential:
    """Conv4 of torch's own modules."""
    layers: list[nn.Module] = []
    for channels in (1, 64, 64, 64):
        layers += [
            nn.Conv2d(channels, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.LeakyReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, ways))


def before(model: nn.Module, tasks: list[Task]) -> Callable[[], list[Tensor]]:
    """The loop as it stands in many a repository."""
    rate = nn.Parameter(torch.tensor(RATE, dtype=next(model.parameters()).dtype))
    adapting = {n: p for n, p in model.named_parameters() if n.split(".")[0] not in ("1", "5", "9", "13")}

    def step() -> list[Tensor]:
        total = torch.zeros((), dtype=rate.dtype)
        for support_x, support_y, target_x, target_y in tasks:
            fast = dict(adapting)
            for _ in range(STEPS):
                loss = F.cross_entropy(functional_call(model, fast, (support_x,)), support_y)
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                fast = {n: p - rate * g for (n, p), g in zip(fast.items(), grads, strict=True)}
            total = total + F.cross_entropy(functional_call(model, fast, (target_x,)), target_y)
        return list(torch.autograd.grad(total / len(tasks), list(adapting.values())))

    return step


def after(model: nn.Module, tasks: list[Task]) -> Callable[[], list[Tensor]]:
    model = mf.convert_batch_norm(model, STEPS)
    rates = mf.LSLR(model, STEPS, RATE)
    own = dict(model.named_parameters())

    def step() -> list[Tensor]:
        total = torch.zeros((), dtype=rates.rates.dtype)
        for support_x, support_y, target_x, target_y in tasks:
            fast = mf.adapt(model, support_x, support_y, rates)
            total = total + F.cross_entropy(mf.functional_call(model, fast, (target_x,)), target_y)
        return list(torch.autograd.grad(total / len(tasks), [own[n] for n in rates.names]))

    return step


def pair(tasks: int, ways: int, dtype: torch.dtype) -> tuple[Callable[[], list[Tensor]], ...]:
    torch.manual_seed(0)
    model = conv4(ways).to(dtype)
    batch = [(torch.rand(ways, 1, 28, 28, dtype=dtype), torch.arange(ways)) * 2 for _ in range(tasks)]
    return before(copy.deepcopy(model), batch), after(model, batch)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--ways", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    theirs, ours = pair(1, 5, torch.float64)
    error = max(
        float((a - b).abs().max() / max(float(b.abs().max()), 1e-6))
        for a, b in zip(ours(), theirs(), strict=True)
    )
    if not error < 1e-9:
        raise SystemExit(f"meta-gradients differ by {error:.1e}: no time is taken")
    theirs, ours = pair(arguments.tasks, arguments.ways, torch.float32)
    times = interleaved({"before": theirs, "after": ours, "again": ours}, arguments.seconds)
    row = {
        "tasks": arguments.tasks,
        "ways": arguments.ways,
        "largest_error_float64": error,
        **before_after(times),
    }
    print(json.dumps(row))
    keep(arguments.json, [row])


if __name__ == "__main__":
    main()
