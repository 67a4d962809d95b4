"""The autograd engine: any module, nested autograd on the fused operations, a CUDA graph where there is a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from mamlpp_fast import accelerated
from mamlpp_fast._modes import float32_products
from mamlpp_fast.adaptation import SupportGradients, inner_steps
from mamlpp_fast.engine.fused.transfer import Gradients
from mamlpp_fast.engine.graph import graphed
from mamlpp_fast.engine.reference import attention_note
from mamlpp_fast.engine.together import Apart, Passes, Together
from mamlpp_fast.episodes import Episode, EpisodeBatch
from mamlpp_fast.lslr import LSLR
from mamlpp_fast.reference import EvalStats, Inputs, LossFn, MetaResult, set_eval_stats, set_step

__all__ = ["AutogradEngine"]

_T = TypeVar("_T")
_Call = Callable[[Mapping[str, Tensor], Inputs, int], Tensor]
"""A prediction from fast weights, inputs and the inner step."""


class AutogradEngine:
    """Fused operations; tasks side by side on a CPU where a pass is one, else one after the other.

    Captured whole on a GPU.
    """

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
        self._together = Together(model, rates, loss_fn)
        self._note = ""

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
        leaves = [p for m in (self.model, self.rates) for p in m.parameters() if p.requires_grad]

        def work(passes: Passes, task: Episode) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
            loop = self._loop(task, second_order, gradients=passes.gradients)
            loss, prediction = self._task_loss(task, step_weights, loop, passes.call, passes.loss)
            gradients = torch.autograd.grad(loss / batch.num_tasks, leaves, allow_unused=True)
            return loss.detach(), prediction.detach(), gradients

        steps = self.rates.num_steps
        kept = (steps if second_order else 1) + (1 if step_weights is None else steps)
        results = self._side_by_side(batch, steps, kept, work)
        losses, logits = [], []
        for i, task in enumerate(batch):
            if results is None:
                with self._rounded():
                    loop = self._loop(task, second_order)
                    loss, prediction = self._task_loss(task, step_weights, loop, self._call, self.loss_fn)
                (loss / batch.num_tasks).backward()
            else:
                loss, prediction, gradients = results[i]
                for p, g in zip(leaves, gradients, strict=True):
                    if g is not None and p.grad is not None:
                        p.grad.add_(g)
            losses.append(loss.detach())
            logits.append(prediction.detach())
        task_losses = torch.stack(losses)
        return MetaResult(task_losses.mean(), task_losses, torch.stack(logits))

    def _task_loss(
        self,
        task: Episode,
        step_weights: Tensor | None,
        loop: Iterator[dict[str, Tensor]],
        call: _Call,
        loss_fn: LossFn,
    ) -> tuple[Tensor, Tensor]:
        total = prediction = torch.zeros((), device=task.support_y.device)
        for k, fast in enumerate(loop):
            if step_weights is None and k < self.rates.num_steps - 1:
                continue
            prediction = call(fast, task.target_x, k)
            loss = loss_fn(prediction, task.target_y)
            total = total + (loss if step_weights is None else step_weights[k] * loss)
        return total, prediction

    def evaluate(self, batch: EpisodeBatch, *, steps: int, stats: EvalStats) -> Tensor:
        self.model.eval()

        def work(passes: Passes, task: Episode) -> Tensor:
            loop = self._loop(task, False, steps, passes.gradients)
            return self._predictions(task, loop, passes.call)

        def call(fast: Mapping[str, Tensor], x: Inputs, step: int) -> Tensor:
            set_eval_stats(self.model, stats)
            prediction = self._call(fast, x, step)
            set_eval_stats(self.model, "batch")
            return prediction

        with torch.enable_grad(), self._products():
            predictions = self._side_by_side(batch, steps, 1, work, stats)
            if predictions is None:
                predictions = []
                for task in batch:
                    with self._rounded():
                        predictions.append(self._predictions(task, self._loop(task, False, steps), call))
        return torch.stack(predictions, dim=1)

    def _predictions(self, task: Episode, loop: Iterator[dict[str, Tensor]], call: _Call) -> Tensor:
        """After every update, [steps, m, ...]."""
        after_each = []
        for k, fast in enumerate(loop):
            with torch.no_grad():
                after_each.append(call(fast, task.target_x, k))
        return torch.stack(after_each)

    def _loop(
        self,
        task: Episode,
        second_order: bool,
        steps: int | None = None,
        gradients: SupportGradients | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        return inner_steps(
            self.model,
            task.support_x,
            task.support_y,
            self.rates,
            steps=steps,
            loss_fn=self.loss_fn,
            first_order=not second_order,
            gradients=gradients,
        )

    def _call(self, fast: Mapping[str, Tensor], x: Inputs, step: int) -> Tensor:
        """Per-step norms are at the step already."""
        prediction: Tensor = accelerated.predicted(self.model, fast, x)
        return prediction

    def _side_by_side(
        self,
        batch: EpisodeBatch,
        steps: int,
        kept: int,
        work: Callable[[Passes, Episode], _T],
        stats: EvalStats = "batch",
    ) -> list[_T] | None:
        """See :meth:`Together.run`; None where tasks are to be taken one after the other."""
        if self.device.type != "cpu":
            return None
        try:
            if self.precision == "bfloat16":
                raise Apart("passes are rounded to bfloat16")
            if stats != "batch":
                raise Apart("target passes normalise with running statistics")
            results = self._together.run(batch, kept, work)
        except Apart as why:
            self._note = f"one task after the other: {why}"
            return None
        set_step(self.model, steps - 1)  # where the loop leaves it
        self._note = "tasks side by side, every pass one operation"
        return results

    def explain(self) -> str:
        """See :class:`mamlpp_fast.engine.Engine`."""
        return "\n".join(filter(None, (attention_note(self.model), self._note)))

    def _products(self) -> contextlib.AbstractContextManager[None]:
        return float32_products(self.device, tf32=self.precision == "tf32")

    def _rounded(self) -> contextlib.AbstractContextManager[object]:
        """What a forward pass rounds; its backward pass follows by itself."""
        rounds = self.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16) if rounds else contextlib.nullcontext()
