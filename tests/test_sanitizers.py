"""The native kernels under the address and undefined-behaviour sanitizers, over odd shapes of the operations' tests.

The library (``sanitized.py``) is built once for given sources and kept in the cache beside the usual one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sanitized import PRELOADED, library

from mamlpp_fast import _native

ROOT = Path(__file__).resolve().parents[1]
OPERATIONS = (
    "lslr_update",
    "norm_act_pool",
    "per_step_batch_norm",
    "pointwise",
    "task_conv2d",
    "window_pool",
)


pytestmark = pytest.mark.skipif(None in PRELOADED, reason="no g++ with libasan")


@pytest.fixture(scope="module")
def sanitized() -> Path:
    return library()


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
LEFT_OUT = (
    "gradcheck or opcheck or finite_differences or derivatives or omniglot or imagenet or forms_chosen "
    "or instruction_sets"
)


@pytest.mark.parametrize("level", ["portable", "highest"])
def test_operations_touch_no_memory_but_their_own(sanitized: Path, level: str) -> None:
    tests = [str(ROOT / "tests" / f"test_{name}.py") for name in OPERATIONS]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "-p", "no:cacheprovider", *tests]
    command += ["-k", f"native and not ({LEFT_OUT})"]
    more = {"MAMLPP_FAST_ISA": "portable"} if level == "portable" else {}
    done = subprocess.run(
        command, env=environment(sanitized, **more), cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 100, done.stdout


def test_the_highest_level_is_the_processors(sanitized: Path) -> None:
    command = [sys.executable, "-c", "from mamlpp_fast import _native; print(_native.status().isa)"]
    done = subprocess.run(command, env=environment(sanitized), cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == _native.status().isa, done.stdout + done.stderr


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
