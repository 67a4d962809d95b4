"""Plain attributes of modules as numbers: one for what is equal, another for whatever is not."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from helpers import form_of
from torch import nn

from mamlpp_fast.engine import fragments
from mamlpp_fast.engine.fingerprint import fingerprint
from mamlpp_fast.engine.fragments import number_of


def made(value: Any) -> Any:
    """The same value in another object, where there is one."""
    return eval(repr(value)) if isinstance(value, (int, float, str, tuple)) else value


VALUES: tuple[Any, ...] = (
    *(1, 1.0, True, "1", None, 10**9, 2.5, -1, (1, 2), (1.0, 2), (True, 2), ((1,), 2), (1, (2,)), ()),
    *(torch.float32, torch.device("cpu"), b"1", 1j, "one text", (None, "x")),
    *(0.0, -0.0, 0, False, 0j, complex(0.0, -0.0), (0.0,), (-0.0,)),
)


def test_numbers_are_equal_where_names_types_and_values_are() -> None:
    numbers = [number_of(("a",), (value,)) for value in VALUES]
    assert None not in numbers and len(set(numbers)) == len(VALUES)
    assert [number_of(("a",), (made(value),)) for value in VALUES] == numbers
    assert number_of(("b",), (1,)) not in numbers
    assert number_of(("a", "b"), (1, 2)) != number_of(("a", "b"), (2, 1))
    assert number_of(("a", "b"), (1, 2)) == number_of(("a", "b"), (1, 2))


@pytest.mark.parametrize(
    "value",
    [[1], {"a": 1}, {1}, torch.ones(1), object(), (1, [2]), nn.ReLU(), slice(1), torch.Size([1]), len],
)
def test_what_may_change_or_is_no_plain_value_has_none(value: Any) -> None:
    assert number_of(("a",), (value,)) is None
    assert number_of(("b", "a"), (1, value)) is None


def test_an_address_used_again_is_not_taken_for_what_was_there() -> None:
    seen = set()
    for i in range(200):
        seen.add(number_of(("a",), (float(i) + 0.125,)))  # each is gone when the next is made
        gc.collect(0)
    assert len(seen) == 200


def test_where_there_are_too_many_numbers_values_are_compared_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known, new = number_of(("a",), (0.5,)), 1234.5678
    monkeypatch.setattr(fragments, "_MOST", 0)
    assert number_of(("a",), (made(0.5),)) == known
    assert number_of(("a",), (new,)) is None
    norm = nn.BatchNorm2d(3)
    norm.eps = 0.0625432
    before = fingerprint(norm), form_of(norm)
    assert (fingerprint(norm), form_of(norm)) == before
    norm.eps = 0.0625433
    assert fingerprint(norm) != before[0] and form_of(norm) != before[1]


@pytest.mark.parametrize("change", [("eps", 1e-4), ("momentum", None), ("affine", 1), ("more", 3)])
def test_a_changed_attribute_is_another_form(change: tuple[str, Any]) -> None:
    norm, name = nn.BatchNorm2d(3), change[0]
    before = fingerprint(norm), form_of(norm)
    kept = getattr(norm, name, None)
    setattr(norm, *change)
    assert fingerprint(norm) != before[0] and form_of(norm) != before[1]
    if name == "more":
        del norm.more
    else:
        setattr(norm, name, kept)
    assert (fingerprint(norm), form_of(norm)) == before
