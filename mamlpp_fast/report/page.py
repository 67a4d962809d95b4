"""The page: HTML of everything, every text escaped, no address outside the page."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

from mamlpp_fast._version import __version__
from mamlpp_fast.report.confusion import Confusions
from mamlpp_fast.report.figures import Figure, Table, look, number, percent, plotly
from mamlpp_fast.report.runs import Run

__all__ = ["page"]

# Nothing may be fetched from anywhere, whatever a name in a run says.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def page(runs: Sequence[Run], figures: Sequence[Figure], found: Sequence[Confusions], script: str) -> str:
    """The whole page.

    Args:
        runs: the runs.
        figures: what to draw of them.
        found: the confusions of each run.
        script: plotly's script.
    """
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    sections = [
        ("results", "Results", _results(runs)),
        *((figure.key, figure.title, _figure(figure, runs)) for figure in figures),
        ("confusions", "Classes taken for each other", _confusions(runs, found)),
        ("settings", "Settings and versions", _settings(runs)),
    ]
    links = "".join(f'<li><a href="#{key}">{_e(name)}</a></li>' for key, name, _ in sections)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{_e(name)}</h2>{content}</section>'
        for key, name, content in sections
    )
    own = files("mamlpp_fast.report")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{_e(title)} · mamlpp_fast</title>
<style>
{own.joinpath("page.css").read_text()}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header>
<h1>{_e(title)}</h1>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main id="main">
<noscript><p>The figures need JavaScript; the tables under them hold the same numbers.</p></noscript>
{body}
</main>
<footer><p>mamlpp_fast {_e(__version__)}. Accuracies are shares of target images named rightly; intervals are 95 %
over tasks.</p></footer>
<script>{script}</script>
<script type="application/json" id="figures">{_json([plotly(figure) for figure in figures])}</script>
<script>
{own.joinpath("page.js").read_text()}</script>
</body>
</html>
"""


def _e(text: Any) -> str:
    return html.escape(str(text))


def _json(value: Any) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _swatch(index: int) -> str:
    colour, _, character = look(index)
    return f'<span class="swatch" style="color:{colour}" aria-hidden="true">{character}</span>'


