"""Lint, format and types of the whole tree, as tests, so that one command checks everything."""

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
        pytest.param(["ruff", "check", "--no-cache"], id="ruff-check"),
        pytest.param(["ruff", "format", "--check", "--no-cache"], id="ruff-format"),
        pytest.param(["mypy"], id="mypy-strict"),
        pytest.param(["clang_format", "--dry-run", "-Werror", *CPP], id="clang-format"),
    ],
)
def test_tree_is_clean(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
