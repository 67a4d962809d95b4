"""The command ``mamlpp-fast``: a module a command, with what it does, its arguments by ``add`` and its work by ``run``.

A mistake gets one line on standard error that names the argument, what was expected and what came, and exit status 2.
Commands import what they need when they run, so that --help and mistakes in the arguments answer at once.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from mamlpp_fast.cli import bench, evaluate, export, import_, info, replay, report, reproduce, runs, train
from mamlpp_fast.cli._arguments import Parser

__all__ = ["main", "run"]

_COMMANDS = (info, train, runs, evaluate, report, reproduce, import_, export, replay, bench)


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


def run() -> NoReturn:
    """The process of a command, which ends with its exit status."""
    status = main()
    gc.freeze()  # else a search through all of torch for cycles, a quarter of a second, before the memory goes anyway
    sys.exit(status)


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror is not None:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}expected to read and write here, {error.strerror}"
    if isinstance(error, MemoryError):
        return "memory: expected more of it"
    return " ".join(str(error).split()) or type(error).__name__


def _parser() -> Parser:
    parser = Parser(prog="mamlpp-fast", description="Fast, exact meta-training with MAML++.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for command in _COMMANDS:
        name = command.__name__.rpartition(".")[2].strip("_")
        sub = commands.add_parser(name, help=command.__doc__, description=command.__doc__)
        sub.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
        sub.set_defaults(run=command.run)
        command.add(sub)
    return parser
