"""Lint, format and types of the whole tree, as tests, so that one command checks everything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CPP = [
    str(path) for suffix in ("h", "cpp", "cu", "cuh") for path in sorted((ROOT / "csrc").rglob(f"*.{suffix}"))
]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["ruff", "check"], id="ruff-check"),
        pytest.param(["ruff", "format", "--check"], id="ruff-format"),
        pytest.param(["mypy"], id="mypy-strict"),
        pytest.param(["clang-format", "--dry-run", "-Werror", *CPP], id="clang-format"),
    ],
)
def test_tree_is_clean(command: list[str]) -> None:
    tool = str(Path(sys.executable).parent / command[0])
    done = subprocess.run([tool, *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_tables_agree_with_the_measurements() -> None:
    command = [sys.executable, "-m", "bench.report", "--check"]
    # One figure trains a network too small for a second thread: waiting for it takes longer than all else.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
