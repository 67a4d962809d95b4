"""Makes a run's folder of checkpoints of the MAML++ authors' code, to evaluate or to train on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mamlpp_fast.cli import _arguments as common

__all__ = ["add", "run"]

# What the command that goes on need not say.
_DEFAULTS = {"engine": "auto", "precision": "float32", "data": None}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        nargs="+",
        metavar="CHECKPOINT",
        help="saved_models/train_model_N of their code; the best of several are the ensemble",
    )
    common.add_experiment(parser, required=True)
    parser.add_argument("--out", required=True, metavar="DIR", help="the run's folder")
    common.add_data(parser, ", for the run to remember")
    common.add_engine(parser)
    parser.set_defaults(precision=None)


def run(arguments: argparse.Namespace) -> int:
    from mamlpp_fast.compat.checkpoints import import_checkpoints
    from mamlpp_fast.compat.experiment import read_experiment
    from mamlpp_fast.train import parse_settings
    from mamlpp_fast.train.run_folder import read_config

    experiment = read_experiment(arguments.config, parse_settings(arguments.set))
    notes = import_checkpoints(
        arguments.checkpoint,
        experiment,
        arguments.out,
        engine=arguments.engine,
        precision=arguments.precision,
        device=common.resolve_device(arguments.device),
        data_path=experiment.data if arguments.data is None else arguments.data,
    )
    for note in (*experiment.notes, *notes):
        print(note, file=sys.stderr)
    _, record = read_config(Path(arguments.out))
    same = [f"--{key} {record[key]}" for key, default in _DEFAULTS.items() if record[key] != default]
    same += [f"--set {' '.join(arguments.set)}"] if arguments.set else []
    print(f"wrote {arguments.out}; next:")
    print(f"  mamlpp-fast evaluate {arguments.out}")
    print(" ".join([f"  mamlpp-fast train --config {arguments.config} --out {arguments.out}", *same]))
    return 0
