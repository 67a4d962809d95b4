"""From the runs of a table to its text and JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mamlpp_fast.reproduce.experiments import TABLES, Cell
from mamlpp_fast.reproduce.published import Published

__all__ = ["Outcome", "as_json", "as_markdown", "instability"]


@dataclass(frozen=True)
class Outcome:
    """What became of one run.

    Attributes:
        seed: its seed.
        summary: its ``summary.json``; None where it stopped.
        epochs: the lines of its ``metrics.jsonl``.
        fault: why it stopped, where it did.
    """

    seed: int
    summary: Mapping[str, Any] | None
    epochs: Sequence[Mapping[str, Any]]
    fault: str | None = None


def over_seeds(outcomes: Sequence[Outcome], key: str) -> dict[str, float | int | None]:
    """Mean of an accuracy over the runs that finished and what it may be off by, all shares.

    ``seeds_sd`` is the standard deviation over seeds (None for one), ``tasks_ci95`` the widest of the runs' 95 %
    intervals over test tasks.
    """
    done = [o.summary for o in outcomes if o.summary is not None]
    values = [float(s[key]) for s in done]
    intervals = [s[f"{key}_ci95"] for s in done if s[f"{key}_ci95"] is not None]
    return {
        "mean": statistics.fmean(values) if values else None,
        "seeds_sd": statistics.stdev(values) if len(values) > 1 else None,
        "tasks_ci95": max(intervals, default=None),
        "seeds": len(values),
    }


def instability(epochs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How far validation went back: the loss over its least before, and accuracy points lost from its best before."""
    losses = [e["val_loss"] for e in epochs]
    accuracies = [e["val_accuracy"] for e in epochs]
    rise, drop = 1.0, 0.0
    for i in range(1, len(losses)):
        before = (
            min(v for v in losses[:i] if v is not None) if any(v is not None for v in losses[:i]) else None
        )
        if losses[i] is None:
            rise = math.inf
        elif before:
            rise = max(rise, losses[i] / before)
        drop = max(drop, max(accuracies[:i]) - accuracies[i])
    return {
        "largest_loss_ratio": rise,
        "largest_accuracy_drop": drop,
        "epochs_with_higher_loss": sum(b is None or (a is not None and b > a) for a, b in pairwise(losses)),
        "epochs": len(losses),
        "last_accuracy": accuracies[-1] if accuracies else None,
    }


def as_json(
    table: str, scale: float, protocol: str, results: Sequence[tuple[Cell, Sequence[Outcome]]]
) -> dict[str, Any]:
    """The whole table with its conditions."""
    rows = []
    for cell, outcomes in results:
        rows.append(
            {
                "row": cell.row,
                "label": cell.label,
                "shots": cell.shots,
                "preset": cell.preset,
                "changes": list(cell.changes),
                "published": [vars(p) for p in cell.published],
                "single": over_seeds(outcomes, "test_accuracy"),
                "ensemble": over_seeds(outcomes, "ensemble_test_accuracy"),
                "runs": [
                    {
                        "seed": o.seed,
                        "fault": o.fault,
                        "summary": o.summary,
                        "instability": instability(o.epochs) if o.epochs else None,
                    }
                    for o in outcomes
                ],
            }
        )
    return {
        "table": table,
        "scale": scale,
        "protocol": protocol,
        "conditions": _conditions(results),
        "rows": rows,
    }


def as_markdown(
    table: str, scale: float, protocol: str, results: Sequence[tuple[Cell, Sequence[Outcome]]]
) -> str:
    """The table, with a caption that says what was done and what was not."""
    body = _instability_table(results) if table == "instability" else _accuracy_table(results)
    return f"# {TABLES[table]}\n\n{_caption(scale, protocol, results)}\n\n{body}\n{_sources(results)}"


def _caption(scale: float, protocol: str, results: Sequence[tuple[Cell, Sequence[Outcome]]]) -> str:
    configs = [cell.config for cell, _ in results]
    changes = list(dict.fromkeys(change for cell, _ in results for change in cell.changes))
    budgets = sorted({f"{c.epochs} epochs of {c.iterations_per_epoch} iterations" for c in configs})
    text = [
        f"Protocol `{protocol}`, scale {scale:g}: {' or '.join(budgets)}, {_range(configs, 'tasks')} tasks each."
    ]
    if changes:
        text.append(f"Against the presets: {', '.join(changes)}.")
    else:
        text.append("Nothing is changed against the presets.")
    return " ".join([*text, _conditions(results)])


