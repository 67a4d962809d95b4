"""Where data lies: a given path, then MAMLPP_FAST_DATA, then the user's cache folder."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from mamlpp_fast.data.errors import DataError

__all__ = ["ENV", "cache_folder", "find", "progress", "search_roots", "write_atomically"]

ENV = "MAMLPP_FAST_DATA"


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/mamlpp_fast/data``, or the same under ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "mamlpp_fast" / "data"


def search_roots(path: str | os.PathLike[str] | None) -> list[tuple[str, Path]]:
    """The places to look in, each with the name a message calls it by; a given path is the only one.

    Raises:
        DataError: for a path, or a MAMLPP_FAST_DATA, that does not exist.
    """
    if path is not None:
        given = Path(path).expanduser()
        if not given.exists():
            raise DataError(f"--data: expected an existing file or folder, got '{given}'")
        return [("--data", given)]
    roots = []
    if os.environ.get(ENV):
        given = Path(os.environ[ENV]).expanduser()
        if not given.exists():
            raise DataError(f"{ENV}: expected an existing file or folder, got '{given}'")
        roots.append((ENV, given))
    if cache_folder().exists():
        roots.append(("cache", cache_folder()))
    return roots


def find(
    name: str, path: str | os.PathLike[str] | None, probe: Callable[[Path], Path | None], expected: str
) -> Path:
    """The first root that ``probe`` accepts, as what ``probe`` returned.

    Args:
        name: the data set, for the message.
        path: a path given by the user, or None.
        probe: returns the file or folder to read under a root, or None.
        expected: what the message says was looked for.

    Raises:
        DataError: when no root has it.
    """
    roots = search_roots(path)
    for _, root in roots:
        found = probe(root)
        if found is not None:
            return found
    if not roots:
        raise DataError(
            f"{name}: expected {expected}; give --data PATH or set {ENV} (nothing in '{cache_folder()}')"
        )
    places = ", ".join(f"{label} '{root}'" for label, root in roots)
    raise DataError(f"{name}: expected {expected}, found none in {places}")


def write_atomically(file: Path, write: Callable[[Path], None]) -> None:
    """Has ``write`` make a temporary file beside ``file``, then renames it: readers see all of it or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    try:
        write(Path(temporary))
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)


def progress(label: str, done: int, total: int) -> None:
    """A line on standard error that overwrites itself; elsewhere than on a terminal only the last one."""
    if sys.stderr.isatty():
        end = "\n" if done >= total else ""
        print(f"\r{label}: {done}/{total}", end=end, file=sys.stderr, flush=True)
    elif done >= total:
        print(f"{label}: {done}/{total}", file=sys.stderr, flush=True)
