"""``engine="auto"`` on 300 random models against a textbook loop; ``python -m bench.random_models`` runs thousands."""

from collections import Counter

import pytest

from tests.random_models import check
from tests.random_programs import make_program

GROUP = 10


@pytest.mark.parametrize("first", range(0, 300, GROUP))
def test_auto_equals_the_textbook(first: int) -> None:
    """``python -m tests.random_models SEED`` shows a model that failed."""
    outcomes = [check(seed) for seed in range(first, first + GROUP)]
    assert {o.seed: (o.engine, o.wrong[:3]) for o in outcomes if o.wrong} == {}


def test_models_of_several_inputs() -> None:
    """By position and by name, floating point, masks and ids; ``describe(SEED, True)`` shows one that failed."""
    outcomes = [check(seed, several=True) for seed in range(40)]
    assert {o.seed: (o.engine, o.wrong[:3]) for o in outcomes if o.wrong} == {}
    assert all("several inputs" in o.features for o in outcomes)
    assert sum(o.engine == "fused" for o in outcomes) >= 20


def test_the_models_are_of_every_kind() -> None:
    """A share of plain ones, so that the fused engine is tested, and every feature at least twice."""
    programs = [make_program(seed) for seed in range(300)]
    assert 0.4 < sum(p.plain for p in programs) / len(programs) < 0.5
    assert sum(p.draws for p in programs) >= 5
    features = Counter(name for p in programs for name in p.features)
    assert len(features) >= 40 and min(features.values()) >= 2


def test_a_program_is_made_alike_each_time() -> None:
    assert make_program(7) == make_program(7)
    first, second = (make_program(7).build().state_dict() for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)
