"""Checkpoint files: whole or not at all, and never code."""

import copy
import errno
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import refused
from train_helpers import RunsCode

from mamlpp_fast.train import TrainConfig, build_learner, checkpoint, files
from mamlpp_fast.train._resumable import check_fits, check_learner
from mamlpp_fast.train.checkpoint import CheckpointError, load_checkpoint, load_tensors, save_checkpoint


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "latest.pt"
    save_checkpoint(path, "model", {"model": {"weight": torch.arange(100.0)}, "epoch": 3})
    return path


def test_round_trip(saved: Path) -> None:
    content = load_checkpoint(saved, "model")
    assert content["epoch"] == 3
    torch.testing.assert_close(content["model"]["weight"], torch.arange(100.0), rtol=0, atol=0)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated(saved: Path, keep: float) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(CheckpointError, match="expected a whole checkpoint"):
        load_checkpoint(saved, "model")


def test_flipped_bit(saved: Path) -> None:
    whole = bytearray(saved.read_bytes())
    at = whole.index(torch.arange(100.0).numpy().tobytes())
    whole[at + 10] ^= 1
    saved.write_bytes(bytes(whole))
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(saved, "model")


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        load_checkpoint(tmp_path / "none.pt", "model")


def test_another_kind(saved: Path) -> None:
    with pytest.raises(
        CheckpointError, match="expected a 'mamlpp_fast training' checkpoint, got 'mamlpp_fast model'"
    ):
        load_checkpoint(saved, "training")


def test_another_programs(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="got 'list'"):
        load_checkpoint(tmp_path / "x.pt", "model")


def test_newer_version(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 0)
    with pytest.raises(CheckpointError, match="expected format 0 or older, got 1"):
        load_checkpoint(saved, "model")


@pytest.mark.parametrize("form", ["archive", "plain pickle"])
def test_a_pickle_with_code_is_refused_unrun(tmp_path: Path, form: str) -> None:
    marker, path = tmp_path / "ran", tmp_path / "evil.pt"
    if form == "archive":
        torch.save({"model": RunsCode(marker)}, path)
    else:
        path.write_bytes(pickle.dumps(RunsCode(marker)))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, "model")
    assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_an_archive_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "x.pt", "model")


_STORAGE = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x03tQ"
_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + _STORAGE + b"K\x00K\x03\x85K\x01\x85\x89}tR."
STORED = {
    "kind": (_TENSOR.replace(b"U\x07storage", b"U\x06module"), "persistent id of other than a storage"),
    "place": (_TENSOR.replace(b"U\x03cpu", b"N"), "storage in another form"),
    "size": (_TENSOR.replace(b"cpuK\x03", b"cpuJ\xff\xff\xff\xff"), "storage of no size"),
    "types": (_STORAGE + _TENSOR.replace(b"Float", b"Int"), "storage of two types or sizes"),
    "no storage": (_TENSOR.replace(_STORAGE, b"N"), "tensor of other than a storage and sizes"),
    "strides": (
        _TENSOR.replace(b"K\x01\x85", b"K\x01K\x01\x86"),
        "tensor with other strides than dimensions",
    ),
}


@pytest.mark.parametrize(("program", "reason"), STORED.values(), ids=STORED)
def test_tensors_that_torch_does_not_write_so(program: bytes, reason: str, tmp_path: Path) -> None:
    def written(program: bytes) -> Path:
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            parts = {"data.pkl": b"\x80\x02" + program, "data/0": bytes(12), "version": b"3\n"}
            for name, content in parts.items():
                archive.writestr(f"x/{name}", content)
        return tmp_path / "x.pt"

    torch.testing.assert_close(load_tensors(written(_TENSOR)), torch.zeros(3))
    with refused(CheckpointError, f"got a damaged pickle (UnpicklingError: {reason})"):
        load_tensors(written(program))


LEARNED: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "model": (("model",), 3, "expected model by name, got int"),
    "iteration": (("iteration",), -1, "iteration: expected an integer, got -1"),
    "optimizer": (("optimizer",), [], "optimizer: expected Adam's state, got list"),
    "groups": (("optimizer", "param_groups"), [{}], "optimizer: expected Adam's parameter groups, got [{}]"),
    "moments": (("optimizer", "state", 0), {}, "optimizer: expected Adam's moments, got 0: {}"),
    "index": (("optimizer", "state", 999), {}, "optimizer: expected Adam's moments, got 999: {}"),
    "shape": (
        ("optimizer", "state", 0, "exp_avg"),
        torch.zeros(1),
        "optimizer: expected exp_avg [2, 1, 3, 3] of",
    ),
}


@pytest.mark.parametrize(("place", "value", "message"), LEARNED.values(), ids=LEARNED)
def test_a_learners_state_is_looked_through(place: tuple[Any, ...], value: Any, message: str) -> None:
    learner = build_learner(TrainConfig(filters=2, stages=1, ways=2, image_size=4, steps=2), 1, 4)
    for p in learner.model.parameters():
        p.grad = torch.ones_like(p)
    learner.apply_gradient()
    state = copy.deepcopy(learner.state_dict())
    check_learner(Path("x.pt"), state, learner)
    within = state
    for key in place[:-1]:
        within = within[key]
    within[place[-1]] = value
    with refused(CheckpointError, f"x.pt: {message}"):
        check_learner(Path("x.pt"), state, learner)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(saved: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = saved.read_bytes()
    monkeypatch.setattr(files.os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(saved, "model", {"model": {}, "epoch": 4})
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == ["latest.pt"]


def test_first_difference_is_named() -> None:
    own = {"a": torch.zeros(2), "b": torch.zeros(3, 4)}
    check_fits(Path("x.pt"), "model", own, {k: v.clone() for k, v in own.items()})
    with pytest.raises(
        CheckpointError, match=r"x.pt: expected model b of shape \[3, 4\], got of shape \[3\]"
    ):
        check_fits(Path("x.pt"), "model", own, own | {"b": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"expected model b of shape \[3, 4\], got absent"):
        check_fits(Path("x.pt"), "model", own, {"a": own["a"]})
    with pytest.raises(CheckpointError, match=r"expected model c absent, got of shape \[1\]"):
        check_fits(Path("x.pt"), "model", own, own | {"c": torch.zeros(1)})


def test_the_lock_admits_one(tmp_path: Path) -> None:
    with (
        files.run_lock(tmp_path / "run"),
        pytest.raises(ValueError, match=rf"held by process {os.getpid()}"),
        files.run_lock(tmp_path / "run"),
    ):
        pass
    with files.run_lock(tmp_path / "run"):
        pass
