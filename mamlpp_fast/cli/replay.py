"""``mamlpp-fast replay``."""

from __future__ import annotations

import argparse

from mamlpp_fast.cli._arguments import ENGINES, Commands, add_command, add_json, print_json

__all__ = ["add", "run"]


def add(commands: Commands) -> None:
    sub = add_command(
        commands,
        "replay",
        run,
        "Repeats a recorded run; exit status 1 when an error is outside the tolerance.",
    )
    sub.add_argument("file", metavar="FILE", help="a recorded run (.npz)")
    sub.add_argument("--engine", choices=ENGINES, default="auto", metavar="E", help=", ".join(ENGINES))
    sub.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    sub.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda or cuda:N (default: cpu)")
    add_json(sub)


def run(arguments: argparse.Namespace) -> int:
    from mamlpp_fast.replay import replay
    from mamlpp_fast.train.build import resolve_device

    report = replay(
        arguments.file,
        engine=arguments.engine,
        dtype=arguments.dtype,
        device=resolve_device(arguments.device),
    )
    if arguments.json:
        print_json(report.to_dict())
    else:
        for name in ("loss", "meta_gradient", "final_parameters", "eval_logits"):
            print(f"{name:<17} {getattr(report, name):.2e}")
        verdict = "within tolerance" if report.ok else "outside tolerance"
        print(f"engine {report.engine}, {report.dtype}: {verdict}")
    return 0 if report.ok else 1
