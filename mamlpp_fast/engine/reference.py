"""The reference engine: :mod:`mamlpp_fast.reference` as it stands, on PyTorch's own batch norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mamlpp_fast import reference
from mamlpp_fast._modes import float32_products
from mamlpp_fast.episodes import EpisodeBatch
from mamlpp_fast.lslr import LSLR
from mamlpp_fast.nn import plain_batch_norm
from mamlpp_fast.reference import EvalStats, LossFn, MetaResult

__all__ = ["ReferenceEngine"]


class ReferenceEngine:
    """One task at a time through nested autograd: slow, plain, the specification."""

    name = "reference"
    generation = 0

    def __init__(self, model: nn.Module, rates: LSLR, loss_fn: LossFn) -> None:
        self.model = model
        self.rates = rates
        self.loss_fn = loss_fn
        self.device = next(model.parameters()).device

    def prepare(self, batch: EpisodeBatch, multi_step: bool, second_order: bool) -> None:
        """See :class:`mamlpp_fast.engine.Engine`; there is nothing to make."""

    def meta_gradient(
        self, batch: EpisodeBatch, step_weights: Tensor | None, second_order: bool
    ) -> MetaResult:
        self.model.train()
        zero_gradients(self.model, self.rates)
        with plain_batch_norm(self.model), float32_products(self.device):
            result = reference.meta_gradient(
                self.model,
                self.rates.as_dict(),
                list(batch),
                steps=self.rates.num_steps,
                step_weights=step_weights,
                loss_fn=self.loss_fn,
                second_order=second_order,
            )
        return result

    def evaluate(self, batch: EpisodeBatch, *, steps: int, stats: EvalStats) -> Tensor:
        self.model.eval()
        with plain_batch_norm(self.model), float32_products(self.device):
            predictions = [
                reference.evaluate_task(
                    self.model,
                    self.rates.as_dict(),
                    task,
                    steps=steps,
                    loss_fn=self.loss_fn,
                    eval_stats=stats,
                )
                for task in batch
            ]
        return torch.stack(predictions, dim=1)

    def explain(self) -> str:
        """See :class:`mamlpp_fast.engine.Engine`."""
        return attention_note(self.model)


def attention_note(model: nn.Module) -> str:
    """What is done about attention, for a model that seems to have some; else nothing."""
    for name, module in model.named_modules():
        code = getattr(type(module).forward, "__code__", None)
        called = () if code is None else code.co_names
        if isinstance(module, nn.MultiheadAttention) or "scaled_dot_product_attention" in called:
            return (
                f"attention ({name or type(model).__name__}) by PyTorch's math kernel in second order: "
                "its fused ones have no second derivative"
            )
    return ""


def zero_gradients(*modules: nn.Module) -> None:
    """Sets every trainable parameter's gradient to zero in place.

    Those that take no part in a step (biases in front of batch norm, say) so keep an exact zero, and the buffers keep
    their addresses, which a captured graph needs.
    """
    for module in modules:
        for p in module.parameters():
            if not p.requires_grad:
                continue
            if p.grad is None or p.grad.stride() != p.stride():
                p.grad = torch.zeros_like(p)
            else:
                p.grad.detach_().zero_()
