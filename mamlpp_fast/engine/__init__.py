"""Engines: three ways to the same meta-gradient, and the choice between them.

``reference`` is the specification, ``autograd`` takes any module, ``fused`` is the fast path for models whose
operations have rules.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from mamlpp_fast.engine.autograd import AutogradEngine
from mamlpp_fast.engine.base import ENGINES, PRECISIONS, Engine, EngineName, Precision, Unsupported, dtype_of
from mamlpp_fast.engine.fused import FusedEngine
from mamlpp_fast.engine.reference import ReferenceEngine
from mamlpp_fast.lslr import LSLR
from mamlpp_fast.reference import LossFn, MetaResult

__all__ = [
    "ENGINES",
    "PRECISIONS",
    "Engine",
    "EngineChoice",
    "EngineName",
    "MetaResult",
    "Precision",
    "Unsupported",
    "dtype_of",
    "make_engine",
]


class EngineChoice(NamedTuple):
    """An engine and, where a faster one could not take the model, why."""

    engine: Engine
    reason: str


def make_engine(
    name: EngineName,
    model: nn.Module,
    rates: LSLR,
    loss_fn: LossFn,
    precision: Precision = "float32",
    deterministic: bool = False,
    verify: bool = True,
) -> EngineChoice:
    """Builds the engine of this name; ``auto`` the fused one, which tells at the first batch whether it can serve.

    Args:
        name: the engine asked for.
        model: the network.
        rates: its inner rates.
        loss_fn: (prediction, target) to a scalar.
        precision, deterministic, verify: see :class:`mamlpp_fast.MAMLPlusPlus`.

    Raises:
        ValueError: for an unknown name, or when the engine asked for cannot serve the loss or precision.
    """
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
                model,
                rates,
                loss_fn,
                precision=precision,
                deterministic=deterministic,
                verify=verify,
                waits=name == "auto",
            )
            if name == "auto":
                reason = "the fastest, and nothing in model or loss has stopped it"
            return EngineChoice(fused, reason)
        except Unsupported as error:
            if name == "fused":
                raise ValueError(f"engine: expected a model the fused engine can take, {error}") from error
            reason = f"not fused: {error}"
    return EngineChoice(AutogradEngine(model, rates, loss_fn, precision), reason)
