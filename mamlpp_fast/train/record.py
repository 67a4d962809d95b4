"""The files of a run as several ranks see them: rank 0 alone touches the disk, all get what it reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mamlpp_fast.distributed import Ranks
from mamlpp_fast.train.checkpoint import CheckpointError, Kind, load_checkpoint, save_checkpoint
from mamlpp_fast.train.files import append_line, write_json

__all__ = ["Record"]


class Record:
    """What a run keeps in its folder.

    Args:
        folder: the run's folder.
        ranks: the processes of the run.
        device: where tensors that are read go.

    Attributes:
        metrics_bytes: length of ``metrics.jsonl`` that the last checkpoint vouches for.
    """

    def __init__(self, folder: Path, ranks: Ranks, device: torch.device) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.latest = self.checkpoints / "latest.pt"
        self.ranks = ranks
        self.device = device
        self.metrics_bytes = 0

    def save(self, path: Path, kind: Kind, content: Mapping[str, Any]) -> None:
        """See :func:`mamlpp_fast.train.checkpoint.save_checkpoint`."""
        if self.ranks.first:
            save_checkpoint(path, kind, content)

    def load(self, path: Path, kind: Kind) -> dict[str, Any]:
        """See :func:`mamlpp_fast.train.checkpoint.load_checkpoint`; called by all ranks together."""
        content = self.ranks.from_first(lambda: load_checkpoint(path, kind))
        moved: dict[str, Any] = pytree.tree_map_only(Tensor, lambda t: t.to(self.device), content)
        return moved

    def load_latest(self) -> dict[str, Any] | None:
        """The checkpoint that training goes on from, if there is one; the summary of an earlier end is dropped."""

        def found() -> bool:
            (self.folder / "summary.json").unlink(missing_ok=True)
            return self.latest.exists()

        return self.load(self.latest, "training") if self.ranks.from_first(found) else None

    def undo(self, kept: Iterable[str]) -> None:
        """Takes back what was written after the last checkpoint.

        Args:
            kept: names of the model checkpoints that belong to it.

        Raises:
            CheckpointError: when ``metrics.jsonl`` is shorter than it was then.
        """
        self.ranks.from_first(lambda: self._undo({"latest.pt", *kept}))

    def _undo(self, kept: set[str]) -> None:
        metrics = self.folder / "metrics.jsonl"
        length = metrics.stat().st_size if metrics.exists() else 0
        if length < self.metrics_bytes:
            raise CheckpointError(f"{metrics}: expected at least {self.metrics_bytes} bytes, got {length}")
        if length > self.metrics_bytes:
            with open(metrics, "r+b") as file:
                file.truncate(self.metrics_bytes)
        for path in self.checkpoints.glob("*.pt"):
            if path.name not in kept:
                path.unlink()

    def append(self, metrics: Mapping[str, Any]) -> int:
        """Adds a line to ``metrics.jsonl``; returns its new length on rank 0."""
        return append_line(self.folder / "metrics.jsonl", metrics) if self.ranks.first else 0

    def drop(self, name: str) -> None:
        """Deletes a model checkpoint."""
        if self.ranks.first:
            (self.checkpoints / name).unlink(missing_ok=True)

    def summarise(self, summary: Mapping[str, Any]) -> None:
        if self.ranks.first:
            write_json(self.folder / "summary.json", dict(summary))
