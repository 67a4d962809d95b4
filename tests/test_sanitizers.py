"""The native kernels under the address and undefined-behaviour sanitizers, over odd shapes of the operations' tests.

The library is built once for given sources (two minutes on two cores) and kept in the cache beside the usual one.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mamlpp_fast import _native

ROOT = Path(__file__).resolve().parents[1]
OPERATIONS = ("lslr_update", "norm_act_pool", "per_step_batch_norm", "task_conv2d")


def runtime(name: str) -> str | None:
    """The path of one of g++'s run-time libraries; None where it has none."""
    if shutil.which("g++") is None:
        return None
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    return path if os.path.isabs(path) else None


PRELOADED = [runtime(name) for name in ("libasan.so", "libstdc++.so")]
pytestmark = pytest.mark.skipif(None in PRELOADED, reason="no g++ with libasan")


@pytest.fixture(scope="module")
def sanitized() -> Path:
    """A library of the portable level and the processor's highest: each kernel source, scalar and at its widest."""
    recipe = _native._recipe()
    folder = _native._cache() / f"sanitized-{recipe.key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    levels = _native._host_levels()[-1:]
    arguments = [a for a in recipe.arguments if not a.startswith("-DMAMLPP_FAST_ISAS")]
    with _native._exclusive(folder.with_suffix(".lock")):
        if not (folder / _native._LIBRARY).is_file():
            cmake = str(_native._tool("cmake"))
            configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *arguments]
            configure += [f"-DMAMLPP_FAST_ISAS={';'.join(levels)}", "-DMAMLPP_FAST_SANITIZE=ON"]
            configure += ["-DCMAKE_CXX_COMPILER=g++", f"-DCMAKE_MAKE_PROGRAM={_native._tool('ninja')}"]
            cores = str(len(os.sched_getaffinity(0)))
            for command in (configure, [cmake, "--build", str(folder), "-j", cores]):
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                assert done.returncode == 0, done.stdout[-3000:]
            shutil.rmtree(folder / "CMakeFiles")
    return folder / _native._LIBRARY


def environment(library: Path, **more: str) -> dict[str, str]:
    # Not measured by coverage here: the same tests are in the suite proper.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MAMLPP_FAST_", "PYTEST_", "COVERAGE_"))}
    return kept | {
        "LD_PRELOAD": " ".join(map(str, PRELOADED)),
        # Python frees little when it ends; what the library itself keeps is not told apart from that.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "MAMLPP_FAST_LIBRARY": str(library),
        "MAMLPP_FAST_NATIVE": "require",
        **more,
    }


# Numerical checks by finite differences repeat the same shapes hundreds of times; these run in the suite proper.
LEFT_OUT = "gradcheck or opcheck or finite_differences or derivatives or omniglot or imagenet or forms_chosen"


@pytest.mark.parametrize("level", ["portable", "highest"])
def test_operations_touch_no_memory_but_their_own(sanitized: Path, level: str) -> None:
    tests = [str(ROOT / "tests" / f"test_{name}.py") for name in OPERATIONS]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    command += ["-k", f"native and not ({LEFT_OUT})"]
    more = {"MAMLPP_FAST_ISA": "portable"} if level == "portable" else {}
    done = subprocess.run(
        command, env=environment(sanitized, **more), cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 100, done.stdout


def test_the_sanitizer_is_awake(sanitized: Path) -> None:
    """What the library reads past the end of a tensor's memory is found: otherwise the test above shows nothing."""
    program = """
import ctypes, numpy, torch, mamlpp_fast
malloc = ctypes.CDLL(None).malloc
malloc.restype = ctypes.POINTER(ctypes.c_float)
grad = torch.from_numpy(numpy.ctypeslib.as_array(malloc(16), shape=(64,)))
torch.ops.mamlpp_fast.lslr_update(torch.zeros(64), grad, torch.zeros(1, 1), torch.tensor([0, 64]), 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(sanitized), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer" in done.stderr
    assert "lslr_update" in done.stderr
