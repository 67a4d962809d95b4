"""Every launch of whole meta-steps and evaluations, compiled as it would be on a GPU; nothing runs there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("triton", reason="no Triton: kernels cannot be compiled")


def launched(tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    """In a process of its own, as the interpreter is on here."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MAMLPP_FAST_NATIVE")}
    path = tmp_path / "launches.json"
    command = [sys.executable, "-m", "bench.launches", *options, "--tasks", "2", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


@pytest.mark.parametrize(("precision", "nodes"), [("float32", 409), ("tf32", 409), ("bfloat16", 532)])
def test_a_whole_meta_step_could_be_launched(tmp_path: Path, precision: str, nodes: int) -> None:
    """Compiled without spills, within the limits of grids and of shared memory; no more nodes than there were."""
    omniglot, mini = launched(tmp_path, "omniglot-5w1s", "miniimagenet-5w1s", "--precision", precision)
    for row in (omniglot, mini):
        assert row["faults"] == []
        assert {"_product", "_weight_product", "forward_sums", "_update"} <= {
            k["name"] for k in row["kernels"]
        }
    assert omniglot["triton"] + omniglot["aten"] <= nodes


def test_an_evaluation_could_be_launched(tmp_path: Path) -> None:
    (row,) = launched(tmp_path, "omniglot-5w1s", "--evaluate")
    assert row["faults"] == []
    assert row["triton"] > 0


def test_a_step_of_the_autograd_engine_could_be_launched(tmp_path: Path) -> None:
    (row,) = launched(tmp_path, "omniglot-5w1s", "--engine", "autograd")
    assert row["faults"] == []
    assert row["triton"] > 0


def test_what_cannot_be_launched_is_named() -> None:
    from bench.launches import Kernel

    kernel = Kernel("k", spilled=8)
    kernel.grids[1, 70_000, 1] += 1
    assert kernel.faults() == [
        "k: 8 bytes of local memory",
        "k: grid (1, 70000, 1), of at most (2147483647, 65535, 65535)",
    ]
