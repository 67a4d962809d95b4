"""The figures of a report, made of what the runs recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mamlpp_fast.report.figures import Choice, Figure, Frame, Panel, Series, Table, number, percent
from mamlpp_fast.report.runs import Run

__all__ = ["all_figures"]

# Epochs in the table of a figure with a slider.
_TABLE_EPOCHS = 25
_NORMS = {
    "weight": "weight, mean over channels",
    "weight_spread": "weight, standard deviation over channels",
    "bias": "bias, mean over channels",
    "bias_spread": "bias, standard deviation over channels",
    "running_mean": "running mean, mean over channels",
    "running_var": "running variance, mean over channels",
}

# Of a run, an epoch's line, a panel: a line's heights.
Heights = Callable[[dict[str, Any], str], Sequence[Any] | None]


def all_figures(runs: Sequence[Run]) -> list[Figure]:
    """Every figure; one whose numbers no run recorded says so in its notes and has no panels."""
    return [learning_curves(runs), step_accuracy(runs), inner_rates(runs), batch_norms(runs), times(runs)]


def _not_recorded(runs: Sequence[Run], key: str) -> list[str]:
    return [f"{run.name}: not recorded." for run in runs if not run.records(key)]


def _scaled(values: Sequence[Any]) -> list[float | None]:
    return [None if v is None else 100 * v for v in values]


def learning_curves(runs: Sequence[Run]) -> Figure:
    """Loss and accuracy of training and validation, and the schedules behind them."""
    loss, accuracy = [], []
    for i, run in enumerate(runs):
        x = run.iterations
        for kind, dash in (("val", "solid"), ("train", "dot")):
            name = f"{run.name}, {'validation' if kind == 'val' else 'training'}"
            loss.append(Series(name, x, run.column(f"{kind}_loss"), i, i, dash))
            accuracy.append(Series(name, x, _scaled(run.column(f"{kind}_accuracy")), i, i, dash))
    panels = [
        Panel("Loss", "iteration", "cross-entropy", loss, log=_spans_decades(loss)),
        Panel("Accuracy", "iteration", "%", accuracy),
    ]
    weights, notes = _step_weights(runs)
    if weights:
        panels.append(Panel("Multi-step weights", "iteration", "weight", weights, legend=True))
    panels.append(
        Panel(
            "Meta learning rate",
            "iteration",
            "rate of Adam",
            [Series(run.name, run.iterations, run.column("meta_lr"), i, i) for i, run in enumerate(runs)],
        )
    )
    rows = [
        [
            run.name,
            number(e.get("epoch")),
            str(e.get("iteration", "–")),
            *(number(e.get(k)) for k in ("train_loss", "val_loss")),
            *(percent(e.get(k)) for k in ("train_accuracy", "val_accuracy", "val_accuracy_ci95")),
            " ".join(number(w, 3) for w in e.get("msl_weights") or ()) or "last step only",
            number(e.get("meta_lr")),
            _order(e.get("second_order")),
        ]
        for run in runs
        for e in run.epochs
    ]
    header = ["run", "epoch", "iteration", "training loss", "validation loss", "training %", "validation %"]
    header += ["± 95 %", "multi-step weights", "meta rate", "order"]
    text = (
        "Solid: validation, on the same tasks every epoch; dotted: training, mean over the epoch. "
        "The training loss weighs the steps as the multi-step weights say; without any, the last step counts alone."
    )
    return Figure("curves", "Learning curves", text, panels, Table(header, rows), notes=notes)


def _order(second: bool | None) -> str:
    return "–" if second is None else "second" if second else "first"


def _spans_decades(series: Sequence[Series]) -> bool:
    values = [v for s in series for v in s.y if v is not None]
    return bool(values) and min(values) > 0 and max(values) > 20 * min(values)


def _step_weights(runs: Sequence[Run]) -> tuple[list[Series], list[str]]:
    """A line a step for every schedule that differs, and, where several do, which runs follow which."""
    schedules: dict[str, list[Run]] = {}
    for run in runs:
        if run.records("msl_weights"):
            schedules.setdefault(repr([run.iterations, run.column("msl_weights")]), []).append(run)
    dashes = {"solid": "solid", "dash": "dashed", "dot": "dotted", "dashdot": "dashes and dots"}
    lines, notes = [], []
    for at, sharing in enumerate(schedules.values()):
        dash, word = list(dashes.items())[at % len(dashes)]
        notes.append(f"Multi-step weights, {word}: {', '.join(run.name for run in sharing)}.")
        column = sharing[0].column("msl_weights")
        steps = max(len(w) for w in column if w is not None)
        # Without weights the last step counts alone.
        full = [[0.0] * (steps - 1) + [1.0] if w is None else w for w in column]
        for k in range(steps):
            heights = [w[k] for w in full]
            lines.append(
                Series(f"step {k + 1}", sharing[0].iterations, heights, k, None, dash, legend=at == 0)
            )
    return lines, notes if len(schedules) > 1 else []


def _moving(
    runs: Sequence[Run],
    key: str,
    panels: Sequence[str],
    x: Callable[[str], Sequence[Any]],
    titles: tuple[str, str],
    quantities: dict[str, Heights],
    zero: bool = False,
) -> tuple[list[Panel], list[Choice]]:
    """Panels with a line a run, moved through the epochs; a choice a quantity. An ended run stays at its end."""
    having = [(i, run) for i, run in enumerate(runs) if run.records(key)]
    count = max((len(run.epochs) for _, run in having), default=0)
    choices = []
    for label, heights in quantities.items():
        frames = []
        for at in range(count):
            lines = [
                [
                    heights(run.epochs[min(at, len(run.epochs) - 1)], panel) or [None] * len(x(panel))
                    for _, run in having
                ]
                for panel in panels
            ]
            frames.append(Frame(_epoch_label(having, at), lines))
        choices.append(Choice(label, frames, zero))
    if not count:
        return [], []
    last = choices[0].frames[-1].y
    made = [
        Panel(
            panel,
            *titles,
            [Series(run.name, x(panel), last[p][line], i, i) for line, (i, run) in enumerate(having)],
        )
        for p, panel in enumerate(panels)
    ]
    return made, choices


def _epoch_label(having: Sequence[tuple[int, Run]], at: int) -> str:
    run = next(run for _, run in having if at < len(run.epochs))
    line = run.epochs[at]
    return f"epoch {line.get('epoch', at)}, iteration {line.get('iteration', '–')}"


def _thinned(epochs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most ``_TABLE_EPOCHS`` of them, evenly spread, first and last among them."""
    n = len(epochs)
    if n <= _TABLE_EPOCHS:
        return list(epochs)
    return [epochs[round(i * (n - 1) / (_TABLE_EPOCHS - 1))] for i in range(_TABLE_EPOCHS)]


