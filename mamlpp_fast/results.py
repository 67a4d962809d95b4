"""What a learner returns and raises."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Evaluation", "NonFiniteLossError", "StepMetrics"]


class StepMetrics(NamedTuple):
    """Result of one meta-update, as tensors on the device: reading one waits for it.

    Attributes:
        loss: weighted target loss, mean over tasks, scalar.
        accuracy: share of target examples predicted right after the last update, mean over tasks, scalar. Labels that
            the loss ignores (-100) do not count; NaN in regression.
        task_losses: loss of each task, [tasks].
    """

    loss: Tensor
    accuracy: Tensor
    task_losses: Tensor


class Evaluation(NamedTuple):
    """Result of evaluating a batch of tasks.

    Attributes:
        logits: target predictions after every inner step, [steps, tasks, m, ways].
        loss: target loss after the last step, [tasks].
        accuracy: share of target examples predicted right after every step, [steps, tasks]; NaN as in
            :class:`StepMetrics`.
    """

    logits: Tensor
    loss: Tensor
    accuracy: Tensor


class NonFiniteLossError(ArithmeticError):
    """A meta-loss is NaN or infinite; ``iteration`` and ``task`` (position in the batch) say where."""

    def __init__(self, iteration: int, epoch: int, task: int) -> None:
        super().__init__(
            f"loss: expected finite, got NaN or infinity at epoch {epoch}, iteration {iteration}, task {task}"
        )
        self.iteration = iteration
        self.epoch = epoch
        self.task = task
