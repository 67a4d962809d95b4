"""Tables of the pages below from the JSON under bench/results/ and results/.

    python -m bench.report [--check]

Each table stands between `<!-- bench:NAME -->` and `<!-- bench:end -->`; NAME is a machine's folder
under bench/results/, a slash and a table, or `runs/` and the folders under results/ to compare, with commas.
`--check` changes nothing and exits with 1 when a page and the JSON disagree.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/drop_in.md", "docs/performance.md", "results/README.md")
_BLOCK = re.compile(r"(<!-- bench:(?P<name>[^ ]+/[^ ]+) -->\n).*?(<!-- bench:end -->)", re.DOTALL)

Rows = list[dict[str, Any]]


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    rule = ["---" if i == 0 else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])


def spread(quartiles: list[float], digits: int) -> str:
    low, median, high = quartiles
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def iterations(rows: Rows) -> str:
    lines = []
    for r in rows:
        name = [r["workload"], f"{r['engine']}, {r['precision']}"]
        if "fault" in r:
            lines.append([*name, f"not timed: {r['fault']}", "", "", ""])
            continue
        ratio = "" if r["ratio"] is None else f"{r['ratio']:.2f}"
        lines.append(
            [*name, spread(r["ms"], 0), ratio, f"{r['gflop_per_s']:.0f}", f"{r['peak_memory_mib']:.0f}"]
        )
    return table(["workload", "engine", "ms (quartiles)", "times reference", "GFLOP/s", "peak MiB"], lines)


def headline(rows: Rows) -> str:
    """Times of each workload by engine, one line a workload."""
    by_workload: dict[str, dict[str, dict[str, Any]]] = {}
    for r in rows:
        if not r["workload"].endswith("-final"):
            by_workload.setdefault(r["workload"], {})[f"{r['engine']}:{r['precision']}"] = r

    def cell(r: dict[str, Any] | None) -> str:
        if r is None or "ms" not in r:
            return "-"
        return f"{r['ms'][1]:.0f}" + ("" if r["engine"] == "reference" else f" ({r['ratio']:.1f}x)")

    columns = {
        "reference:float32": "reference",
        "autograd:float32": "autograd engine",
        "fused:float32": "fused engine",
        "fused:bfloat16": "fused, bfloat16",
    }
    lines = [[name, *(cell(found.get(key)) for key in columns)] for name, found in by_workload.items()]
    return table(["workload, ms an iteration", *columns.values()], lines)


def kernels(rows: Rows) -> str:
    lines = []
    for r in rows:
        name = [f"`{r['operation']}` {r['order']}", r["size"], f"{r['dtype']}, {r['layout']}"]
        if "fault" in r:
            lines.append([*name, f"not timed: {r['fault']}", "", "", "", ""])
            continue
        bound = (
            f"{r['gflop_per_s']:.0f} GFLOP/s, {r['share_of_peak']:.0%} of peak"
            if "gflop_per_s" in r
            else f"{r['gb_per_s']:.1f} GB/s, {r['share_of_copy']:.0%} of copy"
        )
        mib = f"{r['bytes'] / 2**20:.1f}"
        lines.append(
            [*name, f"{r['ours_us'][1]:.0f}", f"{r['torch_us'][1]:.0f}", f"{r['ratio']:.2f}", mib, bound]
        )
    return table(["operation", "size", "", "us", "PyTorch us", "times as fast", "MiB moved", "rate"], lines)


def scaling(rows: Rows) -> str:
    lines = [[r["varies"], str(r["value"]), f"{r['ms']:.1f}", f"{r['ms_each']:.2f}"] for r in rows]
    return table(["varies", "value", "ms", "ms each"], lines)


def drop_in(rows: Rows) -> str:
    lines = [
        [
            f"{r['tasks']} tasks, {r['ways']}-way",
            spread(r["before_ms"], 0),
            spread(r["after_ms"], 0),
            f"{r['ratio']:.2f}",
        ]
        for r in rows
    ]
    return table(["textbook loop", "before, ms", "after, ms", "times as fast"], lines)


def drop_in_scripts(rows: Rows) -> str:
    """Times of whole scripts with another package's import and with ours; a script with other numbers has none."""
    lines = [
        [r["script"], f"not timed: {r['fault']}", "", "", ""]
        if "fault" in r
        else [
            r["script"],
            spread(r["before_ms"], 0),
            spread(r["after_ms"], 0),
            f"{r['ratio']:.2f}",
            f"{max(r['errors_float64'].values()):.0e}",
        ]
        for r in rows
    ]
    return table(["script", "before, ms", "after, ms", "times as fast", "largest difference, float64"], lines)


