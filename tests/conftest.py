"""Settings every test runs under, and the fixtures more than one test file needs."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Both are read when the package, or Triton, is imported: by any test module, so before all of them.
os.environ.setdefault("TRITON_INTERPRET", "1")
if any(map(shutil.which, ("g++", "c++", "clang++"))):
    os.environ.setdefault("MAMLPP_FAST_NATIVE", "require")

import pytest
import torch

# Tests are many and tiny: a second thread costs far more in hand-over than it computes.
torch.set_num_threads(1)

_SANITIZERS = "test_sanitizers.py"
_build = pytest.StashKey[subprocess.Popen[bytes]]()
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests under sanitizers last: what they run on is built beside the others."""
    items.sort(key=lambda item: item.path.name == _SANITIZERS)


def pytest_runtestloop(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        _build_beside(session.config, [item.nodeid for item in session.items])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    """With pytest-xdist the process that hands out the tests, which ends last, looks after the build."""
    _build_beside(node.config, ids)


def _build_beside(config: pytest.Config, ids: list[str]) -> None:
    """Starts the build for the tests under sanitizers, once, where they are among those to run."""
    if config.option.collectonly or _build in config.stash or not any(_SANITIZERS in name for name in ids):
        return
    # A process, not a thread: tests count threads, and fork.
    script = Path(__file__).with_name("sanitized.py")
    config.stash[_build] = subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": str(script.parents[1])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Ends the build where the session ends before it."""
    if (build := session.config.stash.get(_build, None)) is not None:
        build.terminate()
        build.wait()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers for a test whichever others run before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _small_networks_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests' networks are so small that a loop of one's own would be left to PyTorch."""
    from mamlpp_fast.engine.fused import differentiable

    monkeypatch.setattr(differentiable, "EVEN_WITHOUT_GAIN", True)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, in Python and in ``at::empty`` of C++ alike, so an unwritten element shows.

    PyTorch fills it only while deterministic algorithms are on; with ``warn_only`` an operation that has none
    warns, and so fails its test rather than taking another path silently.
    """
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny images, one for the tests of a file."""
    from train_helpers import draw_folder

    return draw_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def own_generator() -> Iterator[None]:
    """Training seeds torch's global generator: puts it back."""
    with torch.random.fork_rng():
        yield


@pytest.fixture
def own_threads() -> Iterator[None]:
    """Puts torch's number of threads back."""
    from helpers import kept_threads

    with kept_threads():
        yield


@pytest.fixture
def nothing_accelerated() -> None:
    """Forgets what accelerated models were served by."""
    from mamlpp_fast import routes

    routes.kept.clear()


def _folder(variable: str, default: Path, what: str) -> Path:
    folder = Path(os.environ.get(variable) or default)
    if not folder.is_dir():
        pytest.skip(f"no {what}: {folder} is not a folder (set {variable})")
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real data sets: ``MAMLPP_FAST_DATA``, else ``../shared/data`` beside the checkout."""
    return _folder("MAMLPP_FAST_DATA", SHARED / "data", "real data sets")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the recorded runs: ``MAMLPP_FAST_GOLDEN``, else ``../shared/golden`` beside the checkout."""
    return _folder("MAMLPP_FAST_GOLDEN", SHARED / "golden", "recorded runs")
