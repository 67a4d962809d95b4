"""Replays recorded runs of the authors' code and measures how far an engine is from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mamlpp_fast.compat.authors import load_authors_state, our_name
from mamlpp_fast.config import MAMLConfig
from mamlpp_fast.engine import EngineName
from mamlpp_fast.episodes import EpisodeBatch
from mamlpp_fast.learner import MAMLPlusPlus
from mamlpp_fast.models import Conv4
from mamlpp_fast.recorded import read_record

__all__ = ["FLOAT64_TOLERANCE", "ReplayReport", "replay"]

FLOAT64_TOLERANCE = 1e-9
FLOAT32_FLOOR = 1e-4
FLOAT32_FACTOR = 4

ReplayDtype = Literal["float64", "float32"]


@dataclass(frozen=True)
class ReplayReport:
    """Largest errors of a replay, each relative to the largest absolute value of its tensor.

    Attributes:
        loss: over the three losses (float32: the first).
        meta_gradient: over the first batch's meta-gradients.
        final_parameters: over the parameters after three updates (float32: informative only).
        eval_logits: over the evaluation's target logits (float32: informative only).
        engine: the engine that ran.
        dtype: ``"float64"`` or ``"float32"``.
        ok: whether all errors that count are within tolerance.
    """

    loss: float
    meta_gradient: float
    final_parameters: float
    eval_logits: float
    engine: str
    dtype: str
    ok: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        """The errors and the verdict, a line each."""
        names = ("loss", "meta_gradient", "final_parameters", "eval_logits")
        errors = [f"{name:<17} {getattr(self, name):.2e}" for name in names]
        verdict = "within tolerance" if self.ok else "outside tolerance"
        return "\n".join([*errors, f"engine {self.engine}, {self.dtype}: {verdict}"])


class _RecordedLearner(MAMLPlusPlus):
    """A learner with the recorded multi-step weights: the authors' code rounds them to float32."""

    recorded_weights: Tensor

    def step_weights(self) -> Tensor | None:
        scheduled = super().step_weights()
        return None if scheduled is None else self.recorded_weights.to(scheduled)


def replay(
    path: str | Path,
    *,
    engine: EngineName = "auto",
    dtype: ReplayDtype = "float64",
    device: torch.device | str = "cpu",
) -> ReplayReport:
    """Repeats a recorded run: three meta-updates and an evaluation.

    In float64 every error must stay within 1e-9. In float32 the first batch alone is judged: loss and meta-gradient at
    most four times as far off as the reference engine in float32 on the same file, or 1e-4 where that is smaller.

    Args:
        path: a recorded run (``.npz``).
        engine: the engine to replay with.
        dtype: ``"float64"`` or ``"float32"``.
        device: where to run.

    Raises:
        ValueError: when the file is no recorded run, or an argument is out of range.
    """
    if dtype not in ("float64", "float32"):
        raise ValueError(f"dtype: expected float64 or float32, got {dtype!r}")
    record = read_record(Path(path))
    report = _run(record, engine, dtype, torch.device(device))
    if dtype == "float64":
        errors = (report.loss, report.meta_gradient, report.final_parameters, report.eval_logits)
        return _judged(report, all(e <= FLOAT64_TOLERANCE for e in errors))
    plain = report if engine == "reference" else _run(record, "reference", dtype, torch.device(device))
    return _judged(
        report,
        report.loss <= max(FLOAT32_FLOOR, FLOAT32_FACTOR * plain.loss)
        and report.meta_gradient <= max(FLOAT32_FLOOR, FLOAT32_FACTOR * plain.meta_gradient),
    )


def _judged(report: ReplayReport, ok: bool) -> ReplayReport:
    return ReplayReport(**(report.to_dict() | {"ok": bool(ok)}))


def _run(
    record: Mapping[str, Any], engine: EngineName, dtype: ReplayDtype, device: torch.device
) -> ReplayReport:
    learner = _learner(record, engine, dtype, device)
    batches = [_batch(record, i) for i in range(3)]
    judged_losses = 3 if dtype == "float64" else 1
    losses, gradient_error = [], 0.0
    for i, batch in enumerate(batches):
        metrics = learner.meta_gradient(batch)
        if i == 0:
            gradient_error = _meta_gradient_error(learner, record)
        learner.apply_gradient()
        losses.append(float(metrics.loss))
    evaluation = learner.evaluate(batches[2])
    return ReplayReport(
        loss=max(
            _error(torch.tensor(ours, dtype=torch.float64), recorded)
            for ours, recorded in zip(losses[:judged_losses], record["losses"], strict=False)
        ),
        meta_gradient=gradient_error,
        final_parameters=_final_error(learner, record),
        eval_logits=_error(evaluation.logits[-1].cpu(), record["eval_logits"]),
        engine=learner.training_engine.name,
        dtype=dtype,
        ok=False,
    )


