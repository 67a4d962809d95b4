"""Writes a run's last state as a checkpoint of the MAML++ authors' code."""

from __future__ import annotations

import argparse
import sys

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", help="the run's folder")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="such as saved_models/train_model_latest of their code"
    )
    parser.add_argument("--legacy", action="store_true", help="in the file format of PyTorch before 1.6")


def run(arguments: argparse.Namespace) -> int:
    from mamlpp_fast.compat.checkpoints import export_checkpoint

    iteration, notes = export_checkpoint(arguments.dir, arguments.out, legacy=arguments.legacy)
    for note in notes:
        print(note, file=sys.stderr)
    print(f"wrote {arguments.out} (iteration {iteration})")
    return 0
