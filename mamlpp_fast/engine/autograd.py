"""The autograd engine: any module, nested autograd on the fused batch norm, a CUDA graph where there is a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mamlpp_fast import accelerated
from mamlpp_fast._modes import Switch
from mamlpp_fast.adaptation import inner_steps
from mamlpp_fast.engine.graph import graphed
from mamlpp_fast.engine.reference import attention_note, zero_gradients
from mamlpp_fast.episodes import Episode, EpisodeBatch
from mamlpp_fast.lslr import LSLR
from mamlpp_fast.reference import EvalStats, LossFn, MetaResult, set_eval_stats

__all__ = ["AutogradEngine"]


def _convolutions(tf32: bool) -> contextlib.AbstractContextManager[None]:
    cudnn = torch.backends.cudnn
    return cudnn.flags(
        enabled=cudnn.enabled,
        benchmark=cudnn.benchmark,
        deterministic=cudnn.deterministic,
        allow_tf32=tf32,
    )


_CONVOLUTIONS = Switch(_convolutions)


class AutogradEngine:
    """One task at a time, fused batch norm; captured whole on a GPU."""

    name = "autograd"
    generation = 0

    def __init__(self, model: nn.Module, rates: LSLR, loss_fn: LossFn, precision: str = "float32") -> None:
        self.model = model
        self.rates = rates
        self.loss_fn = loss_fn
        self.precision = precision
        self._step = graphed(self._gradients, preserve=model.buffers)

    def meta_gradient(
        self, batch: EpisodeBatch, step_weights: Tensor | None, second_order: bool
    ) -> MetaResult:
        self.model.train()
        result: MetaResult = self._step(batch, step_weights, second_order)
        return result

    def _gradients(self, batch: EpisodeBatch, step_weights: Tensor | None, second_order: bool) -> MetaResult:
        zero_gradients(self.model, self.rates)
        losses, logits = [], []
        for task in batch:
            with self._arithmetic():
                loss, prediction = self._task_loss(task, step_weights, second_order)
            (loss / batch.num_tasks).backward()
            losses.append(loss.detach())
            logits.append(prediction.detach())
        task_losses = torch.stack(losses)
        return MetaResult(task_losses.mean(), task_losses, torch.stack(logits))

    def _task_loss(
        self, task: Episode, step_weights: Tensor | None, second_order: bool
    ) -> tuple[Tensor, Tensor]:
        steps = self.rates.num_steps
        loop = inner_steps(
            self.model,
            task.support_x,
            task.support_y,
            self.rates,
            loss_fn=self.loss_fn,
            first_order=not second_order,
        )
        total = prediction = task.support_x.new_zeros(())
        for k, fast in enumerate(loop):
            if step_weights is None and k < steps - 1:
                continue
            prediction = accelerated.functional_call(self.model, fast, task.target_x)
            loss = self.loss_fn(prediction, task.target_y)
            total = total + (loss if step_weights is None else step_weights[k] * loss)
        return total, prediction

    def evaluate(self, batch: EpisodeBatch, *, steps: int, stats: EvalStats) -> Tensor:
        self.model.eval()
        predictions = []
        for task in batch:
            with torch.enable_grad(), self._arithmetic():
                after_each = []
                for fast in inner_steps(
                    self.model,
                    task.support_x,
                    task.support_y,
                    self.rates,
                    steps=steps,
                    loss_fn=self.loss_fn,
                    first_order=True,
                ):
                    set_eval_stats(self.model, stats)
                    with torch.no_grad():
                        after_each.append(accelerated.functional_call(self.model, fast, task.target_x))
                    set_eval_stats(self.model, "batch")
            predictions.append(torch.stack(after_each))
        return torch.stack(predictions, dim=1)

    def explain(self) -> str:
        """See :class:`mamlpp_fast.engine.Engine`."""
        return attention_note(self.model)

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """The precision of matrix products and convolutions."""
        device = next(self.model.parameters()).device.type
        with contextlib.ExitStack() as stack:
            if self.precision == "bfloat16":
                stack.enter_context(torch.autocast(device, torch.bfloat16))
            if device == "cuda":
                stack.enter_context(_CONVOLUTIONS.at(self.precision == "tf32"))
            yield
