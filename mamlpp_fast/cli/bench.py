"""Times whole meta-iterations of a workload."""

from __future__ import annotations

import argparse

from mamlpp_fast.cli import _arguments as common

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "workload", metavar="WORKLOAD", help="omniglot-20w1s, ..., miniimagenet-5w5s, each also with -final"
    )
    common.add_engine(parser)
    common.add_count(parser, "--iters", "iterations timed", 10)
    common.add_count(parser, "--warmup", "iterations before", 3, least=0)
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from mamlpp_fast.benchmarking import bench
    from mamlpp_fast.train.config import suggestion
    from mamlpp_fast.workloads import WORKLOADS

    workload = WORKLOADS.get(arguments.workload)
    if workload is None:
        hint = suggestion(arguments.workload, WORKLOADS)
        raise ValueError(
            f"WORKLOAD: expected one of {', '.join(WORKLOADS)}, got {arguments.workload!r}{hint}"
        )
    result = bench(
        workload,
        engine=arguments.engine,
        precision=arguments.precision,
        device=common.resolve_device(arguments.device),
        iters=arguments.iters,
        warmup=arguments.warmup,
    )
    common.print_result(arguments, result.to_dict(), result.describe)
    return 0
