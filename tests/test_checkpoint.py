"""Checkpoint files: whole or not at all, and never code."""

import errno
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from train_helpers import RunsCode

from mamlpp_fast.train import checkpoint, files
from mamlpp_fast.train._resumable import check_fits
from mamlpp_fast.train.checkpoint import CheckpointError, load_checkpoint, save_checkpoint


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
