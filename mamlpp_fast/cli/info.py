"""``mamlpp-fast info``."""

from __future__ import annotations

import argparse

from mamlpp_fast.cli._arguments import Commands, add_command, add_json, print_result

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    sub = add_command(commands, "info", run, "Versions, devices, and what serves each operation.")
    add_json(sub)


def run(arguments: argparse.Namespace) -> int:
    from mamlpp_fast.info import describe, info

    found = info()
    print_result(arguments, found, lambda: describe(found))
    return 0
