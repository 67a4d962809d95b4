"""Finds, builds and loads the C++ library of CPU kernels.

A wheel may have it inside (setup.py), for some versions of torch. Else it is compiled on the first :func:`load` and
kept in the user's cache folder under a key of all that decides its content, so each combination of sources, flags,
torch, compiler and machine is compiled once.
Without it every operation still runs, on its closed form in PyTorch.

Environment:
    MAMLPP_FAST_NATIVE: ``0`` leaves the library out, ``require`` makes its absence an error.
    MAMLPP_FAST_ISA: highest instruction set to use (``portable``, ``avx2``, ``avx512``, ``avx512bf16``,
        ``amxbf16``).
    MAMLPP_FAST_LIBRARY: a library built by hand (with sanitizers, say), loaded instead of the cached one.
    CXX: the C++ compiler.
    XDG_CACHE_HOME: parent of the cache folder, ``~/.cache`` by default.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["NativeError", "NativeStatus", "build", "few", "load", "set_threads", "status"]

_LIBRARY = "libmamlpp_fast.so"
_FEW = 1 << 22  # elements of which two threads update Adam a millisecond sooner than one
_AVX512 = {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"}
_LEVEL_FLAGS = {
    "avx2": {"avx2", "fma"},
    "avx512": _AVX512,
    "avx512bf16": _AVX512 | {"avx512_bf16"},
    "amxbf16": _AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"},
}


class NativeError(RuntimeError):
    """The library cannot be built or loaded; the message is one line."""


class _NoLevelError(NativeError):
    """The library is whole, but has no kernels for this processor."""


@dataclass(frozen=True)
class NativeStatus:
    """What became of the native library.

    Attributes:
        loaded: whether its kernels serve the operations.
        reason: why not; empty when loaded.
        path: the library file, when there is one.
        isa: instruction set in use (``portable``, ``avx2``, ``avx512``, ``avx512bf16``, ``amxbf16``), when loaded.
    """

    loaded: bool
    reason: str
    path: Path | None = None
    isa: str | None = None


@dataclass(frozen=True)
class _Recipe:
    """One combination of sources, flags, torch, compiler and machine; ``base`` is the key less compiler."""

    source: Path
    arguments: tuple[str, ...]
    compiler: str | None
    sources_key: str
    base: str
    key: str


_lock = threading.Lock()
_status: NativeStatus | None = None
_set_threads: Callable[[int], None] | None = None


def load() -> bool:
    """Loads the library, building it first if it was never built; later calls answer at once.

    Raises:
        NativeError: if it cannot be loaded and ``MAMLPP_FAST_NATIVE=require``.
    """
    global _status
    with _lock:
        if _status is None:
            mode = os.environ.get("MAMLPP_FAST_NATIVE", "")
            try:
                _status = _load(mode)
            except NativeError as error:
                if mode == "require":
                    raise
                _status = NativeStatus(False, str(error))
        return _status.loaded


def status() -> NativeStatus:
    """The outcome of :func:`load`, without causing it."""
    return _status or NativeStatus(False, "not loaded yet")


def set_threads(count: int) -> None:
    """How many threads the kernels take when the calling thread calls them; torch's own number stays."""
    if _set_threads is not None:
        _set_threads(count)


@contextlib.contextmanager
def few(elements: int) -> Iterator[None]:
    """Within it loops of the calling thread over so many elements run on it alone, unless there are millions.

    A thread of OpenMP's that took a share then waits for the next loop, busily, for milliseconds: on a core that one of
    our lanes could have. With the native library alone, as the lanes are its.
    """
    threads = torch.get_num_threads()
    if _set_threads is None or elements > _FEW or threads == 1:
        yield
        return
    _set_threads(1)
    try:
        yield
    finally:
        _set_threads(threads)


def build() -> Path:
    """Builds the library unless the cache has it, and returns its path.

    Raises:
        NativeError: if a tool is missing or the build fails.
    """
    recipe = _recipe()
    return _cached(recipe) or _build(recipe, retry=True)


