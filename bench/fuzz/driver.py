"""Runs damaged inputs in child processes under limits of time and memory, and counts what became of them."""

from __future__ import annotations

import contextlib
import gc
import json
import mmap
import os
import random
import resource
import select
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from bench.fuzz.mutations import Canary
from bench.fuzz.subjects import SUBJECTS, Subject

__all__ = ["SECONDS", "fuzz"]

SECONDS = 10.0  # of processor time, an input
_MEMORY = 2 << 30  # address space beyond what the process starts with
_BATCH = 1000
_WATCHED = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
)


class Hang(BaseException):
    """An input took too long; no handler of ordinary errors may swallow it."""


class _Watch:
    """What an audit hook sees while ``on``: code that starts programs, connects, or writes outside the folder."""

    def __init__(self, folder: Path) -> None:
        self.on = False
        self.seen: list[str] = []
        self._folder = f"{folder}/"
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        target = str(arguments[0]) if arguments else ""
        writes = event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir") or (
            event == "open" and isinstance(arguments[1], str) and bool(set(arguments[1]) & set("wax+"))
        )
        if event in _WATCHED or (writes and not target.startswith(self._folder)):
            self.seen.append(f"{event} {target}")


def fuzz(
    inputs: int,
    seed: int,
    *,
    only: Sequence[str] = (),
    keep: Path | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> list[dict[str, Any]]:
    """Runs about ``inputs`` inputs and returns a row for each kind of input.

    Args:
        inputs: how many in all.
        seed: input ``i`` of a kind depends on this and ``i`` alone.
        only: names of kinds; all without it.
        keep: a folder for the inputs that fail.
        say: told of each finished kind.
    """
    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    rows = []
    chosen = [s for s in SUBJECTS if not only or s.name in only]
    total = sum(s.share for s in chosen)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        canaries = folder / "canaries"
        canaries.mkdir()
        with _environment(XDG_CACHE_HOME=str(folder / "cache")):
            for subject in chosen:
                Canary.path = str(canaries / subject.name)
                subject.prepare(folder)
                row = _fuzz_one(subject, max(1, round(inputs * subject.share / total)), seed, folder, keep)
                row["code_run"] = int(Path(Canary.path).exists())
                row["failed"] += row["code_run"]
                rows.append(row)
                say(json.dumps(rows[-1]))
    return rows


@contextlib.contextmanager
def _environment(**values: str) -> Any:
    before = {k: os.environ.get(k) for k in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for k, v in before.items():
            if v is None:
                del os.environ[k]
            else:
                os.environ[k] = v


def _fuzz_one(subject: Subject, inputs: int, seed: int, folder: Path, keep: Path | None) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    failures: list[str] = []
    started, slowest, peak, at = time.perf_counter(), 0.0, 0, 0
    while at < inputs:
        result = _batch(subject, range(at, min(at + _BATCH, inputs)), seed, folder)
        counts.update(result["counts"])
        slowest, peak = max(slowest, result["slowest"]), max(peak, result["grown"])
        for index, what in result["failures"]:
            failures.append(f"input {index}: {what}")
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{subject.name}-{seed}-{index}").write_bytes(_input(subject, seed, index))
        at = result["next"]
    return {
        "kind": subject.name,
        "inputs": inputs,
        "accepted": counts["accepted"],
        "refused": counts["refused"],
        "failed": len(failures),
        "failures": failures[:20],
        "slowest_seconds": round(slowest, 3),
        "memory_growth_mib": peak >> 20,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _input(subject: Subject, seed: int, index: int) -> bytes:
    return subject.make(random.Random(f"{subject.name}/{seed}/{index}"))


def _batch(subject: Subject, indices: range, seed: int, folder: Path) -> dict[str, Any]:
    """A batch in a child; where the child dies, the input at hand failed and the next batch starts behind it."""
    progress = mmap.mmap(-1, 8)
    reading, writing = os.pipe()
    sys.stdout.flush()
    gc.collect()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 2)
            result = _run(subject, indices, seed, folder, progress)
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(json.dumps(result).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    content, stuck, last = b"", 0.0, -1
    while True:
        if select.select([reading], [], [], 1.0)[0]:
            part = os.read(reading, 1 << 16)
            if not part:
                break
            content += part
        now = struct.unpack("q", progress[:8])[0]
        stuck, last = (stuck + 1.0, last) if now == last else (0.0, now)
        if stuck > 12 * SECONDS:  # not even a signal is answered
            os.kill(child, signal.SIGKILL)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    if content and status == 0:
        found: dict[str, Any] = json.loads(content)
        return found
    at = struct.unpack("q", progress[:8])[0]
    what = f"the process died, status {status}"
    return {
        "counts": {"accepted": 0, "refused": at - indices.start},
        "failures": [[at, what]],
        "slowest": 0.0,
        "grown": 0,
        "next": at + 1,
    }


def _run(subject: Subject, indices: range, seed: int, folder: Path, progress: mmap.mmap) -> dict[str, Any]:
    def late(number: int, frame: FrameType | None) -> None:
        raise Hang

    signal.signal(signal.SIGPROF, late)
    before = _memory()
    resource.setrlimit(resource.RLIMIT_AS, (before["VmSize"] + _MEMORY,) * 2)
    watch = _Watch(folder)
    counts: Counter[str] = Counter()
    failures: list[tuple[int, str]] = []
    slowest = 0.0
    for index in indices:
        progress[:8] = struct.pack("q", index)
        content = _input(subject, seed, index)
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        watch.on = True
        try:
            subject.read(content)
            outcome = "accepted"
        except (ValueError, TypeError, OSError) as error:
            text = str(error)
            outcome = (
                "refused" if text and "\n" not in text and len(text) < 10_000 else f"message {text!r:.300}"
            )
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error!s:.300}"
        finally:
            watch.on = False
            signal.setitimer(signal.ITIMER_PROF, 0)
        slowest = max(slowest, time.process_time() - start)
        if watch.seen:
            outcome = f"did {', '.join(watch.seen)}"
            watch.seen.clear()
        if outcome in ("accepted", "refused"):
            counts[outcome] += 1
        else:
            failures.append((index, outcome))
    grown = max(0, _memory()["VmHWM"] - before["VmRSS"])
    return {"counts": counts, "failures": failures, "slowest": slowest, "grown": grown, "next": indices.stop}


def _memory() -> dict[str, int]:
    """Sizes of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {n: int(v.split()[0]) << 10 for n, _, v in (x.partition(":") for x in lines) if n.startswith("Vm")}
