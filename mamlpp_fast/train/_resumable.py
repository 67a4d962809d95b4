"""What a training checkpoint must hold for a run to go on from it; anything may have been written into the file."""

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
from mamlpp_fast.train.checkpoint import CheckpointError, check_fits

__all__ = ["check_best", "check_content", "check_learner", "is_model_name"]

_NAME = re.compile(r"[\w-]+\.pt")


def is_model_name(value: Any) -> bool:
    """Whether it names a file in ``checkpoints/`` itself: what is no longer among the best is deleted by that name."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


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
