"""Files of a run folder: written whole or not at all, and one process at a time."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = [
    "append_line",
    "is_held",
    "plain",
    "read_json",
    "remove_leftovers",
    "run_lock",
    "write_json",
    "write_whole",
]

_TEMPORARY = ".tmp"
_LOCK = ".lock"


def write_whole(path: Path, content: bytes) -> None:
    """Replaces ``path`` by ``content`` so that, whatever happens, readers find all of the old or all of the new.

    Raises:
        OSError: when the folder cannot be written or the disk is full; ``path`` is then untouched.
    """
    temporary = path.with_name(path.name + _TEMPORARY)
    with _naming(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """:func:`write_whole` of indented JSON; numbers that are not finite become null."""
    write_whole(path, (json.dumps(plain(value), indent=2) + "\n").encode())


def read_json(path: Path, what: str = "a run's folder") -> dict[str, Any]:
    """Reads a JSON object: one of a run's files, or ``what`` else it is.

    Raises:
        ValueError: when it is missing or damaged.
    """
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: expected {what}, {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, {error!s:.200}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def append_line(path: Path, value: Any) -> int:
    """Appends one line of JSON, waits until it is on disk, and returns the file's length in bytes."""
    with _naming(path), open(path, "ab") as file:
        file.write((json.dumps(plain(value)) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def remove_leftovers(folder: Path) -> None:
    """Deletes the temporary files that a killed process left."""
    for path in folder.glob(f"*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds the run folder, which is made if need be; the system lets go of it when the process dies.

    Raises:
        ValueError: when another process holds it.
        OSError: when the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 20).decode().strip()
            who = f"process {owner}" if owner else "another process"
            raise ValueError(
                f"--out: expected a folder no other run is using, got {folder}, held by {who}"
            ) from None
        with suppress(OSError):  # who holds it is a courtesy: a full disk is told of by what matters
            os.truncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def is_held(folder: Path) -> bool:
    """Whether a process holds the run folder."""
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of writing, which come without one, get the file's name."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain(value: Any) -> Any:
    """What JSON can say of a value: null of a number that is not finite, keys as texts."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
