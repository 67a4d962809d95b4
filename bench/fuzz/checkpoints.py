"""Checkpoints, of runs of ours and of the authors' code, damaged from their pickles to the optimiser's moments."""

from __future__ import annotations

import io
import pickle
import random
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.fuzz import mutations as m
from bench.fuzz.archives import zip_of
from bench.fuzz.subject import Subject
from mamlpp_fast.compat.checkpoints import export_checkpoint, import_checkpoints
from mamlpp_fast.compat.experiment import Experiment
from mamlpp_fast.learner import MAMLPlusPlus
from mamlpp_fast.train import TrainConfig
from mamlpp_fast.train._resumable import check_content, check_learner
from mamlpp_fast.train.build import build_learner
from mamlpp_fast.train.checkpoint import checkpoint_bytes, load_checkpoint, load_tensors
from mamlpp_fast.train.files import write_json
from mamlpp_fast.train.run_folder import load_model

_CONFIG = TrainConfig(filters=2, stages=1, ways=2, image_size=4, steps=2)


def _training() -> tuple[MAMLPlusPlus, dict[str, Any]]:
    """A learner after one update, and what its run would go on from."""
    learner: MAMLPlusPlus = build_learner(_CONFIG, 1, 4, engine="reference")
    for p in learner.model.parameters():
        p.grad = torch.ones_like(p)
    learner.apply_gradient()
    return learner, {
        "config": _CONFIG.deciding(),
        "engine": "reference",
        "data": {"name": "strokes"},
        "learner": learner.state_dict(),
        "epochs_done": 1,
        "sums": torch.zeros(2, dtype=torch.float64),
        "best": [{"file": "epoch-0000.pt", "epoch": 0, "iteration": 1, "val_accuracy": 0.5}],
        "metrics_bytes": 0,
        "seconds": 1.0,
        "train_seconds": 1.0,
        "rng_cpu": torch.get_rng_state(),
        "rng_cuda": None,
    }


class _Saved(Subject):
    """A checkpoint: its bytes changed, its parts changed, or its content."""

    path: Path
    content: dict[str, Any]
    valid: list[bytes]  # archives first

    @abstractmethod
    def saved(self, rng: random.Random, content: Any) -> bytes:
        """``content`` as a file."""

    def make(self, rng: random.Random) -> bytes:
        kind = rng.randrange(4)
        if kind == 0:
            return m.bytes_of(rng, rng.choice(self.valid))
        if kind == 1:
            return self._inside(rng)
        changed = _changed(rng, self.content)
        try:
            return self.saved(rng, changed)
        except (RuntimeError, TypeError, ValueError, pickle.PicklingError, UnicodeError):
            return m.bytes_of(rng, self.valid[0])

    def _inside(self, rng: random.Random) -> bytes:
        return zip_of(rng, rng.choice(self.valid), _part)


def _part(rng: random.Random, part: bytes) -> bytes:
    return m.program(rng, m.Canary.path) if rng.random() < 0.2 else m.bytes_of(rng, part)


class Checkpoint(_Saved):
    """A run's training checkpoint and a model."""

    name, share = "checkpoint", 0.05

    def prepare(self, folder: Path) -> None:
        self.path = folder / "latest.pt"
        self.learner, self.content = _training()
        model = {"model": self.learner.model.state_dict(), "rates": self.learner.rates.state_dict()}
        entry = self.content["best"][0]
        self.valid = [checkpoint_bytes("training", self.content), checkpoint_bytes("model", model | entry)]
        for content in self.valid:
            self.read(content)

    def saved(self, rng: random.Random, content: Any) -> bytes:
        return checkpoint_bytes("training", content)

    def read(self, content: bytes) -> None:
        self.path.write_bytes(content)
        try:
            loaded = load_checkpoint(self.path, "training")
        except ValueError as error:
            if "got 'mamlpp_fast model'" not in str(error):
                raise
            load_model(self.path, self.learner)
            return
        check_content(self.path, loaded)
        check_learner(self.path, loaded["learner"], self.learner)
        self.learner.load_state_dict(loaded["learner"])
        self.learner.optimizer.step()


class Authors(_Saved):
    """A checkpoint of the authors' code in either format, imported as a run."""

    name, share = "authors", 0.05

    def prepare(self, folder: Path) -> None:
        self.path, self.out, run = folder / "train_model_1", folder / "imported", folder / "run"
        self.experiment = Experiment(_CONFIG, "x", 1, 4, evaluate_only=False, data=None, notes=())
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        content = _training()[1]
        content["learner"]["iteration"] = _CONFIG.iterations_per_epoch
        (run / "checkpoints" / "latest.pt").write_bytes(checkpoint_bytes("training", content))
        record = {"preset": None, "data": None, "engine": "auto", "precision": "float32", "device": "cpu"}
        write_json(run / "config.json", record | _CONFIG.deciding())
        export_checkpoint(run, self.path)
        statistics = {
            f"{s}_{k}_mean": np.float64(0.5) for s in ("train", "val") for k in ("loss", "accuracy")
        }
        lists = {name: [value] for name, value in statistics.items()}
        self.content = load_tensors(self.path) | statistics | {"per_epoch_statistics": lists}
        self.valid = [self._file(self.content, legacy) for legacy in (False, True)]
        for valid in self.valid:
            self.read(valid)

    def _file(self, content: Any, legacy: bool) -> bytes:
        stream = io.BytesIO()
        torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
        return stream.getvalue()

    def saved(self, rng: random.Random, content: Any) -> bytes:
        return self._file(content, rng.random() < 0.5)

    def _inside(self, rng: random.Random) -> bytes:
        if rng.random() < 0.7:
            return zip_of(rng, self.valid[0], _part)
        stream = io.BytesIO(self.valid[1])
        for _ in range(rng.choice((0, 1, 2, 3, 3, 3))):  # the first three pickles say what it is
            pickle.load(stream)
        return self.valid[1][: stream.tell()] + m.program(rng, m.Canary.path) + stream.read()

    def read(self, content: bytes) -> None:
        self.path.write_bytes(content)
        for old in sorted(self.out.rglob("*"), reverse=True):  # by whole paths, which the watch can tell
            old.rmdir() if old.is_dir() else old.unlink()
        import_checkpoints([self.path], self.experiment, self.out, engine="reference")


def _changed(rng: random.Random, value: Any) -> Any:
    """A tensor of another form or a value of another kind, somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = rng.choice(list(value))
        return dict(value) | {key: _changed(rng, value[key])}
    if isinstance(value, torch.Tensor):
        return rng.choice(
            (
                value.double(),
                value.to(torch.int64),
                value.flatten()[:1].expand(10**12),
                value[..., None],
                value.flatten()[:0],
                torch.zeros(3, 3),
                value.bfloat16(),
                None,
                value.to_sparse(),
                value * torch.nan,
            )
        )
    return m.Canary() if rng.random() < 0.1 else m.json_value(rng, value)
