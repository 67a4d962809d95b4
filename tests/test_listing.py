"""``mamlpp-fast runs``: which runs lie under a folder, how far each is, the best it has reached."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mamlpp_fast.cli import main
from mamlpp_fast.report.listing import describe_runs, list_runs
from mamlpp_fast.train.files import run_lock
from mamlpp_fast.train.progress import duration
from tests.cli_helpers import fails

CONFIG = {"epochs": 4, "iterations_per_epoch": 5}
SUMMARY = {
    "iterations": 20,
    "test_accuracy": 0.75,
    "test_accuracy_ci95": 0.015,
    "ensemble_test_accuracy": 0.8,
    "ensemble_test_accuracy_ci95": 0.01,
}


def epoch(number: int, accuracy: float, seconds: float) -> dict[str, Any]:
    return {"epoch": number, "iteration": 5 * number + 5, "val_accuracy": accuracy, "seconds": seconds}


def make(folder: Path, *epochs: dict[str, Any], summary: dict[str, Any] | None = None) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in epochs))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_runs_of_every_state(tmp_path: Path) -> None:
    curve = [epoch(0, 0.5, 100.0), epoch(1, 0.7, 150.0), epoch(2, 0.6, 170.0)]
    make(tmp_path / "a" / "new")
    make(tmp_path / "a" / "stopped", *curve)
    make(tmp_path / "b" / "cut", *curve[:2], summary=SUMMARY | {"iterations": 10})
    make(tmp_path / "finished", *curve, epoch(3, 0.7, 200.0), summary=SUMMARY)
    (make(tmp_path / "damaged", *curve) / "config.json").write_text("{")
    (tmp_path / "empty").mkdir()
    with run_lock(make(tmp_path / "at work", *curve)):
        found = {Path(r["run"]).name: r for r in list_runs([tmp_path, tmp_path / "a"])}
    assert {name: r["state"] for name, r in found.items()} == {
        "new": "stopped",
        "stopped": "stopped",
        "cut": "stopped",
        "finished": "finished",
        "at work": "running",
        "damaged": "damaged",
    }
    assert [found[name]["iteration"] for name in ("new", "stopped", "cut", "finished")] == [0, 15, 10, 20]
    # The last epoch: 20 s for 5 iterations, 5 to go; then 50 s for 5, and 10 to go.
    assert [found[name]["seconds_left"] for name in ("new", "stopped", "cut", "finished")] == [
        None,
        20,
        100,
        None,
    ]
    assert found["finished"]["val_accuracy"] == 0.7 and found["finished"]["best_iteration"] == 10
    assert found["finished"]["test_accuracy"] == 0.75 and found["at work"]["test_accuracy"] is None
    assert "config.json: expected JSON" in found["damaged"]["fault"]
    assert list_runs([tmp_path])[-1]["run"] == str(tmp_path / "at work")


def test_lock_is_only_looked_at(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    with run_lock(run):
        assert [r["state"] for r in list_runs([run])] == ["running"]
        assert (run / ".lock").read_text() == f"{os.getpid()}\n"
    assert [r["state"] for r in list_runs([run])] == ["stopped"]
    with run_lock(run):
        pass


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "run", epoch(0, 0.5, 100.0), summary=SUMMARY)
    assert main(["runs", str(tmp_path)]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.startswith("run ") and "20 of 20" in line
    assert "75.00 ± 1.50" in line and "80.00 ± 1.00" in line and "50.00 at 5" in line
    assert main(["runs", "--json", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["ensemble_test_accuracy"] == 0.8
    (tmp_path / "none").mkdir()
    assert main(["runs", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out == f"no runs under {tmp_path / 'none'}\n"
    fails(capsys, ["runs", str(tmp_path / "missing")], "DIR: expected a folder with runs", "missing")


def test_faults_stand_under_the_table(tmp_path: Path) -> None:
    (make(tmp_path / "run") / "metrics.jsonl").write_text('{"epoch": 0}\n')
    text = describe_runs(list_runs([tmp_path]))
    assert "damaged" in text and text.splitlines()[-1].startswith(f"{tmp_path / 'run'}: ")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (150, "2 min"), (9000, "2.5 h"), (2e5, "2.3 days")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
