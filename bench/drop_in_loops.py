"""Loops of other kinds than textbook MAML, as they are and with one line changed: FOMAML, ANIL, higher, an engine.

    python -m bench.drop_in_loops [--tasks 2] [--ways 5,20] [--only NAME;...] [--seconds 10] [--json FILE]

Conv4 on 28×28, five inner steps, except for the last two: a WGAN's critic with batch norm and a gradient penalty
(32×32, 16 images, by the examples), and a heat equation's residual by a tanh MLP (256 points), whose second derivative
by the inputs is PyTorch's own. "higher" is `innerloop_ctx` of `mamlpp_fast.compat.higher` against the loop that it
stands for, in plain PyTorch; `bench.drop_in_higher` compares with higher itself. "autograd engine" is a meta-gradient
of the published workload, against the `reference` engine. Gradients must agree in float64 before any time is taken.
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
from bench.drop_in import STEPS, Task, conv4, error_of
from bench.harness import before_after, interleaved, keep
from mamlpp_fast.compat import higher
from mamlpp_fast.engine import EngineName
from mamlpp_fast.workloads import WORKLOADS

__all__ = ["LOOPS"]

Job = Callable[[], list[Tensor]]
Jobs = dict[str, Job]
_TOLERANCE = 1e-9
_RATE = 0.05


def _episodes(tasks: int, ways: int, dtype: torch.dtype) -> tuple[nn.Module, list[Task]]:
    torch.manual_seed(0)
    model = conv4(ways, 28).to(dtype)
    y = torch.arange(ways)
    x = [torch.randn(ways, 1, 28, 28, dtype=dtype) for _ in range(2 * tasks)]
    return model, [(x[2 * i], y, x[2 * i + 1], y) for i in range(tasks)]


def _maml(model: nn.Module, tasks: list[Task], head: str = "", second_order: bool = True) -> Job:
    """A loop in plain PyTorch over the parameters whose names begin with ``head``."""
    own = dict(model.named_parameters())

    def step() -> list[Tensor]:
        model.zero_grad()
        for support_x, support_y, target_x, target_y in tasks:
            fast = {n: p for n, p in own.items() if n.startswith(head)}
            for _ in range(STEPS):
                loss = F.cross_entropy(functional_call(model, fast, (support_x,)), support_y)
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=second_order)
                fast = {n: p - _RATE * g for (n, p), g in zip(fast.items(), grads, strict=True)}
            (F.cross_entropy(functional_call(model, fast, (target_x,)), target_y) / len(tasks)).backward()
        return _gradients(model)

    return step


def _gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def _higher(model: nn.Module, tasks: list[Task]) -> Job:
    inner = torch.optim.SGD(model.parameters(), lr=_RATE)

    def step() -> list[Tensor]:
        model.zero_grad()
        for support_x, support_y, target_x, target_y in tasks:
            with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (fmodel, diffopt):
                for _ in range(STEPS):
                    diffopt.step(F.cross_entropy(fmodel(support_x), support_y))
                (F.cross_entropy(fmodel(target_x), target_y) / len(tasks)).backward()
        return _gradients(model)

    return step


def fomaml(tasks: int, ways: int, dtype: torch.dtype) -> Jobs:
    model, batch = _episodes(tasks, ways, dtype)
    fast = mf.accelerate(copy.deepcopy(model))
    return {
        "before": _maml(model, batch, second_order=False),
        "after": _maml(fast, batch, second_order=False),
    }


def anil(tasks: int, ways: int, dtype: torch.dtype) -> Jobs:
    model, batch = _episodes(tasks, ways, dtype)
    fast = mf.accelerate(copy.deepcopy(model))
    return {"before": _maml(model, batch, "17."), "after": _maml(fast, batch, "17.")}


def higher_sgd(tasks: int, ways: int, dtype: torch.dtype) -> Jobs:
    model, batch = _episodes(tasks, ways, dtype)
    return {"before": _maml(copy.deepcopy(model), batch), "after": _higher(model, batch)}


def engine(tasks: int, ways: int, dtype: torch.dtype) -> Jobs:
    workload = WORKLOADS[f"omniglot-{ways}w1s"]
    batch = workload.batch().tasks(0, tasks)

    def job(name: EngineName) -> Job:
        learner = workload.learner(name, "float64" if dtype == torch.float64 else "float32")

        def step() -> list[Tensor]:
            learner.meta_gradient(batch)
            return _gradients(learner.model)

        return step

    return {"before": job("reference"), "after": job("autograd")}


def penalty(tasks: int, ways: int, dtype: torch.dtype) -> Jobs:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels, filters in ((3, 32), (32, 64), (64, 64)):
        layers += [
            nn.Conv2d(channels, filters, 3, stride=2, padding=1),
            nn.BatchNorm2d(filters),
            nn.LeakyReLU(0.2),
        ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 1)).to(dtype)
    real, made = (torch.randn(16, 3, 32, 32, dtype=dtype) for _ in range(2))
    share = torch.rand(16, 1, 1, 1, dtype=dtype)

    def job(model: nn.Module) -> Job:
        def step() -> list[Tensor]:
            between = (share * real + (1 - share) * made).requires_grad_()
            (slope,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
            loss = model(made).mean() - model(real).mean()
            loss = loss + 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean()
            model.zero_grad()
            loss.backward()
            return _gradients(model)

        return step

    return {"before": job(model), "after": job(mf.accelerate(copy.deepcopy(model)))}


def physics(tasks: int, ways: int, dtype: torch.dtype) -> Jobs:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs in (2, 64, 64):
        layers += [nn.Linear(inputs, 64), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(64, 1)).to(dtype)
    points = torch.rand(256, 2, dtype=dtype)

    def job(model: nn.Module) -> Job:
        def step() -> list[Tensor]:
            z = points.clone().requires_grad_()
            (du,) = torch.autograd.grad(model(z).sum(), z, create_graph=True)
            (ddu,) = torch.autograd.grad(du[:, 0].sum(), z, create_graph=True)
            model.zero_grad()
            (du[:, 1] - ddu[:, 0]).square().mean().backward()
            # The last bias takes no part: no gradient, or one of zeros.
            return [p.grad for n, p in model.named_parameters() if n != "6.bias" and p.grad is not None]

        return step

    return {"before": job(model), "after": job(mf.accelerate(copy.deepcopy(model)))}


LOOPS: dict[str, tuple[Callable[[int, int, torch.dtype], Jobs], bool]] = {
    "FOMAML": (fomaml, True),
    "ANIL": (anil, True),
    "higher, SGD": (higher_sgd, True),
    "autograd engine": (engine, True),
    "gradient penalty": (penalty, False),
    "physics-informed loss": (physics, False),
}
"""What makes the two jobs, and whether they are of tasks of so many ways."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--ways", default="5,20")
    parser.add_argument("--only", help="names, separated by semicolons", default=";".join(LOOPS))
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.only.split(";"):
        make, of_tasks = LOOPS[name]
        for ways in map(int, arguments.ways.split(",") if of_tasks else ("0",)):
            error = error_of(make(1, ways, torch.float64))
            if not error < _TOLERANCE:
                raise SystemExit(f"{name}: gradients differ by {error:.1e}; no time is taken")
            jobs = make(arguments.tasks, ways, torch.float32)
            row = {"script": f"{name}, {ways}-way 1-shot" if of_tasks else name, "tasks": arguments.tasks}
            times = interleaved({**jobs, "again": jobs["after"]}, arguments.seconds)
            rows.append({**row, "largest_error_float64": error, **before_after(times)})
            print(json.dumps(rows[-1]), flush=True)
            keep(arguments.json, rows)


if __name__ == "__main__":
    main()
