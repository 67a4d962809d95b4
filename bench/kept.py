"""The tables of what is kept under results/: training runs, reproduced tables, hard use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.tables import Rows, table
from mamlpp_fast.report.runs import read_run

# Runs whose curves one figure shows.
COMPARED = {"omniglot-20w1s": ("omniglot-20w1s", "omniglot-20w1s-maml")}
# Epochs that a curve's table shows, about.
_ROWS = 25
RESULTS = Path(__file__).resolve().parent.parent / "results"


def run_headline(names: list[str]) -> str:
    """Test accuracies, share of the budget and time of each run, one line a run."""
    lines = []
    for name in names:
        run = read_run(RESULTS / name)
        s = run.summary
        share = s["iterations"] / (run.config["epochs"] * run.config["iterations_per_epoch"])
        made = f"{s['iterations']}" + ("" if share == 1 else f" ({share:.0%})")
        lines.append([name, *_tested(s, 1), made, f"{s['seconds'] / 3600:.1f}"])
    return table(["run", "test, %", "ensemble, %", "iterations (of the schedule)", "hours"], lines)


def _tested(s: dict[str, Any], digits: int) -> list[str]:
    """The best checkpoint's accuracy and the ensemble's, in per cent."""
    return [
        f"{100 * s[key]:.{digits}f} ± {100 * s[f'{key}_ci95']:.{digits}f}"
        for key in ("test_accuracy", "ensemble_test_accuracy")
    ]


def runs(names: list[str]) -> str:
    """Test accuracies, then validation accuracy by epoch side by side."""
    found = [read_run(RESULTS / name) for name in names]
    lines = [
        [
            name,
            *_tested(s, 2),
            str(s["iterations"]),
            f"{s['seconds'] / 60:.1f}",
            f"{s['engine']}, {s['precision']}",
        ]
        for name, s in zip(names, (run.summary for run in found), strict=True)
    ]
    header = ["run", "test, single, %", "ensemble, %", "iterations", "minutes", "engine"]
    by_iteration = [{e["iteration"]: f"{100 * e['val_accuracy']:.1f}" for e in run.epochs} for run in found]
    ends = sorted(set().union(*by_iteration))
    every = -(-len(ends) // _ROWS)
    epochs = [
        [str(end), *(curve.get(end, "") for curve in by_iteration)]
        for i, end in enumerate(ends, 1)
        if i % every == 0 or end == ends[-1]
    ]
    return f"{table(header, lines)}\n\n{table(['iteration, validation %', *names], epochs)}"


def rates(names: list[str]) -> str:
    """The learned inner rates of a run's last epoch, and what the paper's charts for 20-way 1-shot say of theirs.

    Tensors whose rates never moved, convolution biases in front of batch norms, are left out.
    """
    (name,) = names
    found: dict[str, list[float]] = {
        tensor: values
        for tensor, values in read_run(RESULTS / name).epochs[-1]["inner_rates"].items()
        if len(set(values)) > 1
    }
    steps = list(zip(*found.values(), strict=True))
    by_step = [sum(step) / len(step) for step in steps]
    means = {tensor: sum(values) / len(values) for tensor, values in found.items()}
    header = ["tensor", *(f"step {k + 1}" for k in range(len(steps))), "mean"]
    lines = [
        [f"`{tensor}`", *(f"{v:.3f}" for v in values), f"{means[tensor]:.3f}"]
        for tensor, values in found.items()
    ]
    lines.append(["mean", *(f"{v:.3f}" for v in by_step), f"{sum(by_step) / len(by_step):.3f}"])
    convolutions = [tensor for tensor in found if "conv" in tensor]
    first, last = convolutions[:2], convolutions[-1]
    negative = sum(v < 0 for step in steps for v in step)
    largest = max(means, key=lambda tensor: means[tensor])
    order = sorted(range(len(steps)), key=lambda k: -by_step[k])
    early = ", ".join(f"{means[tensor]:.3f}" for tensor in first)
    statements = [
        ("the last convolution's are the largest", f"largest mean: `{largest}`", largest == last),
        (
            "the first layers' are near zero or below",
            f"means {early}; {means[last]:.3f} the last convolution's",
            max(abs(means[tensor]) for tensor in first) < means[last] / 5,
        ),
        ("some are negative", f"{negative} of {len(found) * len(steps)}", negative > 0),
        (
            "steps 1 and 3 high, 2 and 4 between, 5 low",
            "from high to low: " + ", ".join(str(k + 1) for k in order),
            set(order[:2]) == {0, 2} and order[-1] == len(steps) - 1,
        ),
    ]
    held = [[what, seen, "yes" if holds else "no"] for what, seen, holds in statements]
    charts = table(["the paper's charts", "this run", "holds"], held)
    return f"{table(header, lines)}\n\n{charts}"


def reproduced(names: list[str]) -> str:
    """What ``mamlpp-fast reproduce`` wrote, without its title."""
    (name,) = names
    return (RESULTS / name / "table.md").read_text().partition("\n")[2].strip()


def compared(names: Sequence[str]) -> Rows:
    """As :func:`curve_rows`, of single runs."""
    return [{"label": name, "seed": 0, "epochs": read_run(RESULTS / name).epochs} for name in names]


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
