"""Nested autograd, one task at a time, as in most repositories and tutorials."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.func import functional_call

from bench.peers.problem import Problem
from bench.peers.torch_parts import adapts, conv4, finished, tasks
from bench.peers.worker import Step


def build(problem: Problem, device: str, argument: str | None) -> Step:
    model, batch = conv4(problem, device), tasks(problem, device)
    steps, rate, count = problem.sizes.steps, problem.sizes.rate, problem.sizes.tasks
    adapting = {name: p for name, p in model.named_parameters() if adapts(name)}

    def step():  # type: ignore[no-untyped-def]
        model.zero_grad()
        total = torch.zeros((), device=device, dtype=batch[0].dtype)
        for support_x, support_y, target_x, target_y in zip(*batch, strict=True):
            fast = dict(adapting)
            for _ in range(steps):
                loss = F.cross_entropy(functional_call(model, fast, (support_x,)), support_y)
                gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                fast = {name: p - rate * g for (name, p), g in zip(fast.items(), gradients, strict=True)}
            loss = F.cross_entropy(functional_call(model, fast, (target_x,)), target_y) / count
            loss.backward()
            total += loss.detach()
        return finished(total, model)

    return step
