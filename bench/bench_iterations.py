"""Whole meta-iterations under pytest-benchmark: `pytest -n 0 bench/bench_iterations.py --benchmark-enable`.

`python -m bench.iterations` takes the times that are kept: there engines take turns.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.iterations import fault, job, learner_of
from mamlpp_fast.workloads import WORKLOADS

ENGINES = ("reference", "autograd", "fused", "fused:bfloat16")


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("engine", ENGINES)
def test_iteration(benchmark: Any, name: str, engine: str) -> None:
    workload = WORKLOADS[name]
    family, _, precision = engine.partition(":")
    assert fault(workload, family, precision or "float32", "cpu") is None
    step = job(learner_of(workload, engine, "cpu"), workload)
    step()
    benchmark.group = name
    benchmark.extra_info["gflop"] = workload.gflop()
    benchmark.pedantic(step, rounds=5)
