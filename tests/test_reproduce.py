"""The paper's tables: rows, budgets, what is printed, and that a stopped table goes on."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import TINY, before_call, tiny_arguments

from mamlpp_fast.cli import main
from mamlpp_fast.learner import MAMLPlusPlus, NonFiniteLossError
from mamlpp_fast.reproduce import TABLES, reproduce
from mamlpp_fast.reproduce.experiments import cells, scaled
from mamlpp_fast.reproduce.published import PUBLISHED, Published
from mamlpp_fast.reproduce.tables import Outcome, as_markdown, instability, over_seeds
from mamlpp_fast.train import Interrupted, preset

BUDGET = TINY | {"epochs": 2, "iterations_per_epoch": 2}
ROWS = ["maml", "maml++"]


pytestmark = pytest.mark.usefixtures("own_generator")


def run(out: Path, data: Path, **changes: Any) -> str:
    arguments: dict[str, Any] = {"rows": ROWS, "seeds": 2, "settings": BUDGET, "engine": "reference"}
    return reproduce("omniglot-20w", out=out, data_path=data, quiet=True, **(arguments | changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("table")
    with torch.random.fork_rng():
        return out, run(out, data)


def test_the_table_has_ours_beside_the_published(whole: tuple[Path, str]) -> None:
    out, text = whole
    assert (out / "table.md").read_text() == text
    lines = {
        line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("|")
    }
    assert list(lines)[2:] == ["MAML", "MAML++"]
    assert "91.27 ± 1.07 [1], 95.80 ± 0.30 [2]" in lines["MAML"]
    assert "97.65 ± 0.05 [1]" in lines["MAML++"]
    summaries = [
        json.loads((out / "runs" / f"maml-1shot-seed{s}" / "summary.json").read_text()) for s in (0, 1)
    ]
    mean = 50 * sum(s["test_accuracy"] for s in summaries)
    assert f" {mean:.2f} ± " in lines["MAML"]
    found = json.loads((out / "table.json").read_text())
    assert [row["row"] for row in found["rows"]] == ROWS
    assert [r["seed"] for r in found["rows"][0]["runs"]] == [0, 1]
    assert found["rows"][0]["single"]["mean"] == pytest.approx(mean / 100)
    assert {s["init_seed"] for s in summaries}.isdisjoint({s["task_seed"] for s in summaries})
    assert len({s["init_seed"] for s in summaries}) == 2
    assert (out / "report.html").exists()


def test_the_caption_says_what_was_done(whole: tuple[Path, str]) -> None:
    _, text = whole
    for part in (
        "Protocol `paper`, scale 1: 2 epochs of 2 iterations, 2 tasks each.",
        "ways=2 (was 20)",
        "epochs=2 (was 150)",
        "2-way, 2 target images a class; 7 test tasks",
        "batch statistics (transductive)",
        "2 seeds, each with training tasks of its own and an initialisation of its own",
        "± s: standard deviation over seeds; ± t: 95 % interval over test tasks",
    ):
        assert part in text
    assert "authors-code" not in text
    one = cells("omniglot-20w", rows=["maml"], protocol="authors-code")[0]
    again = as_markdown("omniglot-20w", 1.0, "authors-code", [(one, [Outcome(0, None, [])])])
    assert "all with one initialisation" in again
    assert "Nothing is changed against the presets." in again


def test_a_finished_run_is_not_run_again(
    whole: tuple[Path, str], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, text = whole

    def never(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(MAMLPlusPlus, "meta_step", never)
    assert run(out, data) == text


def test_a_stopped_table_goes_on(
    whole: tuple[Path, str], tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise Interrupted(2)

    with monkeypatch.context() as patch:
        patch.setattr(MAMLPlusPlus, "meta_step", before_call(7, MAMLPlusPlus.meta_step, stop))
        with pytest.raises(Interrupted):
            run(tmp_path, data)
    # The first run is whole, and so is a table of it.
    assert [row["row"] for row in json.loads((tmp_path / "table.json").read_text())["rows"]] == ["maml"]
    text = run(tmp_path, data)
    assert _without_minutes(text) == _without_minutes(whole[1])


def _without_minutes(text: str) -> str:
    return re.sub(r"\| \d+\.\d \|", "| |", text)


def test_other_settings_are_refused(whole: tuple[Path, str], data: Path) -> None:
    with pytest.raises(
        ValueError, match=r"--out: expected a folder without another run, .* epochs=3 \(was 2\)"
    ):
        run(whole[0], data, settings=BUDGET | {"epochs": 3})


def test_a_run_that_diverges_is_said_and_the_others_go_on(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = MAMLPlusPlus.meta_step

    def diverging(learner: MAMLPlusPlus, batch: Any, **keywords: Any) -> Any:
        if not learner.config.msl and learner.iteration == 3:
            raise NonFiniteLossError(3, 1, 0)
        return original(learner, batch, **keywords)

    monkeypatch.setattr(MAMLPlusPlus, "meta_step", diverging)
    text = run(tmp_path, data)
    maml, other = (line for line in text.splitlines() if line.startswith("| MAML"))
    assert maml.startswith("| MAML | 1 | – | – |")
    assert "seed 0: loss: expected finite, got NaN or infinity at epoch 1, iteration 3, task 0" in maml
    assert "expected" not in other


def test_instability_table(tmp_path: Path, data: Path) -> None:
    command = ["reproduce", "instability", "--seeds", "1", "--data", str(data), "--out", str(tmp_path)]
    # Four stages of stride 2 on 8 pixels.
    arguments = tiny_arguments(epochs=2, iterations_per_epoch=2)
    assert main([*command, "--engine", "reference", "--device", "cpu", *arguments]) == 0
    text = (tmp_path / "table.md").read_text()
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| MAML")]
    assert rows == ["| MAML", "| MAML + MSL", "| MAML++"]
    for folder in (tmp_path / "runs").iterdir():
        assert json.loads((folder / "config.json").read_text())["max_pool"] is False


def test_instability_is_measured_against_the_best_before() -> None:
    def lines(losses: list[float | None], accuracies: list[float]) -> list[dict[str, Any]]:
        return [{"val_loss": x, "val_accuracy": a} for x, a in zip(losses, accuracies, strict=True)]

    calm = instability(lines([3.0, 2.0, 1.0], [0.1, 0.2, 0.3]))
    assert (calm["largest_loss_ratio"], calm["largest_accuracy_drop"], calm["epochs_with_higher_loss"]) == (
        1,
        0,
        0,
    )
    wild = instability(lines([3.0, 1.0, 2.0, 4.0, 1.5], [0.1, 0.6, 0.5, 0.2, 0.55]))
    assert wild["largest_loss_ratio"] == 4
    assert wild["largest_accuracy_drop"] == pytest.approx(0.4)
    assert wild["epochs_with_higher_loss"] == 2
    assert wild["last_accuracy"] == 0.55
    assert instability(lines([1.0, None, 2.0], [0.5, 0.1, 0.2]))["largest_loss_ratio"] == math.inf
    assert instability(lines([None, None], [0.5, 0.1]))["largest_accuracy_drop"] == pytest.approx(0.4)


def test_over_seeds() -> None:
    def outcome(seed: int, accuracy: float, interval: float) -> Outcome:
        return Outcome(seed, {"test_accuracy": accuracy, "test_accuracy_ci95": interval}, [])

    found = over_seeds(
        [outcome(0, 0.5, 0.01), outcome(1, 0.7, 0.02), Outcome(2, None, [], "lost")], "test_accuracy"
    )
    assert found == {
        "mean": pytest.approx(0.6),
        "seeds_sd": pytest.approx(0.1 * math.sqrt(2)),
        "tasks_ci95": 0.02,
        "seeds": 2,
    }
    assert over_seeds([outcome(0, 0.5, 0.01)], "test_accuracy")["seeds_sd"] is None


def test_rows_are_the_papers() -> None:
    one = cells("omniglot-20w")
    assert [c.row for c in one] == ["maml", "maml-msl", "maml-lslr", "maml-bnwb-bnrs", "maml++", "meta-sgd"]
    assert all(c.config == preset(c.preset) and not c.changes for c in one)
    assert one[-2].preset == "omniglot-20w1s-paper"
    assert [c.row for c in cells("omniglot-20w", shots=[5])] == ["maml", "maml++", "meta-sgd"]
    assert cells("omniglot-20w", rows=["maml-ca"])[0].config.cosine_annealing
    steps = [c.config.steps for c in cells("mini-imagenet", protocol="default")]
    assert steps == [5, 1, 2, 3, 4, 5]
    assert [c.config.shots for c in cells("mini-imagenet", shots=[5])] == [5, 5]
    assert all(not c.config.max_pool for c in cells("instability"))


def test_published_figures_belong_to_rows() -> None:
    known = {(t, c.row, s) for t in TABLES for s in (1, 5) for c in _cells_of(t, s)}
    assert PUBLISHED.keys() <= known
    assert str(Published(98.9, 0.2)) == "98.90 ± 0.20"
    assert str(Published(98.78, None)) == "98.78"


def _cells_of(table: str, shots: int) -> list[Any]:
    try:
        return cells(table, shots=[shots])
    except ValueError:
        return []


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.02, 0.0001])
def test_a_scale_keeps_the_shape_of_a_run(scale: float) -> None:
    whole = preset("omniglot-20w1s-paper")
    small = scaled(whole, scale)
    assert small.iterations == pytest.approx(scale * whole.iterations, rel=0.1, abs=4)
    assert 4 <= small.epochs <= whole.epochs
    assert 1 <= small.msl_epochs <= small.epochs
    assert small.da_epoch / small.epochs == pytest.approx(whole.da_epoch / whole.epochs, abs=0.2)
    assert small.test_tasks >= 100
    assert scaled(preset("omniglot-20w1s-maml-paper"), scale).da_epoch == -1
    if scale == 1:
        assert small == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["omniglot"], "TABLE: expected one of omniglot-20w, mini-imagenet, instability, got 'omniglot'"),
        (["omniglot-20w", "--scale", "0"], "--scale: expected above 0 and at most 1, got 0"),
        (["omniglot-20w", "--rows", "maml+"], "--rows: expected rows among"),
        (["instability", "--shots", "5"], "--shots: expected a number the rows asked for have, got 5"),
        (["omniglot-20w", "--set", "step=3"], "did you mean 'steps'"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", *arguments]) == 2
    assert message in capsys.readouterr().err