def runs(names: list[str]) -> str:
    """Test accuracies, then validation accuracy by epoch side by side."""
    folders = [ROOT / "results" / name for name in names]
    summaries = [json.loads((f / "summary.json").read_text()) for f in folders]
    curves = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in folders]
    lines = [
        [
            name,
            f"{100 * s['test_accuracy']:.2f} ± {100 * s['test_accuracy_ci95']:.2f}",
            f"{100 * s['ensemble_test_accuracy']:.2f} ± {100 * s['ensemble_test_accuracy_ci95']:.2f}",
            str(s["iterations"]),
            f"{s['seconds'] / 60:.1f}",
            f"{s['engine']}, {s['precision']}",
        ]
        for name, s in zip(names, summaries, strict=True)
    ]
    header = ["run", "test, single, %", "ensemble, %", "iterations", "minutes", "engine"]
    epochs = [
        [str(row[0]["iteration"]), *(f"{100 * r['val_accuracy']:.1f}" for r in row)]
        for row in zip(*curves, strict=True)
    ]
    return f"{table(header, lines)}\n\n{table(['iteration, validation %', *names], epochs)}"


def peers(rows: Rows) -> str:
    lines = []
    for r in rows:
        if "fault" in r:
            lines.append([r["workload"], r["peer"], f"not timed: {r['fault']}", "", "", ""])
            continue
        ms = [1e3 * q for q in r["quartiles"]]
        memory = f"{r['peak_mib']:.0f}" if r["peak_mib"] else ""
        lines.append(
            [
                r["workload"],
                r["peer"],
                spread(ms, 0),
                f"{r['ratio']:.2f}" if r["ratio"] else "",
                f"{r['first_seconds']:.0f}",
                memory,
            ]
        )
    header = ["workload", "peer", "ms (quartiles)", "times textbook", "first run after, s", "peak MiB"]
    return table(header, lines)


def peer_rows(data: dict[str, Any]) -> Rows:
    """The rows of all workloads, each with its ratio to the textbook's median."""
    found = []
    for workload, content in data["workloads"].items():
        medians = {r["peer"]: r["quartiles"][1] for r in content["rows"] if "quartiles" in r}
        base = medians.get("textbook")
        for r in content["rows"]:
            ratio = base / medians[r["peer"]] if base and r["peer"] in medians else None
            found.append(r | {"workload": workload, "ratio": ratio})
    return found


TABLES: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "headline": ("iterations", headline),
    "iterations": ("iterations", iterations),
    "kernels": ("kernels", kernels),
    "peers": ("peers", peers),
    "scaling": ("scaling", scaling),
    "drop-in": ("drop_in", drop_in),
    "drop-in-learn2learn": ("drop_in_learn2learn", drop_in_scripts),
}


def render(name: str) -> str:
    """The table and the line that says where it was taken."""
    machine, _, what = name.partition("/")
    if machine == "runs":
        return f"\n{runs(what.split(','))}\n\n"
    file, make = TABLES[what]
    data = json.loads((ROOT / "bench" / "results" / machine / f"{file}.json").read_text())
    m = data["machine"]
    where = m["gpu"] or f"{m['cpu']}, {m['threads']} threads, {m['isa']}"
    rows = peer_rows(data) if what == "peers" else data["rows"]
    return f"\n{make(rows)}\n\n{where}; torch {m['versions']['torch']}.\n\n"


def refreshed(page: str) -> str:
    return _BLOCK.sub(lambda match: match[1] + render(match["name"]) + match[3], page)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for name in PAGES:
        path = ROOT / name
        old = path.read_text()
        new = refreshed(old)
        if new != old:
            stale.append(name)
            if not check:
                path.write_text(new)
    print(*(f"{name}: {'differs from the JSON' if check else 'rewritten'}" for name in stale), sep="\n")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
