"""Training runs: what they write, and that stopping and going on changes nothing."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import before_call, draw_folder, metrics_of, tiny, tiny_arguments, without_timing

from mamlpp_fast.cli import main
from mamlpp_fast.learner import MAMLPlusPlus, NonFiniteLossError, StepMetrics
from mamlpp_fast.train import Interrupted, evaluate_run, load_checkpoint, loop, train
from mamlpp_fast.train.checkpoint import CheckpointError, save_checkpoint
from mamlpp_fast.train.config import TrainConfig
from mamlpp_fast.train.evaluate import mean_and_interval, score

pytestmark = pytest.mark.usefixtures("own_generator")


def run(out: Path, data: Path, config: TrainConfig | None = None, **changes: Any) -> dict[str, Any]:
    arguments = {"engine": "reference", "data_path": data, "quiet": True} | changes
    return train(tiny() if config is None else config, out=out, **arguments)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The folder of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole")
    with torch.random.fork_rng():
        run(out, data)
    return out


def assert_same_run(a: Path, b: Path) -> None:
    """Same summary, metrics, checkpoints, to the last bit."""
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (a, b))
    assert without_timing(ours) == without_timing(theirs)
    assert metrics_of(a) == metrics_of(b)
    names = sorted(p.name for p in (a / "checkpoints").iterdir())
    assert names == sorted(p.name for p in (b / "checkpoints").iterdir())
    for name in names:
        kind = "training" if name == "latest.pt" else "model"
        first, second = (load_checkpoint(f / "checkpoints" / name, kind) for f in (a, b))  # type: ignore[arg-type]
        for content in (first, second):
            for key in ("seconds", "train_seconds", "metrics_bytes", "resumed_at"):
                content.pop(key, None)
        torch.testing.assert_close(_leaves(first), _leaves(second), rtol=0, atol=0)


def _leaves(content: Any) -> list[Any]:
    """Tensors as they are, plain values as text."""
    leaves, _ = torch.utils._pytree.tree_flatten(content)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)] + [
        torch.frombuffer(bytearray(repr(leaf).encode()), dtype=torch.uint8)
        for leaf in leaves
        if not isinstance(leaf, torch.Tensor)
    ]


def test_a_run_writes_what_the_contract_names(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    wanted = (
        "test_accuracy test_accuracy_ci95 best_val_accuracy iterations seconds seconds_per_iteration engine"
    )
    assert {*wanted.split(), "precision", "device", "preset", "seed", "versions"} <= summary.keys()
    assert summary["iterations"] == 9
    assert summary["ensemble_size"] == 2
    lines = metrics_of(whole)
    assert [(line["epoch"], line["iteration"]) for line in lines] == [(0, 3), (1, 6), (2, 9)]
    assert [line["msl_weights"] for line in lines] == [[0.5, 0.5], [0.25, 0.75], None]
    assert all(line["second_order"] for line in lines)
    assert lines[0]["meta_lr"] == 1e-3
    assert all(len(rates) == 2 for rates in lines[0]["inner_rates"].values())
    for line in lines:
        assert len(line["val_step_accuracy"]) == 2
        assert line["val_step_accuracy"][-1] == pytest.approx(line["val_accuracy"])
    files = sorted(p.name for p in (whole / "checkpoints").iterdir())
    assert files == sorted(["latest.pt", *summary["models"]])
    accuracies = sorted((line["val_accuracy"] for line in lines), reverse=True)
    assert summary["best_val_accuracy"] == accuracies[0]


def test_repeating_a_run_repeats_it(tmp_path: Path, whole: Path, data: Path) -> None:
    run(tmp_path / "again", data)
    assert_same_run(tmp_path / "again", whole)


def test_initialisation_does_not_depend_on_what_was_drawn_before(
    tmp_path: Path, whole: Path, data: Path
) -> None:
    torch.rand(17)
    run(tmp_path / "again", data, max_iters=1)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "again", whole)
    run(tmp_path / "again", data)
    assert_same_run(tmp_path / "again", whole)


@pytest.mark.parametrize("seed", ["init_seed", "task_seed"])
def test_each_seed_matters(tmp_path: Path, whole: Path, data: Path, seed: str) -> None:
    run(tmp_path, data, tiny(**{seed: 99}), max_iters=3)
    assert metrics_of(tmp_path)[0]["train_loss"] != metrics_of(whole)[0]["train_loss"]


def test_a_finished_run_is_left_alone(whole: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file() and p.name != ".lock"}
    summary = run(whole, data, quiet=False)
    assert summary == json.loads((whole / "summary.json").read_text())
    assert "finished after 9 iterations" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in before}


@pytest.mark.parametrize("stops", [[1], [3], [4, 5, 8]], ids=str)
def test_max_iters_cuts_a_run_that_can_go_on(
    tmp_path: Path, whole: Path, data: Path, stops: list[int]
) -> None:
    for stop in stops:
        summary = run(tmp_path / "run", data, max_iters=stop)
        assert summary["iterations"] == stop
        assert 0 <= summary["test_accuracy"] <= 1
    summary = run(tmp_path / "run", data)
    assert summary["resumed_at"] == stops
    assert_same_run(tmp_path / "run", whole)


class _Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


@pytest.mark.parametrize("moment", range(0, 40, 3))
def test_a_kill_between_any_two_writes(
    tmp_path: Path, whole: Path, data: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dies at the n-th system call that changes the folder; the next start ends as if nothing had happened."""
    config = tiny(checkpoint_seconds=0.0)
    calls = 0

    def dying(function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > moment:
                raise _Killed
            return function(*arguments, **keywords)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dying(os.fsync))
        patch.setattr(os, "replace", dying(os.replace))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        with pytest.raises(_Killed):
            run(tmp_path / "run", data, config)
    run(tmp_path / "run", data, config)
    assert_same_run(tmp_path / "run", whole)


