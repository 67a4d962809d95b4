"""Whether two runs of a measurement agree within the spread that they state.

    python -m bench.compare OLD NEW

OLD and NEW are JSON files of one measurement, or folders of them. Two medians agree when they are no further apart than
the quartiles that face each other reach together. Ratios of competitors that took turns are compared apart from times,
for a shared machine is faster on one day than on another. Prints every row where they do not agree, with its change,
and how many do; exit status 1 when some do not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.harness import parser_of
from bench.tables import peer_rows, to_itself

# What holds [lower quartile, median, upper quartile] in a row, by the unit.
_QUARTILES = ("ms", "ours_us", "torch_us", "before_ms", "after_ms", "quartiles", "ratio_quartiles")
_RATIO = "ratio_quartiles"
_NAMES = (
    "workload", "peer", "engine", "precision", "operation", "order", "size", "layout", "dtype", "backend",
    "varies", "value", "script", "changed", "tasks", "ways", "shots",
)  # fmt: skip


def name_of(row: dict[str, Any]) -> str:
    """What a row is known by in every run."""
    return " ".join(str(row[key]) for key in _NAMES if key in row)


def measurements(data: dict[str, Any]) -> dict[str, list[float]]:
    """Quartiles by the name of the row and the quantity; not the ratio of a competitor to itself."""
    rows = list(data.get("rows", ()))
    if "workloads" in data:
        rows += peer_rows(data)
    found = {}
    for row in rows:
        for key in _QUARTILES:
            if isinstance(row.get(key), list) and not (key == _RATIO and to_itself(row[key])):
                found[f"{name_of(row)} {key}"] = row[key]
    return found


def agree(old: list[float], new: list[float]) -> bool:
    """Whether medians are no further apart than the two spreads together reach."""
    (low, high) = (old, new) if old[1] <= new[1] else (new, old)
    return high[1] - low[1] <= (low[2] - low[1]) + (high[1] - high[0])


def compare(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, bool, float]]:
    """(name, whether they agree, new median over old) of what both have."""
    before, after = measurements(old), measurements(new)
    for name in before:
        if name in after:
            yield name, agree(before[name], after[name]), after[name][1] / before[name][1]


def summary(rows: Sequence[tuple[str, bool, float]]) -> Iterator[tuple[str, int, int, float]]:
    """Of times and of ratios: how many agree, how many there are, and how far apart the farthest are."""
    for what in ("times", "ratios"):
        chosen = [row for row in rows if row[0].endswith(_RATIO) == (what == "ratios")]
        if chosen:
            farthest = max(max(ratio, 1 / ratio) for *_, ratio in chosen) - 1
            yield what, sum(same for _, same, _ in chosen), len(chosen), farthest


def main() -> int:
    parser = parser_of(__doc__, json=False)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    arguments = parser.parse_args()
    for path in (arguments.old, arguments.new):
        if not path.exists():
            parser.error(f"expected a file or folder, got {path}")
    pairs = [(arguments.old, arguments.new)]
    if arguments.old.is_dir():
        names = sorted(file.name for file in arguments.old.glob("*.json"))
        pairs = [(arguments.old / n, arguments.new / n) for n in names if (arguments.new / n).exists()]
    apart = 0
    for old, new in pairs:
        rows = list(compare(json.loads(old.read_text()), json.loads(new.read_text())))
        for name, same, ratio in rows:
            if not same:
                print(f"{name}: {ratio:.2f} times as {'much' if name.endswith(_RATIO) else 'long'}")
        for what, agreeing, of, farthest in summary(rows):
            print(
                f"{new.name}: {agreeing} of {of} {what} agree within the quartiles stated; "
                f"farthest apart {farthest:.0%}"
            )
            apart += of - agreeing
    return int(apart > 0)


if __name__ == "__main__":
    sys.exit(main())
