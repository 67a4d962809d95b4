"""The benchmarks' own promises: what is wrong gets no time, and the GPU script survives a part that fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import harness
from bench.iterations import fault
from mamlpp_fast.workloads import Workload

ROOT = Path(__file__).resolve().parents[1]


def _case(error: float) -> harness.Case:
    exact = torch.rand(64, dtype=torch.float64) + 1
    ours, theirs = (exact * (1 + error)).float(), exact.float()
    subjects = harness.Subjects(lambda: [ours], lambda: [theirs], lambda: [exact])
    return harness.Case("double", "forward", "[64]", "flat", "float32", lambda: subjects, 512)


def test_a_wrong_result_gets_no_time() -> None:
    right, wrong = harness.rows(iter([_case(0.0), _case(1e-5)]), 0.01)
    assert "fault" not in right and right["ratio"] > 0 and right["ours_us"][0] <= right["ours_us"][2]
    assert "tensor 0" in wrong["fault"] and "ours_us" not in wrong


def test_an_engine_with_a_wrong_gradient_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Workload("tiny", 2, 3, 1, 1, 16, 1, 4, steps=2)
    assert fault(tiny, "autograd", "float32", "cpu") is None
    from mamlpp_fast.ops import lslr_update

    monkeypatch.setattr(
        "mamlpp_fast.ops.lslr_update", lambda t, g, r, *rest: lslr_update(t, g, r * (1 + 1e-6), *rest)
    )
    assert "float64 meta-gradient off by" in (fault(tiny, "autograd", "float32", "cpu") or "")


def test_the_gpu_script_goes_on_after_a_part_that_fails(tmp_path: Path) -> None:
    command = ["bash", "bench/gpu.sh", "--tiny", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "no-such-part", "versions"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={
            "PYTHON": sys.executable,
            "PATH": "/usr/bin:/bin",
            "MAMLPP_FAST_NATIVE": "0",
            "HOME": str(tmp_path),
        },
    )
    assert done.returncode == 1, done.stdout + done.stderr
    summary = (tmp_path / "summary.txt").read_text()
    assert "no-such-part   FAILED 2" in summary and "versions       ok" in summary
    assert (tmp_path / "info.json").exists()