def test_kill_9(tmp_path: Path, data: Path) -> None:
    """The real signal, twice at moments spread over the run, by the command line."""
    config = {"checkpoint_seconds": 0.0, "epochs": 4, "iterations_per_epoch": 20}
    arguments = ["train", "--data", str(data), "--device", "cpu", *tiny_arguments(**config)]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0

    def start(out: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "mamlpp_fast", *arguments, "--out", str(out)],
            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    out = tmp_path / "killed"
    for epochs in (0, 2):
        process = start(out)
        metrics = out / "metrics.jsonl"
        while process.poll() is None and _lines(metrics) < epochs + 1:
            time.sleep(0.002)
        time.sleep(0.03)
        process.kill()
        process.communicate()
    assert not (out / "summary.json").exists()
    last = start(out)
    output, _ = last.communicate(timeout=300)
    assert last.returncode == 0, output.decode()
    assert b"going on from iteration" in output
    assert_same_run(out, tmp_path / "whole")


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("during", ["meta_step", "evaluate"])
def test_a_signal_saves_and_stops(
    tmp_path: Path, whole: Path, data: Path, number: int, during: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    signalling = before_call(5, getattr(MAMLPlusPlus, during), lambda: os.kill(os.getpid(), number))
    with monkeypatch.context() as patch:
        patch.setattr(MAMLPlusPlus, during, signalling)
        with pytest.raises(Interrupted, match=f"stopped by {signal.Signals(number).name}"):
            run(tmp_path / "run", data)
    iteration = load_checkpoint(tmp_path / "run" / "checkpoints" / "latest.pt", "training")["learner"][
        "iteration"
    ]
    assert iteration == (5 if during == "meta_step" else 6)
    run(tmp_path / "run", data)
    assert_same_run(tmp_path / "run", whole)


def test_another_configuration_is_refused(whole: Path, data: Path) -> None:
    with pytest.raises(
        ValueError, match=r"--out: expected a folder without another run, .* now steps=3 \(was 2\)"
    ):
        run(whole, data, tiny(steps=3))
    with pytest.raises(ValueError, match=r"precision=float64 \(was float32\)"):
        run(whole, data, precision="float64")


def test_other_data_are_refused(tmp_path: Path, data: Path) -> None:
    run(tmp_path / "run", data, max_iters=3)
    other = draw_folder(tmp_path / "other", images=5)
    with pytest.raises(CheckpointError, match="expected the data it was made with"):
        run(tmp_path / "run", other)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path, data: Path) -> None:
    run(tmp_path / "run", data, max_iters=3)
    latest = tmp_path / "run" / "checkpoints" / "latest.pt"
    content = load_checkpoint(latest, "training")
    content["learner"]["model"]["head.weight"] = torch.zeros(3, 3)
    save_checkpoint(latest, "training", content)
    with pytest.raises(
        CheckpointError, match=r"latest.pt: expected model head.weight of shape .* got of shape \[3, 3\]"
    ):
        run(tmp_path / "run", data)


