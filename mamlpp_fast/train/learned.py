"""What an epoch's line records of the learned inner rates and of the batch norms, small enough for every epoch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mamlpp_fast.learner import MAMLPlusPlus
from mamlpp_fast.reference import PerStepBatchNorm2d

__all__ = ["batch_norms", "inner_rates"]


def inner_rates(learner: MAMLPlusPlus) -> dict[str, list[float]]:
    """The rate of every adapted tensor and step, [K] each; the mean over elements where each has its own."""
    return {
        name: rate.detach().flatten(1).mean(1).tolist() if rate.ndim > 1 else rate.detach().tolist()
        for name, rate in learner.rates.as_dict().items()
    }


def batch_norms(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Of every batch norm the mean over channels of weight, bias, running mean and variance, a value a row.

    Rows are inner steps, or one that all steps share. ``weight_spread`` and ``bias_spread`` are standard deviations
    over channels. Six significant digits.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, PerStepBatchNorm2d):
            weight, bias = _rows(module.weight), _rows(module.bias)
            found[name] = {
                "weight": _short(weight.mean(1)),
                "weight_spread": _short(weight.std(1, correction=0)),
                "bias": _short(bias.mean(1)),
                "bias_spread": _short(bias.std(1, correction=0)),
                "running_mean": _short(_rows(module.running_mean).mean(1)),
                "running_var": _short(_rows(module.running_var).mean(1)),
            }
    return found


def _rows(values: Tensor) -> Tensor:
    values = values.detach().double()
    return values if values.ndim == 2 else values[None]


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]
