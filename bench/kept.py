"""The tables of what is kept under results/: training runs, reproduced tables, hard use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.tables import Rows, table
from mamlpp_fast.report.runs import read_run
from mamlpp_fast.reproduce.published import Published

__all__ = ["curve_rows", "hard_use", "reproduced", "reproduced_headline", "run_headline", "runs"]

RESULTS = Path(__file__).resolve().parent.parent / "results"


def run_headline(names: list[str]) -> str:
    """Test accuracy and time of each run, one line a run."""
    lines = []
    for name in names:
        s = read_run(RESULTS / name).summary
        accuracy = f"{100 * s['test_accuracy']:.1f} ± {100 * s['test_accuracy_ci95']:.1f}"
        lines.append([name, accuracy, f"{s['seconds'] / 60:.0f}"])
    return table(["run", "test accuracy, %", "minutes"], lines)


def runs(names: list[str]) -> str:
    """Test accuracies, then validation accuracy by epoch side by side."""
    found = [read_run(RESULTS / name) for name in names]
    lines = [
        [
            name,
            f"{100 * s['test_accuracy']:.2f} ± {100 * s['test_accuracy_ci95']:.2f}",
            f"{100 * s['ensemble_test_accuracy']:.2f} ± {100 * s['ensemble_test_accuracy_ci95']:.2f}",
            str(s["iterations"]),
            f"{s['seconds'] / 60:.1f}",
            f"{s['engine']}, {s['precision']}",
        ]
        for name, s in zip(names, (run.summary for run in found), strict=True)
    ]
    header = ["run", "test, single, %", "ensemble, %", "iterations", "minutes", "engine"]
    epochs = [
        [str(row[0]["iteration"]), *(f"{100 * r['val_accuracy']:.1f}" for r in row)]
        for row in zip(*(run.epochs for run in found), strict=True)
    ]
    return f"{table(header, lines)}\n\n{table(['iteration, validation %', *names], epochs)}"


def reproduced_headline(names: list[str]) -> str:
    """Each row of a reproduced table at the scale it was run, beside the published figures."""
    (name,) = names
    content = json.loads((RESULTS / name / "table.json").read_text())
    lines = []
    for r in content["rows"]:
        mean, sd = r["single"]["mean"], r["single"]["seeds_sd"]
        ours = "-" if mean is None else f"{100 * mean:.1f}" + ("" if sd is None else f" ± {100 * sd:.1f}")
        theirs = ", ".join(str(Published(**p)) for p in r["published"])
        lines.append([r["label"], ours, theirs or "-"])
    seeds = max(r["single"]["seeds"] for r in content["rows"])
    header = ["row", f"{100 * content['scale']:g} % of the budget, {seeds} seeds, %", "published, %"]
    return table(header, lines)


def reproduced(names: list[str]) -> str:
    """What ``mamlpp-fast reproduce`` wrote, without its title."""
    (name,) = names
    return (RESULTS / name / "table.md").read_text().partition("\n")[2].strip()


def curve_rows(path: Path) -> Rows:
    """A row for each run of a reproduced table: its label, seed and the lines of its ``metrics.jsonl``."""
    return [
        {"label": row["label"], "seed": run["seed"], "epochs": read_run(folder).epochs}
        for row in json.loads(path.read_text())["rows"]
        for run in row["runs"]
        for folder in path.parent.glob(f"runs/{row['row']}-{row['shots']}shot-seed{run['seed']}")
    ]


def hard_use(names: list[str]) -> str:
    """The closing figures of the fuzzing, of the soak, of deterministic mode or of coverage by the tests."""
    (name,) = names
    path = RESULTS / "hard_use" / f"{name}.json"
    if not path.exists():
        return "Not run to its end yet."
    content = json.loads(path.read_text())
    return {"fuzz": _fuzz, "soak": _soak, "deterministic": _deterministic, "coverage": _coverage}[name](
        content
    )


def _fuzz(content: dict[str, Any]) -> str:
    keys = ("inputs", "accepted", "refused", "failed", "code_run")
    rows = content["rows"]
    lines = [
        [r["kind"], *(str(r[k]) for k in keys), f"{r['slowest_seconds']:.1f}", str(r["memory_growth_mib"])]
        for r in rows
    ]
    slowest, most = max(r["slowest_seconds"] for r in rows), max(r["memory_growth_mib"] for r in rows)
    lines.append(["all", *(str(sum(r[k] for r in rows)) for k in keys), f"{slowest:.1f}", str(most)])
    header = ["input", *keys[:-1], "code run", "slowest, s", "memory grew, MiB"]
    return f"`{content['machine']['command']}`:\n\n{table(header, lines)}"


def _soak(content: dict[str, Any]) -> str:
    last, found = content["rows"][-1], content["machine"]["verdict"]
    low, high = found["rss_mib"]
    lines = [
        ["hours", f"{last['seconds'] / 3600:.2f}"],
        ["meta-updates; whole runs", f"{found['iterations']}; {found['runs']}"],
        ["resident memory after the warm-up, MiB", f"{low:.1f} to {high:.1f}"],
        [
            "its slope, MiB an hour (allowed)",
            f"{found['rss_mib_an_hour']:+.2f} ({found['allowed_mib_an_hour']:g})",
        ],
        ["files, threads more", f"{found['more_files']}, {found['more_threads']}"],
        ["Python objects an hour", f"{found['objects_an_hour']:+.0f}"],
        ["verdict", "nothing grows" if found["ok"] else "grows"],
    ]
    return table(["soak", ""], lines)


def _deterministic(content: dict[str, Any]) -> str:
    lines = [
        [
            f"{r['workload']}, {r['engine']}, {r['precision']}",
            f"{r['default_ms']:.0f}",
            f"{r['deterministic_ms']:.0f}",
            f"{r['cost']:+.0%}",
        ]
        for r in content["rows"]
    ]
    return table(["ms an iteration", "default", "deterministic", "cost"], lines)


def _coverage(content: dict[str, Any]) -> str:
    """The totals, and the modules with the most branches not taken; ``content`` is of ``coverage json``."""
    total = content["totals"]
    files = sorted(
        content["files"].items(), key=lambda item: item[1]["summary"]["missing_branches"], reverse=True
    )
    rows = [("all", total), *((name, file["summary"]) for name, file in files[:8])]
    lines = [
        [
            name,
            f"{r['covered_branches']} of {r['num_branches']}",
            f"{r['covered_branches'] / r['num_branches']:.1%}",
            f"{r['covered_lines'] / r['num_statements']:.1%}",
        ]
        for name, r in rows
    ]
    return table(["module", "branches taken", "", "statements"], lines)
