"""Tables and plots of the pages below from the JSON under bench/results/ and results/.

    python -m bench.report [--check]

Each table stands between `<!-- bench:NAME -->` and `<!-- bench:end -->`. NAME is a table of the machine that the pages
show, which is the CPU with the newest full set of results; a folder under bench/results/, a slash and a table;
`runs/` or `run-headline/` and the folders under results/ to compare, with commas; `rates/` or `reproduced/`
and one folder; `hard-use/` and a file of results/hard_use/; or `taken`, what the fused engine's
rules say. Plots are of the same machine and go to docs/images/; so do the curves of each reproduced table, and the
figures of docs/how_it_works.md, which the package's own functions and a kept run make.
`--check` changes nothing and exits with 1 when a page or plot and what it is made of disagree.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import figures, kept, plots, tables
from bench import load as under_load
from bench.compare import compare, measurements, name_of, summary
from bench.harness import parser_of
from bench.taken import what_is_taken

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
IMAGES = ROOT / "docs" / "images"
PAGES = (
    "README.md",
    "docs/engine.md",
    "docs/performance.md",
    "docs/kernel_table.md",
    "docs/hard_use.md",
    "results/README.md",
)
FULL_SET = ("iterations", "kernels", "peers", "scaling")
_BLOCK = re.compile(r"(<!-- bench:(?P<name>[^ ]+) -->\n).*?(<!-- bench:end -->)", re.DOTALL)

# The file that each is of, and what is made of its rows.
TABLES: dict[str, tuple[str, Callable[[tables.Rows], str]]] = {
    "headline": ("iterations", tables.headline),
    "iterations": ("iterations", tables.iterations),
    "kernels": ("kernels", tables.kernels),
    "kernel-summary": ("kernels", tables.kernel_summary),
    "behind": ("kernels", tables.behind),
    "dispatch": ("kernels", tables.dispatch),
    "closed-form": ("closed_form", tables.kernel_summary),
    "direct": ("kernels_direct", tables.kernels),
    "peers": ("peers", tables.peers),
    "peer-headline": ("peers", tables.peer_headline),
    "scaling": ("scaling", tables.scaling),
    "load": ("load", under_load.describe),
    "accuracy": ("accuracy", tables.accuracy),
    "networks": ("networks", tables.networks),
    "drop-in": ("drop_in", tables.drop_in),
}
RUNS = {
    "runs": kept.runs,
    "run-headline": kept.run_headline,
    "rates": kept.rates,
    "reproduced": kept.reproduced,
    "hard-use": kept.hard_use,
}
PLOTS: dict[str, tuple[str, Callable[[tables.Rows], bytes]]] = {
    "peers": ("peers", plots.peers),
    "roofline": ("kernels", plots.roofline),
    "scaling": ("scaling", plots.scaling),
}


def load(machine: str, file: str) -> dict[str, Any] | None:
    path = RESULTS / machine / f"{file}.json"
    if not path.exists():
        return None
    content = _twice(path)
    # Compiling takes many minutes: a run of its own, and its own textbook to hold it against.
    compiled = path.with_name("peers_compile.json")
    if file == "peers" and compiled.exists():
        content["rows"] += [r for r in _twice(compiled)["rows"] if r["peer"] in tables.COMPILED]
    return content


def _twice(path: Path) -> dict[str, Any]:
    """A result; its rows with the ratio that the second run, in the folder ``again``, has for them."""
    content: dict[str, Any] = json.loads(path.read_text())
    if "workloads" in content:
        content["rows"] = tables.peer_rows(content)
    again = path.parent / "again" / path.name
    if again.exists():
        found = measurements(json.loads(again.read_text()))
        for row in content["rows"]:
            row["again"] = found.get(f"{name_of(row)} ratio_quartiles")
    return content


@functools.cache
def shown() -> str:
    """The CPU whose full set of results is the newest."""
    full = [
        folder.name
        for folder in sorted(RESULTS.glob("cpu-*"))
        if all((folder / f"{file}.json").exists() for file in FULL_SET)
    ]
    if not full:
        raise SystemExit(f"bench/results: expected a folder with {', '.join(FULL_SET)}, got none")

    def taken(machine: str) -> str:
        content = load(machine, "iterations")
        return str((content or {})["machine"].get("date", ""))  # older results do not say when

    return max(full, key=taken)


def where(content: dict[str, Any]) -> str:
    """The machine of a result in half a line, and when and of which commits its rows were taken."""
    m = content["machine"]
    device = m["gpu"] or f"{m['cpu']}, {m['threads']} threads, {m['isa']}"
    text = f"{device}; torch {m['versions']['torch']}"
    rows = [row for row in content.get("rows", ()) if "commit" in row] or [m]
    dates = sorted({row["date"] for row in rows})
    commits = list(dict.fromkeys(row["commit"] for row in sorted(rows, key=lambda row: row["date"])))
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{text}; {span} UTC, commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}."


def agreement(machine: str) -> str:
    """How many medians of a second run, in the folder ``again``, agree with those shown."""
    lines = []
    for path in sorted((RESULTS / machine / "again").glob("*.json")):
        pair = [json.loads(p.read_text()) for p in (RESULTS / machine / path.name, path)]
        for what, agreeing, of, farthest in summary(list(compare(*pair))):
            lines.append([path.stem, what, f"{agreeing} of {of}", f"{farthest:.0%}"])
    if not lines:
        return "Not measured twice on this machine yet."
    return tables.table(["measurement", "medians", "agree within their quartiles", "farthest apart"], lines)


def render(name: str) -> str:
    """The table and the line that says where it was taken."""
    machine, slash, what = name.rpartition("/")
    if machine in RUNS:
        return f"\n{RUNS[machine](what.split(','))}\n\n"
    if name == "taken":
        return f"\n{what_is_taken()}\n\n"
    machine = machine if slash else shown()
    if what == "machine":
        content = load(machine, "iterations")
        assert content is not None
        return f"\n`{machine}`: {where(content)}\n\n"
    if what == "agreement":
        return f"\n{agreement(machine)}\n\n"
    if what == "environments":
        content = load(machine, "peers")
        return f"\n{tables.environments(content or {})}\n\n"
    file, make = TABLES[what]
    content = load(machine, file)
    if content is None:
        return "\nNot measured on this machine yet.\n\n"
    return f"\n{make(content['rows'])}\n\n{where(content)}\n\n"


def refreshed(page: str) -> str:
    return _BLOCK.sub(lambda match: match[1] + render(match["name"]) + match[3], page)


def stale(write: bool) -> list[str]:
    """Pages and plots that differ from the JSON; rewritten if asked."""
    wanted: dict[Path, bytes] = {}
    for name in PAGES:
        wanted[ROOT / name] = refreshed((ROOT / name).read_text()).encode()
    for name, (file, draw) in PLOTS.items():
        content = load(shown(), file)
        assert content is not None
        wanted[IMAGES / f"{name}.svg"] = draw(content["rows"])
    for table in sorted(kept.RESULTS.glob("*/table.json")):
        wanted[IMAGES / f"{table.parent.name}.svg"] = plots.curves(kept.curve_rows(table))
    for name, runs in kept.COMPARED.items():
        wanted[IMAGES / f"{name}.svg"] = plots.curves(kept.compared(runs))
    for name, figure in figures.FIGURES.items():
        wanted[IMAGES / f"{name}.svg"] = figure()
    differing = []
    for path, content in wanted.items():
        if not path.exists() or path.read_bytes() != content:
            differing.append(str(path.relative_to(ROOT)))
            if write:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    return differing


def main() -> int:
    parser = parser_of(__doc__, json=False)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    differing = stale(write=not check)
    print(*(f"{name}: {'out of date' if check else 'rewritten'}" for name in differing), sep="\n")
    return int(check and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
