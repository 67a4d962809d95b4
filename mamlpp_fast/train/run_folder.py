"""What a run's folder holds: opening it, its settings and models, judging it again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mamlpp_fast.data import EpisodeSampler, FewShotData
from mamlpp_fast.data.archives import shown
from mamlpp_fast.engine import EngineName
from mamlpp_fast.learner import MAMLPlusPlus
from mamlpp_fast.train._resumable import changed_settings, check_best, check_fits, is_model_name
from mamlpp_fast.train.build import build_learner, load_data, make_sampler
from mamlpp_fast.train.checkpoint import load_checkpoint
from mamlpp_fast.train.config import TrainConfig
from mamlpp_fast.train.evaluate import Score, predict, score_models
from mamlpp_fast.train.files import read_json, remove_leftovers, write_json

__all__ = [
    "best_files",
    "evaluate_run",
    "finished_summary",
    "load_model",
    "open_folder",
    "open_test",
    "put_model",
    "ranked",
    "read_config",
]


def open_folder(folder: Path, identity: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Checks that the folder is free or holds this very run, and clears what a killed process left."""
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    remove_leftovers(folder)
    remove_leftovers(checkpoints)
    path = folder / "config.json"
    if path.exists():
        plain = json.loads(json.dumps(identity))
        stored = {k: v for k, v in read_json(path).items() if k in plain}
        if changed := changed_settings(stored, plain):
            raise ValueError(f"--out: expected a folder without another run, {folder} differs: now {changed}")
    else:
        if (checkpoints / "latest.pt").exists():
            raise ValueError(f"--out: expected a run's folder, {folder} has checkpoints but no config.json")
        write_json(path, dict(record))


def finished_summary(folder: Path, target: int) -> dict[str, Any] | None:
    """The summary of a run that has made ``target`` meta-updates; None where it has not."""
    path = folder / "summary.json"
    if not path.exists():
        return None
    summary = read_json(path)
    made = summary.get("iterations", 0)
    if type(made) is not int:
        raise ValueError(f"{path}: iterations: expected an integer, got {shown(made)}")
    return summary if made >= target else None


def read_config(folder: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The configuration of a run and the whole content of its ``config.json``.

    Raises:
        ValueError: when the folder holds no run.
    """
    record = read_json(folder / "config.json")
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    for key, kind in (("engine", str), ("precision", str), ("data", str | None)):
        if key not in record or not isinstance(record[key], kind):
            raise ValueError(
                f"{folder / 'config.json'}: expected {key} as a text, got {shown(record.get(key))}"
            )
    return TrainConfig.from_dict({k: v for k, v in record.items() if k in known}), record


def load_model(path: Path, learner: MAMLPlusPlus) -> None:
    """Puts a model checkpoint's parameters and rates into a learner.

    Raises:
        CheckpointError: when it cannot be read or is of another shape.
    """
    put_model(path, load_checkpoint(path, "model", learner.device), learner)


def put_model(path: Path, content: Mapping[str, Any], learner: MAMLPlusPlus) -> None:
    """:func:`load_model` for the content that ``path`` had.

    Raises:
        CheckpointError: when it is of another shape.
    """
    for what, module in (("model", learner.model), ("rates", learner.rates)):
        check_fits(path, what, module.state_dict(), content.get(what))
        module.load_state_dict(content[what])


def open_test(
    config: TrainConfig,
    record: Mapping[str, Any],
    *,
    data_path: str | Path | None = None,
    engine: EngineName | None = None,
    device: torch.device | str = "cpu",
) -> tuple[FewShotData, MAMLPlusPlus, EpisodeSampler]:
    """The data of a run, a learner at its initial parameters, and the sampler of its test tasks.

    Args:
        config: the run's settings.
        record: the whole content of its ``config.json``.
        data_path: where the data set lies; where the run found it without it.
        engine: the run's own without it.
        device: where to run.
    """
    device = torch.device(device)
    data = load_data(config, record["data"] if data_path is None else data_path)
    learner = build_learner(
        config,
        data.channels,
        data.image_size,
        engine=record["engine"] if engine is None else engine,
        precision=record["precision"],
        device=device,
    )
    return data, learner, make_sampler(config, data, "test", device, record["precision"])


def ranked(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Best validation accuracy first, the earlier one of equals."""
    return sorted(entries, key=lambda e: (-e["val_accuracy"], e["iteration"]))


def evaluate_run(
    folder: str | Path,
    *,
    tasks: int | None = None,
    ensemble: int = 5,
    data_path: str | Path | None = None,
    engine: EngineName | None = None,
    device: torch.device | str = "cpu",
    steps: int | None = None,
    stats: str | None = None,
) -> list[Score]:
    """Tests the best checkpoint of a run, and the average of the best ``ensemble`` ones.

    Args:
        folder: the run's folder.
        tasks: test tasks; the run's own number without it.
        ensemble: models to average; fewer where fewer were kept.
        data_path: where the data set lies; where the run found it without it.
        engine: the run's own without it.
        device: where to run.
        steps: inner updates; the run's own number without it.
        stats: ``"batch"`` or ``"running"``; the run's own without it.

    Returns:
        the score of the best model and, with more than one, that of the ensemble.

    Raises:
        ValueError: when the folder holds no run with a finished epoch, or a checkpoint does not fit.
    """
    if ensemble < 1:
        raise ValueError(f"ensemble: expected at least 1, got {ensemble}")
    folder = Path(folder)
    config, record = read_config(folder)
    if stats is not None:
        config = dataclasses.replace(config, eval_stats=stats)  # type: ignore[arg-type]
    if tasks is not None:
        config = dataclasses.replace(config, test_tasks=tasks)
    if steps is not None:
        config = dataclasses.replace(config, eval_steps=steps)
    _, learner, sampler = open_test(config, record, data_path=data_path, engine=engine, device=device)
    files = best_files(folder)[:ensemble]
    single, average = score_models(
        (partial(load_model, folder / "checkpoints" / file, learner) for file in files),
        partial(predict, learner, sampler, config.test_tasks, config.tasks),
        config.conditions(),
    )
    return [single, average] if len(files) > 1 else [single]


def best_files(folder: Path) -> list[str]:
    """Model checkpoints, the best first: those of the summary, else those of the last training checkpoint.

    Raises:
        ValueError: when there is none.
    """
    summary = folder / "summary.json"
    if summary.exists():
        files = read_json(summary).get("models")
    else:
        latest = load_checkpoint(folder / "checkpoints" / "latest.pt", "training")
        files = check_best(folder / "checkpoints" / "latest.pt", latest.get("best"))
    if not files:
        raise ValueError(f"DIR: expected a run with at least one finished epoch, {folder} has none")
    if not isinstance(files, list) or not all(map(is_model_name, files)):
        raise ValueError(f"{summary}: expected names of model checkpoints, got {shown(files)}")
    return files
