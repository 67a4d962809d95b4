"""The command ``mamlpp-fast``: info, train, evaluate, replay, bench.

A mistake gets one line on standard error that names the argument, what was expected and what came, and exit status 2.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["main"]

_ENGINES = ("auto", "reference", "autograd", "fused")
_PRECISIONS = ("float64", "float32", "tf32", "bfloat16")


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    Args:
        argv: the arguments; ``sys.argv[1:]`` without it.
    """
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return command(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, MemoryError) as error:
        if arguments.debug:
            raise
        print(f"mamlpp-fast {arguments.command}: error: {_message(error)}", file=sys.stderr)
        return 2


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror is not None:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}expected to read and write here, {error.strerror}"
    if isinstance(error, MemoryError):
        return "memory: expected more of it"
    return " ".join(str(error).split()) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mamlpp-fast", description="Fast, exact meta-training with MAML++.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
        sub.set_defaults(run=run)
        return sub

    sub = add("info", _info, "Versions, devices, and what serves each operation.")
    _json(sub)

    sub = add(
        "train", _train, "Meta-trains, validates each epoch, tests; goes on where DIR holds a stopped run."
    )
    sub.add_argument(
        "preset",
        nargs="?",
        metavar="PRESET",
        help="BASE[-VARIANT][-PROTOCOL], such as omniglot-20w1s or miniimagenet-5w1s-maml-paper (default: strokes)",
    )
    sub.add_argument("--list", action="store_true", help="print the presets and stop")
    sub.add_argument(
        "--data", metavar="PATH", help="where the data set lies (default: MAMLPP_FAST_DATA, then cache)"
    )
    sub.add_argument("--out", metavar="DIR", help="the run's folder (default: runs/PRESET)")
    _engine(sub)
    sub.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="change settings; repeatable",
    )
    sub.add_argument(
        "--max-iters", type=_at_least(1), metavar="N", help="stop after N meta-updates in all, and test"
    )

    sub = add("evaluate", _evaluate, "Test accuracy of a run's best checkpoint and of its ensemble.")
    sub.add_argument("dir", metavar="DIR", help="the run's folder")
    sub.add_argument("--tasks", type=_at_least(1), default=600, metavar="N", help="test tasks (default: 600)")
    sub.add_argument(
        "--ensemble", type=_at_least(1), default=5, metavar="N", help="models to average (default: 5)"
    )
    sub.add_argument(
        "--data", metavar="PATH", help="where the data set lies (default: where the run found it)"
    )
    sub.add_argument("--engine", choices=_ENGINES, metavar="E", help="default: the run's")
    sub.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    sub.add_argument("--steps", type=_at_least(1), metavar="K", help="inner updates (default: the run's)")
    sub.add_argument(
        "--stats", choices=("batch", "running"), help="statistics of the target passes (default: the run's)"
    )
    _json(sub)

    sub = add(
        "replay", _replay, "Repeats a recorded run; exit status 1 when an error is outside the tolerance."
    )
    sub.add_argument("file", metavar="FILE", help="a recorded run (.npz)")
    sub.add_argument("--engine", choices=_ENGINES, default="auto", metavar="E", help=", ".join(_ENGINES))
    sub.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    sub.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda or cuda:N (default: cpu)")
    _json(sub)

    sub = add("bench", _bench, "Times whole meta-iterations of a workload.")
    sub.add_argument(
        "workload", metavar="WORKLOAD", help="omniglot-20w1s, ..., miniimagenet-5w5s, each also with -final"
    )
    _engine(sub)
    sub.add_argument(
        "--iters", type=_at_least(1), default=10, metavar="N", help="iterations timed (default: 10)"
    )
    sub.add_argument(
        "--warmup", type=_at_least(0), default=3, metavar="N", help="iterations before (default: 3)"
    )
    _json(sub)
    return parser


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=_ENGINES, default="auto", metavar="E", help=", ".join(_ENGINES))
    parser.add_argument(
        "--device", metavar="D", help="cpu, cuda or cuda:N (default: cuda where there is one)"
    )
    parser.add_argument(
        "--precision", choices=_PRECISIONS, default="float32", metavar="P", help=", ".join(_PRECISIONS)
    )


def _at_least(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
        return value

    return convert


def _print_json(value: Any) -> None:
    print(json.dumps(_finite(value), indent=2))


def _finite(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Commands: each imports what it needs, so that --help and mistakes in the arguments answer at once. ------------------


def _info(arguments: argparse.Namespace) -> int:
    from mamlpp_fast.info import describe, info

    found = info()
    if arguments.json:
        _print_json(found)
    else:
        print(describe(found))
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from mamlpp_fast.train import DEFAULT_PRESET, Interrupted, parse_settings, preset, preset_names, train
    from mamlpp_fast.train.build import resolve_device

    if arguments.list:
        print("\n".join(preset_names()))
        return 0
    name = DEFAULT_PRESET if arguments.preset is None else arguments.preset
    settings = parse_settings(arguments.set)
    config = preset(name, settings)
    if arguments.out is None:
        changed = {k: v for k, v in settings.items() if k in config.deciding()}
        suffix = f"-{zlib.crc32(repr(sorted(changed.items())).encode()):08x}" if changed else ""
        out = Path("runs") / f"{name}{suffix}"
    else:
        out = Path(arguments.out)
    try:
        summary = train(
            config,
            out=out,
            preset=name,
            data_path=arguments.data,
            engine=arguments.engine,
            precision=arguments.precision,
            device=resolve_device(arguments.device),
            max_iters=arguments.max_iters,
        )
    except Interrupted as stop:
        print(f"{stop}; everything is saved in {out}. The same command goes on from there.", file=sys.stderr)
        return 128 + stop.number
    except ArithmeticError as error:
        print(
            f"mamlpp-fast train: error: {error}; the last good checkpoint is {out / 'checkpoints' / 'latest.pt'}",
            file=sys.stderr,
        )
        return 1
    interval = summary["test_accuracy_ci95"]
    spread = "" if interval is None or math.isnan(interval) else f" ± {100 * interval:.2f} %"
    print(f"test accuracy {100 * summary['test_accuracy']:.2f} %{spread}; wrote:")
    for path in ("summary.json", "metrics.jsonl", "config.json", "checkpoints"):
        print(f"  {out / path}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
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
    if arguments.json:
        _print_json({"scores": [asdict(s) for s in scores]})
    else:
        for s in scores:
            print(f"test accuracy: {s.describe()}")
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    from mamlpp_fast.replay import replay
    from mamlpp_fast.train.build import resolve_device

    report = replay(
        arguments.file,
        engine=arguments.engine,
        dtype=arguments.dtype,
        device=resolve_device(arguments.device),
    )
    if arguments.json:
        _print_json(report.to_dict())
    else:
        for name in ("loss", "meta_gradient", "final_parameters", "eval_logits"):
            print(f"{name:<17} {getattr(report, name):.2e}")
        verdict = "within tolerance" if report.ok else "outside tolerance"
        print(f"engine {report.engine}, {report.dtype}: {verdict}")
    return 0 if report.ok else 1


def _bench(arguments: argparse.Namespace) -> int:
    from mamlpp_fast.benchmarking import bench
    from mamlpp_fast.train.build import resolve_device
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
        device=resolve_device(arguments.device),
        iters=arguments.iters,
        warmup=arguments.warmup,
    )
    if arguments.json:
        _print_json(result.to_dict())
    else:
        print(result.describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
