"""The script that measures what float32 costs a meta-gradient."""

import statistics

import pytest

from bench import accuracy
from mamlpp_fast.engine import EngineName


@pytest.mark.parametrize("engine", ["fused", "reference"])
def test_errors_are_of_the_size_of_float32(engine: EngineName) -> None:
    found = accuracy.errors(engine, episodes=5, updates=2)
    assert len(found) == 5
    assert 1e-7 < statistics.median(found) < 1e-3
