"""The same cases under pytest-benchmark: `pytest -n 0 bench/bench_kernels.py --benchmark-enable`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.cases import all_cases
from bench.harness import Case, check


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
@pytest.mark.parametrize("who", ["ours", "torch"])
def test_operation(benchmark: Any, case: Case, who: str) -> None:
    torch.manual_seed(0)
    subjects = case.make()
    assert check(case, subjects) is None
    benchmark.group = case.name
    benchmark(getattr(subjects, who))
