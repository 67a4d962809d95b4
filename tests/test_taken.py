"""The table of what the fused engine takes is the code's."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bench.taken import BEGIN, END, PAGE, written


@pytest.fixture(scope="module")
def made() -> str:
    """In a process of its own: rules may have been added in this one."""
    command = [sys.executable, "-m", "bench.taken"]
    return subprocess.run(command, cwd=PAGE.parent.parent, capture_output=True, text=True, check=True).stdout


def test_the_page_agrees_with_the_code(made: str) -> None:
    """``python -m bench.taken --write`` brings it up to date."""
    assert f"{BEGIN}{made}{END}" in PAGE.read_text()


def test_every_row_has_names_and_words(made: str) -> None:
    rows = [line.strip("|").split(" | ") for line in made.splitlines() if line.startswith("| `")]
    assert len(rows) > 10 and all(names.strip() and takes.strip() for names, takes in rows)
    assert all(name in made for name in ("`conv2d`", "`dropout2d`", "`linear`", "`*`", "`gru`"))


def test_what_stands_between_the_marks_is_replaced() -> None:
    page = f"before\n{BEGIN}| `tan` | everywhere |\n{END}after\n"
    found = written(page)
    assert found.startswith(f"before\n{BEGIN}| operation |") and found.endswith(f"{END}after\n")
    assert "`tan`" not in found
    with pytest.raises(ValueError, match="expected the marks"):
        written("before\nafter\n")
