"""Several ranks do what one process does: gradients, statistics, runs, and what happens when one of them ends."""

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
import torch.distributed as dist
from rank_helpers import on_ranks
from torch import nn
from train_helpers import before_call, metrics_of, tiny, tiny_arguments

import mamlpp_fast as mf
from mamlpp_fast.distributed import Ranks, own_device
from mamlpp_fast.learner import MAMLPlusPlus
from mamlpp_fast.train import Interrupted, load_checkpoint, train

TASKS = 5
STEPS = 3


class WithOtherNorms(nn.Module):
    """One batch norm used twice in a pass, one of features, and a norm that keeps its single row."""

    def __init__(self) -> None:
        super().__init__()
        # No bias in front of batch norm: its gradient is rounding noise, of which Adam makes steps.
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.twice = nn.BatchNorm2d(4)
        self.instance = nn.InstanceNorm2d(4, momentum=0.2, track_running_stats=True)
        self.features = nn.BatchNorm1d(4, momentum=0.3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.twice(self.conv1(x)))
        x = torch.tanh(self.instance(self.twice(self.conv2(x))) + x)
        return self.head(self.features(x.mean((2, 3))))


class Counting(nn.Module):
    """Has a buffer that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += len(x)
        return self.head(x.flatten(1))


def batch(seed: int, tasks: int = TASKS) -> mf.EpisodeBatch:
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(3)
    return mf.EpisodeBatch(
        torch.randn(tasks, 3, 1, 8, 8, generator=g),
        labels.repeat(tasks, 1),
        torch.randn(tasks, 6, 1, 8, 8, generator=g),
        labels.repeat_interleave(2).repeat(tasks, 1),
    )


def learner(case: str, group: dist.ProcessGroup | None, seed: int = 0) -> MAMLPlusPlus:
    engine, _, option = case.partition(":")
    changes: dict[str, Any] = {
        "": {},
        "shared-statistics": {"bnrs": False},
        "last-step": {"msl": False},
        "clamped": {"clamp_meta_gradient": 1e-3},
        "other-norms": {},
        "meta-sgd": {"rates": "element"},
    }[option]
    config = mf.MAMLConfig(steps=STEPS, msl_epochs=1, iterations_per_epoch=2, epochs=3, **changes)
    torch.manual_seed(seed)
    model: nn.Module = WithOtherNorms()
    if option != "other-norms":
        model = mf.Conv4(1, 3, image_size=8, filters=4, stages=2, num_steps=STEPS, per_step_stats=config.bnrs)
    return MAMLPlusPlus(model, config, engine=engine, precision="float64", process_group=group)


CASES = [
    "reference:",
    "autograd:",
    "fused:",
    "fused:shared-statistics",
    "fused:last-step",
    "fused:clamped",
    "autograd:other-norms",
    "fused:meta-sgd",
]


def trained(case: str, group: dist.ProcessGroup | None, *, parts: bool = False) -> list[Any]:
    """Losses, accuracies and state after four updates, across the end of the multi-step loss."""
    # Rank 0's parameters count.
    own = learner(case, group, seed=0 if group is None else dist.get_rank(group))
    kept: list[Any] = []
    for i in range(4):
        whole = batch(i)
        share = own.ranks.share(TASKS)
        metrics = (
            own.meta_step(whole.tasks(share.start, share.stop), total_tasks=TASKS)
            if parts
            else own.meta_step(whole)
        )
        right = (metrics.accuracy * 6 * TASKS).round()  # a count: the accuracy is float32
        kept += [metrics.loss, right, metrics.task_losses]
        kept += [p.grad.clone() for p in own.model.parameters() if p.grad is not None]
    return [t.clone() for t in (*kept, *own.model.state_dict().values(), *own.rates.state_dict().values())]


def every(cases: list[str], parts: bool) -> list[list[Any]]:
    return [trained(case, dist.group.WORLD, parts=parts) for case in cases]


@pytest.mark.parametrize(
    ("size", "parts", "cases"), [(2, False, CASES), (3, True, CASES[2:4])], ids=["2", "3"]
)
def test_ranks_equal_one_process(size: int, parts: bool, cases: list[str]) -> None:
    """The running statistics, in task order, among them; five tasks divide by neither number of ranks."""
    expected = [trained(case, None) for case in cases]
    for result in on_ranks(size, every, cases, parts):
        for case, ours, theirs in zip(cases, result, expected, strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=1e-10, atol=1e-12, msg=lambda m, c=case: f"{c}: {m}"
            )


def _mistakes() -> list[str]:
    own = learner("autograd:", dist.group.WORLD)
    counting = MAMLPlusPlus(
        Counting(), mf.MAMLConfig(bnwb=False, bnrs=False), process_group=dist.group.WORLD, engine="autograd"
    )
    said = []
    for target, arguments, keywords in (
        (own, (batch(0, tasks=1),), {}),
        (own, (batch(0, tasks=5),), {"total_tasks": 8}),
        (counting, (batch(0),), {}),
    ):
        with pytest.raises(ValueError) as caught:
            target.meta_step(*arguments, **keywords)
        said.append(str(caught.value))
    return said


def test_mistakes_are_named_on_every_rank() -> None:
    for rank, (few, wrong, buffer) in enumerate(on_ranks(2, _mistakes)):
        assert few == "batch: expected at least one task for each of 2 ranks, got 1"
        assert wrong == f"batch: expected the 4 tasks of rank {rank} of 8 in all, got 5"
        assert "seen does" in buffer


def _primitives() -> tuple[Any, ...]:
    ranks = Ranks(dist.group.WORLD)
    same = torch.arange(3.0)
    differing = same + (1e-7 if ranks.rank == 2 else 0.0)

    def fail() -> int:
        raise FileNotFoundError(2, "No such file")

    try:
        failure = ranks.from_first(fail)
    except Exception as error:
        failure = (type(error).__name__, getattr(error, "status", None))
    shared = ranks.from_first(lambda: {"rank": dist.get_rank()})
    agreed = ranks.agree([same, torch.tensor(3)]), ranks.agree([differing])
    return ranks.largest(ranks.rank), agreed, shared, failure, list(ranks.share(5))


def test_what_ranks_tell_each_other() -> None:
    expected_failures = [("FileNotFoundError", None), ("ElsewhereError", 2), ("ElsewhereError", 2)]
    shares = [[0, 1], [2, 3], [4]]
    for found, failure, share in zip(on_ranks(3, _primitives), expected_failures, shares, strict=True):
        assert found == (2, (True, False), {"rank": 0}, failure, share)


def test_one_process_needs_no_group() -> None:
    alone = Ranks()
    assert alone.first and alone.share(3) == range(3) and alone.largest(7) == 7
    assert alone.from_first(lambda: "made") == "made" and alone.agree([])
    tensor = torch.ones(2)
    alone.sum(tensor)
    alone.broadcast([tensor])
    assert tensor.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("device", "processes", "expected"),
    [
        ("cpu", 8, "cpu"),
        ("cuda:3", 1, "cuda:3"),
        ("cuda", 2, "cuda:1"),
        ("cuda:0", 2, "--device: expected cuda or cpu for 2 processes on a machine, got cuda:0"),
        ("cuda", 3, "--nproc-per-node: expected at most 2, the GPUs of this machine, got 3"),
    ],
)
def test_each_process_has_a_gpu_of_its_own(
    device: str, processes: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    try:
        found = str(own_device(torch.device(device)))
    except ValueError as error:
        found = str(error)
    assert found == expected


# Runs ----------------------------------------------------------------------------------------------------------------

RUN: dict[str, Any] = {"tasks": 4, "val_tasks": 100, "test_tasks": 7, "checkpoint_seconds": 0.0}


def run(out: Path, data: Path, **options: Any) -> dict[str, Any]:
    """A run of 9 iterations, on the ranks there are."""
    group = dist.group.WORLD if dist.is_initialized() else None
    with torch.random.fork_rng():
        return train(
            tiny(**RUN),
            out=out,
            data_path=data,
            engine="fused",
            precision="float64",
            quiet=True,
            process_group=group,
            **options,
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The folder of an undisturbed run of one process."""
    out = tmp_path_factory.mktemp("whole")
    run(out, data)
    return out


