"""The comparison with peers: what agrees with float64 is timed, what does not is refused a time."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import drop_in, drop_in_loops, tables
from bench.peers.client import Failed, Peer, Worker, differs, distance
from bench.peers.driver import PEERS, Settings, compare, describe
from bench.peers.problem import TINY, Problem, Sizes, make

SMALL = TINY["tiny-final"]
SETTINGS = Settings(rounds=2, threads=1, device="cpu", cache=None)
WRONG = """
from bench.peers import textbook

def build(problem, device, argument):
    step = textbook.build(problem, device, None)
    factor = 100 if problem.weights["head.bias"].dtype == argument else 1

    def wrong():
        loss, gradients = step()
        gradients["blocks.2.norm.weight"].mul_(factor)
        return loss, gradients

    return wrong
"""


def peers(*names: str) -> list[Peer]:
    return [peer for peer in PEERS if peer.name in names]


@pytest.mark.parametrize(
    ("sizes", "names"),
    [(SMALL, ("ours-autograd",)), (TINY["tiny"], ("torch.func", "ours-fused"))],
    ids=["maml", "maml++"],
)
def test_peers_that_agree_are_timed(sizes: Sizes, names: tuple[str, ...], tmp_path: Path) -> None:
    settings = Settings(**vars(SETTINGS) | {"lock": tmp_path / "lock"})
    rows = compare(sizes, peers(*names), settings)
    assert [row["peer"] for row in rows] == list(names)
    for row in rows:
        assert "fault" not in row
        assert row["error"] < 1e-9
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0 and row["peak_mib"] > 0
        assert row["peer"] in describe(row, 1.0)


def test_a_wrong_gradient_is_refused_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong_peer.py").write_text(WRONG)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    precisions = ("float64", "float32")
    rows = compare(SMALL, [Peer(f"wrong in {p}", "wrong_peer", p) for p in precisions], SETTINGS)
    for row, precision in zip(rows, precisions, strict=True):
        assert row["fault"].startswith(f"check: {precision} error")
        assert "seconds" not in row
        assert row["fault"] in describe(row, 1.0)


def test_what_fails_is_listed_with_why(tmp_path: Path) -> None:
    missing = Peer("missing", "bench.peers.no_such_module")
    unmade = Peer("unmade", "bench.peers.with_higher", None, "higher")
    first, second = compare(SMALL, [missing, unmade], Settings(**vars(SETTINGS) | {"cache": tmp_path}))
    assert first["fault"] == "setup: ModuleNotFoundError: No module named 'bench.peers.no_such_module'"
    assert second["fault"] == "not installed: run python -m bench.peers.environments"


def test_a_worker_that_dies_says_so() -> None:
    with Worker(Peer("none", "json"), Path(sys.executable), 1) as worker:
        with pytest.raises(Failed, match="time: RuntimeError: setup comes first"):
            worker.ask("time", runs=1)
        worker._process.kill()
        with pytest.raises(Failed, match="status -9"):
            worker.ask("time", runs=1)


def test_a_worker_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_peer.py").write_text("import time\nbuild = lambda *_: time.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    make(SMALL).save(tmp_path / "problem.npz")
    with (
        Worker(Peer("slow", "slow_peer"), Path(sys.executable), 1, limit=5) as worker,
        pytest.raises(Failed, match="setup: no answer within 5 s"),
    ):
        worker.ask("setup", path=str(tmp_path / "problem.npz"), device="cpu", dtype="float32")


def test_problems_survive_their_file(tmp_path: Path) -> None:
    problem = make(SMALL)
    problem.save(tmp_path / "problem.npz")
    loaded = Problem.load(tmp_path / "problem.npz", "float64")
    assert loaded.sizes == SMALL and loaded.weights.keys() == problem.weights.keys()
    assert all(value.dtype == np.float64 for value in loaded.weights.values())
    for before, after in zip(problem.tasks, loaded.tasks, strict=True):
        np.testing.assert_array_equal(before, after)


def test_errors_are_relative_and_biases_before_batch_norm_count_absolutely() -> None:
    exact = {
        "loss": np.float64(2),
        "gradient/w": np.array([1.0, 0.1]),
        "gradient/blocks.0.conv.bias": np.zeros(2),
    }
    exact = {name: np.asarray(value) for name, value in exact.items()}
    assert differs(exact, exact) == (0.0, "loss")
    assert differs(exact | {"gradient/blocks.0.conv.bias": np.asarray(np.nan)}, exact)[0] == 0
    error, where = differs(exact | {"gradient/blocks.0.conv.bias": np.array([0.0, 0.5])}, exact)
    assert (error, where) == (0.5, "gradient/blocks.0.conv.bias")
    assert differs(exact | {"gradient/w": np.array([1.0, np.nan])}, exact)[0] == np.inf
    assert distance(exact | {"loss": np.asarray(3.0)}, exact) == 0.5


def test_a_script_of_higher_is_timed_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    # higher is not installed here: the script with our import line stands for both.
    def ours(library: str, module: str, name: str, which: str) -> Worker:
        return Worker(Peer(which, module, f"{name}:after"), Path(sys.executable), 1)

    monkeypatch.setattr(drop_in, "worker", ours)
    (script,) = (row for row in drop_in.rows(2) if row.script == "higher: test-time")
    row = drop_in.measure(dataclasses.replace(script, sizes=SMALL), 0.0)
    assert row["largest_error_float64"] == 0.0 and row["tensors"] > 0
    for key in ("before_ms", "after_ms", "ratio_quartiles"):
        low, median, high = row[key]
        assert 0 < low <= median <= high


def test_a_loop_is_timed_beside_the_learner() -> None:
    small = Sizes(2, tasks=2, image_size=28, steps=2)
    for loop in drop_in_loops.LOOPS[1:6:2]:  # of a textbook, by map_tasks, FOMAML
        builds = loop.jobs
        row = drop_in.Row(
            loop.name,
            loop.changed,
            small,
            lambda _, b=builds: {w: drop_in.Local(f) for w, f in b.items()},  # type: ignore[misc]
        )
        found = drop_in.measure(row, 0.0)
        assert found["largest_error_float64"] < 1e-9 and found["over_learner"] > 0
        assert loop.name in tables.drop_in([found]) and "not timed" not in tables.drop_in([found])


def test_a_loop_that_differs_gets_no_time() -> None:
    jobs = {
        w: drop_in.Local(lambda s, d, v=v: lambda: [torch.tensor(v)])
        for w, v in (("before", 1.0), ("after", 1.1))
    }  # type: ignore[misc]
    row = drop_in.measure(drop_in.Row("loop", "line", SMALL, lambda _: jobs), 0.0)
    assert "before_ms" not in row and "not timed: differs by 1.0e-01" in tables.drop_in([row])
