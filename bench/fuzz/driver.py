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
    jobs: int = 1,
    say: Callable[[str], object] = lambda text: None,
) -> list[dict[str, Any]]:
    """Runs ``inputs`` inputs, a few more where shares do not divide them, and returns a row for each kind of input.

    Args:
        inputs: how many in all.
        seed: input ``i`` of a kind depends on this and ``i`` alone.
        only: names of kinds; all without it.
        keep: a folder for the inputs that fail.
        jobs: batches that run at a time; what is found does not depend on it.
        say: told of each finished kind.
    """
    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    chosen = [s for s in SUBJECTS if not only or s.name in only]
    total = sum(s.share for s in chosen)
    rows = []
    with tempfile.TemporaryDirectory(
        dir=_MEMORY_FOLDER if os.access(_MEMORY_FOLDER, os.W_OK) else None
    ) as name:
        folder = Path(name)
        (folder / "canaries").mkdir()
        kinds = [_Kind(s, math.ceil(inputs * s.share / total), seed, folder) for s in chosen]
        waiting = [(kind, batch) for kind in kinds for batch in kind.batches()]
        slots = [folder / f"slot-{i}" for i in range(jobs)]
        running: dict[int, _Batch] = {}
        while waiting or running:
            while waiting and slots:
                kind, indices = waiting.pop(0)
                batch = _Batch(kind, indices, slots.pop())
                running[batch.reading] = batch
            for ready in select.select(list(running), [], [], 1.0)[0] or ():
                batch = running[ready]
                if batch.takes_more():
                    continue
                del running[ready]
                slots.append(batch.slot)
                left = batch.kind.add(batch)
                if left:
                    waiting.insert(0, (batch.kind, left))
                elif batch.kind.done == batch.kind.inputs:
                    rows.append(batch.kind.row(keep))
                    say(json.dumps(rows[-1]))
            for batch in running.values():
                batch.end_when_stuck()
    return sorted(rows, key=lambda row: [s.name for s in chosen].index(row["kind"]))


class _Kind:
    """What became of the inputs of one kind so far."""

    def __init__(self, subject: Subject, inputs: int, seed: int, folder: Path) -> None:
        self.subject, self.inputs, self.seed, self.folder = subject, inputs, seed, folder
        self.canary = str(folder / "canaries" / subject.name)
        self.done = 0
        self._counts: Counter[str] = Counter()
        self._failures: list[tuple[int, str]] = []
        self._slowest, self._peak, self._seconds, self._processor = 0.0, 0, 0.0, 0.0
        self._prepared = False

    def batches(self) -> list[range]:
        return [range(at, min(at + _BATCH, self.inputs)) for at in range(0, self.inputs, _BATCH)]

    def prepare(self) -> None:
        """Once, before the first child, so that they find modules imported."""
        if not self._prepared:
            self._prepared = True
            self.enter(self.folder / "parent")

    def enter(self, place: Path) -> None:
        """Makes ``place`` the folder where inputs are read from, and nothing but it a place to write to."""
        place.mkdir(exist_ok=True)
        Canary.path = self.canary
        with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(place / "cache")):
            self.subject.prepare(place)

    def input(self, index: int) -> bytes:
        return self.subject.make(random.Random(f"{self.subject.name}/{self.seed}/{index}"))

    def add(self, batch: _Batch) -> range | None:
        """Counts a batch; returns what is left of one whose process died."""
        result = batch.result()
        self._counts.update(result["counts"])
        self._failures += [tuple(f) for f in result["failures"]]
        self._slowest = max(self._slowest, result["slowest"])
        self._peak = max(self._peak, result["grown"])
        self._processor += result["processor"]
        self._seconds += time.perf_counter() - batch.started
        self.done += result["next"] - batch.indices.start
        return range(result["next"], batch.indices.stop) or None

    def row(self, keep: Path | None) -> dict[str, Any]:
        failures = sorted(self._failures)
        if keep is not None and failures:
            keep.mkdir(parents=True, exist_ok=True)
            Canary.path = self.canary
            for index, _ in failures:
                (keep / f"{self.subject.name}-{self.seed}-{index}").write_bytes(self.input(index))
        code_run = int(Path(self.canary).exists())
        return {
            "kind": self.subject.name,
            "inputs": self.inputs,
            "accepted": self._counts["accepted"],
            "refused": self._counts["refused"],
            "failed": len(failures) + code_run,
            "failures": [f"input {index}: {what}" for index, what in failures[:20]],
            "slowest_seconds": round(self._slowest, 3),
            "memory_growth_mib": self._peak >> 20,
            "seconds": round(self._seconds, 1),
            "processor_seconds": round(self._processor, 1),
            "code_run": code_run,
        }


class _Batch:
    """A batch in a child; where the child dies, the input at hand failed and the next batch starts behind it."""

    def __init__(self, kind: _Kind, indices: range, slot: Path) -> None:
        self.kind, self.indices, self.slot = kind, indices, slot
        self.started = time.perf_counter()
        self._progress = mmap.mmap(-1, 8)
        self._progress[:8] = struct.pack("q", indices.start)
        self._content, self._last = b"", indices.start
        self._moved, self._used = self.started, 0.0
        kind.prepare()
        self.reading, writing = os.pipe()
        sys.stdout.flush()
        gc.collect()
        gc.freeze()  # else the child's collections copy every page of ours
        self._child = os.fork()
        if self._child == 0:
            status = 1
            try:
                with open(os.devnull, "w") as null:
                    os.dup2(null.fileno(), 2)
                result = _run(kind, indices, slot, self._progress)
                with os.fdopen(writing, "wb") as pipe:
                    pipe.write(json.dumps(result).encode())
                status = 0
            finally:
                os._exit(status)
        gc.unfreeze()
        os.close(writing)

    def takes_more(self) -> bool:
        """Reads what the child wrote; false at its end."""
        part = os.read(self.reading, 1 << 16)
        self._content += part
        return bool(part)

    def end_when_stuck(self) -> None:
        """Kills a child that not even a signal reaches; one that waits for the processor alone is not stuck."""
        at, now = struct.unpack("q", self._progress[:8])[0], time.perf_counter()
        state, *fields = Path(f"/proc/{self._child}/stat").read_text().rpartition(")")[2].split()
        used = (int(fields[10]) + int(fields[11])) / os.sysconf("SC_CLK_TCK")  # by the program, by the system
        if at != self._last:
            self._last, self._used, self._moved = at, used, now
        if state == "R":
            self._moved = now
        if max(now - self._moved, used - self._used) > 12 * SECONDS:
            os.kill(self._child, signal.SIGKILL)

    def result(self) -> dict[str, Any]:
        os.close(self.reading)
        _, status = os.waitpid(self._child, 0)
        if self._content and status == 0:
            found: dict[str, Any] = json.loads(self._content)
            return found
        at = struct.unpack("q", self._progress[:8])[0]
        what = f"the process died, status {status}"
        # What was counted before died with it.
        counts = {"accepted": 0, "refused": at - self.indices.start}
        return {
            "counts": counts,
            "failures": [[at, what]],
            "slowest": 0.0,
            "grown": 0,
            "processor": 0.0,
            "next": at + 1,
        }


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
