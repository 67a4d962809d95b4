"""Engines: three ways to the same meta-gradient, and the choice between them.

``reference`` is the specification, ``autograd`` takes any module, ``fused`` is the fast path for the modules it knows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mamlpp_fast.config import MAMLConfig
from mamlpp_fast.episodes import EpisodeBatch
from mamlpp_fast.reference import EvalStats, LossFn, MetaResult

if TYPE_CHECKING:
    from mamlpp_fast.lslr import LSLR

__all__ = ["ENGINES", "PRECISIONS", "Engine", "EngineChoice", "MetaResult", "make_engine"]

EngineName = Literal["auto", "reference", "autograd", "fused"]
Precision = Literal["float64", "float32", "tf32", "bfloat16"]
ENGINES: tuple[EngineName, ...] = ("auto", "reference", "autograd", "fused")
PRECISIONS: tuple[Precision, ...] = ("float64", "float32", "tf32", "bfloat16")


class Engine(Protocol):
    """Computes meta-gradients and evaluations for one model and its inner rates."""

    name: str

    def meta_gradient(
        self, batch: EpisodeBatch, step_weights: Tensor | None, second_order: bool
    ) -> MetaResult:
        """Sets ``.grad`` of every trainable parameter of model and rates: the mean over tasks.

        Args:
            batch: the meta-batch, on the model's device, in its dtype.
            step_weights: multi-step-loss weights [K], or None for the last step's target loss alone.
            second_order: False for first-order MAML.
        """
        ...

    def evaluate(self, batch: EpisodeBatch, *, steps: int, stats: EvalStats) -> Tensor:
        """Target predictions after every one of ``steps`` updates, [steps, tasks, m, ...]; changes no state."""
        ...


class EngineChoice(NamedTuple):
    """An engine and, where a faster one could not take the model, why."""

    engine: Engine
    reason: str


def make_engine(
    name: EngineName,
    model: nn.Module,
    rates: LSLR,
    config: MAMLConfig,
    loss_fn: LossFn,
    precision: Precision = "float32",
    deterministic: bool = False,
    *,
    verify: bool = True,
) -> EngineChoice:
    """Builds the engine of this name; ``auto`` takes the fastest that can serve the model.

    Args:
        name: the engine asked for.
        model: the network.
        rates: its inner rates.
        config: the settings.
        loss_fn: (prediction, target) to a scalar.
        precision: see :class:`mamlpp_fast.MAMLPlusPlus`, as for the others.
        deterministic: ditto.
        verify: ditto.

    Raises:
        ValueError: for an unknown name, or when the engine asked for cannot serve the model or precision.
    """
    from mamlpp_fast.engine.autograd import AutogradEngine
    from mamlpp_fast.engine.fused import FusedEngine, Unsupported
    from mamlpp_fast.engine.reference import ReferenceEngine

    if name not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {name!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    device = next(model.parameters()).device
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision: expected a CUDA device for tf32, got {device}")
    if name == "reference":
        if precision not in ("float64", "float32"):
            raise ValueError(
                f"precision: expected float64 or float32 for the reference engine, got {precision}"
            )
        return EngineChoice(ReferenceEngine(model, rates, loss_fn), "asked for")
    reason = "asked for"
    if name in ("auto", "fused"):
        try:
            fused = FusedEngine(
                model, rates, config, loss_fn, precision=precision, deterministic=deterministic
            )
            return EngineChoice(
                fused, "every module of the model has fused rules" if name == "auto" else reason
            )
        except Unsupported as error:
            if name == "fused":
                raise ValueError(f"engine: expected a model the fused engine can take, {error}") from error
            reason = f"not fused: {error}"
    autograd = AutogradEngine(model, rates, loss_fn, precision)
    return EngineChoice(autograd, reason)


def dtype_of(precision: Precision) -> torch.dtype:
    """The dtype of parameters and inputs at a precision: bfloat16 and tf32 keep them in float32."""
    return torch.float64 if precision == "float64" else torch.float32
