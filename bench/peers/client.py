"""The driver's end of a worker, and the check of what a worker computes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from bench.peers.problem import Arrays

ROOT = Path(__file__).resolve().parents[2]
_INERT = re.compile(r"\.conv\.bias$")


class Failed(Exception):
    """Why a peer gets no time."""


@dataclass(frozen=True)
class Peer:
    """A row of the table: the worker's module and its argument, and the environment that it runs in.

    Without an environment it runs in the driver's own interpreter. ``plus``: whether it is asked for
    MAML++ as well as MAML.
    """

    name: str
    module: str
    argument: str | None = None
    environment: str | None = None
    plus: bool = True


class Worker:
    """A peer's process; ends with the ``with`` block or :meth:`close`, or when an answer takes ``limit`` seconds."""

    def __init__(self, peer: Peer, python: Path, threads: int, limit: float = math.inf) -> None:
        self._limit = limit
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC", "PJRT_NPROC")
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close
        # Compilers start from nothing every time, so that the first run says what compiling costs.
        self._compiled = tempfile.TemporaryDirectory()
        command = [str(python), "-m", "bench.peers.worker", peer.module, peer.argument]
        self._process = subprocess.Popen(
            [part for part in command if part is not None],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
            cwd=ROOT,
            env=os.environ
            | dict.fromkeys(names, str(threads))
            | {"TORCHINDUCTOR_CACHE_DIR": self._compiled.name, "TORCHINDUCTOR_COMPILE_THREADS": str(threads)},
        )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The worker's answer.

        Raises:
            Failed: with what the worker says went wrong, or its last words.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        late = threading.Timer(min(self._limit, threading.TIMEOUT_MAX), self._kill)
        late.start()
        try:
            print(json.dumps({"do": do} | request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timed_out = late.finished.is_set()
            late.cancel()
        if not line:
            status = self._process.wait()
            if timed_out:
                raise Failed(f"{do}: no answer within {self._limit:.0f} s")
            self._errors.seek(0)
            words = self._errors.read().strip().splitlines()
            raise Failed(f"{do}: ended with status {status}: {words[-1] if words else 'no message'}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(f"{do}: {answer['error']}")
        return answer

    def _kill(self) -> None:
        """Ends the process and what it has started: compilers keep its output open."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def computed(self) -> Arrays:
        """Loss and gradients as the worker has them."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "result.npz"
            self.ask("check", path=str(path))
            with np.load(path) as file:
                return {name: file[name] for name in file.files}

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()
        self._compiled.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def differs(found: Arrays, exact: Arrays) -> tuple[float, str]:
    """The largest error and where it is.

    Of a tensor its error is relative to its own largest value; of convolutions' biases in front of batch norm, whose
    gradient is zero (or none), relative to the largest of all gradients.
    """
    largest = max(float(np.abs(value).max()) for name, value in exact.items() if name != "loss")
    worst = (0.0, "loss")
    for name, value in exact.items():
        inert = _INERT.search(name) is not None
        if inert and name in found and np.isnan(found[name]).all():
            continue
        if name not in found or found[name].shape != value.shape:
            return math.inf, f"{name}, missing or of another shape"
        scale = largest if inert else float(np.abs(value).max())
        error = float(np.abs(found[name] - value).max()) / scale
        if not error <= worst[0]:
            worst = (math.inf if math.isnan(error) else error, name)
    return worst


def distance(found: Arrays, exact: Arrays) -> float:
    """Norm of the error over norm of the whole meta-gradient, or the loss's relative error where that is larger."""
    names = [name for name in exact if name != "loss" and _INERT.search(name) is None]
    error = math.sqrt(sum(float(np.square(found[name] - exact[name]).sum()) for name in names))
    norm = math.sqrt(sum(float(np.square(exact[name]).sum()) for name in names))
    worst = max(error / norm, float(abs(found["loss"] - exact["loss"]) / abs(exact["loss"])))
    return worst if math.isfinite(error) and math.isfinite(worst) else math.inf
