"""``mamlpp-fast evaluate``."""

from __future__ import annotations

import argparse

from mamlpp_fast.cli import _arguments as common

__all__ = ["add", "run"]


def add(commands: common.Commands) -> None:
    sub = common.add_command(
        commands, "evaluate", run, "Test accuracy of a run's best checkpoint and of its ensemble."
    )
    sub.add_argument("dir", metavar="DIR", help="the run's folder")
    sub.add_argument(
        "--tasks", type=common.at_least(1), default=600, metavar="N", help="test tasks (default: 600)"
    )
    sub.add_argument(
        "--ensemble", type=common.at_least(1), default=5, metavar="N", help="models to average (default: 5)"
    )
    common.add_data(sub, " (default: where the run found it)")
    sub.add_argument("--engine", choices=common.ENGINES, metavar="E", help="default: the run's")
    common.add_device(sub)
    sub.add_argument(
        "--steps", type=common.at_least(1), metavar="K", help="inner updates (default: the run's)"
    )
    sub.add_argument(
        "--stats", choices=("batch", "running"), help="statistics of the target passes (default: the run's)"
    )
    common.add_json(sub)


def run(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from mamlpp_fast.train import evaluate_run
    from mamlpp_fast.train.build import resolve_device

    scores = evaluate_run(
        arguments.dir,
        tasks=arguments.tasks,
        ensemble=arguments.ensemble,
        data_path=arguments.data,
        engine=arguments.engine,
        device=resolve_device(arguments.device),
        steps=arguments.steps,
        stats=arguments.stats,
    )
    common.print_result(
        arguments,
        {"scores": [asdict(s) for s in scores]},
        lambda: "\n".join(f"test accuracy: {s.describe()}" for s in scores),
    )
    return 0
