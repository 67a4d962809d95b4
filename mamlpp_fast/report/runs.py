"""What run folders hold, as far as they hold it: a run may be unfinished, or older than what is recorded today."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mamlpp_fast.train.files import read_json

__all__ = ["Run", "read_run", "read_runs"]


@dataclass(frozen=True)
class Run:
    """One run's records.

    Attributes:
        name: the folder's name, with as many parents as tell it from the others'.
        folder: where it lies.
        config: the content of ``config.json``.
        epochs: the lines of ``metrics.jsonl``; none before the first epoch's end.
        summary: the content of ``summary.json``; None while the run is not finished.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    epochs: list[dict[str, Any]]
    summary: dict[str, Any] | None

    def column(self, key: str) -> list[Any]:
        """A key of every epoch, None where it was not recorded."""
        return [epoch.get(key) for epoch in self.epochs]

    def records(self, key: str) -> bool:
        return any(value is not None for value in self.column(key))

    @property
    def iterations(self) -> list[Any]:
        return self.column("iteration")


def read_run(folder: Path) -> Run:
    """Reads one run.

    Raises:
        ValueError: when the folder holds none, or a file of it is damaged (but for a last line cut off by a kill).
    """
    config = read_json(folder / "config.json")
    summary = folder / "summary.json"
    return Run(
        folder.resolve().name,
        folder,
        config,
        _read_lines(folder / "metrics.jsonl"),
        read_json(summary) if summary.exists() else None,
    )


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Reads several runs and gives each a name of its own.

    Raises:
        ValueError: without a folder, for the same one twice, and as :func:`read_run` does.
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise ValueError("DIR: expected at least one run's folder, got none")
    parts = [path.resolve().parts for path in paths]
    for i, part in enumerate(parts):
        if part in parts[:i]:
            raise ValueError(f"DIR: expected every run once, got {paths[i]} twice")
    runs = [read_run(path) for path in paths]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return [replace(run, name="/".join(part[-depth:])) for run, part in zip(runs, parts, strict=True)]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            # NaN is no JSON, and the page is read by a browser.
            value = json.loads(line, parse_constant=lambda _: None)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}: expected JSON in line {number}, {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}: expected a JSON object in line {number}, got {type(value).__name__}")
        found.append(value)
    return found
