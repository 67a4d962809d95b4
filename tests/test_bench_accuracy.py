"""The script that measures what float32 costs a meta-gradient."""

import statistics

from bench import accuracy


def test_errors_are_of_the_size_of_float32() -> None:
    found = accuracy.errors(episodes=5, updates=2)
    assert len(found) == 5
    assert 1e-7 < statistics.median(found) < 1e-3