def _scroll(label: str, table: str) -> str:
    """A table that scrolls by itself, with the keyboard too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{_e(label)}">{table}</div>'


def _table(table: Table, label: str) -> str:

    def cells(row: Sequence[str], tag: str) -> str:
        filled = [*row, *[""] * (len(table.header) - len(row))]
        return "".join(
            f"<{tag}{'' if i < table.texts else ' class=n'}>{_e(cell)}</{tag}>"
            for i, cell in enumerate(filled)
        )

    head = cells(table.header, "th").replace("<th", '<th scope="col"')
    rows = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in table.rows)
    return _scroll(label, f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>")


def _notes(notes: Iterable[str]) -> str:
    items = "".join(f"<li>{_e(note)}</li>" for note in notes)
    return f'<ul class="notes soft">{items}</ul>' if items else ""


def _results(runs: Sequence[Run]) -> str:
    protocols = [_protocol(run) for run in runs]
    same = len(set(protocols)) == 1
    header = [
        "run",
        "test, single model, %",
        "test, ensemble, %",
        "best validation, %",
        "iterations",
        "minutes",
    ]
    header += ["s an iteration", "tasks/s", "peak MiB", "engine", *([] if same else ["tasks"])]
    rows = []
    for i, (run, protocol) in enumerate(zip(runs, protocols, strict=True)):
        box = f'<input type="checkbox" checked data-run="{i}">' if len(runs) > 1 else ""
        tag = "label" if box else "span"
        name = f'<th scope="row"><{tag} class="pick">{box}{_swatch(i)} {_e(run.name)}</{tag}></th>'
        *numbers, engine = _result_cells(run)
        cells = "".join(f"<td class=n>{_e(cell)}</td>" for cell in numbers)
        texts = "".join(f"<td>{_e(text)}</td>" for text in [engine, *([] if same else [protocol])])
        rows.append(f"<tr>{name}{cells}{texts}</tr>")
    kinds = ["", *[" class=n"] * 8, "", ""]
    head = "".join(
        f'<th scope="col"{kind}>{_e(cell)}</th>' for cell, kind in zip(header, kinds, strict=False)
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    text = f"<p>{_e(protocols[0])}.</p>" if same else ""
    hint = "<p class=soft>A run's box shows or hides it in every figure.</p>" if len(runs) > 1 else ""
    return text + hint + _scroll("Results", table)


def _result_cells(run: Run) -> list[str]:
    s, c = run.summary or {}, run.config
    last = run.epochs[-1] if run.epochs else {}
    each = s.get("seconds_per_iteration", last.get("seconds_per_iteration"))
    seconds = s.get("seconds", last.get("seconds"))
    memory = [m for m in run.column("peak_memory_mib") if m is not None]
    ensemble = "–"
    if s.get("ensemble_size", 1) > 1:
        accuracy = _interval(s.get("ensemble_test_accuracy"), s.get("ensemble_test_accuracy_ci95"))
        ensemble = f"{accuracy} (of {s['ensemble_size']})"
    best = max((v for v in run.column("val_accuracy") if v is not None), default=None)
    epoch = s.get("best_epoch")
    return [
        _interval(s.get("test_accuracy"), s.get("test_accuracy_ci95")) if s else "not finished",
        ensemble,
        percent(s.get("best_val_accuracy", best)) + ("" if epoch is None else f" (epoch {epoch})"),
        str(s.get("iterations", last.get("iteration", "–"))),
        number(None if seconds is None else seconds / 60, 3),
        number(each, 3),
        number(c["tasks"] / each if each and "tasks" in c else None, 3),
        number(max(memory), 4) if memory else "not recorded",
        f"{s.get('engine', c.get('engine', '–'))}, {c.get('precision', '–')}, {s.get('device', c.get('device', '–'))}",
    ]


def _interval(mean: Any, half: Any) -> str:
    return percent(mean) if half is None else f"{percent(mean)} ± {percent(half)}"


def _protocol(run: Run) -> str:
    """Ways, shots, targets, number of tasks and whether the target images are judged together."""

    def get(key: str) -> Any:
        return (run.summary or {}).get(key, run.config.get(key, "–"))

    stats = (
        "batch statistics (transductive)"
        if get("eval_stats") == "batch"
        else f"{get('eval_stats')} statistics"
    )
    images = "image" if get("targets") == 1 else "images"
    return (
        f"{get('dataset')}, {get('ways')}-way {get('shots')}-shot, {get('targets')} target {images} a class, "
        f"{get('test_tasks')} test tasks, {stats}"
    )


def _figure(figure: Figure, runs: Sequence[Run]) -> str:
    moves = (
        " The slider goes through the epochs; a run that has ended stays at its end."
        if figure.choices
        else ""
    )
    parts = [f"<figure><figcaption>{_e(figure.text)}{moves}</figcaption>"]
    if figure.panels:
        parts.append(_notes(figure.notes))
        if len(runs) > 1:
            items = "".join(f"<li>{_swatch(i)} {_e(run.name)}</li>" for i, run in enumerate(runs))
            parts.append(f'<ul class="legend" aria-label="Colours">{items}</ul>')
        parts.append(_controls(figure))
        plots = "".join(
            f'<div class="panel"><h3>{_e(panel.title)}</h3><div class="plot" id="plot-{figure.key}-{p}" role="img" '
            f'aria-label="{_e(f"{figure.title}: {panel.title}; the numbers are in the table below")}"></div></div>'
            for p, panel in enumerate(figure.panels)
        )
        parts.append(f'<div class="panels{" small" if figure.choices else ""}">{plots}</div>')
    else:
        parts.append("<p>Not recorded by any of these runs.</p>")
    parts.append(
        f"<details><summary>Table: {_e(figure.title.lower())}</summary>"
        f"{_table(figure.table, f'Table: {figure.title}')}</details></figure>"
    )
    return "".join(parts)


def _controls(figure: Figure) -> str:
    if not figure.choices:
        return ""
    last = len(figure.choices[0].frames) - 1
    select = ""
    if len(figure.choices) > 1:
        options = "".join(f"<option>{_e(choice.label)}</option>" for choice in figure.choices)
        select = f'<label>Quantity <select id="choice-{figure.key}">{options}</select></label>'
    return (
        f'<div class="controls">{select}<label>Epoch <input type="range" id="epoch-{figure.key}" min="0" max="{last}" '
        f'value="{last}" step="1"></label><output id="shown-{figure.key}" for="epoch-{figure.key}">'
        f"{_e(figure.choices[0].frames[-1].label)}</output></div>"
    )


def _confusions(runs: Sequence[Run], found: Sequence[Confusions]) -> str:
    return (
        "<p class=soft>The pairs of classes the best checkpoint confuses most often, counted over test tasks: how "
        "many target images of the first it named as the second, of how many it saw in tasks that had both, and how "
        "sure it was of the second in the mean; of equals, the surer come first. The images: one of the mistaken ones, "
        "and a support image of the other class in the same task.</p>"
        + "".join(_pairs(run, c, len(runs) > 1) for run, c in zip(runs, found, strict=True))
    )


def _pairs(run: Run, found: Confusions, several: bool) -> str:
    title = f"<h3>{_e(run.name)}</h3>" if several else ""
    if found.reason is not None:
        return f"{title}<p>Not computed: {_e(found.reason)}</p>"
    text = f"{found.checkpoint}: {found.wrong} of {found.images} target images wrong in {found.tasks} tasks."
    if not found.pairs:
        return f"{title}<p>{_e(text)}</p>"
    header = ("class", "taken for", "times", "of", "sure, %")
    head = "".join(f'<th scope="col"{" class=n" if i > 1 else ""}>{h}</th>' for i, h in enumerate(header))
    rows = "".join(
        f"<tr><td>{_image(p.image, p.true)}</td><td>{_image(p.support, p.predicted)}</td>"
        f"<td class=n>{p.count}</td><td class=n>{p.met}</td><td class=n>{percent(p.probability, 0)}</td></tr>"
        for p in found.pairs
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f"{title}<p>{_e(text)}</p>{_scroll(f'Confusions of {run.name}', table)}"


def _image(png: str, name: str) -> str:
    alt = _e(f"image of {name}")
    image = f'<img class="sample" width="56" height="56" alt="{alt}" src="data:image/png;base64,{png}">'
    return f'<div class="class">{image}<span>{_e(name)}</span></div>'


def _settings(runs: Sequence[Run]) -> str:
    columns = [{**run.config, **_versions(run)} for run in runs]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    shown = [[json.dumps(c[k]) if k in c else "–" for c in columns] for k in keys]
    rows = list(zip(keys, shown, strict=True))
    differing = [(k, values) for k, values in rows if len(set(values)) > 1]
    parts = []
    if len(runs) > 1:
        parts.append("<h3>What differs</h3>")
        parts.append(_setting_table(runs, differing) if differing else "<p>Nothing.</p>")
    same = [(k, values) for k, values in rows if len(set(values)) == 1]
    name = "All settings" if len(runs) == 1 else "What is the same"
    parts.append(f"<details><summary>{name}</summary>{_setting_table(runs, same)}</details>")
    return "".join(parts)


def _versions(run: Run) -> dict[str, Any]:
    found = (run.summary or {}).get("versions", {})
    return {f"version of {name}": version for name, version in found.items()}


def _setting_table(runs: Sequence[Run], rows: Sequence[tuple[str, list[str]]]) -> str:
    same = all(len(set(values)) == 1 for _, values in rows)
    header = ["setting", *(["value"] if same else [run.name for run in runs])]
    table = Table(header, [[key, *(values[:1] if same else values)] for key, values in rows], len(header))
    return _table(table, "Settings")
