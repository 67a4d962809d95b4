"""``mamlpp-fast info``."""

from __future__ import annotations

import argparse

from mamlpp_fast.cli import _arguments as common

__all__ = ["add", "run"]


def add(commands: common.Commands) -> None:
    sub = common.add_command(commands, "info", run, "Versions, devices, and what serves each operation.")
    common.add_json(sub)


def run(arguments: argparse.Namespace) -> int:
    from mamlpp_fast.info import describe, info

    found = info()
    common.print_result(arguments, found, lambda: describe(found))
    return 0
