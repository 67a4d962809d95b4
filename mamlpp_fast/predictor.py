"""A model adapted to one support set, kept for inference."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mamlpp_fast.engine.deterministic import one_thread
from mamlpp_fast.episodes import as_input
from mamlpp_fast.reference import EvalStats, set_eval_stats, set_step

__all__ = ["Predictor", "copy_of", "detached_memo"]

_M = TypeVar("_M", bound=nn.Module)


class Predictor:
    """What :meth:`mamlpp_fast.MAMLPlusPlus.adapt` returns: inputs [m, ...] to predictions [m, ...].

    A snapshot: it keeps a copy of the model with the adapted weights in evaluation mode, so that nothing done to the
    learner later changes it. It can be pickled and copied (where the model can), and called by several threads at once.

    Args:
        model: copied.
        weights: adapted parameters, by name; the others are the model's.
        step: the inner step whose batch-norm rows are used.
        stats: the statistics that per-step batch norms normalise with.
        dtype: of floating-point inputs.
        deterministic: computes on one thread.

    Attributes:
        model: the adapted copy.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        *,
        step: int,
        stats: EvalStats,
        dtype: torch.dtype,
        deterministic: bool = False,
    ) -> None:
        self.model = copy_of(model).eval()
        own = dict(self.model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, value in weights.items():
                own[name].copy_(value)
        set_step(self.model, step)
        set_eval_stats(self.model, stats)
        self.device = next(self.model.parameters()).device
        self.dtype = dtype
        self.deterministic = deterministic

    def __call__(self, x: Tensor) -> Tensor:
        """Predictions for ``x`` [m, ...], without gradients; moved to the model's device and dtype."""
        with torch.no_grad(), one_thread(self.deterministic):
            prediction: Tensor = self.model(as_input(x, self.device, self.dtype))
        return prediction


def copy_of(model: _M) -> _M:
    """A deep copy of a model, of one too that holds results of computations (old ``weight_norm``), which is detached.

    Raises:
        ValueError: when something in the model cannot be copied.
    """
    try:
        return copy.deepcopy(model, detached_memo(model))
    except (TypeError, RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model: expected one that copy.deepcopy can copy, {reason}") from error


def detached_memo(model: nn.Module) -> dict[int, object]:
    """The memo for ``copy.deepcopy`` with which tensors that carry a graph become constants; else it refuses them."""
    memo: dict[int, object] = {}
    for module in model.modules():
        for value in module.__dict__.values():
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, Tensor) and not leaf.is_leaf:
                    memo[id(leaf)] = leaf.detach().clone()
    return memo
