"""Builds the native library under the address and undefined-behaviour sanitizers; ``python tests/sanitized.py``.

It takes some minutes of two cores and is kept in the cache beside the usual one. A session that will need it starts
this at its beginning, at the lowest priority (``conftest.py``), as most tests leave a core idle.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from mamlpp_fast import _native

__all__ = ["PRELOADED", "library"]

ROOT = Path(__file__).resolve().parents[1]


def runtime(name: str) -> str | None:
    """The path of one of g++'s run-time libraries; None where it has none."""
    if shutil.which("g++") is None:
        return None
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    return path if os.path.isabs(path) else None


PRELOADED = [runtime(name) for name in ("libasan.so", "libstdc++.so")]


def library() -> Path:
    """A library of the portable level and the processor's highest: each kernel source, scalar and at its widest.

    Built unless the cache has it; another process that builds it is waited for.
    """
    recipe = _native._recipe()
    folder = _native._cache() / f"sanitized-{recipe.key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    have = _native._levels()[0]
    highest = have[-2:] if have[-1] == "amxbf16" else have[-1:]  # the tiles' level and the one below
    levels = dict.fromkeys(["portable", *highest])
    arguments = [
        a for a in recipe.arguments if not a.startswith(("-DMAMLPP_FAST_ISAS", "-DMAMLPP_FAST_BEST"))
    ]
    with _native._exclusive(folder.with_suffix(".lock")):
        unfinished = folder / "CMakeFiles"
        if unfinished.exists() or not (folder / _native._LIBRARY).is_file():
            cmake = str(_native._tool("cmake"))
            configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *arguments]
            configure += [f"-DMAMLPP_FAST_ISAS={';'.join(levels)}", "-DMAMLPP_FAST_SANITIZE=ON"]
            # Register allocation without regions: a fifth less time to compile.
            configure += ["-DCMAKE_CXX_FLAGS=-fira-region=one"]
            configure += ["-DCMAKE_CXX_COMPILER=g++", f"-DCMAKE_MAKE_PROGRAM={_native._tool('ninja')}"]
            cores = str(len(os.sched_getaffinity(0)))
            for command in (configure, [cmake, "--build", str(folder), "-j", cores]):
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                if done.returncode:
                    raise RuntimeError(done.stdout[-3000:])
            shutil.rmtree(unfinished)
    return folder / _native._LIBRARY


if __name__ == "__main__":
    if None in PRELOADED:
        sys.exit("no g++ with libasan")
    os.nice(19)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the compilers too
    library()
