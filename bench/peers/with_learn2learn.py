"""learn2learn's ``MAML`` and ``maml_update``.

Its ``MAML.adapt`` adapts every parameter; ``maml_update`` takes the gradients, None for what stays.
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F

from bench.peers.learn2learn_source import skeleton
from bench.peers.problem import Problem
from bench.peers.torch_parts import adapts, conv4, finished, tasks
from bench.peers.worker import Step


def build(problem: Problem, device: str, argument: str | None) -> Step:
    skeleton()
    algorithms = importlib.import_module("learn2learn.algorithms.maml")
    model, batch = conv4(problem, device), tasks(problem, device)
    maml = algorithms.MAML(model, lr=problem.sizes.rate)

    def adapt(module: torch.nn.Module, loss: torch.Tensor) -> torch.nn.Module:
        named = dict(module.named_parameters())
        adapting = [p for name, p in named.items() if adapts(name)]
        gradients = iter(torch.autograd.grad(loss, adapting, create_graph=True))
        chosen = [next(gradients) if adapts(name) else None for name in named]
        return algorithms.maml_update(module, problem.sizes.rate, chosen)

    def step():  # type: ignore[no-untyped-def]
        model.zero_grad()
        total = torch.zeros((), device=device, dtype=batch[0].dtype)
        for support_x, support_y, target_x, target_y in zip(*batch, strict=True):
            module = maml.clone().module
            for _ in range(problem.sizes.steps):
                module = adapt(module, F.cross_entropy(module(support_x), support_y))
            loss = F.cross_entropy(module(target_x), target_y) / problem.sizes.tasks
            loss.backward()
            total += loss.detach()
        return finished(total, model)

    return step
