"""Loops for `bench.drop_in` that take several tasks at once: `vmap` of `torch.func`, and `map_tasks`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import mamlpp_fast as mf

Task = tuple[Tensor, Tensor, Tensor, Tensor]
Held = dict[str, Tensor]
FIXED = ("1", "5", "9", "13")
"""The batch norms of Conv4, whose weights do not adapt."""


def untracked(model: nn.Module) -> nn.Module:
    """Without running statistics, which PyTorch refuses under `vmap`."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    return model


def adapting(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if n.split(".")[0] not in FIXED}


def by_func(model: nn.Module, tasks: list[Task], steps: int, rate: float) -> Callable[[], list[Tensor]]:
    """The gradient of the mean over tasks of a loss that calls `grad`, all tasks by `vmap`."""
    own = {n: p.detach() for n, p in adapting(model).items()}
    batch = [torch.stack(parts) for parts in zip(*tasks, strict=True)]

    def loss(held: Held, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, held, (x,)), y)

    def task(held: Held, x: Tensor, y: Tensor, target_x: Tensor, target_y: Tensor) -> Tensor:
        for _ in range(steps):
            grads = grad(loss)(held, x, y)
            held = {n: p - rate * grads[n] for n, p in held.items()}
        return loss(held, target_x, target_y)

    def mean(held: Held) -> Tensor:
        losses: Tensor = vmap(task, (None, 0, 0, 0, 0))(held, *batch)
        return losses.mean()

    return lambda: list(grad(mean)(own).values())


def side_by_side(model: nn.Module, tasks: list[Task], steps: int, rate: float) -> Callable[[], list[Tensor]]:
    """The textbook loop, its tasks by `map_tasks`."""
    own = adapting(model)

    def step(model: nn.Module, task: Task) -> Tensor:
        support_x, support_y, target_x, target_y = task
        fast: dict[str, Tensor] = dict(adapting(model))
        for _ in range(steps):
            loss = F.cross_entropy(functional_call(model, fast, (support_x,)), support_y)
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {n: p - rate * g for (n, p), g in zip(fast.items(), grads, strict=True)}
        return F.cross_entropy(functional_call(model, fast, (target_x,)), target_y) / len(tasks)

    def run() -> list[Tensor]:
        model.zero_grad()
        mf.map_tasks(step, tasks, model)
        return [p.grad for p in own.values() if p.grad is not None]

    return run


def jobs(
    conv4: Callable[[], nn.Module],
    tasks: list[Task],
    textbook: Callable[[nn.Module, list[Task]], Callable[[], list[Tensor]]],
    steps: int,
    rate: float,
) -> dict[str, dict[str, Callable[[], list[Tensor]]]]:
    """As :func:`bench.drop_in.jobs`."""

    def fast(model: nn.Module) -> nn.Module:
        return mf.accelerate(model)

    func = functools.partial(by_func, tasks=tasks, steps=steps, rate=rate)
    team = functools.partial(side_by_side, tasks=tasks, steps=steps, rate=rate)
    return {
        "accelerate under torch.func, vmap over tasks": {
            "before": func(untracked(conv4())),
            "after": func(fast(untracked(conv4()))),
        },
        "map_tasks": {"before": textbook(conv4(), tasks), "after": team(conv4())},
        "accelerate and map_tasks": {"before": textbook(conv4(), tasks), "after": team(fast(conv4()))},
    }
