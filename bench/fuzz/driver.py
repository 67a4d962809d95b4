"""Runs damaged inputs in child processes under limits of time and memory, and counts what became of them."""

from __future__ import annotations

import gc
import json
import math
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
from unittest import mock

import torch

from bench.fuzz.mutations import Canary
from bench.fuzz.subject import Subject
from bench.fuzz.subjects import SUBJECTS

SECONDS = 10.0  # of processor time, an input
_MEMORY = 1 << 30  # address space beyond what the process starts with
_BATCH = 1000
_MEMORY_FOLDER = "/dev/shm"  # on a disk each input waits for it
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
    """What an audit hook sees while ``on``: code that starts programs, connects, or writes outside the folders."""

    def __init__(self, *folders: Path) -> None:
        self.on = False
        self.seen: list[str] = []
        self._folders = tuple(f"{folder}/" for folder in folders)
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        target = str(arguments[0]) if arguments else ""
        writes = event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir") or (
            event == "open" and isinstance(arguments[1], str) and bool(set(arguments[1]) & set("wax+"))
        )
        if event in _WATCHED or (writes and not target.startswith(self._folders)):
            self.seen.append(f"{event} {target}")


def fuzz(
    inputs: int,
    seed: int,
    *,
    only: Sequence[str] = (),
    keep: Path | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> list[dict[str, Any]]:
    """Runs ``inputs`` inputs, a few more where shares do not divide them, and returns a row for each kind of input.

    Args:
        inputs: how many in all.
        seed: input ``i`` of a kind depends on this and ``i`` alone.
        only: names of kinds; all without it.
        keep: a folder for the inputs that fail.
        say: told of each finished kind.
    """
    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    chosen = [s for s in SUBJECTS if not only or s.name in only]
    total = sum(s.share for s in chosen)
    rows = []
    with tempfile.TemporaryDirectory(
        dir=_MEMORY_FOLDER if os.access(_MEMORY_FOLDER, os.W_OK) else None
    ) as name:
        (Path(name) / "canaries").mkdir()
        for subject in chosen:
            kind = _Kind(subject, math.ceil(inputs * subject.share / total), seed, Path(name))
            rows.append(kind.run(keep))
            say(json.dumps(rows[-1]))
    return rows


class _Kind:
    """Inputs of one kind, and what becomes of them."""

    def __init__(self, subject: Subject, inputs: int, seed: int, folder: Path) -> None:
        self.subject, self.inputs, self.seed, self.folder = subject, inputs, seed, folder
        self.canary = str(folder / "canaries" / subject.name)

    def enter(self, place: Path) -> None:
        """Makes ``place`` the folder where inputs are read from, and nothing but it a place to write to."""
        place.mkdir(exist_ok=True)
        Canary.path = self.canary
        with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(place / "cache")):
            self.subject.prepare(place)

    def input(self, index: int) -> bytes:
        return self.subject.make(random.Random(f"{self.subject.name}/{self.seed}/{index}"))

    def run(self, keep: Path | None) -> dict[str, Any]:
        began = time.perf_counter()
        self.enter(self.folder / "parent")  # so that children find modules imported
        results, done = [], 0
        while done < self.inputs:
            results.append(_in_a_child(self, range(done, min(done + _BATCH, self.inputs))))
            done = results[-1]["next"]
        failures = [tuple(f) for r in results for f in r["failures"]]
        if keep is not None and failures:
            keep.mkdir(parents=True, exist_ok=True)
            for index, _ in failures:
                (keep / f"{self.subject.name}-{self.seed}-{index}").write_bytes(self.input(index))
        code_run = int(Path(self.canary).exists())
        return {
            "kind": self.subject.name,
            "inputs": self.inputs,
            **{key: sum(r["counts"].get(key, 0) for r in results) for key in ("accepted", "refused")},
            "failed": len(failures) + code_run,
            "failures": [f"input {index}: {what}" for index, what in failures[:20]],
            "slowest_seconds": round(max(r["slowest"] for r in results), 3),
            "memory_growth_mib": max(r["grown"] for r in results) >> 20,
            "seconds": round(time.perf_counter() - began, 1),
            "processor_seconds": round(sum(r["processor"] for r in results), 1),
            "code_run": code_run,
        }


