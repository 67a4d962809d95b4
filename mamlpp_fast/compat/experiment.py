"""Experiment files (JSON) of the MAML++ authors' code as our settings: what each key does here is said in this file."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mamlpp_fast.config import TRUTH, read_value
from mamlpp_fast.data.authors import OMNIGLOT_FRACTIONS
from mamlpp_fast.train.config import TrainConfig
from mamlpp_fast.train.files import read_json

__all__ = ["Experiment", "read_experiment"]


class _Key(NamedTuple):
    """A key that decides something here.

    Attributes:
        kind: type of its value.
        default: their default; where ``required``, what their shipped files say.
        ours: our setting that has the same value.
        required: their code stops without it.
    """

    kind: type
    default: Any
    ours: str | None = None
    required: bool = False


_USED = {
    "dataset_name": _Key(str, "omniglot_dataset"),
    "dataset_path": _Key(str, "datasets/omniglot_dataset"),
    "sets_are_pre_split": _Key(bool, None, required=True),
    "train_val_test_split": _Key(list, [0.73982737361, 0.26, 0.13008631319]),
    "reverse_channels": _Key(bool, False),
    "image_height": _Key(int, 28),
    "image_width": _Key(int, 28),
    "image_channels": _Key(int, 1),
    "experiment_name": _Key(str, None),
    "evaluate_on_test_set_only": _Key(bool, False, required=True),
    "num_classes_per_set": _Key(int, 20, "ways"),
    "num_samples_per_class": _Key(int, 1, "shots"),
    "num_target_samples": _Key(int, 15, "targets"),
    "batch_size": _Key(int, 32),
    "num_of_gpus": _Key(int, 1),
    "samples_per_iter": _Key(int, 1),
    "num_evaluation_tasks": _Key(int, 600, required=True),
    "seed": _Key(int, 104),
    "train_seed": _Key(int, 0, "seed", required=True),
    "val_seed": _Key(int, 0, required=True),
    "cnn_num_filters": _Key(int, 64, "filters"),
    "num_stages": _Key(int, 4, "stages", required=True),
    "conv_padding": _Key(bool, True, required=True),
    "max_pooling": _Key(bool, False, "max_pool"),
    "norm_layer": _Key(str, "batch_norm"),
    "per_step_bn_statistics": _Key(bool, False, "bnrs"),
    "learnable_bn_gamma": _Key(bool, True, "learn_gamma", required=True),
    "learnable_bn_beta": _Key(bool, True, "learn_beta", required=True),
    "enable_inner_loop_optimizable_bn_params": _Key(bool, False, "adapt_norm", required=True),
    "number_of_training_steps_per_iter": _Key(int, 1, "steps"),
    "number_of_evaluation_steps_per_iter": _Key(int, 1),
    "task_learning_rate": _Key(float, 0.1, "inner_lr"),
    "learnable_per_layer_per_step_inner_loop_learning_rate": _Key(bool, True, "lslr", required=True),
    "use_multi_step_loss_optimization": _Key(bool, True, "msl", required=True),
    "multi_step_loss_num_epochs": _Key(int, 10, "msl_epochs", required=True),
    "second_order": _Key(bool, False, "second_order"),
    "first_order_to_second_order_epoch": _Key(int, -1, required=True),
    "meta_learning_rate": _Key(float, 0.001, "meta_lr"),
    "min_learning_rate": _Key(float, 0.00001, "min_meta_lr"),
    "total_epochs": _Key(int, 200, "epochs"),
    "total_iter_per_epoch": _Key(int, 500, "iterations_per_epoch"),
}

_NEVER_READ = "the authors' code never reads it either"
_UNUSED = {
    **dict.fromkeys(
        (
            "architecture_name",
            "cnn_blocks_per_stage",
            "cnn_num_blocks",
            "dropout_rate_value",
            "evalute_on_test_set_only",
            "learnable_batch_norm_momentum",
            "load_from_npz_files",
            "max_models_to_save",
            "meta_opt_bn",
            "minimum_per_task_contribution",
            "name_of_args_json_file",
            "reset_stored_paths",
            "train_in_stages",
            "use_gdrive",
            "weight_decay",
        ),
        _NEVER_READ,
    ),
    "init_inner_loop_learning_rate": "the authors' code never reads it but task_learning_rate (--set inner_lr)",
    "indexes_of_folders_indicating_class": "classes are told from the layout of the folders",
    "labels_as_int": "classes are told from the layout of the folders",
    "load_into_memory": "images are always kept in memory",
    "num_dataprovider_workers": "tasks are drawn without worker processes",
    "reset_stored_filepaths": "no list of files is stored",
    "total_epochs_before_pause": "a run stopped at any moment goes on with the same command (--max-iters stops it)",
}
# Theirs takes these from its own command line alone, whatever the key is exactly.
_COMMAND_LINE = {
    "gpu_to_use": "their code ignores it in a file (--device)",
    "continue_from": "their code ignores it in a file; a stopped run in --out goes on",
}
_OWN_IMAGES = {"omniglot": (28, 1), "miniimagenet": (84, 3)}


@dataclass(frozen=True)
class Experiment:
    """An experiment file of the authors' code.

    Attributes:
        config: our settings for what their code does with it.
        name: their experiment's name.
        channels: channels of the images.
        image_size: their height and width in pixels.
        evaluate_only: whether it asks for the test alone.
        data: folder of its data set in ``DATASET_DIR``, where there is one.
        notes: keys without effect and why, absent keys and what was taken, a line each.
    """

    config: TrainConfig
    name: str
    channels: int
    image_size: int
    evaluate_only: bool
    data: Path | None
    notes: tuple[str, ...]


def read_experiment(path: str | Path, settings: Mapping[str, Any] | None = None) -> Experiment:
    """Reads an experiment file; ``settings`` replace ours.

    Raises:
        ValueError: for a file that is no JSON object, an unknown key (the nearest known one is named), or a value that
            this package cannot do.
    """
    path = Path(path)
    values = read_json(path, "an experiment file for --config")
    try:
        return _Translation(path, values, dict(settings or {})).experiment()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class _Translation:
    def __init__(self, path: Path, values: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self.path, self.values, self.settings = path, values, settings
        for key in values:
            if key not in _USED and key not in _UNUSED and not any(part in key for part in _COMMAND_LINE):
                (near,) = difflib.get_close_matches(key, [*_USED, *_UNUSED, *_COMMAND_LINE], 1, cutoff=0)
                raise ValueError(
                    f"{key}: expected a key of the authors' code, the nearest is {near!r}, got {key!r}"
                )

    def __getitem__(self, key: str) -> Any:
        """The value of a key, of its type: their default where it is absent."""
        kind, default, *_ = _USED[key]
        value = self.values.get(key, default)
        if kind is bool:
            value = TRUTH.get(str(value).lower(), value)
        absent = key not in self.values or (value is None and kind is bool)
        return value if absent else read_value(key, value, kind)

    def experiment(self) -> Experiment:
        dataset, changes = self._dataset()
        changes |= {
            key.ours: self[name]
            for name, key in _USED.items()
            if key.ours is not None and key.ours not in self.settings
        }
        tasks = self["batch_size"] * self["num_of_gpus"] * self["samples_per_iter"]
        judged = self["num_evaluation_tasks"] // max(tasks, 1) * tasks
        evaluation_steps = self["number_of_evaluation_steps_per_iter"]
        changes |= {
            "tasks": tasks,
            "val_tasks": judged,
            "test_tasks": judged,
            "sampling": "authors",
            "init_seed": int(np.random.RandomState(self["seed"]).randint(0, 999999)),
            "val_seed": self["val_seed"],
            "test_seed": self["val_seed"],
            "norm": self._choice("norm_layer", {"batch_norm": "batch", "layer_norm": "layer"}),
            "bnwb": self["per_step_bn_statistics"] and not self["enable_inner_loop_optimizable_bn_params"],
            "da_epoch": max(self["first_order_to_second_order_epoch"], -1),
            "eval_steps": None
            if evaluation_steps == self["number_of_training_steps_per_iter"]
            else evaluation_steps,
        }
        if not self["conv_padding"]:
            raise ValueError("conv_padding: expected true, the networks here pad by one pixel, got false")
        if "inner_lr" not in self.settings and not self["task_learning_rate"] > 0:
            raise ValueError(
                f"task_learning_rate: expected above 0, as the authors' code does, got "
                f"{self['task_learning_rate']}; older code then took init_inner_loop_learning_rate: --set inner_lr"
            )
        config = self._config(changes | dict(self.settings))
        return Experiment(
            config,
            self._name(),
            self["image_channels"],
            self["image_height"],
            self["evaluate_on_test_set_only"],
            self._data(),
            tuple(self._notes(dataset, config)),
        )

    def _config(self, values: Mapping[str, Any]) -> TrainConfig:
        try:
            return TrainConfig.from_dict(values)
        except ValueError as error:
            ours, colon, rest = str(error).partition(":")
            theirs = {key.ours: name for name, key in _USED.items()} | {
                "tasks": "batch_size",
                "val_tasks": "num_evaluation_tasks",
                "eval_steps": "number_of_evaluation_steps_per_iter",
            }
            name = theirs.get(ours) if ours not in self.settings else None
            raise ValueError(f"{name} ({ours}){colon}{rest}" if name else str(error)) from error

    def _choice(self, key: str, known: Mapping[str, str]) -> str:
        if (value := self[key]) not in known:
            raise ValueError(f"{key}: expected {' or '.join(known)}, got {value!r}")
        return known[value]

    def _name(self) -> str:
        name = self["experiment_name"] or self.path.stem
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"experiment_name: expected a folder's name, got {name!r}")
        return str(name)

    def _data(self) -> Path | None:
        root = os.environ.get("DATASET_DIR")
        folder = Path(root) / self["dataset_path"] if root else None
        return folder if folder is not None and folder.exists() else None

    def _dataset(self) -> tuple[str, dict[str, Any]]:
        """Our data set, and the settings that follow from it and from its images."""
        name = self["dataset_name"]
        theirs = (
            "omniglot"
            if "omniglot" in name
            else "miniimagenet"
            if "mini" in name and "imagenet" in name
            else None
        )
        dataset = self.settings.get("dataset", theirs)
        if dataset is None:
            raise ValueError(
                f"dataset_name: expected one with omniglot or mini_imagenet in it, got {name!r} "
                "(--set dataset=folder --data PATH reads any images)"
            )
        size, channels = self["image_height"], self["image_channels"]
        own_size, own_channels = _OWN_IMAGES.get(dataset, (None, channels))
        if size != self["image_width"]:
            raise ValueError(f"image_width: expected image_height, {size}, got {self['image_width']}")
        if channels != own_channels:
            raise ValueError(f"image_channels: expected {own_channels} of {dataset}, got {channels}")
        if self["reverse_channels"]:
            raise ValueError("reverse_channels: expected false, channels keep their order here, got true")
        if dataset in _OWN_IMAGES:
            self._check_split(dataset)
        return dataset, {
            "dataset": dataset,
            "image_size": None if size == own_size else size,
            "clamp_meta_gradient": 10.0 if "imagenet" in name else None,
        }

    def _check_split(self, dataset: str) -> None:
        presplit = dataset == "miniimagenet"
        if (given := self["sets_are_pre_split"]) not in (presplit, None):
            raise ValueError(
                f"sets_are_pre_split: expected {str(presplit).lower()} for {dataset}, got {str(given).lower()}"
            )
        if not presplit and (split := self["train_val_test_split"]) != list(OMNIGLOT_FRACTIONS):
            raise ValueError(
                f"train_val_test_split: expected {list(OMNIGLOT_FRACTIONS)} for omniglot, got {split}"
            )

    def _notes(self, dataset: str, config: TrainConfig) -> Iterator[str]:
        reasons: dict[str, list[str]] = {}
        for key in self.values:
            if key in _UNUSED:
                reasons.setdefault(_UNUSED[key], []).append(key)
            elif key not in _USED:
                reason = next(why for part, why in _COMMAND_LINE.items() if part in key)
                reasons.setdefault(reason, []).append(key)
        if dataset == "miniimagenet" and "train_val_test_split" in self.values:
            reasons["sets_are_pre_split says that the folders are split"] = ["train_val_test_split"]
        if (
            documented := self.values.get("init_inner_loop_learning_rate", config.inner_lr)
        ) != config.inner_lr:
            yield f"inner rates start at {config.inner_lr}, not at init_inner_loop_learning_rate={documented}"
        for reason, keys in reasons.items():
            yield f"no effect: {', '.join(keys)}: {reason}"
        for required, why in ((False, "as by their defaults"), (True, "as in their shipped files")):
            absent = [
                f"{name}={key.default}"
                for name, key in _USED.items()
                if name not in self.values
                and key.required is required
                and key.default is not None
                and key.ours not in self.settings
            ]
            if absent:
                yield f"absent, {why}: {', '.join(absent)}"
        if dataset == "omniglot" and config.val_seed != 0:
            yield "val_seed: draws the tasks of validation and test; the split into classes stays that of val_seed 0"
        if config.eval_steps is not None and "eval_steps" not in self.settings:
            yield (
                f"number_of_evaluation_steps_per_iter: judged after step {config.eval_steps}; their code judges after "
                f"step {config.steps} or stops"
            )
        if "val_tasks" not in self.settings and config.val_tasks != self["num_evaluation_tasks"]:
            yield f"num_evaluation_tasks: {config.val_tasks}, whole batches, as theirs"
        if self["num_of_gpus"] > 1:
            yield f"num_of_gpus: {config.tasks} tasks a batch, as theirs; each task stays whole on one device"