def test_a_non_finite_loss_names_the_place_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = MAMLPlusPlus.meta_step

    def diverging(learner: MAMLPlusPlus, batch: Any, **keywords: Any) -> StepMetrics:
        metrics = original(learner, batch, **keywords)
        if learner.iteration == 5:
            metrics.task_losses[1] = math.inf
            next(learner.model.parameters()).data.fill_(math.nan)
        return metrics

    monkeypatch.setattr(MAMLPlusPlus, "meta_step", diverging)
    with pytest.raises(NonFiniteLossError, match="epoch 1, iteration 4, task 1") as error:
        run(tmp_path, data)
    assert (error.value.epoch, error.value.iteration, error.value.task) == (1, 4, 1)
    content = load_checkpoint(tmp_path / "checkpoints" / "latest.pt", "training")
    assert content["learner"]["iteration"] == 3
    assert all(bool(torch.isfinite(t).all()) for t in content["learner"]["model"].values())


def test_non_finite_parameters_are_never_saved(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = MAMLPlusPlus.apply_gradient

    def diverging(learner: MAMLPlusPlus) -> None:
        original(learner)
        if learner.iteration == 6:
            next(learner.model.parameters()).data.fill_(math.nan)

    monkeypatch.setattr(MAMLPlusPlus, "apply_gradient", diverging)
    with pytest.raises(
        loop.NonFiniteParametersError, match=r"model\..*: expected finite .* epoch 1, iteration 5"
    ):
        run(tmp_path, data)
    assert load_checkpoint(tmp_path / "checkpoints" / "latest.pt", "training")["learner"]["iteration"] == 3


def test_evaluate_repeats_the_test(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    single, ensemble = evaluate_run(whole)
    assert (single.accuracy, single.ci95) == (summary["test_accuracy"], summary["test_accuracy_ci95"])
    assert ensemble.accuracy == summary["ensemble_test_accuracy"]
    assert (single.models, ensemble.models, single.tasks, single.targets) == (1, 2, 7, 2)
    (alone,) = evaluate_run(whole, ensemble=1, tasks=3, steps=4, stats="running")
    assert (alone.tasks, alone.steps, alone.stats) == (3, 4, "running")


def test_evaluate_without_an_epoch(tmp_path: Path, data: Path) -> None:
    with pytest.raises(ValueError, match="expected a run's folder"):
        evaluate_run(tmp_path)
    with pytest.raises(ValueError, match="ensemble: expected at least 1, got 0"):
        evaluate_run(tmp_path, ensemble=0)


def test_interval_and_score() -> None:
    mean, half = mean_and_interval(torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64))
    assert mean == 0.5
    assert half == pytest.approx(1.96 * math.sqrt(1 / 3) / 2)
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]])
    labels = torch.tensor([[0, 1], [0, 1]])
    result = score(logits, labels, ways=2, shots=1, targets=1, models=5, stats="batch", steps=3)
    assert result.accuracy == 0.75
    text = result.describe()
    assert text.startswith("75.00 % ± ")
    assert "ensemble of 5 models" in text
    assert "1 target image a class" in text
    assert "batch statistics" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"rates": "element", "msl": False},
        {"adapt": "head"},
        {"second_order": False, "lslr": False, "bnwb": False, "bnrs": False, "msl": False},
        {"max_pool": False},
        {"norm": "layer"},
        {"eval_stats": "running"},
        {"eval_steps": 4},
        {"sampling": "authors"},
    ],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()),
)
def test_settings_train(tmp_path: Path, data: Path, changes: dict[str, Any]) -> None:
    summary = run(tmp_path, data, tiny(epochs=1, **changes))
    assert 0 <= summary["test_accuracy"] <= 1