def _conditions(results: Sequence[tuple[Cell, Sequence[Outcome]]]) -> str:
    configs = [cell.config for cell, _ in results]
    stats = " or ".join(sorted({c.eval_stats for c in configs}))
    seeds = max(len(outcomes) for _, outcomes in results)
    images = _range(configs, "targets")
    own = "each with training tasks of its own" + (
        " and an initialisation of its own"
        if configs[0].init_seed is None
        else ", all with one initialisation"
    )
    return (
        f"{_range(configs, 'ways')}-way, {images} target image{'' if images == '1' else 's'} a class; "
        f"{_range(configs, 'test_tasks')} test tasks, the same for all runs; {stats} statistics"
        f"{' (transductive)' if stats == 'batch' else ''}. {seeds} seed{'' if seeds == 1 else 's'}, {own}. Single: the "
        "epoch best in validation; ensemble: the mean of the raw logits of the "
        f"{_range(configs, 'ensemble')} best epochs, fewer where fewer were kept."
    )


def _range(configs: Sequence[Any], key: str) -> str:
    values = sorted({getattr(c, key) for c in configs})
    return " or ".join(str(v) for v in values)


def _accuracy_table(results: Sequence[tuple[Cell, Sequence[Outcome]]]) -> str:
    lines = []
    for cell, outcomes in results:
        faults = [f"seed {o.seed}: {o.fault}" for o in outcomes if o.fault is not None]
        minutes = sum(o.summary["seconds"] for o in outcomes if o.summary is not None) / 60
        lines.append(
            [
                cell.label,
                str(cell.shots),
                _accuracy(over_seeds(outcomes, "test_accuracy")),
                _accuracy(over_seeds(outcomes, "ensemble_test_accuracy")),
                ", ".join(f"{p}{_mark(p, results)}" for p in cell.published) or "–",
                f"{minutes:.1f}",
                "; ".join(faults),
            ]
        )
    header = [
        "row",
        "shots",
        "single, % ± s ± t",
        "ensemble, % ± s ± t",
        "published, %",
        "minutes",
        "stopped",
    ]
    return (
        _markdown(header, lines)
        + "\n± s: standard deviation over seeds; ± t: 95 % interval over test tasks, the widest of the runs."
    )


def _accuracy(found: Mapping[str, float | int | None]) -> str:
    mean, *spread = (found[key] for key in ("mean", "seeds_sd", "tasks_ci95"))
    if mean is None:
        return "–"
    return " ± ".join([f"{100 * mean:.2f}", *("–" if s is None else f"{100 * s:.2f}" for s in spread)])


def _instability_table(results: Sequence[tuple[Cell, Sequence[Outcome]]]) -> str:
    lines = []
    for cell, outcomes in results:
        for o in outcomes:
            found = instability(o.epochs) if o.epochs else None
            lines.append(
                [
                    cell.label,
                    str(o.seed),
                    "–" if found is None else f"{100 * found['last_accuracy']:.1f}",
                    "–" if found is None else f"{100 * found['largest_accuracy_drop']:.1f}",
                    "–" if found is None else f"{found['largest_loss_ratio']:.2f}",
                    "–" if found is None else f"{found['epochs_with_higher_loss']} of {found['epochs']}",
                    "finished" if o.fault is None else o.fault,
                ]
            )
    header = [
        "row",
        "seed",
        "last validation, %",
        "largest drop, points",
        "largest loss ratio",
        "epochs up",
        "end",
    ]
    return (
        _markdown(header, lines)
        + "\nDrop: points of validation accuracy below the best before. Loss ratio: validation loss over its least "
        "before. Epochs up: those whose validation loss is above the one before. The paper's figure 1 has no numbers: "
        "of three seeds of strided MAML two became erratic, and none of strided MAML++."
    )


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _all_sources(results: Sequence[tuple[Cell, Sequence[Outcome]]]) -> list[str]:
    return list(dict.fromkeys(p.source for cell, _ in results for p in cell.published))


def _mark(published: Published, results: Sequence[tuple[Cell, Sequence[Outcome]]]) -> str:
    return f" [{_all_sources(results).index(published.source) + 1}]"


def _sources(results: Sequence[tuple[Cell, Sequence[Outcome]]]) -> str:
    return "".join(f"\n[{i}] {source}." for i, source in enumerate(_all_sources(results), 1)) + "\n"
