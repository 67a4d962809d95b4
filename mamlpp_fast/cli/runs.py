"""``mamlpp-fast runs``."""

from __future__ import annotations

import argparse

from mamlpp_fast.cli._arguments import Commands, add_command, add_json, print_result

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    sub = add_command(commands, "runs", run, "Runs under a folder: state, progress, best figures.")
    sub.add_argument("dirs", nargs="*", default=["runs"], metavar="DIR", help="where to look (default: runs)")
    add_json(sub)


def run(arguments: argparse.Namespace) -> int:
    from mamlpp_fast.report.listing import describe_runs, list_runs

    found = list_runs(arguments.dirs)
    nothing = f"no runs under {', '.join(arguments.dirs)}"
    print_result(arguments, {"runs": found}, lambda: describe_runs(found) if found else nothing)
    return 0
