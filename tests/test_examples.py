"""Every example runs, and shows what it says it shows."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
QUICK = ["--test-tasks", "4"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls ``main`` of the example of this name with these arguments."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return lambda name, *arguments: importlib.import_module(name).main([*arguments])


def test_every_example_is_run_here() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"few_shot"}
    source = Path(__file__).read_text()
    assert names == {name for name in names if f'run("{name}"' in source} and len(names) == 10


def test_textbook_maml_keeps_its_meta_gradients(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = run("textbook_maml", "--iterations", "2", *QUICK)
    assert found["difference"] < 1e-9
    assert min(found["before"], found["after"]) > 0.3  # chance: 0.2
    assert "ms an iteration" in capsys.readouterr().out


def test_sine_regression_falls_with_every_step(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = run("sine_regression", "--iterations", "120", "--test-tasks", "60")
    for errors in found.values():
        assert errors[0] > errors[1] > errors[5]
        assert errors[10] < errors[0]
    assert "fused engine: the fastest, and nothing in model or loss has stopped it" in capsys.readouterr().out


def test_a_siren_fits_fields_from_a_learned_start(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = run("siren_field", "--iterations", "25", *QUICK)
    assert found["learned"][2] > found["fresh"][2] + 3  # dB
    assert found["learned"][0] < found["learned"][1] < found["learned"][2]
    assert "fused engine" in capsys.readouterr().out


def test_an_lstm_forecasts_new_series(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = run("lstm_series", "--iterations", "15", *QUICK)
    assert found["3 steps"] < found["0 steps"]
    assert "fused engine" in capsys.readouterr().out


def test_low_rank_weights_adapt_a_transformer(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = run("lora_transformer", "--iterations", "5", *QUICK)
    assert found["5"] > found["0"] + 0.1
    assert "fused engine" in capsys.readouterr().out


def test_anil_adapts_the_head_alone(run: Any) -> None:
    found = run("anil", "--iterations", "3", *QUICK)
    assert found["body"] == 0 and found["head"] > 1e-3
    assert found["accuracy"] > 0.2


def test_meta_sgd_learns_a_rate_for_every_element(run: Any) -> None:
    found = run("meta_sgd", "--iterations", "3", *QUICK)
    assert found["spread"] > 1e-4
    assert found["accuracy"] > 0.2


def test_gradient_penalty_is_that_of_plain_batch_norm(run: Any) -> None:
    found = run("gradient_penalty", "--iterations", "6")
    assert found["outputs"] < 1e-10 and found["gradients"] < 1e-10 and found["weights"] < 1e-9


def test_own_resnet_runs_on_the_fused_engine(run: Any) -> None:
    found = run("own_resnet", "--iterations", "3", *QUICK)
    assert found["engine"] == "fused"
    for part in ("blocks.1.shortcut.0", "Add", "AveragePool", "second order"):
        assert part in found["explanation"]
    assert found["accuracy"] > 0.2


def test_graphed_step_calls_through_without_a_gpu(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = run("graphed_step", "--iterations", "3")
    assert found["difference"] == 0 and found["graphs"] == 0
    assert "on the CPU mf.graphed calls the step itself" in capsys.readouterr().out


@pytest.mark.data
def test_an_example_takes_omniglot(run: Any, real_data: Path) -> None:
    assert run("anil", "--iterations", "1", "--data", str(real_data), *QUICK)["body"] == 0


def test_a_mistake_on_the_command_line_is_named(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("anil", "--iterations", "0")
    assert stopped.value.code == 2
    assert "argument --iterations: expected at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        run("anil", "--data", "nowhere")
    assert stopped.value.code == 2
    assert "nowhere" in capsys.readouterr().err.splitlines()[-1]
