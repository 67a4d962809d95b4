"""Meta-trains, validates each epoch, tests; goes on where DIR holds a stopped run."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import zlib
from contextlib import nullcontext
from pathlib import Path

from mamlpp_fast.cli import _arguments as common

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "preset",
        nargs="?",
        metavar="PRESET",
        help="BASE[-VARIANT][-PROTOCOL], such as omniglot-20w1s or miniimagenet-5w1s-maml-paper (default: strokes)",
    )
    parser.add_argument("--list", action="store_true", help="print the presets and stop")
    common.add_data(parser, " (default: MAMLPP_FAST_DATA, then cache)")
    parser.add_argument(
        "--out", metavar="DIR", help="the run's folder (default: runs/PRESET or runs/EXPERIMENT)"
    )
    common.add_engine(parser)
    common.add_experiment(parser, required=False)
    parser.add_argument(
        "--deterministic", action="store_true", help="the same result on any number of CPU threads"
    )
    common.add_count(parser, "--max-iters", "stop after N meta-updates in all, and test")


def run(arguments: argparse.Namespace) -> int:
    from mamlpp_fast.compat.experiment import read_experiment
    from mamlpp_fast.distributed import ElsewhereError, RankError, RankLostError, launched, own_device
    from mamlpp_fast.engine.deterministic import deterministic_algorithms
    from mamlpp_fast.train import (
        DEFAULT_PRESET,
        Interrupted,
        evaluate_run,
        parse_settings,
        preset,
        preset_names,
        train,
    )

    if arguments.list:
        print("\n".join(preset_names()))
        return 0
    settings = parse_settings(arguments.set)
    data = arguments.data
    evaluate_only = False
    if arguments.config is None:
        name = DEFAULT_PRESET if arguments.preset is None else arguments.preset
        config = preset(name, settings)
    elif arguments.preset is not None:
        raise ValueError(f"PRESET: expected none beside --config, got {arguments.preset!r}")
    else:
        experiment = read_experiment(arguments.config, settings)
        for note in experiment.notes:
            print(f"{arguments.config}: {note}", file=sys.stderr)
        name, config, evaluate_only = experiment.name, experiment.config, experiment.evaluate_only
        data = experiment.data if data is None else data
    if arguments.out is None:
        changed = {k: v for k, v in settings.items() if k in config.deciding()}
        suffix = f"-{zlib.crc32(repr(sorted(changed.items())).encode()):08x}" if changed else ""
        out = Path("runs") / f"{name}{suffix}"
    else:
        out = Path(arguments.out)
    first = os.environ.get("RANK", "0") == "0"
    device = own_device(common.resolve_device(arguments.device))
    if evaluate_only:
        for s in evaluate_run(out, tasks=config.test_tasks, data_path=data, device=device):
            print(f"test accuracy: {s.describe()}")
        return 0
    with_switch = arguments.deterministic and device.type == "cpu"
    try:
        switch = deterministic_algorithms() if with_switch else nullcontext()
        with switch, launched(device) as group:
            summary = train(
                config,
                out=out,
                preset=name,
                data_path=data,
                engine=arguments.engine,
                precision=arguments.precision,
                device=device,
                max_iters=arguments.max_iters,
                process_group=group,
            )
    except Interrupted as stop:
        return common.stopped(stop, out, told=first)
    except (ArithmeticError, RankError) as error:
        if first or isinstance(error, RankLostError):
            print(
                f"mamlpp-fast train: error: {error}; "
                f"the last good checkpoint is {out / 'checkpoints' / 'latest.pt'}",
                file=sys.stderr,
            )
        return 1
    except ElsewhereError as error:
        return error.status
    if not first:
        return 0
    interval = summary["test_accuracy_ci95"]
    spread = "" if interval is None or math.isnan(interval) else f" ± {100 * interval:.2f} %"
    print(f"test accuracy {100 * summary['test_accuracy']:.2f} %{spread}; wrote:")
    for path in ("summary.json", "metrics.jsonl", "config.json", "checkpoints"):
        print(f"  {out / path}")
    print(f"its page: mamlpp-fast report {shlex.quote(str(out))}")
    return 0
