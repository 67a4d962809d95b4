"""higher's ``innerloop_ctx``."""

from __future__ import annotations

import higher
import torch
import torch.nn.functional as F

from bench.peers.problem import Problem
from bench.peers.torch_parts import conv4, finished, tasks
from bench.peers.worker import Step


def build(problem: Problem, device: str, argument: str | None) -> Step:
    model, batch = conv4(problem, device), tasks(problem, device)
    adapting = [p for name, p in model.named_parameters() if name in problem.adapting()]
    optimizer = torch.optim.SGD(adapting, lr=problem.sizes.rate)

    def step():  # type: ignore[no-untyped-def]
        model.zero_grad()
        total = torch.zeros((), device=device, dtype=batch[0].dtype)
        for support_x, support_y, target_x, target_y in zip(*batch, strict=True):
            with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fast, inner):
                for _ in range(problem.sizes.steps):
                    inner.step(F.cross_entropy(fast(support_x), support_y))
                loss = F.cross_entropy(fast(target_x), target_y) / problem.sizes.tasks
                loss.backward()
            total += loss.detach()
        return finished(total, dict(model.named_parameters()))

    return step
