"""The plots: rows of a result file to SVG, the same bytes for the same rows."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any, ParamSpec

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
_P = ParamSpec("_P")
_STYLE = {
    "svg.hashsalt": "mamlpp_fast",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}
OURS, THEIRS, GREY = "#c8452c", "#5b7fa6", "#8a8a8a"


def _svg(figure: Figure) -> bytes:
    # The layout's solver goes through sets in the order of addresses, which the last bits of its result depend on; the
    # names of clip paths are made of all of them.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for ax in figure.axes:
        left, bottom, width, height = (round(part, 9) for part in ax.get_position().bounds)
        ax.set_position((left, bottom, width, height))
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    # A blank at the end of a line is all that Matplotlib's own text lacks to be clean.
    lines = (line.rstrip() for line in file.getvalue().decode().splitlines())
    return ("\n".join(lines) + "\n").encode()


def drawn(draw: Callable[_P, Figure]) -> Callable[_P, bytes]:
    """The SVG of the figure, in the style of all of them."""

    @functools.wraps(draw)
    def plot(*args: _P.args, **kwargs: _P.kwargs) -> bytes:
        with matplotlib.rc_context(_STYLE):
            return _svg(draw(*args, **kwargs))

    return plot


def _whiskers(quartiles: list[float]) -> list[list[float]]:
    low, median, high = quartiles
    return [[median - low], [high - median]]


@drawn
def peers(rows: Rows) -> Figure:
    """Time of a meta-gradient by peer, a panel a workload; what was not timed is in the table."""
    timed = [r for r in rows if "quartiles" in r]
    workloads = list(dict.fromkeys(r["workload"] for r in timed))
    heights = [sum(r["workload"] == w for r in timed) for w in workloads]
    figure, axes = plt.subplots(
        len(workloads),
        1,
        squeeze=False,
        figsize=(7, 0.27 * sum(heights) + 0.8 * len(workloads)),
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for ax, workload in zip(axes[:, 0], workloads, strict=True):
        for y, r in enumerate(r for r in timed if r["workload"] == workload):
            ms = [1e3 * q for q in r["quartiles"]]
            color = OURS if r["peer"].startswith("ours") else THEIRS
            ax.barh(y, ms[1], xerr=_whiskers(ms), color=color, height=0.7, error_kw={"lw": 0.8})
            ax.text(ms[2], y, f" {ms[1]:.0f}", va="center", fontsize=8)
            ax.text(0, y, f"{r['peer']} ", va="center", ha="right", fontsize=8)
        ax.set_yticks([])
        ax.invert_yaxis()
        ax.set_title(workload, loc="left", fontsize=9)
    axes[-1, 0].set_xlabel("ms a meta-gradient: median and quartiles")
    return figure


_MARKERS = ("o", "s", "^", "D", "v", "P")


@drawn
def roofline(rows: Rows) -> Figure:
    """Rate over operations a byte, a panel a dtype, under the peak and the rates of copies in the same run."""
    timed = [r for r in rows if r.get("gflop_per_s") and not r["size"].startswith("dispatch")]
    dtypes = [d for d in ("float32", "bfloat16") if any(r["dtype"] == d for r in timed)]
    figure, axes = plt.subplots(
        1, len(dtypes), squeeze=False, figsize=(4.2 * len(dtypes), 4), layout="constrained", sharey=True
    )
    operations = list(dict.fromkeys(r["operation"] for r in timed))
    for ax, dtype in zip(axes[0], dtypes, strict=True):
        own = [r for r in timed if r["dtype"] == dtype]
        _roofs(ax, own)
        for i, operation in enumerate(operations):
            points = [r for r in own if r["operation"] == operation]
            ax.plot(
                [r["gflop_per_s"] / r["gb_per_s"] for r in points],
                [r["gflop_per_s"] for r in points],
                _MARKERS[i % len(_MARKERS)],
                color=f"C{i}",
                markersize=4,
                alpha=0.8,
                label=operation,
            )
        ax.set_xscale("log", base=10)
        ax.set_yscale("log", base=10)
        ax.set_title(dtype, loc="left", fontsize=9)
        ax.set_xlabel("operations a byte")
        ax.grid(which="major", lw=0.3)
    axes[0, 0].set_ylabel("GFLOP/s")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _roofs(ax: Axes, rows: Rows) -> None:
    """The multiply-add peak, and the slowest and the fastest of the copies of as many bytes."""
    peak = max(r["gflop_per_s"] / r["share_of_peak"] for r in rows)
    copies = [r["gb_per_s"] / r["share_of_copy"] for r in rows if r["bytes"] > 2**16]
    intensities = [r["gflop_per_s"] / r["gb_per_s"] for r in rows]
    left, right = min(intensities) / 2, max(intensities) * 2
    ax.plot([left, right], [peak, peak], color=GREY, lw=1)
    ax.annotate(f"peak {peak:.0f} GFLOP/s", (left, peak), va="bottom", fontsize=7, color=GREY)
    for copy, style in ((min(copies), ":"), (max(copies), "--")):
        end = min(peak / copy, right)
        ax.plot([left, end], [left * copy, end * copy], style, color=GREY, lw=1)
        ax.annotate(f"copy {copy:.0f} GB/s", (left, left * copy), va="top", fontsize=7, color=GREY)


@drawn
def scaling(rows: Rows) -> Figure:
    """Time of an iteration over each size, with the line on which it would be proportional."""
    names = list(dict.fromkeys(r["varies"] for r in rows))
    figure, axes = plt.subplots(
        1, len(names), squeeze=False, figsize=(2.1 * len(names), 2.6), layout="constrained"
    )
    for ax, name in zip(axes[0], names, strict=True):
        own = [r for r in rows if r["varies"] == name]
        x = [r["value"] for r in own]
        quartiles = [r["ms"] for r in own]
        y = [q[1] for q in quartiles]
        spans = [[q[1] - q[0] for q in quartiles], [q[2] - q[1] for q in quartiles]]
        ideal = [y[0] * (x[0] / v if name == "threads" else v / x[0]) for v in x]
        ax.plot(x, ideal, ":", color=GREY, lw=1)
        ax.errorbar(x, y, spans, fmt="o-", color=OURS, markersize=3, lw=1)
        ax.set_ylim(0)
        ax.set_xlim(0)
        ax.set_xlabel(name)
        ax.grid(lw=0.3)
    axes[0, 0].set_ylabel("ms an iteration")
    return figure


@drawn
def curves(rows: Rows) -> Figure:
    """Validation accuracy and loss of each run over meta-updates, a colour for each row of the table."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    labels = list(dict.fromkeys(r["label"] for r in rows))
    for r in rows:
        x = [e["iteration"] for e in r["epochs"]]
        color = f"C{labels.index(r['label'])}"
        for ax, y in (
            (axes[0], [100 * e["val_accuracy"] for e in r["epochs"]]),
            (axes[1], [float("nan") if e["val_loss"] is None else e["val_loss"] for e in r["epochs"]]),
        ):
            ax.plot(x, y, ".-", color=color, lw=1, markersize=3, label=r["label"] if ax is axes[0] else None)
    for ax, text in zip(axes, ("validation accuracy, %", "validation loss"), strict=True):
        ax.set_xlabel("meta-updates")
        ax.set_ylabel(text)
        ax.grid(lw=0.3)
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure
