"""What a run's folder and its checkpoints must hold for a run to go on from them, or a learner to take them.

Anything may have been written into the files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamlpp_fast.data.archives import shown
from mamlpp_fast.learner import MAMLPlusPlus
from mamlpp_fast.train.checkpoint import CheckpointError
from mamlpp_fast.train.config import TrainConfig

__all__ = [
    "changed_settings",
    "check_best",
    "check_content",
    "check_fits",
    "check_learner",
    "check_training",
    "is_model_name",
]

_NAME = re.compile(r"[\w-]+\.pt")


def is_model_name(value: Any) -> bool:
    """Whether it names a file in ``checkpoints/`` itself: what is no longer among the best is deleted by that name."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def changed_settings(stored: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The settings that differ, as ``steps=3 (was 5)``; empty when none do.

    Args:
        stored: a run's; those younger than it have their defaults.
        ours: what they must be.
    """
    theirs = TrainConfig().deciding() | dict(stored)
    missing = object()
    parts = []
    for key in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(key, missing), theirs.get(key, missing)
        if mine != other:
            shown = "absent" if mine is missing else mine
            parts.append(f"{key}={shown} (was {'absent' if other is missing else other})")
    return ", ".join(parts)


def check_training(
    path: Path,
    content: Mapping[str, Any],
    config: TrainConfig,
    fingerprint: Mapping[str, Any],
    learner: MAMLPlusPlus,
) -> None:
    """Compares a training checkpoint with the run that is to go on from it.

    Raises:
        CheckpointError: when it is of another configuration, data set, engine or model.
    """
    check_content(path, content)
    if changed := changed_settings(content["config"], config.deciding()):
        raise CheckpointError(f"{path}: expected a checkpoint of this configuration, now {changed}")
    # An imported checkpoint names no data.
    if content["data"] not in (None, fingerprint):
        raise CheckpointError(
            f"{path}: expected the data it was made with ({content['data'].get('name')!s:.50}), "
            "got other classes or pixels"
        )
    # Which engine `auto` takes shows at the first batch, and is the same for the same model.
    possible = ("fused", "autograd") if learner.engine_asked == "auto" else (learner.engine.name,)
    if content["engine"] not in possible:
        raise CheckpointError(
            f"{path}: expected engine {content['engine']}, with which it was made, "
            f"got {learner.engine.name} ({learner.engine_reason})"
        )
    state = content["learner"]
    check_learner(path, state, learner)


def check_content(path: Path, content: Mapping[str, Any]) -> None:
    """Checks the types of everything that a run goes on from, but for what the learner's state holds.

    Args:
        path: the checkpoint, for the message.
        content: what was read.

    Raises:
        CheckpointError: names the first entry that is not as expected.
    """

    def need(name: str, fits: bool, expected: str) -> None:
        if not fits:
            raise CheckpointError(f"{path}: {name}: expected {expected}, got {shown(content.get(name))}")

    for name in ("config", "learner"):
        need(name, isinstance(content.get(name), dict), "a dictionary")
    need("untimed", _whole(content.get("untimed", 0)), "an integer of at least 0")
    resumed = content.get("resumed_at", [])
    need("resumed_at", isinstance(resumed, list) and all(map(_whole, resumed)), "a list of iterations")
    need("data", isinstance(content.get("data"), dict | None), "a dictionary or none")
    need("engine", isinstance(content.get("engine"), str), "a name")
    for name in ("epochs_done", "metrics_bytes"):
        need(name, _whole(content.get(name)), "an integer of at least 0")
    for name in ("seconds", "train_seconds"):
        value = content.get(name)
        need(name, type(value) in (int, float) and math.isfinite(value) and value >= 0, "a number of seconds")  # type: ignore[arg-type, operator]
    sums = content.get("sums")
    need("sums", isinstance(sums, Tensor) and sums.shape == (2,) and sums.dtype == torch.float64, "two sums")
    own = torch.get_rng_state()
    state = content.get("rng_cpu")
    fits = isinstance(state, Tensor) and state.shape == own.shape and state.dtype == own.dtype
    need("rng_cpu", fits, "a random state")
    need("rng_cuda", isinstance(content.get("rng_cuda"), Tensor | None), "a random state or none")
    check_best(path, content.get("best"))


def check_best(path: Path, best: Any) -> list[str]:
    """The files of the best models.

    Raises:
        CheckpointError: for anything but a list of models with names and accuracies.
    """
    entries: list[Any] = best if isinstance(best, list) else [None]
    for entry in entries:
        if (
            not isinstance(entry, dict)
            or not is_model_name(entry.get("file"))
            or type(entry.get("val_accuracy")) is not float
            or not all(_whole(entry.get(key)) for key in ("epoch", "iteration"))
        ):
            raise CheckpointError(
                f"{path}: best: expected models with names and accuracies, got {shown(entry)}"
            )
    return [entry["file"] for entry in entries]


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


# How Adam computes, not what.
_OF_THE_DEVICE = ("capturable", "foreach", "fused")


def check_learner(path: Path, state: Mapping[str, Any], learner: MAMLPlusPlus) -> None:
    """Checks a learner's state: names and shapes of everything in it, Adam's moments among them.

    Raises:
        CheckpointError: names the first entry that is not as expected.
    """
    check_fits(path, "model", learner.model.state_dict(), state.get("model"))
    check_fits(path, "rates", learner.rates.state_dict(), state.get("rates"))
    if not _whole(state.get("iteration")):
        raise CheckpointError(f"{path}: iteration: expected an integer, got {shown(state.get('iteration'))}")
    optimizer = state.get("optimizer")
    ours: dict[str, Any] = learner.optimizer.state_dict()
    parameters = [p for group in learner.optimizer.param_groups for p in group["params"]]
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("state"), dict):
        raise CheckpointError(f"{path}: optimizer: expected Adam's state, got {type(optimizer).__name__}")
    groups = optimizer.get("param_groups")
    if groups is None or not _same_form(groups, ours["param_groups"]):
        raise CheckpointError(f"{path}: optimizer: expected Adam's parameter groups, got {shown(groups)}")
    for group, own in zip(groups, ours["param_groups"], strict=True):
        for key, value in own.items():
            switch = isinstance(value, bool) and key not in _OF_THE_DEVICE
            if (switch or key == "params") and group[key] != value:
                raise CheckpointError(
                    f"{path}: optimizer: expected {key} {shown(value)}, got {shown(group[key])}"
                )
    for index, moments in optimizer["state"].items():
        known = type(index) is int and 0 <= index < len(parameters)
        if not known or not isinstance(moments, dict) or moments.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise CheckpointError(
                f"{path}: optimizer: expected Adam's moments, got {shown(index)}: {shown(moments)}"
            )
        p = parameters[index]
        for key, value in moments.items():
            shape = () if key == "step" else p.shape
            if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
                raise CheckpointError(f"{path}: optimizer: expected {key} {list(shape)} of parameter {index}")


def check_fits(path: Path, what: str, own: Mapping[str, Any], loaded: Any) -> None:
    """Compares names and shapes before anything is loaded.

    Args:
        path: the checkpoint, for the message.
        what: ``"model"`` or ``"rates"``, for the message.
        own: the state dict it is to be loaded into.
        loaded: the state dict it holds.

    Raises:
        CheckpointError: names the first parameter that differs.
    """
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: expected {what} by name, got {type(loaded).__name__}")
    for name in [*own, *loaded]:
        ours = _shape(own.get(name))
        theirs = _shape(loaded.get(name))
        if ours != theirs:
            raise CheckpointError(f"{path}: expected {what} {name!s:.100} {ours}, got {theirs}")


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"of shape {list(value.shape)}"
    return "absent" if value is None else type(value).__name__


def _same_form(theirs: Any, ours: Any) -> bool:
    """The same keys, lengths and kinds of value throughout."""
    if isinstance(ours, dict):
        return (
            isinstance(theirs, dict)
            and theirs.keys() == ours.keys()
            and all(_same_form(theirs[key], value) for key, value in ours.items())
        )
    if isinstance(ours, list | tuple):
        return (
            isinstance(theirs, list | tuple)
            and len(theirs) == len(ours)
            and all(map(_same_form, theirs, ours))
        )
    if isinstance(ours, float | Tensor):
        return isinstance(theirs, float | Tensor) and math.isfinite(float(theirs))
    return type(theirs) is type(ours)
