"""Lanes: threads that work side by side and meet when all are done.

A lane computes on a single thread, so that nothing it calls waits for another thread: where other processes take
processors away, a lane is late by what was taken from it, not by what was taken from any of them at each of its calls.
"""

from __future__ import annotations

import contextvars
import itertools
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

import mamlpp_fast.ops.lslr_update  # noqa: F401 - registers the operation
from mamlpp_fast import _native
from mamlpp_fast._modes import function_modes
from mamlpp_fast.engine.deterministic import one_thread
from mamlpp_fast.reference import Watch, WeightNormByFormula

__all__ = ["NEVER", "Halt", "Share", "each", "here", "number", "run", "shares", "watched"]

Share = tuple[range, int, int]
"""Groups of tasks, the lanes that take them, and the threads that our kernels have in each."""


class Halt:
    """Whether lanes are to stop: at their next call.

    Attributes:
        flag: uint8 [1], 1 once they are; for what does not run in Python.
    """

    def __init__(self, flag: Tensor) -> None:
        self.flag = flag
        self.wanted = False

    def want(self) -> None:
        self.wanted = True
        self.flag.fill_(1)


NEVER = Halt(torch.zeros(1, dtype=torch.uint8, device="cpu"))
"""Of what runs on the calling thread: it has no other lane to stop for. Nothing is allocated, as in a capture."""


class _Pool:
    """The threads of lanes, the process's; as many as were ever needed at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._count = 0

    def of(self, count: int) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None or self._count < count:
                # Those before end when no caller holds them any more.
                self._threads, self._count = _started(count), count
            return self._threads


def _started(count: int) -> ThreadPoolExecutor:
    """Threads on which torch computes on one; what later threads begin with is as before."""
    _native.load()
    default: list[int] = []
    barrier = threading.Barrier(count)

    def begin() -> None:
        default.append(torch.get_num_threads())
        # The first `at::parallel_for` of a library on a thread sets the number that later threads begin with.
        one = torch.zeros(1)
        torch.ops.mamlpp_fast.lslr_update(one, one, one, None, 0)
        barrier.wait()
        torch.set_num_threads(1)
        barrier.wait()

    pool = ThreadPoolExecutor(count, "mamlpp_fast lane")
    for future in [pool.submit(begin) for _ in range(count)]:
        future.result()
    restore = threading.Thread(target=torch.set_num_threads, args=default[:1])
    restore.start()
    restore.join()
    return pool


_pool = _Pool()
_forked = False


def _forget() -> None:
    global _pool, _forked
    _pool, _forked = _Pool(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)  # threads stay behind in the parent


def here() -> bool:
    """Whether lanes are to run on the calling thread: where they alone have it, or where something watches it."""
    return torch.get_num_threads() == 1 or watched()


_own = threading.local()


def number() -> int:
    """Of the lane that the calling thread is; 0 of a thread that is none."""
    found: int = getattr(_own, "number", 0)
    return found


def watched() -> bool:
    """Whether a mode or the profiler watches what the calling thread calls."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or any(not isinstance(mode, Watch | WeightNormByFormula) for mode in function_modes())
        or torch._C._autograd._profiler_enabled()
    )


def shares(groups: int, most: int, threads: int) -> list[Share]:
    """How lanes share groups of tasks; one share after the other.

    As many groups as threads divide are taken by lanes of one thread. The rest would leave threads idle: each has a
    lane of its own, in which our kernels divide images among several threads. Their results do not depend on that.

    Args:
        groups: of tasks.
        most: lanes at once.
        threads: in all.
    """
    rest = groups % threads
    if most < threads or rest == 0 or threads // rest == 1 or not _native.status().loaded:
        lanes = min(groups, most)
        return [(range(groups), lanes, max(1, threads // lanes))]
    whole = range(groups - rest)
    return [*([(whole, threads, 1)] if whole else []), (range(len(whole), groups), rest, threads // rest)]


def run(work: Callable[[int, Halt], None], lanes: int = 1, threads: int = 1) -> None:
    """Calls ``work(lane, halt)`` for every lane, each on a thread of its own, and waits for all.

    Torch computes on one thread in it, without gradients. An error, or an interrupt of the caller, halts the other
    lanes and is raised when all have stopped. Where :func:`here`, lane after lane runs on the calling thread, and so
    does a single lane whose kernels have several ``threads``: these are the caller's own already. (A second team of
    OpenMP's threads, once it exists, makes all of the process go to sleep at the end of each parallel region where
    they would wait: a textbook loop beside it took 2.1 times as long.)
    """
    # OpenMP's threads stay behind in the parent as well, but the forked caller waits for them.
    if here() or (lanes == 1 and threads > 1 and not _forked):
        with one_thread(), torch.no_grad():
            for lane in range(lanes):
                work(lane, NEVER)
        return
    halt = Halt(torch.zeros(1, dtype=torch.uint8, device="cpu"))
    flush = _flushes_denormals()
    gate, begun = threading.Lock(), list[threading.Event]()

    def on_lane(lane: int) -> None:
        done = threading.Event()
        with gate:
            if halt.wanted:  # the caller may be gone
                return
            begun.append(done)
        try:
            torch.set_flush_denormal(flush)
            _own.number = lane
            with torch.no_grad():
                work(lane, halt)
        except BaseException:
            halt.want()
            raise
        finally:
            done.set()

    pool, running = _pool.of(lanes), list[Future[None]]()
    try:
        # Context variables (NumPy's treatment of errors, a user's settings) are the caller's on every lane.
        running += (pool.submit(contextvars.copy_context().run, on_lane, lane) for lane in range(lanes))
        # With a limit: an interrupt that comes just before the wait begins is seen only after it.
        while wait(running, timeout=1.0).not_done:
            continue
    finally:
        _settle(halt, gate, begun)
    for future in running:
        future.result()


def each(work: Callable[[int, int], None], count: int, lanes: int) -> None:
    """Calls ``work(item, lane)`` for ``count`` items; each lane takes the next that none has taken (:func:`run`)."""
    following = itertools.count()

    def on_lane(lane: int, halt: Halt) -> None:
        for item in following:
            if item >= count or halt.wanted:
                return
            work(item, lane)

    run(on_lane, lanes)


def _settle(halt: Halt, gate: threading.Lock, begun: list[threading.Event]) -> None:
    """Halts all lanes and waits for those that have begun, however often the caller is interrupted.

    They write to memory that it goes on to use. An interrupt while a lane is handed to its thread leaves no future of
    it: so lanes say themselves that they have begun.
    """
    while True:
        try:
            halt.want()
            with gate:
                own = list(begun)
            for done in own:
                done.wait()
        except KeyboardInterrupt:
            continue
        return


def _flushes_denormals() -> bool:
    """Whether the calling thread takes subnormal numbers for zero, which each thread has a setting for."""
    return sys.float_info.min * 0.5 == 0.0
