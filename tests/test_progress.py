"""What a user sees of a run: the bar on a terminal, the lines elsewhere, TensorBoard's curves where it is installed."""

import importlib.machinery
import importlib.util
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from mamlpp_fast.train.progress import Curves, Progress

METRICS: dict[str, Any] = {
    "epoch": 2,
    "train_loss": 0.5,
    "best": True,
    "msl_weights": None,
    "inner_rates": {"head.weight": [0.1, 0.2]},
}


class Writer:
    made: list["Writer"]

    def __init__(self, folder: str, purge_step: int) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.about = (folder, purge_step)
        self.flushed = self.closed = False
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, epoch: int) -> None:
        self.scalars.append((name, value, epoch))

    def flush(self) -> None:
        self.flushed = True

    def close(self) -> None:
        self.closed = True


def test_curves_of_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Writer.made = []
    module: Any = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    spec = importlib.machinery.ModuleSpec("tensorboard", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "tensorboard" else None)
    curves = Curves(tmp_path / "tensorboard", 2)
    curves.add(METRICS)
    curves.close()
    (writer,) = Writer.made
    assert writer.about == (str(tmp_path / "tensorboard"), 2)
    assert writer.scalars == [
        ("train_loss", 0.5, 2),
        ("best", True, 2),
        ("inner_rates/head.weight/step0", 0.1, 2),
        ("inner_rates/head.weight/step1", 0.2, 2),
    ]
    assert writer.flushed
    assert writer.closed


def test_no_curves_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    curves = Curves(tmp_path / "tensorboard", 0)
    curves.add(METRICS)
    curves.close()
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_a_bar_on_a_terminal_alone(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    progress = Progress(10, 4, 8)
    progress.update(6, 0, 0.25, 0.9)
    progress.say("a line")
    progress.close()
    captured = capsys.readouterr()
    assert captured.out == "a line\n"
    assert ("/80" in captured.err) == terminal


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(10, 0, 8, quiet=True)
    progress.update(1, 0, 0.25, 0.9)
    progress.say("a line")
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_time_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 40.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    progress = Progress(1000, 400, 2, quiet=True)
    assert progress.left(400) == ""
    # 30 s for 60 iterations of this process, 540 to go.
    assert progress.left(460) == ", 4 min to go"
    assert progress.left(1000) == ""
