"""Checkpoints of the MAML++ authors' code (``train_model_5``) as run folders of ours, and back."""

from __future__ import annotations

import io
import json
import struct
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamlpp_fast.compat.adam import adam_from_authors, adam_to_authors
from mamlpp_fast.compat.authors import layout, load_authors_state, our_name, our_order, to_authors
from mamlpp_fast.compat.experiment import Experiment
from mamlpp_fast.engine import EngineName, Precision
from mamlpp_fast.learner import MAMLPlusPlus
from mamlpp_fast.train.build import build_learner
from mamlpp_fast.train.checkpoint import load_checkpoint, load_tensors, save_checkpoint
from mamlpp_fast.train.config import TrainConfig
from mamlpp_fast.train.files import append_line, run_lock, write_json, write_whole
from mamlpp_fast.train.run_folder import ranked, read_config

__all__ = ["export_checkpoint", "import_checkpoints"]

# What has no place in a run of ours: the last entries of the rate vectors. Beside config.json, so that training,
# which clears the checkpoints it no longer needs, leaves it.
_REST = "authors.pt"
_STATISTICS = {
    "train_loss": "train_loss_mean",
    "train_accuracy": "train_accuracy_mean",
    "val_loss": "val_loss_mean",
    "val_accuracy": "val_accuracy_mean",
}


@dataclass(frozen=True)
class _Checkpoint:
    path: Path
    content: Mapping[str, Any]
    network: Mapping[str, Tensor]
    iteration: int
    val_accuracy: float

    def epoch(self, config: TrainConfig) -> int:
        """The epoch that it ends."""
        return self.iteration // config.iterations_per_epoch - 1


def import_checkpoints(
    paths: Sequence[str | Path],
    experiment: Experiment,
    out: str | Path,
    *,
    engine: EngineName = "auto",
    precision: Precision | None = None,
    device: torch.device | str = "cpu",
    data_path: str | Path | None = None,
) -> list[str]:
    """Makes a run's folder of checkpoints of the authors' code; nothing in the files is run.

    The furthest of them is what training goes on from; the best by validation are the ensemble.

    Args:
        paths: their files, in either format of ``torch.save``.
        experiment: the experiment they were made by.
        out: the folder; must hold no run.
        engine: the engine that the run goes on with; see :class:`mamlpp_fast.MAMLPlusPlus`, as for the others.
        precision: ditto; that of the tensors without it.
        device: ditto.
        data_path: where the data set lies.

    Returns:
        what is not as in their run, a line each.

    Raises:
        ValueError: when a file is no checkpoint of the experiment, or ``out`` holds a run.
    """
    config, folder = experiment.config, Path(out)
    found = {c.iteration: c for c in (_read(Path(path), config) for path in paths)}
    checkpoints = [found[i] for i in sorted(found)]
    latest = checkpoints[-1]
    if precision is None:
        wide = next(iter(latest.network.values())).dtype == torch.float64
        precision = "float64" if wide else "float32"
    learner = build_learner(
        config, experiment.channels, experiment.image_size, engine=engine, precision=precision, device=device
    )
    for c in checkpoints:  # all of them fit before anything is written
        _load(learner, c)
    notes, rest = _load_adam(learner, latest, config)
    with run_lock(folder):
        if (folder / "config.json").exists():
            raise ValueError(f"--out: expected a folder without a run, {folder} holds one")
        (folder / "checkpoints").mkdir(exist_ok=True)
        entries = []
        for c in checkpoints:
            _load(learner, c)
            entries.append(_save_model(folder, c, learner, config))
        best = ranked(entries)[: config.ensemble]
        for entry in entries:
            if entry not in best:
                (folder / "checkpoints" / entry["file"]).unlink()
        notes += _write_metrics(folder, latest, learner, config)
        content = {
            "config": config.deciding(),
            "engine": learner.engine.name,
            "data": None,
            "learner": learner.state_dict(),
            "epochs_done": latest.epoch(config) + 1,
            "sums": torch.zeros(2, dtype=torch.float64),
            "best": best,
            "metrics_bytes": (folder / "metrics.jsonl").stat().st_size,
            "seconds": 0.0,
            "train_seconds": 0.0,
            "untimed": latest.iteration,
            "rng_cpu": torch.Generator().manual_seed(config.training_seed).get_state(),
            "rng_cuda": None,
        }
        save_checkpoint(folder / "checkpoints" / "latest.pt", "training", content)
        save_checkpoint(folder / _REST, "authors", rest)
        identity = {"engine": engine, "precision": precision, "device": torch.device(device).type}
        data = None if data_path is None else str(data_path)
        # Last: with it the folder is a run.
        write_json(
            folder / "config.json", {"preset": experiment.name, "data": data, **config.deciding(), **identity}
        )
    return notes


