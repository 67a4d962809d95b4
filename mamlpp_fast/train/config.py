"""The settings of a whole training run, those of learner, network, data and protocol, in one flat record."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from mamlpp_fast.config import MAMLConfig, read_value, type_hints
from mamlpp_fast.data import DATASETS

__all__ = ["TrainConfig", "parse_settings", "suggestion"]

# Settings that decide how a run is carried out, not what it computes.
_NOT_RESULTS = frozenset({"checkpoint_seconds"})


@dataclass(frozen=True)
class TrainConfig(MAMLConfig):
    """:class:`mamlpp_fast.MAMLConfig` and everything else that decides the result of a run.

    Attributes:
        dataset: name of the data set (``mamlpp_fast.data.DATASETS``).
        data_protocol: split, scaling and augmentation of the data set, by name; ``"default"`` for the published one.
        image_size: side of the images in pixels; None for the data set's own.
        sampling: ``"counter"`` or ``"authors"`` (the random draws of the authors' code).
        ways: classes of a task.
        shots: support images of a class.
        targets: target images of a class.
        tasks: tasks of a meta-batch.
        model: ``"conv4"`` or ``"resnet12"``.
        filters: channels of every stage of ``conv4``.
        stages: stages of ``conv4``.
        max_pool: max-pooling in ``conv4``, else stride-2 convolutions.
        norm: ``"batch"`` or ``"layer"`` in ``conv4``.
        learn_gamma: meta-learn the batch-norm weights; False keeps them at 1.
        learn_beta: meta-learn the batch-norm biases; False keeps them at 0.
        val_tasks: tasks of each epoch's validation, the same ones every epoch.
        test_tasks: tasks of the final test.
        ensemble: best checkpoints kept, and averaged in the test.
        seed: the seed that ``init_seed`` and ``task_seed`` are derived from where they are None.
        init_seed: seed of the initial parameters.
        task_seed: seed of the training tasks.
        val_seed: seed of the validation tasks.
        test_seed: seed of the test tasks.
        checkpoint_seconds: time between two checkpoints within an epoch; does not change the result.
    """

    dataset: str = "strokes"
    data_protocol: str = "default"
    image_size: int | None = None
    sampling: Literal["counter", "authors"] = "counter"
    ways: int = 5
    shots: int = 1
    targets: int = 1
    tasks: int = 8
    model: Literal["conv4", "resnet12"] = "conv4"
    filters: int = 64
    stages: int = 4
    max_pool: bool = True
    norm: Literal["batch", "layer"] = "batch"
    learn_gamma: bool = True
    learn_beta: bool = True
    val_tasks: int = 600
    test_tasks: int = 600
    ensemble: int = 5
    seed: int = 0
    init_seed: int | None = None
    task_seed: int | None = None
    val_seed: int = 1
    test_seed: int = 2
    checkpoint_seconds: float = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset not in DATASETS:
            hint = suggestion(self.dataset, DATASETS)
            raise ValueError(f"dataset: expected one of {', '.join(DATASETS)}, got {self.dataset!r}{hint}")
        if self.loss != "cross_entropy":
            raise ValueError(f"loss: expected cross_entropy to train on classes of images, got {self.loss}")

    @classmethod
    def least(cls) -> dict[str, int]:
        counts = (
            "shots",
            "targets",
            "tasks",
            "filters",
            "stages",
            "val_tasks",
            "test_tasks",
            "ensemble",
            "image_size",
        )
        free = ("seed", "init_seed", "task_seed", "val_seed", "test_seed", "checkpoint_seconds")
        return super().least() | {"ways": 2} | dict.fromkeys(counts, 1) | dict.fromkeys(free, 0)

    @property
    def iterations(self) -> int:
        """Meta-updates of the whole run."""
        return self.epochs * self.iterations_per_epoch

    @property
    def initial_seed(self) -> int:
        """The seed of the initial parameters: ``init_seed``, or derived from ``seed``."""
        return _derived(self.seed, "init") if self.init_seed is None else self.init_seed

    @property
    def training_seed(self) -> int:
        """The seed of the training tasks: ``task_seed``, or derived from ``seed``.

        The authors' draws hash their small seeds themselves, so there ``seed`` is passed on.
        """
        if self.task_seed is not None:
            return self.task_seed
        return self.seed if self.sampling == "authors" else _derived(self.seed, "tasks")

    def learner_config(self) -> MAMLConfig:
        """The part that the learner takes."""
        return MAMLConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(MAMLConfig)})

    def conditions(self) -> dict[str, Any]:
        """What a score is stated with, as :func:`mamlpp_fast.train.evaluate.score` takes it."""
        return {
            "ways": self.ways,
            "shots": self.shots,
            "targets": self.targets,
            "stats": self.eval_stats,
            "steps": self.evaluation_steps(),
        }

    def deciding(self) -> dict[str, Any]:
        """The settings that two runs with the same result share, as plain values."""
        return {
            k: list(v) if isinstance(v, tuple) else v
            for k, v in self.to_dict().items()
            if k not in _NOT_RESULTS
        }


def _derived(seed: int, purpose: str) -> int:
    """A seed below 2**31 for one purpose: streams of different purposes are independent."""
    return int.from_bytes(hashlib.sha256(f"{purpose}/{seed}".encode()).digest()[:8], "little") >> 33


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Reads ``key=value`` texts into values of the types that :class:`TrainConfig` has.

    Raises:
        ValueError: for an unknown key or a value that is not of the key's type.
    """
    hints = type_hints(TrainConfig)
    known = [f.name for f in dataclasses.fields(TrainConfig)]
    values: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise ValueError(f"--set: expected key=value, got {text!r}")
        if key not in known:
            raise ValueError(
                f"--set: expected a setting such as steps or inner_lr, got {key!r}{suggestion(key, known)}"
            )
        values[key] = read_value(key, value.strip(), hints[key], text=True)
    return values


def suggestion(given: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" for a near miss, else nothing."""
    close = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
