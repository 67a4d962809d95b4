"""Repeats a recorded run; exit status 1 when an error is outside the tolerance."""

from __future__ import annotations

import argparse

from mamlpp_fast.cli import _arguments as common

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a recorded run (.npz)")
    parser.add_argument(
        "--engine", choices=common.ENGINES, default="auto", metavar="E", help=", ".join(common.ENGINES)
    )
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    common.add_device(parser, "cpu")
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from mamlpp_fast.replay import replay

    report = replay(
        arguments.file,
        engine=arguments.engine,
        dtype=arguments.dtype,
        device=common.resolve_device(arguments.device),
    )
    common.print_result(arguments, report.to_dict(), report.describe)
    return 0 if report.ok else 1