def _in_a_child(kind: _Kind, indices: range) -> dict[str, Any]:
    """A batch in a child; where the child dies, the input at hand failed and the next batch starts behind it."""
    progress = mmap.mmap(-1, 8)
    progress[:8] = struct.pack("q", indices.start)
    reading, writing = os.pipe()
    sys.stdout.flush()
    gc.collect()
    gc.freeze()  # else the child's collections copy every page of ours
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 2)
            result = _run(kind, indices, kind.folder / "child", progress)
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(json.dumps(result).encode())
            status = 0
        finally:
            os._exit(status)
    gc.unfreeze()
    os.close(writing)
    content = _written(reading, child, progress)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    if content and status == 0:
        found: dict[str, Any] = json.loads(content)
        return found
    at = struct.unpack("q", progress[:8])[0]
    return {
        "counts": {"refused": at - indices.start},  # what was counted before died with it
        "failures": [[at, f"the process died, status {status}"]],
        "slowest": 0.0,
        "grown": 0,
        "processor": 0.0,
        "next": at + 1,
    }


def _written(reading: int, child: int, progress: mmap.mmap) -> bytes:
    """All that a child writes. One that not even a signal reaches is killed; waiting for the processor is not stuck."""
    content, last, spent, moved = b"", -1, 0.0, time.perf_counter()
    while True:
        if select.select([reading], [], [], 1.0)[0]:
            part = os.read(reading, 1 << 16)
            content += part
            if not part:
                return content
        at, now = struct.unpack("q", progress[:8])[0], time.perf_counter()
        state, *fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        used = (int(fields[10]) + int(fields[11])) / os.sysconf("SC_CLK_TCK")  # by the program, by the system
        if at != last:
            last, spent, moved = at, used, now
        if state == "R":
            moved = now
        if max(now - moved, used - spent) > 12 * SECONDS:
            os.kill(child, signal.SIGKILL)


def _run(kind: _Kind, indices: range, slot: Path, progress: mmap.mmap) -> dict[str, Any]:
    def late(number: int, frame: FrameType | None) -> None:
        raise Hang

    kind.enter(slot)
    os.environ["XDG_CACHE_HOME"] = str(slot / "cache")
    signal.signal(signal.SIGPROF, late)
    before = _memory()
    resource.setrlimit(resource.RLIMIT_AS, (before["VmSize"] + _MEMORY,) * 2)
    watch = _Watch(slot, kind.folder / "canaries")
    counts: Counter[str] = Counter()
    failures: list[tuple[int, str]] = []
    slowest = 0.0
    for index in indices:
        progress[:8] = struct.pack("q", index)
        content = kind.input(index)
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        watch.on = True
        try:
            kind.subject.read(content)
            outcome = "accepted"
        except (ValueError, TypeError, OSError) as error:
            text = str(error)
            outcome = (
                "refused" if text and "\n" not in text and len(text) < 10_000 else f"message {text!r:.300}"
            )
            if _exhausted(error):
                outcome = f"more memory than there is, then {text!r:.300}"
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
    return {
        "counts": counts,
        "failures": failures,
        "slowest": slowest,
        "grown": grown,
        "processor": time.process_time(),
        "next": indices.stop,
    }


def _exhausted(error: BaseException | None) -> bool:
    """Whether an allocation failed before the error was raised, by a number that the file has no bytes for."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _memory() -> dict[str, int]:
    """Sizes of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {n: int(v.split()[0]) << 10 for n, _, v in (x.partition(":") for x in lines) if n.startswith("Vm")}
