"""The native library: built once, cached, and done without where it cannot be had."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mamlpp_fast import _native

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "mamlpp_fast" / "_native.py"
HAS_COMPILER = _native._compiler() is not None
Fresh = Callable[..., ModuleType]
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler on PATH")

# Runs in a process of its own: the names a library registers with torch stay for the life of the process. The module
# is told that it lies elsewhere, so that it builds what lies there.
PROBE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("mamlpp_fast._native", sys.argv[1])
native = sys.modules["mamlpp_fast._native"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
native.__file__ = sys.argv[2]
print(native.load(), native.status().isa, native.status().path)
print(native.status().reason)
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build with no operation in it: compiling the real sources would take most of the suite's time."""
    root = tmp_path_factory.mktemp("package")
    (root / "csrc/cpu").mkdir(parents=True)
    (root / "mamlpp_fast").mkdir()
    for name in ("CMakeLists.txt", "csrc/cpu/isa.h", "csrc/cpu/isa.cpp", "csrc/cpu/threads.cpp"):
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
    command = [sys.executable, "-c", PROBE, str(SOURCE), str(package / "mamlpp_fast" / "_native.py")]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _probe(package: Path, cache: Path, **environment: str) -> tuple[list[str], str, str]:
    """First line printed, split; the reason; standard error."""
    out, err = _start(package, cache, **environment).communicate(timeout=300)
    first, _, reason = out.partition("\n")
    return first.split(), reason.strip(), err