def _thinning_note(runs: Sequence[Run]) -> list[str]:
    if any(len(run.epochs) > _TABLE_EPOCHS for run in runs):
        return [f"The table shows {_TABLE_EPOCHS} epochs, evenly spread; the slider has all."]
    return []


def _step_header(rows: Sequence[Sequence[str]], first: Sequence[str]) -> list[str]:
    """``first`` and a column a step; shorter rows are filled up by the page."""
    steps = max((len(row) for row in rows), default=len(first)) - len(first)
    return [*first, *(f"step {k + 1}" for k in range(steps))]


def step_accuracy(runs: Sequence[Run]) -> Figure:
    """Validation accuracy after every inner step."""
    key = "val_step_accuracy"
    steps = max((len(v) for run in runs for v in run.column(key) if v is not None), default=0)

    def heights(epoch: dict[str, Any], _: str) -> list[float | None]:
        values = _scaled(epoch.get(key) or [])
        return values + [None] * (steps - len(values))

    axis = [str(k + 1) for k in range(steps)]
    panels, choices = _moving(
        runs, key, ["Validation accuracy"], lambda _: axis, ("inner step", "%"), {"accuracy": heights}
    )
    rows = [
        [run.name, str(e.get("epoch", "–")), *(percent(v) for v in e[key])]
        for run in runs
        for e in _thinned(run.epochs)
        if e.get(key) is not None
    ]
    return Figure(
        "steps",
        "Accuracy after each inner step",
        "How far every inner update takes the network on the validation tasks.",
        panels,
        Table(_step_header(rows, ["run", "epoch"]), rows),
        choices,
        [*_not_recorded(runs, key), *_thinning_note(runs)],
    )