def _learner(
    record: Mapping[str, Any], engine: EngineName, dtype: ReplayDtype, device: torch.device
) -> MAMLPlusPlus:
    c = record["config"]
    config = MAMLConfig(
        steps=c["steps"],
        inner_lr=c["inner_lr"],
        lslr=c["lslr"],
        second_order=c["second_order"],
        da_epoch=c["da_epoch"],
        msl=c["msl"],
        msl_epochs=c["msl_epochs"],
        bnwb=c["per_step_bn"] and not c["inner_bn"],
        bnrs=c["per_step_bn"],
        adapt_norm=c["inner_bn"],
        clamp_meta_gradient=10.0 if "imagenet" in c["dataset"] else None,
    )
    model = Conv4(
        c["channels"],
        c["ways"],
        image_size=c["image"],
        filters=c["filters"],
        stages=c["stages"],
        num_steps=c["steps"],
        max_pool=c["max_pool"],
        per_step_affine=config.bnwb,
        per_step_stats=config.bnrs,
    )
    for block in model.blocks:
        norm = block.get_submodule("norm")
        norm.get_parameter("weight").requires_grad_(c["bn_gamma"])
        norm.get_parameter("bias").requires_grad_(c["bn_beta"])
    learner = _RecordedLearner(model, config, engine=engine, precision=dtype, device=device)
    load_authors_state(learner, {k: torch.from_numpy(v) for k, v in _group(record, "init").items()})
    learner.recorded_weights = torch.from_numpy(record["msl_weights"])
    learner.iteration = c["epoch"] * config.iterations_per_epoch
    return learner


def _batch(record: Mapping[str, Any], index: int) -> EpisodeBatch:
    fields = (f"batch{index}/{side}_{axis}" for side in ("support", "target") for axis in "xy")
    return EpisodeBatch(*(torch.from_numpy(record[f]) for f in fields))


def _meta_gradient_error(learner: MAMLPlusPlus, record: Mapping[str, Any]) -> float:
    own = dict(learner.model.named_parameters())
    errors = []
    for name, recorded in _group(record, "grad0").items():
        kind, ours = our_name(name)
        if ours.endswith("conv.bias"):
            continue  # rounding noise around an exact zero
        grad = None
        if kind == "model" and ours in own:
            grad = own[ours].grad
        elif kind == "rates" and ours in learner.rates.names and learner.rates.rates.grad is not None:
            grad = learner.rates.rates.grad[learner.rates.names.index(ours)]
            recorded = recorded[: learner.config.steps]
        if grad is None:
            raise ValueError(f"grad0/{name}: expected a gradient of {ours}, this configuration has none")
        errors.append(_error(grad.cpu(), recorded))
    return max(errors, default=float("inf"))


def _final_error(learner: MAMLPlusPlus, record: Mapping[str, Any]) -> float:
    state = learner.model.state_dict()
    errors = []
    for name, recorded in _group(record, "final").items():
        kind, ours = our_name(name)
        # The authors' Adam moves inert biases by amplified rounding noise; their recorded running statistics
        # include the evaluation's, which leak into them.
        if ours.endswith("conv.bias") or ".running_" in ours:
            continue
        if ours not in (state if kind == "model" else learner.rates.names):
            raise ValueError(f"final/{name}: expected a parameter of this configuration, it has no {ours}")
        if kind == "model":
            errors.append(_error(state[ours].cpu(), recorded))
        else:
            row = learner.rates.rates[learner.rates.names.index(ours)].detach()
            errors.append(_error(row.cpu(), recorded[: learner.config.steps]))
    return max(errors, default=float("inf"))


def _error(ours: Tensor, recorded: np.ndarray[Any, Any]) -> float:
    """Largest absolute difference relative to the largest recorded value (absolute where all recorded are zero)."""
    expected = torch.as_tensor(recorded, dtype=torch.float64)
    if expected.shape != ours.shape:
        raise ValueError(f"recorded: expected a tensor {list(ours.shape)}, got {list(expected.shape)}")
    scale = float(expected.abs().max())
    difference = float((ours.double() - expected).abs().max())
    if difference != difference:
        return float("inf")
    return difference / scale if scale else difference


def _group(record: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(f"{prefix}/"): v for k, v in record.items() if k.startswith(f"{prefix}/")}