def _read(path: Path, config: TrainConfig) -> _Checkpoint:
    with torch.serialization.safe_globals(_NUMBERS):
        content = load_tensors(path)
    try:
        network, iteration = content["network"], content["current_iter"]
        accuracy = content["val_accuracy_mean"]
    except (KeyError, TypeError, IndexError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else f"got {type(content).__name__}"
        raise ValueError(f"{path}: expected a checkpoint of the authors' code, {reason}") from error
    tensors = (
        isinstance(network, Mapping) and network and all(isinstance(v, Tensor) for v in network.values())
    )
    if not tensors or not isinstance(iteration, int) or not isinstance(accuracy, float):
        raise ValueError(
            f"{path}: expected tensors in 'network', an integer in 'current_iter', a number in 'val_accuracy_mean'"
        )
    if iteration < 1 or iteration % config.iterations_per_epoch:
        raise ValueError(
            f"{path}: expected current_iter to be a multiple of total_iter_per_epoch "
            f"({config.iterations_per_epoch}), got {iteration}"
        )
    return _Checkpoint(path, content, network, iteration, accuracy)


# Of numpy's type names what struct calls them: all of its plain numbers and truth values.
_FORMATS = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"}
_FORMATS |= {"f2": "e", "f4": "f", "f8": "d"}


class _NumberType:
    """Stands in for ``numpy.dtype`` in the pickles of their numbers."""

    def __init__(self, code: str, *_: object) -> None:
        if code not in _FORMATS:
            raise ValueError(f"number type {code!r}")
        self.code = code
        self.order = "<"

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _number(kind: _NumberType, raw: bytes | str) -> float | int:
    """Stands in for ``numpy.core.multiarray.scalar``."""
    data = raw.encode("latin1") if isinstance(raw, str) else raw
    value: float | int = struct.unpack(kind.order + _FORMATS[kind.code], data)[0]
    return value


_NUMBERS: list[Any] = [
    (_NumberType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
]


def _load(learner: MAMLPlusPlus, checkpoint: _Checkpoint) -> None:
    try:
        load_authors_state(learner, checkpoint.network)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error
    learner.iteration = checkpoint.iteration


def _save_model(
    folder: Path, checkpoint: _Checkpoint, learner: MAMLPlusPlus, config: TrainConfig
) -> dict[str, Any]:
    epoch = checkpoint.epoch(config)
    entry: dict[str, Any] = {
        "file": f"epoch-{epoch:04d}.pt",
        "epoch": epoch,
        "iteration": checkpoint.iteration,
        "val_accuracy": checkpoint.val_accuracy,
    }
    state = {"model": learner.model.state_dict(), "rates": learner.rates.state_dict()}
    save_checkpoint(
        folder / "checkpoints" / entry["file"], "model", state | entry | {"config": config.deciding()}
    )
    return entry


def _load_adam(
    learner: MAMLPlusPlus, checkpoint: _Checkpoint, config: TrainConfig
) -> tuple[list[str], dict[str, Any]]:
    """Puts their Adam's state into ours; returns what the user should know, and what has no place there."""
    tensors = {"/".join(our_name(name)): value for name, value in checkpoint.network.items()}
    rest: dict[str, Any] = {
        "rates": {name: tensors[f"rates/{name}"][-1].clone() for name in learner.rates.names},
        "parallel": any(name.startswith("classifier.module.") for name in checkpoint.network),
    }
    notes = []
    if (theirs := checkpoint.content.get("optimizer")) is None:
        notes.append("no optimizer in it (older code stored none): Adam starts anew")
    else:
        try:
            # Adam numbers parameters in the order of registration, which is that of the state dict.
            order = list(tensors)
            entries = sorted(layout(config), key=lambda e: order.index(f"{e.kind}/{e.ours}"))
            state, unused = adam_from_authors(theirs, config, entries, tensors)
        except ValueError as error:
            raise ValueError(f"{checkpoint.path}: {error}") from error
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:  # a file may hold anything
            raise ValueError(
                f"{checkpoint.path}: expected the state of Adam in 'optimizer', {error}"
            ) from error
        learner.optimizer.load_state_dict(learner.optimizer.state_dict() | {"state": state})
        rest |= unused
    return notes, rest


def _write_metrics(
    folder: Path, checkpoint: _Checkpoint, learner: MAMLPlusPlus, config: TrainConfig
) -> list[str]:
    """A line for every epoch whose statistics the checkpoint has."""
    epochs = checkpoint.epoch(config) + 1
    lists = checkpoint.content.get("per_epoch_statistics") or {}
    try:
        last = {ours: float(checkpoint.content.get(theirs, "nan")) for ours, theirs in _STATISTICS.items()}
        known = {ours: [float(v) for v in lists.get(theirs, [])] for ours, theirs in _STATISTICS.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:  # a file may hold anything
        raise ValueError(f"{checkpoint.path}: expected lists of numbers in 'per_epoch_statistics'") from error
    lengths = {len(values) for values in known.values()}
    notes = []
    if lengths == {epochs}:
        rows = [dict(zip(known, values, strict=True)) for values in zip(*known.values(), strict=True)]
    elif lengths == {epochs - 1}:  # they save before they add the epoch that ends
        rows = [dict(zip(known, values, strict=True)) for values in zip(*known.values(), strict=True)]
        rows.append(last)
    else:
        rows = [last]
        notes.append(
            f"statistics of {max(lengths)} epochs where {epochs} ended, and not of which (their code loses one at each "
            "restart): the last epoch's alone are kept"
        )
    (folder / "metrics.jsonl").write_bytes(b"")
    highest = float("-inf")
    for epoch, row in enumerate(rows, epochs - len(rows)):
        rates = learner.rates.as_dict() if epoch == epochs - 1 else {}
        append_line(
            folder / "metrics.jsonl",
            {
                "epoch": epoch,
                "iteration": (epoch + 1) * config.iterations_per_epoch,
                **row,
                "val_accuracy_ci95": None,
                "best": row["val_accuracy"] > highest,
                **learner.schedule(epoch),
                "inner_rates": {name: rate.tolist() for name, rate in rates.items()},
                "seconds": None,
                "seconds_per_iteration": None,
            },
        )
        highest = max(highest, row["val_accuracy"])
    return notes


def export_checkpoint(folder: str | Path, out: str | Path, *, legacy: bool = False) -> tuple[int, list[str]]:
    """Writes what training in ``folder`` goes on from as a checkpoint that the authors' code loads.

    Args:
        folder: a run's folder.
        out: the file; its folder is made.
        legacy: the format of PyTorch before 1.6.

    Returns:
        its iteration, and what is not as their code would write it, a line each.

    Raises:
        ValueError: when the folder holds no run, or one that their code does not know.
        OSError: when ``out`` cannot be written.
    """
    folder = Path(folder)
    config, _ = read_config(folder)
    entries = layout(config)
    state = load_checkpoint(folder / "checkpoints" / "latest.pt", "training")["learner"]
    rest = load_checkpoint(folder / _REST, "authors") if (folder / _REST).exists() else {}
    rates = state["rates"]["rates"]
    rows = dict(zip(our_order(e.ours for e in entries if e.kind == "rates"), rates, strict=True))
    unused = rest.get("rates", dict.fromkeys(rows, rates.new_full((), config.inner_lr)))
    network = to_authors(entries, state["model"], rows, unused)
    if rest.get("parallel"):
        network = {name.replace("classifier.", "classifier.module.", 1): v for name, v in network.items()}
    statistics, notes = _statistics(folder / "metrics.jsonl", config, state["iteration"])
    content = {
        "current_iter": state["iteration"],
        **statistics,
        "network": OrderedDict(network),
        "optimizer": adam_to_authors(state["optimizer"], entries, rest),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(out), buffer.getvalue())
    return state["iteration"], notes


def _statistics(path: Path, config: TrainConfig, iteration: int) -> tuple[dict[str, Any], list[str]]:
    """The statistics that their code goes on from, of the epochs that ended."""
    per_epoch = config.iterations_per_epoch
    lines = [line for line in _lines(path) if line["iteration"] % per_epoch == 0]
    lines = [line for line in lines if line["iteration"] <= iteration]
    best = max(lines, key=lambda line: line["val_accuracy"], default=None)
    best_iteration = 0 if best is None else best["iteration"]
    result: dict[str, Any] = {
        "best_val_acc": 0.0 if best is None else best["val_accuracy"],
        "best_val_iter": best_iteration,
        "best_epoch": best_iteration // per_epoch,
    }
    if lines:
        result |= {theirs: lines[-1][ours] for ours, theirs in _STATISTICS.items()}
    if len(lines) < iteration // per_epoch:
        return result, [
            "per_epoch_statistics: left out, metrics.jsonl lacks epochs; their final test needs them"
        ]
    lists = {theirs: [line[ours] for line in lines] for ours, theirs in _STATISTICS.items()}
    return result | {"per_epoch_statistics": lists}, []


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines() if path.exists() else ():
        yield json.loads(line)
