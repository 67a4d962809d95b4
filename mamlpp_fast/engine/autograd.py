"""The autograd engine: any module, nested autograd on the fused batch norm, a CUDA graph where there is a GPU."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from mamlpp_fast import accelerated
from mamlpp_fast._modes import float32_products
from mamlpp_fast.adaptation import inner_steps
from mamlpp_fast.engine.fused.transfer import Gradients
from mamlpp_fast.engine.graph import graphed
from mamlpp_fast.engine.reference import attention_note
from mamlpp_fast.episodes import Episode, EpisodeBatch
from mamlpp_fast.lslr import LSLR
from mamlpp_fast.reference import EvalStats, LossFn, MetaResult, set_eval_stats

__all__ = ["AutogradEngine"]


class AutogradEngine:
    """One task at a time, fused batch norm; captured whole on a GPU."""

    name = "autograd"
    generation = 0

    def __init__(self, model: nn.Module, rates: LSLR, loss_fn: LossFn, precision: str = "float32") -> None:
        self.model = model
        self.rates = rates
        self.loss_fn = loss_fn
        self.precision = precision
        self.device = next(model.parameters()).device
        self._gradients = Gradients(model, rates)
        self._step = graphed(self._iterate, preserve=model.buffers)

    def prepare(self, batch: EpisodeBatch, multi_step: bool, second_order: bool) -> None:
        """See :class:`mamlpp_fast.engine.Engine`; there is nothing to make."""

    def meta_gradient(
        self, batch: EpisodeBatch, step_weights: Tensor | None, second_order: bool
    ) -> MetaResult:
        self.model.train()
        with self._products():
            result: MetaResult = self._step(batch, step_weights, second_order)
        # Again: a replay runs none of this in Python, and the caller may have set them to None.
        self._gradients.hand_over()
        return result

    def _iterate(self, batch: EpisodeBatch, step_weights: Tensor | None, second_order: bool) -> MetaResult:
        self._gradients.zero()
        self._gradients.hand_over()
        losses, logits = [], []
        for task in batch:
            with self._rounded():
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
            with torch.enable_grad(), self._products(), self._rounded():
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

    def _products(self) -> contextlib.AbstractContextManager[None]:
        return float32_products(self.device, tf32=self.precision == "tf32")

    def _rounded(self) -> contextlib.AbstractContextManager[object]:
        """What a forward pass rounds; its backward pass follows by itself."""
        rounds = self.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16) if rounds else contextlib.nullcontext()
