"""Our learn2learn against the real one, script by script, where that is installed."""

from __future__ import annotations

from types import ModuleType

import pytest

import mamlpp_fast.compat.learn2learn as ours
from bench.drop_in_learn2learn import SCRIPTS, errors, run
from bench.peers.learn2learn_source import load


@pytest.fixture(scope="module")
def original() -> ModuleType:
    try:
        return load()
    except ImportError as error:
        pytest.skip(f"learn2learn cannot be imported: {error}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_gives_the_same_numbers(script: str, original: ModuleType) -> None:
    sizes = {"ways": 3, "iterations": 2, "tasks": 2, "hidden": 8, "dtype": "float64"}
    theirs, mine = run(script, original, **sizes), run(script, ours, **sizes)
    assert max(errors(mine, theirs).values()) < 1e-6
