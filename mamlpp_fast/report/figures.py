"""What a figure is, and its form for plotly."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "COLOURS",
    "Choice",
    "Figure",
    "Frame",
    "Panel",
    "Series",
    "Table",
    "look",
    "number",
    "percent",
    "plotly",
]

# Each at least 3:1 against the page's light and its dark ground (WCAG 1.4.11).
COLOURS = ("#2f7de1", "#d9691e", "#1f9d6b", "#c74aa0", "#8a6fe8", "#a07d1c", "#d9484f", "#3a94a8")
# plotly's markers, and the characters that stand for them in the page.
_SYMBOLS = {
    "circle": "●",
    "square": "■",
    "diamond": "◆",
    "triangle-up": "▲",
    "x": "✖",
    "star": "★",
    "cross": "✚",
    "triangle-down": "▼",
}

Number = float | int | None


@dataclass(frozen=True)
class Series:
    """A line: ``index`` gives colour and marker, ``run`` what the page's switches show and hide."""

    name: str
    x: Sequence[Any]
    y: Sequence[Number]
    index: int
    run: int | None = None
    dash: str = "solid"
    legend: bool = True


@dataclass(frozen=True)
class Panel:
    """One plot of a figure."""

    title: str
    x_title: str
    y_title: str
    series: Sequence[Series]
    legend: bool = False
    log: bool = False


@dataclass(frozen=True)
class Frame:
    """Heights for one position of the slider: a list a panel, in it a list a series."""

    label: str
    y: Sequence[Sequence[Sequence[Number]]]


@dataclass(frozen=True)
class Choice:
    """The frames of one quantity, all on one scale, which takes in 0 if asked to."""

    label: str
    frames: Sequence[Frame]
    zero: bool = False

    def range(self) -> tuple[float, float] | None:
        values = [v for f in self.frames for panel in f.y for line in panel for v in line if v is not None]
        if not values:
            return None
        low, high = min(values), max(values)
        if self.zero:
            low, high = min(low, 0.0), max(high, 0.0)
        pad = 0.06 * (high - low) or 0.1 * abs(high) or 0.1
        return low - pad, high + pad


@dataclass(frozen=True)
class Table:
    """Texts in the first ``texts`` columns, numbers in the others; short rows are filled up."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1


@dataclass(frozen=True)
class Figure:
    """Panels, the table behind them, and what a slider moves them through.

    Attributes:
        key: its name in the page.
        title: ditto, for people.
        text: what it shows.
        panels: the plots, at the last frame.
        table: the same in numbers.
        choices: none, one, or several to choose from.
        notes: what is missing and why.
    """

    key: str
    title: str
    text: str
    panels: Sequence[Panel]
    table: Table
    choices: Sequence[Choice] = ()
    notes: Sequence[str] = field(default=())


def look(index: int) -> tuple[str, str, str]:
    """Colour, plotly's marker and its character of the line ``index``: all different for the first 64."""
    n = len(_SYMBOLS)
    symbol = list(_SYMBOLS)[(index + index // len(COLOURS)) % n]
    return COLOURS[index % len(COLOURS)], symbol, _SYMBOLS[symbol]


def number(value: Any, digits: int = 4) -> str:
    """``digits`` significant digits; a dash for nothing."""
    return "–" if value is None else f"{value:.{digits}g}"


def percent(value: Any, digits: int = 2) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"


def plotly(figure: Figure) -> dict[str, Any]:
    """The figure for the page's script: plotly's ``data`` and ``layout`` a panel, and the frames."""
    scale = figure.choices[0].range() if figure.choices else None
    return {
        "key": figure.key,
        "panels": [_panel(panel, scale) for panel in figure.panels],
        "choices": [
            {
                "label": choice.label,
                "range": choice.range(),
                "frames": [{"label": frame.label, "y": frame.y} for frame in choice.frames],
            }
            for choice in figure.choices
        ],
    }


def _panel(panel: Panel, scale: tuple[float, float] | None) -> dict[str, Any]:
    # plotly reads a subset of HTML in every text, so that of others is escaped.
    yaxis: dict[str, Any] = {"title": {"text": html.escape(panel.y_title)}, "automargin": True}
    if panel.log:
        yaxis |= {"type": "log", **_log_ticks([v for s in panel.series for v in s.y if v is not None])}
    if scale is not None:
        yaxis["range"] = list(scale)
    named = any(isinstance(x, str) for s in panel.series for x in s.x)
    kind = "category" if named else "linear"
    layout = {
        "xaxis": {"title": {"text": html.escape(panel.x_title)}, "automargin": True, "type": kind},
        "yaxis": yaxis,
        "showlegend": panel.legend,
    }
    return {"title": panel.title, "data": [_trace(s) for s in panel.series], "layout": layout}


def _log_ticks(values: Sequence[float]) -> dict[str, Any]:
    """1, 2, 5, 10, ... written out: plotly would write bare digits."""
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    return {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _trace(series: Series) -> dict[str, Any]:
    colour, symbol, _ = look(series.index)
    texts = [html.escape(x) if isinstance(x, str) else x for x in series.x]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": html.escape(series.name),
        "x": texts,
        "y": list(series.y),
        "line": {"color": colour, "dash": series.dash, "width": 2},
        "marker": {"color": colour, "symbol": symbol, "size": 6},
        "meta": {"run": series.run},
        "showlegend": series.legend,
    }
