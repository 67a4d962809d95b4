"""Which runs lie under a folder, how far each is and the best it has reached."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mamlpp_fast.report.runs import Run, read_run
from mamlpp_fast.train.files import is_held
from mamlpp_fast.train.progress import duration

__all__ = ["describe_runs", "list_runs"]


def list_runs(folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    """A record for every run in these folders or below them, the one written to last at the end.

    Args:
        folders: where to look.

    Returns:
        for each ``run`` (its folder), ``state`` (``"running"``, ``"stopped"``, ``"finished"``, or ``"damaged"``, and
        ``fault`` then says why), ``iteration`` (of the last finished epoch) and ``iterations`` (of the whole
        configuration), the accuracies ``val_accuracy`` (the best, at iteration ``best_iteration``), ``test_accuracy``
        and ``ensemble_test_accuracy`` with intervals ``…_ci95`` between 0 and 1, None where there are none yet,
        ``seconds_left`` at the last epoch's pace, and when it was ``written``, in seconds since 1970.

    Raises:
        ValueError: for a folder that is not there.
    """
    found: dict[Path, dict[str, Any]] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"DIR: expected a folder with runs, got {folder}")
        for path in _runs_below(folder):
            found.setdefault(path.resolve(), _record(path))
    return sorted(found.values(), key=lambda r: (r["written"], r["run"]))


def _runs_below(folder: Path) -> Iterator[Path]:
    for place, below, files in os.walk(folder):
        # A run holds config.json and its checkpoints; results that were kept, the lines of its epochs.
        if "config.json" in files and ("checkpoints" in below or "metrics.jsonl" in files):
            below.clear()
            yield Path(place)


def _record(folder: Path) -> dict[str, Any]:
    files = [folder / "config.json", folder / "metrics.jsonl", folder / "checkpoints" / "latest.pt"]
    written = max(f.stat().st_mtime for f in files if f.exists())
    try:
        return {"run": str(folder), **_progress(read_run(folder), is_held(folder)), "written": written}
    except (ValueError, KeyError, TypeError) as error:
        return {"run": str(folder), "state": "damaged", "fault": str(error), "written": written}


def _progress(run: Run, running: bool) -> dict[str, Any]:
    summary = run.summary or {}
    total = run.config["epochs"] * run.config["iterations_per_epoch"]
    last = run.epochs[-1] if run.epochs else {}
    made = summary.get("iterations", last.get("iteration", 0))
    best = max(run.epochs, key=lambda epoch: epoch["val_accuracy"], default={})
    state = "running" if running else "finished" if summary and made >= total else "stopped"
    # At the pace of the last epoch: a machine is not as busy for days as it was at first.
    before = run.epochs[-2] if len(run.epochs) > 1 else {"seconds": 0.0, "iteration": 0}
    each = (last["seconds"] - before["seconds"]) / (last["iteration"] - before["iteration"]) if last else None
    accuracies = (
        "test_accuracy",
        "test_accuracy_ci95",
        "ensemble_test_accuracy",
        "ensemble_test_accuracy_ci95",
    )
    return {
        "state": state,
        "iteration": made,
        "iterations": total,
        "val_accuracy": best.get("val_accuracy"),
        "best_iteration": best.get("iteration"),
        **{key: summary.get(key) for key in accuracies},
        "seconds_left": None if each is None or state == "finished" else each * (total - made),
    }


def describe_runs(records: Sequence[dict[str, Any]]) -> str:
    """What :func:`list_runs` found, a line a run under a heading."""
    header = ["run", "state", "iteration", "best validation, %", "test, %", "ensemble, %", "to go", "written"]
    lines = [header]
    for r in records:
        written = datetime.fromtimestamp(r["written"]).strftime("%Y-%m-%d %H:%M")
        if r["state"] == "damaged":
            lines.append([r["run"], "damaged", *["-"] * 5, written])
            continue
        best = "-" if r["val_accuracy"] is None else f"{100 * r['val_accuracy']:.2f} at {r['best_iteration']}"
        left = "-" if r["seconds_left"] is None else duration(r["seconds_left"])
        place = f"{r['iteration']} of {r['iterations']}"
        tests = [_percent(r, "test_accuracy"), _percent(r, "ensemble_test_accuracy")]
        lines.append([r["run"], r["state"], place, best, *tests, left, written])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, *(f"{r['run']}: {r['fault']}" for r in records if "fault" in r)])


def _percent(record: dict[str, Any], key: str) -> str:
    if record[key] is None:
        return "-"
    return f"{100 * record[key]:.2f} ± {100 * record[f'{key}_ci95']:.2f}"
