"""The command line for users of the authors' code: train --config, import, export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from authors_helpers import TINY, TheirSystem, write_experiment
from cli_helpers import fails
from train_helpers import metrics_of

from mamlpp_fast.cli import main
from mamlpp_fast.compat.experiment import read_experiment
from mamlpp_fast.train import load_checkpoint, save_checkpoint

ANY_IMAGES = ["--set", "dataset=folder"]


def command(experiment: Path, data: Path, out: Path) -> list[str]:
    where = ["--config", str(experiment), "--data", str(data), "--out", str(out)]
    return ["train", *where, "--engine", "reference", "--device", "cpu", *ANY_IMAGES]


def their_checkpoint(folder: Path) -> Path:
    config = read_experiment(folder / "e.json", {"dataset": "folder"}).config
    state = TheirSystem(config).trained(6).state([0.5, 0.75])
    state["network"] = {k: v.float() for k, v in state["network"].items()}
    torch.save(state, folder / "train_model_2")
    return folder / "train_model_2"


def test_train_reads_an_experiment_file(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = write_experiment(tmp_path / "e.json", **(TINY | {"experiment_name": "mine"}))
    monkeypatch.chdir(tmp_path)
    arguments = command(experiment, data, tmp_path / "run")
    at = arguments.index("--out")
    assert main([*arguments[:at], *arguments[at + 2 :], "steps=3", "--max-iters", "3"]) == 0
    shown = capsys.readouterr()
    assert "weight_decay" in shown.err
    assert "init_inner_loop_learning_rate" in shown.err
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("mine-")
    config = json.loads((run / "config.json").read_text())
    assert (config["preset"], config["steps"], config["sampling"]) == ("mine", 3, "authors")
    assert (config["dataset"], config["task_seed"], config["init_seed"]) == ("folder", None, 925765)


def test_a_run_stopped_exported_and_imported_ends_as_the_undisturbed_one(tmp_path: Path, data: Path) -> None:
    experiment = write_experiment(tmp_path / "e.json", **TINY)
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    assert main(command(experiment, data, whole)) == 0
    assert main([*command(experiment, data, first), "--max-iters", "6"]) == 0
    theirs = tmp_path / "saved_models" / "train_model_latest"
    assert main(["export", str(first), "--out", str(theirs)]) == 0
    arguments = [
        "--config",
        str(experiment),
        "--out",
        str(second),
        "--engine",
        "reference",
        "--device",
        "cpu",
    ]
    assert main(["import", str(theirs), *arguments, *ANY_IMAGES]) == 0
    assert main(command(experiment, data, second)) == 0
    states = [load_checkpoint(run / "checkpoints" / "latest.pt", "training") for run in (whole, second)]
    for kind in ("model", "rates"):
        for name, value in states[0]["learner"][kind].items():
            torch.testing.assert_close(states[1]["learner"][kind][name], value, rtol=0, atol=0)
    assert [state["untimed"] for state in states] == [0, 6]
    ours, gone_on = metrics_of(whole), metrics_of(second)
    assert gone_on[2] == ours[2]
    assert [m["val_accuracy"] for m in gone_on] == [m["val_accuracy"] for m in ours]


def test_a_run_older_than_a_setting_goes_on(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, run = write_experiment(tmp_path / "e.json", **TINY), tmp_path / "run"
    assert main([*command(experiment, data, run), "--max-iters", "3"]) == 0
    config = json.loads((run / "config.json").read_text())
    del config["learn_gamma"]
    (run / "config.json").write_text(json.dumps(config))
    latest = run / "checkpoints" / "latest.pt"
    content = load_checkpoint(latest, "training")
    del content["config"]["learn_gamma"], content["untimed"]
    save_checkpoint(latest, "training", content)
    assert main([*command(experiment, data, run), "--max-iters", "6"]) == 0
    assert "going on from iteration 3" in capsys.readouterr().out


def test_import_evaluate_and_the_test_alone(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = write_experiment(tmp_path / "e.json", **TINY)
    run = tmp_path / "run"
    arguments = ["--config", str(experiment), "--out", str(run), "--data", str(data), "--device", "cpu"]
    assert main(["import", str(their_checkpoint(tmp_path)), *arguments, *ANY_IMAGES]) == 0
    shown = capsys.readouterr()
    goes_on = f"mamlpp-fast train --config {experiment} --out {run} --data {data} --set dataset=folder\n"
    assert shown.out.endswith(goes_on)
    assert main(["evaluate", str(run), "--tasks", "4", "--device", "cpu"]) == 0
    evaluated = capsys.readouterr().out
    assert "over 4 tasks; 2-way 1-shot" in evaluated
    write_experiment(experiment, **(TINY | {"evaluate_on_test_set_only": "True"}))
    assert main(["train", *arguments, *ANY_IMAGES]) == 0
    assert capsys.readouterr().out == evaluated


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "strokes", "--config", "{e}"], ["PRESET: expected none beside --config, got 'strokes'"]),
        (["train", "--config", "{e}.none"], ["expected an experiment file for --config, No such file"]),
        (["train", "--config", "{bad}"], ["secondorder", "the nearest is 'second_order'"]),
        (["train", "--config", "{e}", "--set", "stepz=1"], ["did you mean 'steps'"]),
        (["import", "{e}", "--config", "{e}", "--out", "{e}.run"], ["e.json: expected"]),
        (["import", "{e}.none", "--config", "{e}", "--out", "{e}.run"], ["none: expected", "No such file"]),
        (["import", "{e}", "--config", "{e}"], ["--out"]),
        (["import", "{e}", "--out", "{e}.run"], ["--config"]),
        (["export", "{e}.none", "--out", "{e}.back"], ["expected a run's folder"]),
    ],
)
def test_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    names: dict[str, Any] = {
        "e": write_experiment(tmp_path / "e.json", **TINY),
        "bad": write_experiment(tmp_path / "bad.json", secondorder=True),
    }
    fails(capsys, [a.format(**names) for a in arguments], *parts)