@pytest.fixture
def fresh(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fresh:
    """``_native`` once more in this process, unloaded, its cache empty, for what ends without a library."""
    for name in [name for name in os.environ if name.startswith("MAMLPP_FAST_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def load(root: Path = package, **environment: str) -> ModuleType:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        spec = importlib.util.spec_from_file_location("native_again", SOURCE)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "native_again", module)
        spec.loader.exec_module(module)
        module.__file__ = str(root / "mamlpp_fast" / "_native.py")
        return module

    return load


@needs_compiler
def test_two_processes_build_once_and_a_third_finds_it(package: Path, cache: Path) -> None:
    words, reason, err = _probe(package, cache)
    assert words[0] == "True"
    assert words[1] in ("portable", *_native._LEVEL_FLAGS)
    assert (reason, err) == ("", "")


@needs_compiler
def test_damaged_library_is_built_again(package: Path, cache: Path) -> None:
    for library in cache.rglob("*.so"):
        library.write_bytes(library.read_bytes()[:100])
    words, _, err = _probe(package, cache)
    assert words[0] == "True"
    assert "building native kernels" in err


@needs_compiler
def test_another_level_is_another_library(package: Path, cache: Path) -> None:
    """That of the processor has no other, and is refused where it is no answer."""
    _, best, path = _probe(package, cache)[0]
    words, reason, err = _probe(package, cache, MAMLPP_FAST_ISA="portable")
    assert (words[:2], reason) == (["True", "portable"], "")
    assert ("building native kernels" in err) == (best != "portable")
    words, reason, _ = _probe(package, cache, MAMLPP_FAST_ISA="portable", MAMLPP_FAST_LIBRARY=path)
    assert words[0] == str(best == "portable")
    assert ("has no kernels for this processor or MAMLPP_FAST_ISA" in reason) == (best != "portable")


@needs_compiler
def test_a_library_without_a_level_is_not_built_again(fresh: Fresh, tmp_path: Path) -> None:
    native = fresh()
    source, library = tmp_path / "a.cpp", native._cache() / native._recipe().key / native._LIBRARY
    source.write_text(
        'extern "C" const char* mamlpp_fast_isa() { return ""; }\n'
        'extern "C" void mamlpp_fast_set_threads(int) {}\n'
    )
    library.parent.mkdir(parents=True)
    subprocess.run([str(_native._compiler()), "-shared", "-fPIC", source, "-o", library], check=True)
    assert not native.load()
    assert native.status().reason.startswith(f"does not load: {library} has no kernels for this processor")
    assert library.is_file()


def test_operations_run_where_a_library_has_no_level_for_the_processor() -> None:
    """As closed forms: a library of the best level alone, asked for the lowest, stands for one of another machine."""
    status = _native.status()
    if status.isa in (None, "portable"):
        pytest.skip("no library, or none without the lowest level")
    script = (
        "import torch, torch.nn.functional as F, mamlpp_fast as mf; from mamlpp_fast import _native\n"
        "x, one, zero = torch.randn(4, 3, 2, 2), torch.ones(3), torch.zeros(3)\n"
        "made = mf.ops.per_step_batch_norm(x, one, zero, negative_slope=1.0)\n"
        "torch.testing.assert_close(made, F.batch_norm(x, None, None, one, zero, True))\n"
        "print(_native.status().isa)"
    )
    own = {"MAMLPP_FAST_NATIVE": "1", "MAMLPP_FAST_ISA": "portable", "MAMLPP_FAST_LIBRARY": str(status.path)}
    env = {**os.environ, **own, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() in (["None"], ["portable"])  # the latter of a library of all levels


@needs_compiler
def test_library_outlives_the_compiler(package: Path, cache: Path) -> None:
    assert _probe(package, cache, CXX="missing-g++")[0][0] == "True"


@needs_compiler
def test_a_wheels_library_needs_no_compiler(package: Path, cache: Path, tmp_path: Path) -> None:
    """One for this version of torch; where there is none that loads, it is built as ever."""
    root = shutil.copytree(package, tmp_path / "package")
    built = next(cache.rglob("*.so"))
    version = ".".join(torch.__version__.split(".")[:2])
    for name in (version, "1.0"):
        folder = root / "mamlpp_fast" / "_lib" / name
        folder.mkdir(parents=True)
        shutil.copy2(built, folder)
    words, _, _ = _probe(root, tmp_path / "cache", PATH="")
    assert words[0] == "True"
    assert Path(words[2]) == root / "mamlpp_fast" / "_lib" / version / built.name
    Path(words[2]).write_bytes(b"no library")
    words, reason, _ = _probe(root, tmp_path / "cache", PATH="")
    assert (words[0], reason) == ("False", "not built: no C++ compiler (g++ or clang++) on PATH")


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        pytest.param({"CXX": "missing-g++"}, "not built: CXX=missing-g++ is not a command", id="CXX"),
        pytest.param({"PATH": ""}, "not built: no C++ compiler (g++ or clang++) on PATH", id="no-compiler"),
        pytest.param({"MAMLPP_FAST_NATIVE": "0"}, "disabled by MAMLPP_FAST_NATIVE=0", id="disabled"),
        pytest.param(
            {"MAMLPP_FAST_NATIVE": "no"},
            "MAMLPP_FAST_NATIVE must be 0, 1 or require, got 'no'",
            id="unknown-mode",
        ),
        pytest.param(
            {"MAMLPP_FAST_ISA": "sse9"},
            "MAMLPP_FAST_ISA must be one of portable, avx2, avx512, avx512bf16, amxbf16, got 'sse9'",
            id="unknown-isa",
        ),
        pytest.param(
            {"MAMLPP_FAST_LIBRARY": "/missing.so"},
            "does not load: /missing.so: cannot open shared object file: No such file or directory",
            id="library-by-hand",
        ),
    ],
)
def test_reason_without_a_library(
    fresh: Fresh, environment: dict[str, str], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    native = fresh(**environment)
    assert native.status().reason == "not loaded yet"
    assert not native.load()
    assert native.status() == native.NativeStatus(loaded=False, reason=reason)
    assert capfd.readouterr().err == ""


@needs_compiler
def test_build_for_another_torch_is_another_message(fresh: Fresh, cache: Path, tmp_path: Path) -> None:
    record = next(cache.rglob("build.json")).read_text().replace('"torch": "', '"torch": "0.')
    (tmp_path / "mamlpp_fast" / "other").mkdir(parents=True)
    (tmp_path / "mamlpp_fast" / "other" / "build.json").write_text(record)
    native = fresh(CXX="missing-g++")
    assert not native.load()
    expected = f"built for another torch (0.{torch.__version__}, this is {torch.__version__}) "
    assert native.status().reason == f"{expected}and cannot be rebuilt: CXX=missing-g++ is not a command"


def test_required_and_absent_is_an_error(fresh: Fresh) -> None:
    native = fresh(MAMLPP_FAST_NATIVE="require", CXX="missing-g++")
    with pytest.raises(native.NativeError, match=r"^not built: CXX=missing-g\+\+ is not a command$"):
        native.load()


def test_sources_that_are_not_there(fresh: Fresh, tmp_path: Path) -> None:
    native = fresh(tmp_path / "installed")
    assert not native.load()
    assert native.status().reason.startswith("not built: the C++ sources are missing beside ")


@needs_compiler
@pytest.mark.parametrize("missing", ["cmake", "ninja"])
def test_a_missing_tool_is_named(fresh: Fresh, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    native = fresh()
    monkeypatch.setattr(native, "_tool", lambda name: None if name == missing else f"/usr/bin/{name}")
    assert not native.load()
    assert native.status().reason == f"not built: {missing} is missing (pip install cmake ninja)"


def test_a_failure_is_looked_into_once(fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    native = fresh(CXX="missing-g++")
    assert not native.load()
    monkeypatch.setenv("MAMLPP_FAST_NATIVE", "no")  # would be another reason
    assert not native.load()
    assert native.status().reason == "not built: CXX=missing-g++ is not a command"


def test_other_records_in_the_cache_are_no_reason(fresh: Fresh, tmp_path: Path) -> None:
    """One that cannot be read, one of other sources: built for another torch, but not from these."""
    for name, record in (("a", "{"), ("b", '{"torch": "0.1", "sources": "of another version"}')):
        (tmp_path / "mamlpp_fast" / name).mkdir(parents=True)
        (tmp_path / "mamlpp_fast" / name / "build.json").write_text(record)
    native = fresh(CXX="missing-g++")
    assert not native.load()
    assert native.status().reason == "not built: CXX=missing-g++ is not a command"


@needs_compiler
def test_a_library_of_another_torch_is_said_to_be_one(fresh: Fresh, tmp_path: Path) -> None:
    source, library = tmp_path / "a.cpp", tmp_path / "a.so"
    source.write_text("extern int of_another_torch; int* here = &of_another_torch;\n")
    subprocess.run([str(_native._compiler()), "-shared", "-fPIC", source, "-o", library], check=True)
    native = fresh(MAMLPP_FAST_LIBRARY=str(library))
    assert not native.load()
    reason = native.status().reason
    assert reason.startswith(f"does not load: built for another torch than {torch.__version__}: ")
    assert "undefined symbol: of_another_torch" in reason


@pytest.mark.parametrize(
    ("processor", "asked", "levels"),
    [
        ("portable", "", 1),
        ("avx2", "", 2),
        ("avx2", "avx512", 2),
        ("avx512bf16", "", 4),
        ("amxbf16", "avx512bf16", 5),
        ("avx512bf16", "portable", 4),
        ("avx512bf16", "avx2", 4),
    ],
)
def test_the_best_level_is_built_or_all_where_another_is_asked_for(
    processor: str, asked: str, levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = " ".join(_native._LEVEL_FLAGS.get(processor, ()))
    monkeypatch.setattr(Path, "read_text", lambda self: f"processor: 0\nflags\t\t: fpu {flags}\n")
    monkeypatch.setenv("MAMLPP_FAST_ISA", asked)
    every = ["portable", *_native._LEVEL_FLAGS]
    assert _native._levels() == (every[:levels], asked not in ("portable", "avx2"))


def test_all_levels_are_built_where_the_processor_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert _native._levels() == (["portable", *_native._LEVEL_FLAGS], False)


@needs_compiler
def test_failed_build_gives_one_reason_and_is_not_repeated(
    fresh: Fresh, package: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(package, broken)
    (broken / "csrc/cpu/isa.cpp").write_text("#error deliberately broken\n")
    native = fresh(broken)
    assert not native.load()
    assert "#error deliberately broken" in native.status().reason
    assert "\n" not in native.status().reason
    assert "building native kernels" in capfd.readouterr().err
    again = fresh(broken)
    assert not again.load()
    assert "delete it to try again" in again.status().reason
    assert capfd.readouterr().err == ""


@needs_compiler
def test_unwritable_cache_is_one_reason(fresh: Fresh, tmp_path: Path) -> None:
    (tmp_path / "mamlpp_fast").write_text("a file where the folder should be")
    native = fresh()
    assert not native.load()
    assert native.status().reason.startswith(f"not built: cache folder {tmp_path / 'mamlpp_fast'}: ")


@needs_compiler
def test_kernels_compile_for_the_widest_instruction_set(tmp_path: Path) -> None:
    """Which this processor may lack; kernels see no torch header, so no TORCH_ROOT is given."""
    cmake, ninja = _native._tool("cmake"), _native._tool("ninja")
    assert cmake
    assert ninja
    configure = [cmake, "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += [
        "-DMAMLPP_FAST_ISAS=avx512bf16;amxbf16",
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_CXX_FLAGS_DEBUG=-O0",
    ]
    for command in (configure, [cmake, "--build", str(tmp_path)]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
