"""``torch.func``: gradient of a gradient, ``vmap`` over the tasks; ARGUMENT says how ``torch.compile`` gets it.

``compiled``: the transformed function as it is, its transforms traced by Dynamo. ``traced``: the operations that one
call makes, derivatives included, recorded by ``make_fx``; Inductor compiles that graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from bench.peers.problem import Problem
from bench.peers.torch_parts import Named, conv4, leaves, norms, rate, tasks
from bench.peers.worker import Step


def meta_gradient(problem: Problem, device: str) -> Callable[..., Any]:
    """(parameters by name, whole batch) to gradients by name and the mean target loss."""
    model, step_weights, adapting = conv4(problem, device), problem.sizes.step_weights, problem.adapting()
    for p in model.parameters():
        p.requires_grad_(False)

    def loss_of(fast: Named, fixed: Named, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, fast | fixed, (x,)), y)

    def task_loss(
        own: Named, support_x: Tensor, support_y: Tensor, target_x: Tensor, target_y: Tensor
    ) -> Tensor:
        fast, losses = {name: own[name] for name in adapting}, []
        for k, step_weight in enumerate(step_weights):
            fixed = norms(own, k)
            gradients = grad(loss_of)(fast, fixed, support_x, support_y)
            fast = {
                name: p - rate(problem, own, i, k) * gradients[name]
                for i, (name, p) in enumerate(fast.items())
            }
            if step_weight:
                losses.append(step_weight * loss_of(fast, fixed, target_x, target_y))
        return torch.stack(losses).sum()

    def mean_loss(own: Named, *batch: Tensor) -> Tensor:
        return vmap(task_loss, in_dims=(None, 0, 0, 0, 0))(own, *batch).mean()

    return grad_and_value(mean_loss)


def build(problem: Problem, device: str, argument: str | None) -> Step:
    batch = tasks(problem, device)
    own = {name: p.detach() for name, p in leaves(problem, device).items()}
    function = meta_gradient(problem, device)
    if argument == "compiled":
        function = torch.compile(function, fullgraph=True)
    elif argument == "traced":
        function = torch.compile(make_fx(function)(own, *batch), fullgraph=True)

    def step():  # type: ignore[no-untyped-def]
        gradients, loss = function(own, *batch)
        if loss.is_cuda:
            torch.cuda.synchronize()
        return loss, gradients

    return step
