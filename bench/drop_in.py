"""Textbook MAML on Conv4, as it is, and with `convert_batch_norm`, `LSLR` and `adapt` (three lines), or `accelerate`.

    python -m bench.drop_in [--tasks 2] [--ways 5,20] [--size 28] [--only NAME] [--seconds 20] [--json FILE]

Five inner steps, second order; "norms adapt" with the batch norms' weights among what adapts. Loops take one task at a
time through autograd. Those of `bench.drop_in_tasks` take all at once: by `vmap` of `torch.func`, before and after, or
by `map_tasks` after. Meta-gradients must agree in float64 before any time is taken.
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
from bench import drop_in_tasks
from bench.harness import before_after, interleaved, keep

STEPS, RATE = 5, 0.1
Task = tuple[Tensor, Tensor, Tensor, Tensor]


def conv4(ways: int, size: int) -> nn.Sequential:
    """Conv4 of torch's own modules, for grey images of 28 pixels or coloured larger ones."""
    layers: list[nn.Module] = []
    for channels in (1 if size == 28 else 3, 64, 64, 64):
        layers += [
            nn.Conv2d(channels, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.LeakyReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * (size // 16) ** 2, ways))


def before(model: nn.Module, tasks: list[Task], norms: bool = False) -> Callable[[], list[Tensor]]:
    """The loop as it stands in many a repository."""
    rate = nn.Parameter(torch.tensor(RATE, dtype=next(model.parameters()).dtype))
    fixed = () if norms else ("1", "5", "9", "13")
    adapting = {n: p for n, p in model.named_parameters() if n.split(".")[0] not in fixed}

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


def jobs(
    tasks: int, ways: int, size: int, dtype: torch.dtype
) -> dict[str, dict[str, Callable[[], list[Tensor]]]]:
    """By what has changed, the loops "before" and "after"."""
    torch.manual_seed(0)
    model = conv4(ways, size).to(dtype)
    x = [torch.randn(ways, 1 if size == 28 else 3, size, size, dtype=dtype) for _ in range(2 * tasks)]
    y = torch.arange(ways)
    batch = [(x[2 * i], y, x[2 * i + 1], y) for i in range(tasks)]

    def fast() -> nn.Module:
        return mf.accelerate(copy.deepcopy(model))

    plain, adapting = before(copy.deepcopy(model), batch), before(copy.deepcopy(model), batch, True)
    return {
        "three lines": {"before": plain, "after": after(copy.deepcopy(model), batch)},
        "accelerate": {"before": plain, "after": before(fast(), batch)},
        "accelerate, norms adapt": {"before": adapting, "after": before(fast(), batch, True)},
    } | drop_in_tasks.jobs(lambda: copy.deepcopy(model), batch, before, STEPS, RATE)


def error_of(loops: dict[str, Callable[[], list[Tensor]]]) -> float:
    """The largest difference of the meta-gradients, relative to the largest value of each.

    Or to 1e-4 of the largest of all, as the engines' own checks do it: the gradient of a bias in front of batch norm is
    zero, where PyTorch has rounding noise of the other gradients' size (1e-13 beside gradients of 100 at 84 pixels).
    """
    found, expected = loops["after"](), loops["before"]()
    floor = 1e-4 * max(float(b.abs().max()) for b in expected)
    return max(
        float((a - b).abs().max()) / max(float(b.abs().max()), floor)
        for a, b in zip(found, expected, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--ways", default="5,20")
    parser.add_argument("--size", type=int, default=28, help="pixels a side; coloured where it is not 28")
    parser.add_argument("--only", default="", help="loops with this in their names")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    errors = {
        name: error_of(loops)
        for name, loops in jobs(2, 5, arguments.size, torch.float64).items()
        if arguments.only in name
    }
    if not max(errors.values()) < 1e-9:
        raise SystemExit(f"meta-gradients differ: {errors}; no time is taken")
    rows = []
    for ways in map(int, arguments.ways.split(",")):
        for name, loops in jobs(arguments.tasks, ways, arguments.size, torch.float32).items():
            if name not in errors:
                continue
            row = {"tasks": arguments.tasks, "ways": ways, "size": arguments.size, "changed": name}
            times = interleaved({**loops, "again": loops["after"]}, arguments.seconds)
            rows.append({**row, "largest_error_float64": errors[name], **before_after(times)})
            print(json.dumps(rows[-1]), flush=True)
            keep(arguments.json, rows)


if __name__ == "__main__":
    main()