def inner_rates(runs: Sequence[Run]) -> Figure:
    """The learned inner rates: a panel a step, in it the rate by layer."""
    key = "inner_rates"
    names = list(dict.fromkeys(n for run in runs for e in run.epochs for n in e.get(key) or ()))
    moved = [n for n in names if _moves(runs, n)] or [n for n in names if n.endswith("weight")] or names
    steps = max((len(r) for run in runs for e in run.epochs for r in (e.get(key) or {}).values()), default=0)
    labels = [n.removesuffix(".weight") if n.endswith(".weight") else n for n in moved]

    def heights(epoch: dict[str, Any], panel: str) -> list[float | None] | None:
        rates = epoch.get(key)
        if rates is None:
            return None
        k = int(panel.removeprefix("Step ")) - 1
        return [rates[n][k] if n in rates and k < len(rates[n]) else None for n in moved]

    panels, choices = _moving(
        runs,
        key,
        [f"Step {k + 1}" for k in range(steps)],
        lambda _: labels,
        ("", "rate"),
        {"rate": heights},
        zero=True,
    )
    rows = [
        [run.name, str(e.get("epoch", "–")), name, *(number(r) for r in rates)]
        for run in runs
        for e in _thinned(run.epochs)
        for name, rates in (e.get(key) or {}).items()
    ]
    text = (
        "The inner learning rate of every layer, a plot for each inner step; below the line at zero a step goes up the "
        "gradient. Rates are neither clamped nor kept positive."
    )
    notes = [*_not_recorded(runs, key), *_thinning_note(runs)]
    if still := [n for n in names if n not in moved]:
        notes.append(f"In the table alone, since no run moved them: {', '.join(still)}.")
    return Figure(
        "rates",
        "Inner learning rates",
        text,
        panels,
        Table(_step_header(rows, ["run", "epoch", "tensor"]), rows, 3),
        choices,
        notes,
    )


def _moves(runs: Sequence[Run], name: str) -> bool:
    """Whether a tensor's rates differ between steps or epochs of some run."""
    for run in runs:
        values = {r for e in run.epochs for r in (e.get("inner_rates") or {}).get(name, ())}
        if len(values) > 1:
            return True
    return False


def batch_norms(runs: Sequence[Run]) -> Figure:
    """Batch-norm weights and statistics by inner step: a panel a layer."""
    key = "batch_norm"
    layers = list(dict.fromkeys(n for run in runs for e in run.epochs for n in e.get(key) or ()))
    steps = max(
        (len(q) for run in runs for e in run.epochs for n in (e.get(key) or {}).values() for q in n.values()),
        default=0,
    )

    def of(quantity: str) -> Heights:
        def heights(epoch: dict[str, Any], layer: str) -> list[float | None] | None:
            values = (epoch.get(key) or {}).get(layer, {}).get(quantity)
            if values is None:
                return None
            # One row that all steps share is drawn at every step.
            return list(values) * steps if len(values) == 1 else values + [None] * (steps - len(values))

        return heights

    axis = [str(k + 1) for k in range(steps)]
    panels, choices = _moving(
        runs,
        key,
        layers,
        lambda _: axis,
        ("inner step", ""),
        {label: of(quantity) for quantity, label in _NORMS.items()},
    )
    rows = [
        [run.name, str(e.get("epoch", "–")), layer, _NORMS[quantity], *(number(v) for v in values)]
        for run in runs
        for e in _thinned(run.epochs)
        for layer, found in (e.get(key) or {}).items()
        for quantity, values in found.items()
        if quantity in _NORMS
    ]
    return Figure(
        "norms",
        "Batch norm by inner step",
        "Weights, biases and running statistics of every batch norm at each inner step; level where the steps share "
        "one row. Predictions use the statistics of the batch unless the settings say otherwise.",
        panels,
        Table(_step_header(rows, ["run", "epoch", "layer", "quantity"]), rows, 4),
        choices,
        [*_not_recorded(runs, key), *_thinning_note(runs)],
    )


def times(runs: Sequence[Run]) -> Figure:
    """Accuracy against the clock, and what an epoch takes."""
    accuracy, epoch = [], []
    rows = []
    for i, run in enumerate(runs):
        seconds = run.column("seconds")
        spent = [
            None if now is None or before is None else now - before
            for before, now in zip([0.0, *seconds], seconds, strict=False)
        ]
        minutes = [None if s is None else s / 60 for s in seconds]
        accuracy.append(Series(run.name, minutes, _scaled(run.column("val_accuracy")), i, i))
        epoch.append(Series(run.name, run.column("epoch"), spent, i, i))
        rows += [
            [
                run.name,
                str(e.get("epoch", "–")),
                number(m),
                number(s),
                number(e.get("seconds_per_iteration")),
                number(e.get("peak_memory_mib"), 5),
            ]
            for e, m, s in zip(run.epochs, minutes, spent, strict=True)
        ]
    header = [
        "run",
        "epoch",
        "minutes in all",
        "seconds, this epoch",
        "seconds an iteration",
        "peak memory, MiB",
    ]
    return Figure(
        "times",
        "Time and memory",
        "Training, validation and checkpoints together; seconds an iteration are of training alone. Memory is the peak "
        "of the process on a CPU, of torch's allocations on a GPU.",
        [
            Panel("Validation accuracy against time", "minutes", "%", accuracy),
            Panel("Seconds by epoch", "epoch", "seconds", epoch),
        ],
        Table(header, rows),
        notes=[f"{n[:-1]}: memory." for n in _not_recorded(runs, "peak_memory_mib")],
    )
