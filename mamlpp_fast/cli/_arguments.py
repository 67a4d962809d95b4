"""What the arguments and the output of several commands share."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from mamlpp_fast.engine import ENGINES, PRECISIONS

if TYPE_CHECKING:
    from mamlpp_fast.train import Interrupted

__all__ = [
    "ENGINES",
    "Parser",
    "add_count",
    "add_data",
    "add_device",
    "add_engine",
    "add_experiment",
    "add_json",
    "add_settings",
    "print_result",
    "resolve_device",
    "stopped",
]


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=ENGINES, default="auto", metavar="E", help=", ".join(ENGINES))
    add_device(parser)
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="float32", metavar="P", help=", ".join(PRECISIONS)
    )


def add_device(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    shown = "cuda where there is one" if default is None else default
    text = f"cpu, cuda or cuda:N (default: {shown})"
    parser.add_argument("--device", default=default, metavar="D", help=text)


def resolve_device(name: str | None) -> torch.device:
    """The device of this name; without one a GPU where there is one, else the CPU.

    Raises:
        ValueError: for a name torch does not know or a device that is not there.
    """
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(f"--device: expected one of {count} CUDA devices and the CPU, got {name!r}")
    return device


def add_data(parser: argparse.ArgumentParser, text: str = "") -> None:
    parser.add_argument("--data", metavar="PATH", help=f"where the data set lies{text}")


def add_experiment(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--config",
        required=required,
        metavar="FILE",
        help="an experiment file (JSON) of the MAML++ authors' code",
    )
    add_settings(parser, "change settings; repeatable")


def add_settings(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help=text)


def add_count(
    parser: argparse.ArgumentParser,
    name: str,
    text: str,
    default: int | None = None,
    *,
    least: int = 1,
    metavar: str = "N",
) -> None:
    shown = "" if default is None else f" (default: {default})"
    parser.add_argument(name, type=_at_least(least), default=default, metavar=metavar, help=f"{text}{shown}")


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


def print_result(arguments: argparse.Namespace, value: Any, text: Callable[[], str]) -> None:
    """As JSON where it was asked for, else in words."""
    from mamlpp_fast.train.files import plain

    print(json.dumps(plain(value), indent=2) if arguments.json else text())


def stopped(stop: Interrupted, out: Path, *, told: bool = True) -> int:
    """The exit status of a run that was stopped by a signal, which is told where ``told``."""
    if told:
        print(f"{stop}; everything is saved in {out}. The same command goes on from there.", file=sys.stderr)
    return 128 + stop.number
