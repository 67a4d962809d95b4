"""Test accuracy of a run's best checkpoint and of its ensemble."""

from __future__ import annotations

import argparse

from mamlpp_fast.cli import _arguments as common

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", help="the run's folder")
    common.add_count(parser, "--tasks", "test tasks", 600)
    common.add_count(parser, "--ensemble", "models to average", 5)
    common.add_data(parser, " (default: where the run found it)")
    parser.add_argument("--engine", choices=common.ENGINES, metavar="E", help="default: the run's")
    common.add_device(parser)
    common.add_count(parser, "--steps", "inner updates (default: the run's)", metavar="K")
    parser.add_argument(
        "--stats", choices=("batch", "running"), help="statistics of the target passes (default: the run's)"
    )
    common.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from mamlpp_fast.train import evaluate_run

    scores = evaluate_run(
        arguments.dir,
        tasks=arguments.tasks,
        ensemble=arguments.ensemble,
        data_path=arguments.data,
        engine=arguments.engine,
        device=common.resolve_device(arguments.device),
        steps=arguments.steps,
        stats=arguments.stats,
    )
    common.print_result(
        arguments,
        {"scores": [asdict(s) for s in scores]},
        lambda: "\n".join(f"test accuracy: {s.describe()}" for s in scores),
    )
    return 0
