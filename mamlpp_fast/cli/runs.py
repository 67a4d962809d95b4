"""Runs under a folder: state, progress, best figures."""

from __future__ import annotations

import argparse

from mamlpp_fast.cli import _arguments as common

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "dirs", nargs="*", default=["runs"], metavar="DIR", help="where to look (default: runs)"
    )
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from mamlpp_fast.report.listing import describe_runs, list_runs

    found = list_runs(arguments.dirs)
    nothing = f"no runs under {', '.join(arguments.dirs)}"
    common.print_result(arguments, {"runs": found}, lambda: describe_runs(found) if found else nothing)
    return 0
