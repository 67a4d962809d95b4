"""Versions, devices, and what serves each operation."""

from __future__ import annotations

import argparse

from mamlpp_fast.cli import _arguments as common

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from mamlpp_fast.info import describe, info

    found = info()
    common.print_result(arguments, found, lambda: describe(found))
    return 0
