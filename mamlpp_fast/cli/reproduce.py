"""Trains the rows of a published table over seeds; goes on where it was stopped."""

from __future__ import annotations

import argparse
from pathlib import Path

from mamlpp_fast.cli import _arguments as common

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", metavar="TABLE", help="omniglot-20w, mini-imagenet or instability")
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="S", help="share of the published budget (default: 1)"
    )
    common.add_count(parser, "--seeds", "runs a row", 3)
    parser.add_argument(
        "--shots", type=int, nargs="+", choices=(1, 5), default=[1], metavar="K", help="1, 5 or both"
    )
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", help="rows such as maml maml-lslr maml++ (default: all)"
    )
    parser.add_argument("--protocol", choices=("paper", "authors-code", "default"), default="paper")
    common.add_data(parser)
    parser.add_argument("--out", metavar="DIR", help="the table's folder (default: runs/reproduce-TABLE)")
    common.add_engine(parser)
    common.add_settings(parser, "change settings of every row")


def run(arguments: argparse.Namespace) -> int:
    from mamlpp_fast.reproduce import reproduce
    from mamlpp_fast.train import Interrupted, parse_settings

    out = Path("runs") / f"reproduce-{arguments.table}" if arguments.out is None else Path(arguments.out)
    try:
        text = reproduce(
            arguments.table,
            out=out,
            scale=arguments.scale,
            seeds=arguments.seeds,
            shots=tuple(dict.fromkeys(arguments.shots)),
            rows=arguments.rows,
            protocol=arguments.protocol,
            settings=parse_settings(arguments.set),
            data_path=arguments.data,
            engine=arguments.engine,
            precision=arguments.precision,
            device=common.resolve_device(arguments.device),
        )
    except Interrupted as stop:
        return common.stopped(stop, out)
    print(f"\n{text}\nwrote {out / 'table.md'}, {out / 'table.json'}")
    return 0