def assert_close_runs(a: Path, b: Path) -> None:
    """Same metrics, test scores and final state but for the order of summation."""

    def numbers(folder: Path) -> list[torch.Tensor]:
        summary = json.loads((folder / "summary.json").read_text())
        state = load_checkpoint(folder / "checkpoints" / "latest.pt", "training")["learner"]
        leaves, _ = torch.utils._pytree.tree_flatten((state, metrics_of(folder)))
        kept = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor | int | float)]
        kept += [summary[k] for k in ("test_accuracy", "ensemble_test_accuracy", "test_loss", "iterations")]
        return [torch.as_tensor(leaf, dtype=torch.float64) for leaf in kept]

    torch.testing.assert_close(numbers(a), numbers(b), rtol=1e-8, atol=1e-10)
    names = [sorted(p.name for p in (f / "checkpoints").iterdir()) for f in (a, b)]
    assert names[0] == names[1]


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path, data: Path, whole: Path) -> None:
    """2 ranks, then one process, then 3: the same as one undisturbed process."""
    out = tmp_path / "run"
    assert [s["ranks"] for s in on_ranks(2, _part, out, data, 4)] == [2, 2]
    assert run(out, data, max_iters=5)["ranks"] == 1
    summaries = on_ranks(3, _part, out, data, 9)
    assert [s["ranks"] for s in summaries] == [3, 3, 3]
    assert summaries[0]["test_accuracy"] == summaries[2]["test_accuracy"]
    assert_close_runs(out, whole)


