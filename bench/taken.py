"""What the fused engine takes, as the table in ``docs/engine.md``, from the engine's own rules.

    python -m bench.taken [--write]

prints it, or puts it into the page between its two marks; ``tests/test_taken.py`` holds the page against the code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mamlpp_fast.engine.fused.rules  # noqa: F401 - fills the table
from bench.harness import parser_of
from mamlpp_fast.engine.fused.composites import COMPOSITES
from mamlpp_fast.engine.fused.lowering import taken
from mamlpp_fast.engine.recorder import name_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "engine.md"
BEGIN, END = "<!-- taken: by python -m bench.taken --write -->\n", "<!-- /taken -->\n"
_OPERATORS = {"__add__": "`+`", "__mul__": "`*`", "__setitem__": "assignment to a slice"}


def names(functions: list[Any]) -> list[str]:
    """How these are called, each name once: in place and reversed forms under that of the plain one."""
    found = dict.fromkeys(map(_name, functions))
    return [name for name in found if name]


def _name(function: Any) -> str:
    name = name_of(function)
    if name.startswith("__"):
        return _OPERATORS.get(name.replace("__i", "__").replace("__r", "__"), "")
    return f"`{name.strip('_')}`"


def table() -> str:
    """Two tables: functions with rules of their own, and those that are traced as other ones."""
    lines = ["| operation | with a rule of its own |", "| --- | --- |"]
    lines += [f"| {', '.join(names(functions))} | {takes} |" for takes, functions in taken().items()]
    composites = ", ".join(names(list(COMPOSITES)))
    lines += ["", f"Generic steps made of other operations than PyTorch's: {composites}.", ""]
    return "\n".join(lines)


def written(page: str) -> str:
    """A page with the table between its marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name}: expected the marks {BEGIN.strip()} and {END.strip()}")
    return before + begin + table() + end + after


def main() -> None:
    parser = parser_of(__doc__, json=False)
    parser.add_argument("--write", action="store_true", help="into docs/engine.md")
    if parser.parse_args().write:
        PAGE.write_text(written(PAGE.read_text()))
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
