"""Files of recorded runs, read whole and checked before anything is built to their measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mamlpp_fast.data.archives import read_npz, shown

__all__ = ["read_record"]

_INTEGERS = {  # the least of each
    "ways": 1,
    "image": 1,
    "channels": 1,
    "filters": 1,
    "stages": 1,
    "steps": 1,
    "msl_epochs": 0,
    "da_epoch": -1,
    "epoch": 0,
}
_SWITCHES = ("lslr", "inner_bn", "msl", "second_order", "max_pool", "per_step_bn", "bn_gamma", "bn_beta")
_KEYS = frozenset([*_INTEGERS, *_SWITCHES, "inner_lr", "dataset"])
_FIRST = "init/classifier.layer_dict.conv0.conv.weight"
_MOST = 1 << 20  # of any number: epochs, steps, sides


def read_record(path: Path) -> dict[str, Any]:
    """Reads a recorded run whole; ``config`` becomes a dictionary.

    Raises:
        ValueError: when the file cannot be read, lacks a key, or holds arrays that do not fit its ``config``.
    """
    record: dict[str, Any] = dict(read_npz(path))
    batches = {f"batch{i}/{side}_{axis}" for i in range(3) for side in ("support", "target") for axis in "xy"}
    needed = {"config", "losses", "eval_logits", "msl_weights", _FIRST} | batches
    if missing := needed - record.keys():
        raise ValueError(f"{path}: expected a recorded run, key {min(missing)!r} is missing")
    for prefix in ("grad0/", "final/"):
        if not any(key.startswith(prefix) for key in record):
            raise ValueError(f"{path}: expected a recorded run, keys {prefix}... are missing")
    try:
        config = json.loads(str(record["config"]))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected config to be JSON, {error!s:.200}") from error
    if not isinstance(config, dict) or (absent := _KEYS - config.keys()):
        detail = f"{min(absent)!r} is missing" if isinstance(config, dict) else "it is no object"
        raise ValueError(f"{path}: expected config to say how the run was made, {detail}")
    _check_config(path, config)
    _check_arrays(path, config, record)
    return record | {"config": config}


def _check_config(path: Path, config: dict[str, Any]) -> None:
    for key, least in _INTEGERS.items():
        value = config[key]
        if type(value) is not int or not least <= value <= _MOST:
            raise ValueError(
                f"{path}: config {key}: expected an integer of at least {least}, got {shown(value)}"
            )
    for key in _SWITCHES:
        if type(config[key]) is not bool:
            raise ValueError(f"{path}: config {key}: expected true or false, got {shown(config[key])}")
    rate = config["inner_lr"]
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not -1e9 < rate < 1e9:
        raise ValueError(f"{path}: config inner_lr: expected a number within 1e9, got {shown(rate)}")
    if not isinstance(config["dataset"], str):
        raise ValueError(f"{path}: config dataset: expected a name, got {shown(config['dataset'])}")


def _check_arrays(path: Path, c: dict[str, Any], record: dict[str, Any]) -> None:
    """Sizes agree with ``config``: what is built to it is then no larger than what the file holds."""
    stages = sum(k.startswith("init/") and k.endswith(".conv.weight") for k in record)
    expected = {_FIRST: (c["filters"], c["channels"], 3, 3), "msl_weights": (c["steps"],), "losses": (3,)}
    for key, shape in expected.items():
        if record[key].shape != shape:
            raise ValueError(f"{path}: {key}: expected {list(shape)}, got {list(record[key].shape)}")
    if stages != c["stages"]:
        raise ValueError(f"{path}: init/: expected {c['stages']} convolutions, got {stages}")
    for i in range(3):
        for side in ("support", "target"):
            x, y = record[f"batch{i}/{side}_x"], record[f"batch{i}/{side}_y"]
            image = (c["channels"], c["image"], c["image"])
            if x.ndim != 6 or x.shape[1] != c["ways"] or x.shape[3:] != image or 0 in x.shape:
                raise ValueError(
                    f"{path}: batch{i}/{side}_x: expected [tasks, {c['ways']}, images, "
                    f"{', '.join(map(str, image))}], got {list(x.shape)}"
                )
            whole = np.issubdtype(y.dtype, np.signedinteger)
            if not whole or y.shape != x.shape[:3] or y.min() < 0 or y.max() >= c["ways"]:
                raise ValueError(
                    f"{path}: batch{i}/{side}_y: expected labels 0 to {c['ways'] - 1} in {list(x.shape[:3])}, "
                    f"got {y.dtype} {list(y.shape)}"
                )
        if record[f"batch{i}/support_x"].shape[0] != record[f"batch{i}/target_x"].shape[0]:
            raise ValueError(f"{path}: batch{i}: expected support and target of as many tasks")
    for key, value in record.items():
        kind = value.dtype if isinstance(value, np.ndarray) else None
        labels_or_text = key.endswith("_y") or key == "config"
        if kind is not None and not labels_or_text and kind not in (np.float64, np.float32):
            raise ValueError(f"{path}: {key}: expected float64 or float32, got {kind}")
