"""Feeds damaged and hostile inputs to every reader of files and settings.

    python -m bench.fuzz [--inputs 100000] [--seed 0] [--only NAME,...] [--json FILE] [--keep DIR]

Each input must be accepted, or refused by a ValueError, TypeError or OSError of one line, within the limits of time and
memory, and without running anything: pickles are laid that would make a folder, and the interpreter's audit
hook watches for processes, connections and files written elsewhere. Inputs go in batches to child processes, so that a
crash is seen and counted too. Exits with 1 where anything fails; ``--keep`` writes the failing inputs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.fuzz.driver import fuzz
from bench.harness import keep, parser_of


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    only = [name for name in options.only.split(",") if name]
    rows = fuzz(options.inputs, options.seed, only=only, keep=options.keep, say=print)
    command = f"python -m bench.fuzz --inputs {options.inputs} --seed {options.seed}"
    keep(options.json, rows, command=command, inputs=sum(r["inputs"] for r in rows))
    return 1 if any(r["failed"] for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
