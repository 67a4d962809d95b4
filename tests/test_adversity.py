"""What may happen to a run from outside: no room, no permission, a clock set back, signals, a second run."""

import ctypes
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

import pytest
import torch
from train_helpers import metrics_of, tiny_arguments

from mamlpp_fast.cli import main
from mamlpp_fast.train import load_checkpoint

LATEST = Path("checkpoints") / "latest.pt"


def command(data: Path, out: Path, **changes: object) -> list[str]:
    settings = tiny_arguments(checkpoint_seconds=0.0, **changes)
    return ["train", "--data", str(data), "--device", "cpu", "--out", str(out), *settings]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main(command(data, out)) == 0
    return out


def assert_ends_as(out: Path, whole: Path, data: Path, **changes: object) -> None:
    """Started again, the run ends with every number of the undisturbed one."""
    assert main(command(data, out, **changes)) == 0
    assert metrics_of(out) == metrics_of(whole)
    ours, theirs = (load_checkpoint(folder / LATEST, "training")["learner"] for folder in (out, whole))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == sorted(
        p.name for p in (whole / "checkpoints").iterdir()
    )


def forked(work: Callable[[], int], errors: Path = Path(os.devnull)) -> int:
    """Starts ``work`` in a child that has everything imported already; returns its process number."""
    sys.stdout.flush()
    with warnings.catch_warnings():
        # Python 3.12's, of other threads, which the child lacks: under pytest-xdist one waits for orders.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 99
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(
                    number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                )
            with open(os.devnull, "w") as null, open(errors, "w") as told:
                os.dup2(null.fileno(), 1)
                os.dup2(told.fileno(), 2)
                sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115 # pytest has taken the other
            status = work()
        except KeyboardInterrupt:
            status = 130
        finally:
            os._exit(status)
    return child


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("part", [0.1, 0.6, 0.95])
def test_files_may_grow_no_further(tmp_path: Path, data: Path, whole: Path, part: float) -> None:
    """The system refuses the rest of a write, as on a full disk or over a quota."""
    out = tmp_path / "run"
    assert main([*command(data, out), "--max-iters", "4"]) == 0
    before = (out / LATEST).read_bytes()

    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(part * len(before)),) * 2)
        return main(command(data, out))

    assert status_of(forked(limited)) == 2
    assert (out / LATEST).read_bytes() == before
    assert not list(out.rglob("*.tmp"))
    assert_ends_as(out, whole, data)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or shutil.which("mount") is None:
        pytest.skip("mounting takes root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)], capture_output=True
    )
    if done.returncode:
        pytest.skip(f"this machine mounts nothing: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(file: FileIO) -> None:
    while True:
        file.write(bytes(512))


def test_a_full_disk(
    small_disk: Path, data: Path, whole: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = small_disk / "run"
    assert main([*command(data, out), "--max-iters", "4"]) == 0
    before = (out / LATEST).read_bytes()
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        fill(file)
    capsys.readouterr()
    assert main(command(data, out)) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("mamlpp-fast train: error:")
    assert "No space left on device" in line
    assert (out / LATEST).read_bytes() == before
    filler.unlink()
    moved = tmp_path / "moved"
    shutil.copytree(out, moved)
    assert_ends_as(moved, whole, data)


def without_power(work: Callable[[], int]) -> int:
    """Does ``work`` with permissions that count for root, too: every capability is given up."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0
    return work()


@pytest.mark.parametrize("place", ["checkpoints", "."])
def test_permission_is_lost(tmp_path: Path, data: Path, whole: Path, place: str) -> None:
    """Between two starts a folder becomes read-only."""
    out, errors = tmp_path / "run", tmp_path / "errors"
    assert main([*command(data, out), "--max-iters", "4"]) == 0
    before = (out / LATEST).read_bytes()
    (out / place).chmod(0o500)
    child = forked(lambda: without_power(lambda: main(command(data, out))), errors)
    status = status_of(child)
    (out / place).chmod(0o700)
    (line,) = errors.read_text().splitlines()
    assert status == 2
    assert line.startswith(f"mamlpp-fast train: error: {out / place}".removesuffix("."))
    assert line.endswith("expected to read and write here, Permission denied")
    load_checkpoint(out / LATEST, "training")
    assert place == "." or (out / LATEST).read_bytes() == before
    assert_ends_as(out, whole, data)


def test_the_clock_is_set_back(
    tmp_path: Path, data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time of day runs backwards and files are dated in the future: neither decides anything."""
    out = tmp_path / "run"
    assert main([*command(data, out), "--max-iters", "4"]) == 0
    for path in out.rglob("*"):
        os.utime(path, (2**32, 2**32))
    now = time.time()
    ticks = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: now - 1000.0 * next(ticks))
    assert_ends_as(out, whole, data)


@pytest.mark.parametrize("seed", range(3))
def test_signals_at_random_moments(tmp_path: Path, data: Path, seed: int) -> None:
    """Whatever arrives, whenever: the last checkpoint is whole, and the run ends as if nothing had been."""
    changes: dict[str, object] = {"epochs": 4, "iterations_per_epoch": 8}
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "run"
    start = time.perf_counter()
    assert main(command(data, undisturbed, **changes)) == 0
    seconds = time.perf_counter() - start
    rng = random.Random(seed)
    seen = set()
    for attempt in range(8):
        number = rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGKILL))
        child = forked(lambda: main(command(data, out, **changes)))
        while attempt == 0 and not (out / "config.json").exists():
            time.sleep(0.001)  # the first at the beginning, however fast the run: one at least is interrupted
        if attempt:
            time.sleep(rng.uniform(0, seconds / 4))
        os.kill(child, number)
        status = status_of(child)
        # Saved and stopped, or ended by the signal before and after that; 0 where it had finished.
        assert status in (0, 128 + number, -number), status
        seen.add(status)
        if (out / LATEST).exists():
            load_checkpoint(out / LATEST, "training")
    assert seen - {0}
    assert_ends_as(out, undisturbed, data, **changes)


def test_a_second_process_on_one_folder(
    tmp_path: Path, data: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    first = forked(lambda: main(command(data, out, epochs=500)))
    config = out / "config.json"
    while not config.exists():
        time.sleep(0.005)
    os.kill(first, signal.SIGSTOP)  # alive, however slow
    capsys.readouterr()
    assert main(command(data, out)) == 2
    assert capsys.readouterr().err == (
        "mamlpp-fast train: error: --out: expected a folder no other run is using, "
        f"got {out}, held by process {first}\n"
    )
    os.kill(first, signal.SIGKILL)
    assert status_of(first) == -signal.SIGKILL
    shutil.rmtree(out / "checkpoints")
    config.unlink()
    (out / "metrics.jsonl").unlink(missing_ok=True)
    assert_ends_as(out, whole, data)