def _load(mode: str) -> NativeStatus:
    if mode == "0":
        raise NativeError("disabled by MAMLPP_FAST_NATIVE=0")
    if mode not in ("", "1", "require"):
        raise NativeError(f"MAMLPP_FAST_NATIVE must be 0, 1 or require, got {mode!r}")
    level = os.environ.get("MAMLPP_FAST_ISA", "")
    if level not in ("", "portable", *_LEVEL_FLAGS):
        raise NativeError(
            f"MAMLPP_FAST_ISA must be one of portable, {', '.join(_LEVEL_FLAGS)}, got {level!r}"
        )
    by_hand = os.environ.get("MAMLPP_FAST_LIBRARY")
    if by_hand:
        return _open(Path(by_hand))
    shipped = _shipped()
    if shipped.is_file():
        with contextlib.suppress(NativeError):  # a nightly torch, or another platform: compiled as ever
            return _open(shipped)
    recipe = _recipe()
    path = _cached(recipe)
    if path is not None:
        try:
            return _open(path)
        except _NoLevelError:  # an emulator of a lesser processor, say: another build would be the same
            raise
        except NativeError:
            # What the cache held is damaged: once more from the sources.
            shutil.rmtree(path.parent, ignore_errors=True)
    return _open(_build(recipe, retry=mode == "require"))


def _open(path: Path) -> NativeStatus:
    try:
        torch.ops.load_library(path)
    except OSError as error:
        cause = _one_line(str(error.__cause__ or error))
        if "undefined symbol" in cause:
            cause = f"built for another torch than {torch.__version__}: {cause}"
        raise NativeError(f"does not load: {cause}") from error
    global _set_threads
    library = ctypes.CDLL(str(path))
    isa, _set_threads = library.mamlpp_fast_isa, library.mamlpp_fast_set_threads
    isa.restype = ctypes.c_char_p
    _set_threads.argtypes, _set_threads.restype = [ctypes.c_int], None
    level = isa().decode()
    if not level:
        raise _NoLevelError(f"does not load: {path} has no kernels for this processor or MAMLPP_FAST_ISA")
    return NativeStatus(True, "", path, level)


def _shipped() -> Path:
    """Where a wheel has the library for this torch."""
    version = ".".join(torch.__version__.split(".")[:2])
    return Path(__file__).resolve().parent / "_lib" / version / _LIBRARY


def _cache() -> Path:
    parent = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(parent) / "mamlpp_fast"


def _source() -> Path:
    """The folder with CMakeLists.txt and csrc/: inside an installed package, or the checkout around it."""
    here = Path(__file__).resolve().parent
    for folder in (here / "_src", here.parent):
        if (folder / "CMakeLists.txt").is_file() and (folder / "csrc").is_dir():
            return folder
    raise NativeError(f"not built: the C++ sources are missing beside {here}")


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    # g++ first: torch's wheels carry GCC's OpenMP run-time, and two run-times share no thread limit.
    candidates = [shlex.split(named)[0]] if named else ["g++", "c++", "clang++"]
    return next((found for found in map(shutil.which, candidates) if found), None)


def _tool(name: str) -> str | None:
    """cmake or ninja: those installed with this Python first, so that a machine needs only a compiler."""
    beside = os.path.dirname(sys.executable)
    return shutil.which(name, path=beside) or shutil.which(name)


