"""What the fused engine takes, as the table in ``docs/engine.md``, from the engine's own rules."""

from __future__ import annotations

from typing import Any

import mamlpp_fast.engine.fused.rules  # noqa: F401 - fills the table
from bench.tables import table
from mamlpp_fast.engine.fused.composites import COMPOSITES
from mamlpp_fast.engine.fused.lowering import taken
from mamlpp_fast.engine.operation import name_of

_OPERATORS = {"__add__": "`+`", "__mul__": "`*`", "__setitem__": "assignment to a slice"}


def _names(functions: list[Any]) -> str:
    """How these are called, each name once: in place and reversed forms under that of the plain one."""
    return ", ".join(name for name in dict.fromkeys(map(_name, functions)) if name)


def _name(function: Any) -> str:
    name = name_of(function)
    if name.startswith("__"):
        return _OPERATORS.get(name.replace("__i", "__").replace("__r", "__"), "")
    return f"`{name.strip('_')}`"


def what_is_taken() -> str:
    """Functions with rules of their own, and those that are traced as other ones."""
    rules = [[_names(functions), takes] for takes, functions in taken().items()]
    composites = _names(list(COMPOSITES))
    return (
        f"{table(['operation', 'with a rule of its own'], rules, texts=2)}\n\n"
        f"Generic steps made of other operations than PyTorch's: {composites}."
    )