def _part(out: Path, data: Path, iterations: int) -> dict[str, Any]:
    return run(out, data, max_iters=iterations)


def _stopped(out: Path, data: Path, when: str) -> tuple[str, int]:
    """SIGTERM reaches the last rank alone, in the second meta-update or the second batch of a validation."""
    if dist.get_rank() == dist.get_world_size() - 1:
        name = "meta_gradient" if when == "training" else "evaluate"
        original = getattr(MAMLPlusPlus, name)
        setattr(MAMLPlusPlus, name, before_call(2, original, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    try:
        run(out, data)
    except Interrupted as stop:
        return str(stop), stop.number
    return "finished", 0


@pytest.mark.parametrize("when", ["training", "validation"])
def test_a_signal_to_one_rank_stops_all(tmp_path: Path, data: Path, whole: Path, when: str) -> None:
    stopped = on_ranks(2, _stopped, tmp_path, data, when)
    assert stopped == [("stopped by SIGTERM", signal.SIGTERM)] * 2
    latest = load_checkpoint(tmp_path / "checkpoints" / "latest.pt", "training")
    assert (latest["learner"]["iteration"], latest["epochs_done"]) == (3, 0)
    assert not (tmp_path / "summary.json").exists()
    run(tmp_path, data)
    assert_close_runs(tmp_path, whole)


def _in_use(out: Path, data: Path) -> Any:
    return train(tiny(**RUN, steps=1), out=out, data_path=data, quiet=True, process_group=dist.group.WORLD)


def test_a_mistake_is_told_by_rank_0_alone(data: Path, whole: Path) -> None:
    first, second = on_ranks(2, _in_use, whole, data)
    assert first[0] == "ValueError" and "expected a folder without another run" in first[1]
    assert second[0] == "ElsewhereError"
    few = on_ranks(5, _part, whole, data, 9)
    assert few[0][:2] == ("ValueError", "tasks: expected at least one for each of 5 ranks, got 4")


# Ranks that end ------------------------------------------------------------------------------------------------------


def _silent() -> Any:
    ranks = Ranks(dist.group.WORLD)
    if ranks.rank == 1:
        time.sleep(4)
        return "woke"
    return ranks.largest(1)


def test_a_rank_that_hangs_is_given_up(capfd: pytest.CaptureFixture[str]) -> None:
    first, second = on_ranks(2, _silent, timeout=1.5)
    assert first[0] == "RankLostError" and "one ended or hangs" in first[1]
    assert second == "woke"


def _children(pid: int) -> dict[int, int]:
    """Process ids of the workers of torchrun by rank."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        for entry in environment:
            if entry.startswith(b"RANK="):
                found[int(entry[5:])] = int(child)
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
def test_a_killed_rank_ends_the_run_cleanly(tmp_path: Path, data: Path) -> None:
    """By torchrun and the command line: one line, a status, a whole checkpoint, and one process goes on from it."""
    arguments = [
        *("train", "--data", str(data), "--device", "cpu", "--engine", "fused", "--precision", "float64"),
        *tiny_arguments(**RUN | {"epochs": 400}),
        *("--out", str(tmp_path / "run")),
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*torchrun, "-m", "mamlpp_fast", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    latest = tmp_path / "run" / "checkpoints" / "latest.pt"
    deadline = time.monotonic() + 60
    while not latest.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(_children(process.pid)[1], signal.SIGKILL)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    told = [line for line in errors.splitlines() if line.startswith("mamlpp-fast")]
    assert len(told) == 1 and "ranks: expected all to answer" in told[0] and "latest.pt" in told[0], errors
    # The traceback there is, is torchrun's own.
    files = [line for line in errors.splitlines() if line.startswith("  File")]
    assert not [line for line in files if "mamlpp_fast" in line and "site-packages" not in line]
    assert output.count("shared by 2 ranks") == 1
    reached = load_checkpoint(latest, "training")["learner"]["iteration"]
    assert math.isfinite(reached)
    again = [sys.executable, "-m", "mamlpp_fast", *arguments, "--max-iters", str(reached + 1)]
    done = subprocess.run(again, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert f"going on from iteration {reached}" in done.stdout
