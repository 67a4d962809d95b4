"""``torch.func``: gradient of a gradient, ``vmap`` over the tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

from bench.peers.problem import Problem
from bench.peers.torch_parts import adapts, conv4, tasks
from bench.peers.worker import Step

Named = dict[str, Tensor]


def meta_gradient(model: nn.Module, steps: int, rate: float) -> Callable[..., Any]:
    """(parameters by name, whole batch) to gradients by name and the mean target loss."""

    def loss_of(fast: Named, fixed: Named, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, fast | fixed, (x,)), y)

    def task_loss(
        fast: Named, fixed: Named, support_x: Tensor, support_y: Tensor, target_x: Tensor, target_y: Tensor
    ) -> Tensor:
        for _ in range(steps):
            gradients = grad(loss_of)(fast, fixed, support_x, support_y)
            fast = {name: p - rate * gradients[name] for name, p in fast.items()}
        return loss_of(fast, fixed, target_x, target_y)

    def mean_loss(own: Named, *batch: Tensor) -> Tensor:
        fast = {name: p for name, p in own.items() if adapts(name)}
        fixed = {name: p for name, p in own.items() if not adapts(name)}
        return vmap(task_loss, in_dims=(None, None, 0, 0, 0, 0))(fast, fixed, *batch).mean()

    return grad_and_value(mean_loss)


def build(problem: Problem, device: str, argument: str | None) -> Step:
    model, batch = conv4(problem, device), tasks(problem, device)
    own = {name: p.detach() for name, p in model.named_parameters()}
    function = meta_gradient(model, problem.sizes.steps, problem.sizes.rate)
    if argument == "compiled":
        function = torch.compile(function, fullgraph=True)

    def step():  # type: ignore[no-untyped-def]
        gradients, loss = function(own, *batch)
        if loss.is_cuda:
            torch.cuda.synchronize()
        return loss, gradients

    return step
