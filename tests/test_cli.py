"""The command line: what it prints, and one line with exit status 2 for every mistake."""

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import fails
from train_helpers import tiny_arguments

from mamlpp_fast import _native, workloads
from mamlpp_fast.cli import info, main
from mamlpp_fast.data import FewShotData, from_arrays
from mamlpp_fast.train import build, files
from mamlpp_fast.workloads import WORKLOADS


def train_command(data: Path, out: Path, **changes: Any) -> list[str]:
    arguments = ["train", "--engine", "reference", "--data", str(data), "--out", str(out), "--device", "cpu"]
    return arguments + tiny_arguments(**changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    out = tmp_path_factory.mktemp("run")
    with torch.random.fork_rng():
        assert main(train_command(data, out, epochs=1)) == 0
    return out


# What goes right ------------------------------------------------------------------------------------------------------


def test_train_ends_with_an_accuracy_and_the_paths(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(train_command(data, out, epochs=1)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("strokes: 2-way 1-shot, 2 tasks a batch, 3 iterations")
    assert "engine reference" in lines[1]
    assert any(line.startswith("epoch 0: loss ") for line in lines)
    assert any(
        "95 % interval over 7 tasks; 2-way 1-shot, 2 target images a class, single model" in x for x in lines
    )
    assert lines[-6].startswith("test accuracy ")
    assert lines[-1] == f"its page: mamlpp-fast report {out}"
    for line in lines[-5:-1]:
        assert Path(line.strip()).exists()
    assert main(train_command(data, out, epochs=1)) == 0
    assert "finished after 3 iterations" in capsys.readouterr().out


def test_train_lists_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert {"strokes", "omniglot-20w1s", "miniimagenet-5w1s-3steps-maml-paper"} <= set(names)


def test_runs_of_other_settings_get_folders_of_their_own(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        command = train_command(data, tmp_path, epochs=1, seed=seed)
        at = command.index("--out")
        assert main(command[:at] + command[at + 2 :] + ["--max-iters", "1"]) == 0
    assert len(list((tmp_path / "runs").glob("strokes-*/summary.json"))) == 2


def test_evaluate(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(finished), "--tasks", "5", "--device", "cpu"]) == 0
    assert "over 5 tasks" in capsys.readouterr().out
    assert main(["evaluate", str(finished), "--tasks", "5", "--device", "cpu", "--json"]) == 0
    (single,) = json.loads(capsys.readouterr().out)["scores"]
    assert (single["tasks"], single["models"], single["stats"]) == (5, 1, "batch")


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"mamlpp_fast", "torch", "python"} <= found["versions"].keys()
    assert "cpu" in found["devices"]
    assert {"loaded", "reason", "isa", "path", "bfloat16"} == found["native"].keys()
    for served in (s for op in found["operations"].values() for s in op.values()):
        assert served["backend"] in ("native", "triton", "python", "none")
        if served["backend"] in ("python", "none"):
            assert served["reason"]
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "native library: " in text
    if found["native"]["loaded"]:
        words = {"amxbf16": "multiplied in AMX tiles", "avx512bf16": "multiplied in pairs in layers where"}
        expected = words.get(found["native"]["isa"], "not multiplied: float32 serves it")
        assert f"bfloat16 in convolutions on the CPU: {expected}" in text
    assert all(name in text for name in found["operations"])


def test_info_of_a_machine_with_a_gpu_and_no_kernels(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(_native, "_status", _native.NativeStatus(False, "not built: no C++ compiler"))
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "devices: cpu, cuda:0 (Some GPU); " in text
    assert "native library: not in use, not built: no C++ compiler\n" in text
    assert "none (triton is not installed)" in text


def test_bench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = workloads.Workload("small", 2, 2, 1, 1, 16, 1, 4, 2)
    monkeypatch.setattr(workloads, "WORKLOADS", {"small": small})
    command = ["bench", "small", "--engine", "reference", "--iters", "3", "--warmup", "1", "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    seconds = found["seconds_per_iteration"]
    assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
    assert (found["workload"], found["engine"], found["iterations"]) == ("small", "reference", 3)
    assert found["peak_memory_mib"] > 0
    assert found["gflop_per_second"] == pytest.approx(found["gflop_per_iteration"] / seconds["median"])
    assert main(command) == 0
    assert "GFLOP/s" in capsys.readouterr().out


def test_workloads_are_the_contracts() -> None:
    assert len(WORKLOADS) == 12
    w = WORKLOADS["omniglot-20w1s"]
    assert (w.tasks, w.ways, w.shots, w.targets, w.image_size, w.channels, w.filters) == (
        8,
        20,
        1,
        1,
        28,
        1,
        64,
    )
    # 138 GFLOP of support passes, and 46 of five target passes or a fifth of it.
    assert w.gflop() == pytest.approx(184, rel=0.01)
    assert WORKLOADS["omniglot-20w1s-final"].gflop() == pytest.approx(138 + 46 / 5, rel=0.01)
    w = WORKLOADS["miniimagenet-5w5s"]
    assert (w.tasks, w.ways, w.shots, w.targets, w.image_size, w.channels, w.filters) == (
        2,
        5,
        5,
        15,
        84,
        3,
        48,
    )


@pytest.mark.parametrize("name", ["omniglot-5w1s", "miniimagenet-5w1s-final"])
def test_workload_batches(name: str) -> None:
    w = WORKLOADS[name]
    batch = w.batch(3)
    assert batch.support_x.shape == (w.tasks, w.ways * w.shots, w.channels, w.image_size, w.image_size)
    assert batch.target_x.shape == (w.tasks, w.ways * w.targets, w.channels, w.image_size, w.image_size)
    torch.testing.assert_close(batch.support_x, w.batch(3).support_x, rtol=0, atol=0)
    if w.channels == 1:
        assert set(batch.support_x.unique().tolist()) == {0.0, 1.0}


def test_replay(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["replay", str(golden / "maml_plain.npz"), "--engine", "reference"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["loss"] <= 1e-9
    assert main(command) == 0
    assert "within tolerance" in capsys.readouterr().out


def test_python_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "mamlpp_fast", "bench", "x"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("mamlpp-fast bench: error: WORKLOAD: expected one of ")


# What goes wrong ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trane"], ["invalid choice: 'trane'"]),
        (
            ["train", "omniglot-20w1"],
            ["preset:", "expected", "got 'omniglot-20w1'", "did you mean 'omniglot-20w1s'"],
        ),
        (["train", "--set", "inner_rl=1"], ["--set:", "got 'inner_rl'", "did you mean 'inner_lr'"]),
        (["train", "--set", "steps=0"], ["steps: expected at least 1, got 0"]),
        (["train", "--set", "meta_lr=-1"], ["meta_lr: expected a positive number, got -1"]),
        (["train", "--max-iters", "0"], ["--max-iters", "expected at least 1, got 0"]),
        (["train", "--engine", "warp"], ["--engine", "'warp'"]),
        (["train", "--device", "tpu"], ["--device: expected cpu", "got 'tpu'"]),
        (["train", "--device", "cuda:99"], ["--device: expected", "got 'cuda:99'"]),
        (["train", "omniglot-5w1s", "--data", "/nowhere"], ["--data", "'/nowhere'"]),
        (["evaluate", "/nowhere"], ["/nowhere", "No such file"]),
        (["evaluate", "x", "--tasks", "many"], ["--tasks", "expected an integer, got 'many'"]),
        (["replay", "/nowhere.npz"], ["/nowhere.npz", "that can be read, No such file"]),
        (["bench", "omniglot-20w2s"], ["WORKLOAD: expected one of", "got 'omniglot-20w2s'", "did you mean"]),
        (["bench", "omniglot-5w1s", "--iters", "0"], ["--iters", "expected at least 1, got 0"]),
    ],
    ids=lambda value: " ".join(value) if value and "expected" not in value[0] else "",
)
def test_wrong_arguments(
    arguments: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    fails(capsys, arguments, *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"shots": 3}, ["shots + targets: expected at most the 4 images of class 'class0'", "got 3 + 2"]),
        ({"ways": 4}, ["ways: expected at most the 3 classes", "got 4"]),
        ({"stages": 5}, ["image_size: expected at least 32 for 5 stages, got 8"]),
    ],
    ids=["too few images", "more ways than classes", "image too small"],
)
def test_data_that_do_not_suffice(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, int], parts: list[str]
) -> None:
    fails(capsys, train_command(data, tmp_path / "run", **changes), *parts)


def test_nan_in_images(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: object) -> FewShotData:
        images = torch.rand(12, 1, 8, 8)
        images[7, 0, 3, 3] = float("nan")
        return FewShotData(
            "own", "plain", *(from_arrays(images, [0, 1, 2] * 4, s) for s in ("train", "val", "test"))
        )

    monkeypatch.setattr(build, "load_data", load)
    monkeypatch.setattr("mamlpp_fast.train.loop.load_data", load)
    fails(
        capsys, train_command(data, tmp_path / "run"), "expected finite values, got NaN or infinity in image"
    )


@pytest.fixture
def interrupted(tmp_path: Path, data: Path) -> list[str]:
    """The command of a run of which three iterations of nine are done."""
    command = train_command(data, tmp_path / "run")
    with torch.random.fork_rng():
        assert main([*command, "--max-iters", "3"]) == 0
    return command


def test_checkpoint_of_another_shape(interrupted: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(interrupted[interrupted.index("--out") + 1])
    other = [*interrupted, "--set", "filters=5"]
    at = other.index("--out") + 1
    other[at] = str(out.with_name("other"))
    assert main([*other, "--max-iters", "3"]) == 0
    source = out.with_name("other") / "checkpoints"
    shutil.copy(source / "latest.pt", out / "checkpoints" / "latest.pt")
    fails(capsys, interrupted, "latest.pt: expected a checkpoint of this configuration", "filters=4 (was 5)")
    shutil.copy(source / "epoch-0000.pt", out / "checkpoints" / "epoch-0000.pt")
    fails(
        capsys,
        ["evaluate", str(out)],
        "epoch-0000.pt: expected model blocks.0.conv.weight of shape [4, 1, 3, 3]",
    )


def test_a_file_where_the_folder_should_be(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    fails(
        capsys, train_command(data, tmp_path / "file"), "file: expected to read and write here, File exists"
    )
    fails(capsys, train_command(data, tmp_path / "file" / "run"), "Not a directory")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS], ids=errno.errorcode.get)
def test_a_disk_that_refuses(
    interrupted: list[str], number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names the reason, and the checkpoint before it is whole: the run ends well once there is room."""

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", refuse)
        fails(capsys, interrupted, ".pt: expected to read and write here", os.strerror(number))
    assert main(interrupted) == 0


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="WORKLOAD"):
        main(["bench", "x", "--debug"])


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (MemoryError(), 2, "mamlpp-fast info: error: memory: expected more of it\n"),
    ],
    ids=["interrupt", "memory"],
)
def test_what_ends_a_command(
    error: BaseException,
    status: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(arguments: Any) -> int:
        raise error

    monkeypatch.setattr(info, "run", run)
    assert main(["info"]) == status
    assert capsys.readouterr().err == said
