"""The native library: built once, cached, and done without where it cannot be had."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mamlpp_fast import _native

ROOT = Path(__file__).resolve().parents[1]
HAS_COMPILER = _native._compiler() is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler on PATH")

# A package of two files: compiling the real sources would take most of the suite's time.
PROBE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("native", sys.argv[1])
native = sys.modules["native"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
print(native.load(), native.status().isa, native.status().path)
print(native.status().reason)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the build with no operation in it."""
    root = tmp_path_factory.mktemp("package")
    (root / "csrc/cpu").mkdir(parents=True)
    (root / "mamlpp_fast").mkdir()
    for name in ("CMakeLists.txt", "csrc/cpu/isa.h", "csrc/cpu/isa.cpp", "mamlpp_fast/_native.py"):
        (root / name).write_bytes((ROOT / name).read_bytes())
    return root


@pytest.fixture(scope="module")
def cache(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder filled by two processes that started together."""
    folder = tmp_path_factory.mktemp("cache")
    both = [_start(package, folder) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in both]
    assert all(out.startswith("True") for out, _ in outputs), outputs
    assert sum("building native kernels" in err for _, err in outputs) == 1
    return folder


def _start(package: Path, cache: Path, **environment: str) -> "subprocess.Popen[str]":
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAMLPP_FAST_")}
    env |= {"XDG_CACHE_HOME": str(cache)} | environment
    command = [sys.executable, "-c", PROBE, str(package / "mamlpp_fast" / "_native.py")]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _probe(package: Path, cache: Path, **environment: str) -> tuple[list[str], str, str]:
    """First line printed, split; the reason; standard error."""
    out, err = _start(package, cache, **environment).communicate(timeout=300)
    first, _, reason = out.partition("\n")
    return first.split(), reason.strip(), err


def _no_compiler(tmp_path: Path) -> dict[str, str]:
    return {"CXX": str(tmp_path / "missing-g++")}


@needs_compiler
def test_two_processes_build_once_and_a_third_finds_it(package: Path, cache: Path) -> None:
    words, reason, err = _probe(package, cache)
    assert words[0] == "True"
    assert words[1] in ("portable", "avx2", "avx512", "avx512bf16")
    assert (reason, err) == ("", "")


@needs_compiler
def test_instruction_set_can_be_lowered(package: Path, cache: Path) -> None:
    assert _probe(package, cache, MAMLPP_FAST_ISA="portable")[0][1] == "portable"
    words, reason, _ = _probe(package, cache, MAMLPP_FAST_ISA="sse9")
    assert words[0] == "False"
    assert reason == "MAMLPP_FAST_ISA must be one of portable, avx2, avx512, avx512bf16, got 'sse9'"


@needs_compiler
def test_damaged_library_is_built_again(package: Path, cache: Path) -> None:
    library = Path(_probe(package, cache)[0][2])
    whole = library.read_bytes()
    library.write_bytes(whole[:100])
    words, _, err = _probe(package, cache)
    assert words[0] == "True"
    assert "building native kernels" in err


@needs_compiler
def test_library_outlives_the_compiler(package: Path, cache: Path, tmp_path: Path) -> None:
    assert _probe(package, cache, **_no_compiler(tmp_path))[0][0] == "True"


def test_without_compiler_says_so(package: Path, tmp_path: Path) -> None:
    words, reason, err = _probe(package, tmp_path, **_no_compiler(tmp_path))
    assert words[0] == "False"
    assert reason == f"not built: CXX={tmp_path / 'missing-g++'} is not a command"
    assert err == ""
    words, reason, _ = _probe(package, tmp_path, PATH=str(tmp_path))
    assert reason == "not built: no C++ compiler (g++ or clang++) on PATH"


@needs_compiler
def test_build_for_another_torch_is_another_message(package: Path, cache: Path, tmp_path: Path) -> None:
    record = next(cache.rglob("build.json")).read_text().replace('"torch": "', '"torch": "0.')
    (tmp_path / "mamlpp_fast" / "other").mkdir(parents=True)
    (tmp_path / "mamlpp_fast" / "other" / "build.json").write_text(record)
    words, reason, _ = _probe(package, tmp_path, **_no_compiler(tmp_path))
    assert words[0] == "False"
    assert reason.startswith("built for another torch (0.")


def test_disabled(package: Path, tmp_path: Path) -> None:
    words, reason, _ = _probe(package, tmp_path, MAMLPP_FAST_NATIVE="0")
    assert words[0] == "False"
    assert reason == "disabled by MAMLPP_FAST_NATIVE=0"


def test_required_and_absent_is_an_error(package: Path, tmp_path: Path) -> None:
    process = _start(package, tmp_path, MAMLPP_FAST_NATIVE="require", **_no_compiler(tmp_path))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert err.splitlines()[-1].startswith("native.NativeError: not built: CXX=")


@needs_compiler
def test_failed_build_gives_one_reason_and_is_not_repeated(package: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    (broken / "csrc/cpu").mkdir(parents=True)
    (broken / "mamlpp_fast").mkdir()
    for name in ("CMakeLists.txt", "mamlpp_fast/_native.py"):
        (broken / name).write_bytes((package / name).read_bytes())
    (broken / "csrc/cpu/isa.cpp").write_text("#error deliberately broken\n")
    words, reason, err = _probe(broken, tmp_path)
    assert words[0] == "False"
    assert "#error deliberately broken" in reason
    assert "\n" not in reason
    assert "building native kernels" in err
    words, reason, err = _probe(broken, tmp_path)
    assert "delete it to try again" in reason
    assert err == ""


@needs_compiler
def test_unwritable_cache_is_one_reason(package: Path, tmp_path: Path) -> None:
    (tmp_path / "mamlpp_fast").write_text("a file where the folder should be")
    words, reason, _ = _probe(package, tmp_path)
    assert words[0] == "False"
    assert reason.startswith(f"not built: cache folder {tmp_path / 'mamlpp_fast'}: ")


@needs_compiler
def test_kernels_compile_for_every_instruction_set(tmp_path: Path) -> None:
    """Also for those this processor lacks; kernels see no torch header, so no TORCH_ROOT is given."""
    cmake, ninja = _native._tool("cmake"), _native._tool("ninja")
    assert cmake
    assert ninja
    configure = [cmake, "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    for command in (configure, [cmake, "--build", str(tmp_path)]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