def _levels() -> tuple[list[str], bool]:
    """The instruction sets that this processor has, and whether the best that the compiler knows is enough.

    All are compiled where ``MAMLPP_FAST_ISA`` asks for another, and every one where the processor cannot be asked.
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ["portable", *_LEVEL_FLAGS], False
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    flags = set(line.partition(":")[2].split())
    have = ["portable", *(level for level, needed in _LEVEL_FLAGS.items() if needed <= flags)]
    lesser = have[: -2 if have[-1] == "amxbf16" else -1]  # the tiles' level is the one below, and they
    return have, os.environ.get("MAMLPP_FAST_ISA", "") not in lesser


def _recipe() -> _Recipe:
    source = _source()
    files = hashlib.sha256()
    for path in [source / "CMakeLists.txt", *sorted((source / "csrc").rglob("*"))]:
        if path.suffix in (".txt", ".h", ".cpp"):
            files.update(f"{path.relative_to(source)}\0".encode() + path.read_bytes() + b"\0")
    levels, best = _levels()
    arguments = (
        f"-DTORCH_ROOT={Path(torch.__file__).resolve().parent}",
        f"-DMAMLPP_FAST_ISAS={';'.join(levels)}",
        f"-DMAMLPP_FAST_BEST={'ON' if best else 'OFF'}",
        "-DCMAKE_UNITY_BUILD=ON",
        f"-DMAMLPP_FAST_CXX11_ABI={'ON' if torch.compiled_with_cxx11_abi() else 'OFF'}",
    )
    machine = (platform.system(), platform.machine(), *platform.libc_ver())
    base = _digest(files.hexdigest(), *arguments, torch.__version__, str(torch.version.git_version), *machine)
    compiler = _compiler()
    which = ""
    if compiler is not None:
        # Size and date stand for the compiler's version; asking it would start a process on each import.
        real = os.path.realpath(compiler)
        which = _digest(real, str(os.stat(real).st_size), str(os.stat(real).st_mtime_ns))
    return _Recipe(source, arguments, compiler, files.hexdigest(), base, f"{base}-{which}")


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cached(recipe: _Recipe) -> Path | None:
    exact = _cache() / recipe.key / _LIBRARY
    if exact.is_file():
        return exact
    if recipe.compiler is None:
        # A machine that lost its compiler (a container's second stage) keeps what was built with it.
        return next(iter(sorted(_cache().glob(f"{recipe.base}-*/{_LIBRARY}"))), None)
    return None


def _missing(recipe: _Recipe, what: str) -> NativeError:
    """The error for a library that cannot be built, naming another torch it was built for if that is why."""
    for record in sorted(_cache().glob("*/build.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            known = json.loads(record.read_text())
            if known["sources"] == recipe.sources_key and known["torch"] != torch.__version__:
                return NativeError(
                    f"built for another torch ({known['torch']}, this is {torch.__version__}) "
                    f"and cannot be rebuilt: {what}"
                )
    return NativeError(f"not built: {what}")


def _build(recipe: _Recipe, *, retry: bool) -> Path:
    """Compiles into a temporary folder and renames it into place; concurrent processes wait for the first.

    A failure is remembered, so that not every import tries again; ``retry`` ignores that memory.
    """
    compiler, cmake, ninja = recipe.compiler, _tool("cmake"), _tool("ninja")
    if compiler is None:
        named = os.environ.get("CXX")
        what = f"CXX={named} is not a command" if named else "no C++ compiler (g++ or clang++) on PATH"
        raise _missing(recipe, what)
    if cmake is None or ninja is None:
        name = "cmake" if cmake is None else "ninja"
        raise _missing(recipe, f"{name} is missing (pip install cmake ninja)")
    try:
        _cache().mkdir(parents=True, exist_ok=True)
        with _exclusive(_cache() / f"{recipe.key}.lock"):
            done = _cached(recipe)
            if done is not None:
                return done
            failure = _cache() / f"{recipe.key}.failed"
            if failure.is_file() and not retry:
                reason = failure.read_text().partition("\n")[0]
                raise NativeError(f"not built: {reason} (log: {failure}; delete it to try again)")
            with tempfile.TemporaryDirectory(prefix=f"{recipe.key}.", dir=_cache()) as folder:
                return _compile(recipe, compiler, cmake, ninja, Path(folder), failure)
    except OSError as error:
        raise _missing(recipe, f"cache folder {_cache()}: {error.strerror or error}") from error


def _compile(recipe: _Recipe, compiler: str, cmake: str, ninja: str, folder: Path, failure: Path) -> Path:
    work, ready = folder / "work", folder / "ready"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    levels, best = _levels()
    kernels = len(list(recipe.source.glob("csrc/cpu/kernels/*.cpp"))) * (1 if best else len(levels))
    seconds = 5 * (1 + (20 + 2 * kernels) // (5 * cores))
    print(f"mamlpp_fast: building native kernels (once, about {seconds} s) ...", file=sys.stderr, flush=True)
    configure = [cmake, "-S", str(recipe.source), "-B", str(work), "-G", "Ninja", *recipe.arguments]
    configure += [f"-DCMAKE_CXX_COMPILER={compiler}", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    for command in (configure, [cmake, "--build", str(work), "-j", str(cores)]):
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        if done.returncode != 0:
            reason = f"the build with {compiler} failed: {_first_error(done.stdout)}"
            failure.write_text(f"{reason}\n{shlex.join(command)}\n{done.stdout}")
            raise _missing(recipe, f"{reason} (log: {failure})")
    ready.mkdir()
    shutil.copy2(work / _LIBRARY, ready / _LIBRARY)
    record = {"torch": torch.__version__, "sources": recipe.sources_key, "compiler": compiler}
    (ready / "build.json").write_text(json.dumps(record))
    target = _cache() / recipe.key
    shutil.rmtree(target, ignore_errors=True)
    ready.rename(target)
    failure.unlink(missing_ok=True)
    return target / _LIBRARY


def _first_error(output: str) -> str:
    lines = output.strip().splitlines()
    return _one_line(
        next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no output")
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Holds a lock between processes; the system frees it when its holder dies."""
    import fcntl

    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
