"""TorchOpt's differentiable ``MetaSGD``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchopt
from torch import nn

from bench.peers.problem import Problem
from bench.peers.torch_parts import conv4, finished, tasks
from bench.peers.worker import Step


def build(problem: Problem, device: str, argument: str | None) -> Step:
    model, batch = conv4(problem, device), tasks(problem, device)
    own = dict(model.named_parameters())
    adapting = nn.ModuleList(m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    optimizer = torchopt.MetaSGD(adapting, lr=problem.sizes.rate)
    start = [torchopt.extract_state_dict(part) for part in (adapting, optimizer)]

    def step():  # type: ignore[no-untyped-def]
        for p in own.values():
            p.grad = None
        total = torch.zeros((), device=device, dtype=batch[0].dtype)
        for support_x, support_y, target_x, target_y in zip(*batch, strict=True):
            for _ in range(problem.sizes.steps):
                optimizer.step(F.cross_entropy(model(support_x), support_y))
            loss = F.cross_entropy(model(target_x), target_y) / problem.sizes.tasks
            loss.backward()
            total += loss.detach()
            for part, state in zip((adapting, optimizer), start, strict=True):
                torchopt.recover_state_dict(part, state)
        return finished(total, own)

    return step
