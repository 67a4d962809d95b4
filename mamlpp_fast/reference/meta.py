"""The meta-gradient of a batch of tasks, and evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamlpp_fast.reference.calling import Inputs, predicted
from mamlpp_fast.reference.inner import LossFn, inner_loop
from mamlpp_fast.reference.norms import EvalStats, set_eval_stats

__all__ = ["MetaResult", "Task", "evaluate_task", "meta_gradient", "task_loss"]


class Task(Protocol):
    """What the functions below read of an episode."""

    @property
    def support_x(self) -> Inputs: ...
    @property
    def support_y(self) -> Tensor: ...
    @property
    def target_x(self) -> Inputs: ...
    @property
    def target_y(self) -> Tensor: ...


class MetaResult(NamedTuple):
    """What one meta-batch gave, besides the gradients.

    Attributes:
        loss: mean over tasks of the weighted target loss, scalar.
        task_losses: the same before the mean, [tasks].
        target_logits: predictions after the last update, [tasks, m, ...].
    """

    loss: Tensor
    task_losses: Tensor
    target_logits: Tensor


def task_loss(
    model: nn.Module,
    params: Mapping[str, Tensor],
    rates: Mapping[str, Tensor],
    task: Task,
    *,
    steps: int,
    step_weights: Sequence[float] | Tensor | None,
    loss_fn: LossFn,
    second_order: bool,
) -> tuple[Tensor, Tensor]:
    """Weighted target loss of one task (eq. 3, MSL; eq. 2 without weights) and the last step's predictions."""
    total: Tensor | None = None
    logits: Tensor | None = None
    loop = inner_loop(
        model,
        params,
        rates,
        task.support_x,
        task.support_y,
        steps=steps,
        loss_fn=loss_fn,
        second_order=second_order,
    )
    for k, fast in enumerate(loop):
        if step_weights is None and k < steps - 1:
            continue
        logits = predicted(model, fast, task.target_x)
        loss = loss_fn(logits, task.target_y)
        if step_weights is not None:
            loss = step_weights[k] * loss
        total = loss if total is None else total + loss
    assert total is not None and logits is not None
    return total, logits


def meta_gradient(
    model: nn.Module,
    rates: Mapping[str, Tensor],
    tasks: Sequence[Task],
    *,
    steps: int,
    step_weights: Sequence[float] | Tensor | None,
    loss_fn: LossFn = F.cross_entropy,
    second_order: bool = True,
) -> MetaResult:
    """Adds the meta-gradient of a batch of tasks (mean over tasks) to ``.grad`` of parameters and rates.

    Args:
        model: the network at its meta-parameters, in training mode.
        rates: inner learning rates; its names say which parameters adapt (see :func:`inner_loop`).
        tasks: the meta-batch.
        steps: inner updates K.
        step_weights: K multi-step-loss weights, or None for the last step's target loss alone.
        loss_fn: (prediction, target) to a scalar.
        second_order: False gives first-order MAML: inner gradients are constants, rates still learn.
    """
    own = dict(model.named_parameters())
    params = {name: own[name] for name in rates}
    losses, logits = [], []
    for task in tasks:
        loss, prediction = task_loss(
            model,
            params,
            rates,
            task,
            steps=steps,
            step_weights=step_weights,
            loss_fn=loss_fn,
            second_order=second_order,
        )
        (loss / len(tasks)).backward()
        losses.append(loss.detach())
        logits.append(prediction.detach())
    task_losses = torch.stack(losses)
    return MetaResult(task_losses.mean(), task_losses, torch.stack(logits))


def evaluate_task(
    model: nn.Module,
    rates: Mapping[str, Tensor],
    task: Task,
    *,
    steps: int,
    loss_fn: LossFn = F.cross_entropy,
    eval_stats: EvalStats = "batch",
) -> Tensor:
    """Target predictions after every one of ``steps`` updates, [steps, m, ...], for a model in evaluation mode.

    Adaptation always normalises with the statistics of the support set, as in training; ``eval_stats`` chooses those
    of the target passes. ``steps`` may exceed the number of rates and of batch-norm rows: the last ones are used again.
    """
    own = dict(model.named_parameters())
    # Its own where they can be: hooks on their gradients act as in training.
    params = {
        name: own[name] if own[name].requires_grad else own[name].detach().requires_grad_() for name in rates
    }
    predictions = []
    with torch.enable_grad():
        loop = inner_loop(
            model,
            params,
            {name: r.detach() for name, r in rates.items()},
            task.support_x,
            task.support_y,
            steps=steps,
            loss_fn=loss_fn,
            second_order=False,
        )
        for fast in loop:
            set_eval_stats(model, eval_stats)
            with torch.no_grad():
                predictions.append(predicted(model, fast, task.target_x))
            set_eval_stats(model, "batch")
    return torch.stack(predictions)
