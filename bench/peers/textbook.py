"""Nested autograd, one task at a time, as in most repositories and tutorials.

ARGUMENT ``compiled`` gives the whole of it to ``torch.compile``, ``compiled-loss`` only the network and its loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from bench.peers.problem import Problem
from bench.peers.torch_parts import Named, conv4, finished, leaves, norms, rate, tasks
from bench.peers.worker import Step


def build(problem: Problem, device: str, argument: str | None) -> Step:
    model, batch, own = conv4(problem, device), tasks(problem, device), leaves(problem, device)
    step_weights, count, adapting = problem.sizes.step_weights, problem.sizes.tasks, problem.adapting()

    def loss_of(weights: Named, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (x,)), y)

    if argument == "compiled-loss":
        loss_of = torch.compile(loss_of, fullgraph=True)

    def adapted(support_x: Tensor, support_y: Tensor, target_x: Tensor, target_y: Tensor) -> Tensor:
        fast, total = {name: own[name] for name in adapting}, torch.zeros((), device=device)
        for k, step_weight in enumerate(step_weights):
            fixed = norms(own, k)
            loss = loss_of(fast | fixed, support_x, support_y)
            gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {
                name: p - rate(problem, own, i, k) * g
                for i, ((name, p), g) in enumerate(zip(fast.items(), gradients, strict=True))
            }
            if step_weight:
                total = total + step_weight * loss_of(fast | fixed, target_x, target_y)
        return total / count

    if argument == "compiled":
        torch._dynamo.config.trace_autograd_ops = True
        adapted = torch.compile(adapted, fullgraph=True)

    def step():  # type: ignore[no-untyped-def]
        for p in own.values():
            p.grad = None
        total = torch.zeros((), device=device, dtype=batch[0].dtype)
        for task in zip(*batch, strict=True):
            loss = adapted(*task)
            loss.backward()
            total += loss.detach()
        return finished(total, own)

    return step
