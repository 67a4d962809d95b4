"""One HTML page about a run, or comparing several."""

from __future__ import annotations

import argparse

from mamlpp_fast.cli import _arguments as common

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dirs", nargs="+", metavar="DIR", help="a run's folder")
    parser.add_argument(
        "--out", metavar="FILE", help="the page (default: DIR/report.html; for several ./report.html)"
    )
    common.add_count(parser, "--tasks", "test tasks to count confusions over, 0 for none", 100, least=0)
    common.add_data(parser, " (default: where each run found it)")
    common.add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    from mamlpp_fast.report import write_report

    path = write_report(
        arguments.dirs,
        arguments.out,
        tasks=arguments.tasks,
        data_path=arguments.data,
        device=common.resolve_device(arguments.device),
    )
    print(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB)")
    return 0
