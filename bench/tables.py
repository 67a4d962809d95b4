"""The tables: rows of a result file to Markdown."""

from __future__ import annotations

import statistics
from typing import Any

from bench.harness import Times

_ABSENT = "Not measured on this machine yet."

Rows = list[dict[str, Any]]
COMPILED = ("torch.compile", "torch.compile-traced", "textbook-compiled", "textbook-compiled-net")


def table(header: list[str], lines: list[list[str]], texts: int = 1) -> str:
    """A Markdown table, numbers to the right; of its columns the first ``texts`` hold none."""
    rule = ["---" if i < texts else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines])


def spread(quartiles: list[float], digits: int) -> str:
    low, median, high = quartiles
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def to_itself(quartiles: list[float]) -> bool:
    """Whether this is the ratio, round by round, of a competitor to itself."""
    return set(quartiles) == {1.0}


def _ratio(quartiles: list[float] | None) -> str:
    """How many times as fast, round by round; nothing where it was not taken."""
    if quartiles is None:
        return ""
    return "1" if to_itself(quartiles) else spread(quartiles, 2)


def iterations(rows: Rows) -> str:
    lines = []
    for r in rows:
        name = [r["workload"], f"{r['engine']}, {r['precision']}"]
        if "fault" in r:
            lines.append([*name, f"not timed: {r['fault']}", *[""] * 7])
            continue
        lines.append(
            [
                *(*name, spread(r["ms"], 0), _ratio(r["ratio_quartiles"]), _ratio(r.get("again"))),
                *(f"{r['gflop_per_s']:.0f}", f"{r['share_of_peak']:.0%}"),
                *(_optional(r, "gb_per_s", ".0f"), _optional(r, "share_of_copy", ".0%")),
                f"{r['peak_memory_mib']:.0f}",
            ]
        )
    header = ["workload", "engine", "ms (quartiles)", "times reference", "in another run"]
    return table([*header, "GFLOP/s", "of peak", "GB/s", "of copy", "peak MiB"], lines)


def headline(rows: Rows) -> str:
    """Times of each workload by engine, one line a workload."""
    by_workload: dict[str, dict[str, dict[str, Any]]] = {}
    for r in rows:
        if not r["workload"].endswith("-final"):
            by_workload.setdefault(r["workload"], {})[f"{r['engine']}:{r['precision']}"] = r

    def cell(r: dict[str, Any] | None) -> str:
        if r is None or "ms" not in r:
            return "-"
        return f"{r['ms'][1]:.0f}" + (
            "" if r["engine"] == "reference" else f" ({r['ratio_quartiles'][1]:.1f}x)"
        )

    columns = {
        "reference:float32": "reference",
        "autograd:float32": "autograd engine",
        "fused:float32": "fused engine",
        "fused:bfloat16": "fused, bfloat16",
    }
    lines = [[name, *(cell(found.get(key)) for key in columns)] for name, found in by_workload.items()]
    return table(["workload, ms an iteration", *columns.values()], lines)


def _named(r: dict[str, Any]) -> list[str]:
    return [f"`{r['operation']}` {r['order']}", r["size"], f"{r['dtype']}, {r['layout']}"]


def kernels(rows: Rows) -> str:
    """Every operation at every size."""
    header = [
        *("operation", "size", "", "us", "PyTorch us", "times as fast", "MiB moved"),
        *("GB/s", "of copy", "GFLOP/s", "of peak", "of the roof"),
    ]
    lines = []
    for r in rows:
        if "fault" in r:
            lines.append([*_named(r), f"not timed: {r['fault']}", *[""] * 8])
            continue
        lines.append(
            [
                *_named(r),
                *(f"{r['ours_us'][1]:.0f}", f"{r['torch_us'][1]:.0f}", _ratio(r["ratio_quartiles"])),
                *(f"{r['bytes'] / 2**20:.1f}", f"{r['gb_per_s']:.1f}", f"{r['share_of_copy']:.0%}"),
                *(f"{r['gflop_per_s']:.0f}", f"{r['share_of_peak']:.0%}", f"{r['share_of_roof']:.0%}"),
            ]
        )
    return table(header, lines)


def _optional(r: dict[str, Any], key: str, form: str) -> str:
    """A number that not every row has."""
    return format(r[key], form) if r.get(key) is not None else ""


def _in_dispatch(r: dict[str, Any]) -> bool:
    return bool(r["size"].startswith("dispatch"))


def kernel_summary(rows: Rows) -> str:
    """A line for all sizes of an operation, order, dtype and layout."""
    groups: dict[tuple[str, ...], Rows] = {}
    for r in rows:
        if not _in_dispatch(r):
            groups.setdefault((r["operation"], r["order"], r["dtype"], r["layout"]), []).append(r)
    lines = []
    for (operation, order, dtype, layout), found in groups.items():
        timed = [r for r in found if "fault" not in r]
        name = [f"`{operation}` {order}", f"{dtype}, {layout}", str(len(found))]
        if not timed:
            lines.append([*name, "not timed", ""])
            continue
        shares = [max(r["share_of_copy"], r["share_of_peak"]) for r in timed]
        lines.append([*name, _range([r["ratio"] for r in timed], ".2f"), _range(shares, ".0%")])
    return table(["operation", "", "sizes", "times as fast as PyTorch", "of the nearer ceiling"], lines)


def _range(values: list[float], form: str) -> str:
    """Median, least and most."""
    if len(values) == 1:
        return format(values[0], form)
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def behind(rows: Rows) -> str:
    """What PyTorch does faster, by more than two timings of the same differ."""
    lines = [
        [*_named(r), f"{r['ours_us'][1]:.0f}", f"{r['torch_us'][1]:.0f}", f"{r['ratio']:.2f}"]
        for r in rows
        if "fault" not in r and not _in_dispatch(r) and r["ratio"] * (1 + r["noise"]) < 1
    ]
    return table(["operation", "size", "", "us", "PyTorch us", "times as fast"], lines) if lines else "None."


def dispatch(rows: Rows) -> str:
    lines = [
        [
            f"`{r['operation']}` {r['order']}",
            *(spread(r[key], 1) for key in ("ours_us", "torch_us")),
            _ratio(r["ratio_quartiles"]),
        ]
        for r in rows
        if _in_dispatch(r) and "fault" not in r
    ]
    if not lines:
        return _ABSENT
    return table(["calls", "us (quartiles)", "PyTorch us", "times as fast"], lines)


def scaling(rows: Rows) -> str:
    lines = []
    for r in rows:
        ratios = [_ratio(r.get("ratio_quartiles")), _ratio(r.get("again"))]
        rates = [_optional(r, "gflop_per_s", ".0f"), _optional(r, "share_of_peak", ".0%")]
        lines.append(
            [r["varies"], str(r["value"]), spread(r["ms"], 1), *ratios, f"{r['ms_each']:.2f}", *rates]
        )
    header = ["varies", "value", "ms (quartiles)", "times the unchanged", "in another run"]
    return table([*header, "ms each", "GFLOP/s", "of peak"], lines)


def drop_in(rows: Rows) -> str:
    """Loops before and after a line is changed, and the learner on the same problem; one that differs has no time."""
    lines = []
    for r in rows:
        sizes = [f"{r['ways']}-way {r['shots']}-shot"] if r["ways"] else []
        sizes += [f"{r['size']} pixels"] if r["size"] > 28 else []
        line = [", ".join([r["script"], *sizes]), r["changed"]]
        if "fault" in r:
            lines.append([*line, f"not timed: {r['fault']}", *[""] * 4])
            continue
        low, _, high = r["ratio_quartiles"]
        beside = f"{r['over_learner']:.2f}" if "over_learner" in r else ""
        times = [
            spread(r["before_ms"], 0),
            spread(r["after_ms"], 0),
            f"{r['ratio']:.2f} ({low:.2f} to {high:.2f})",
        ]
        lines.append([*line, *times, beside, f"{r['largest_error_float64']:.0e}"])
    header = ["loop", "changed", "before, ms", "after, ms", "times as fast", "after, over the learner's time"]
    return table([*header, "largest difference, float64"], lines)


def accuracy(rows: Rows) -> str:
    """Relative errors of meta-gradients, by form of the convolutions."""
    keys = "lower", "median", "upper", "largest"
    lines = [[r["form"], r["weights"], str(r["episodes"]), *(f"{r[key]:.1e}" for key in keys)] for r in rows]
    return table(
        ["form", "weights", "episodes", "lower quartile", "median", "upper quartile", "largest"], lines
    )


def networks(rows: Rows) -> str:
    """Times of networks of all kinds beside a textbook loop's and torch.func's; quartiles round by round; memory."""
    lines = []
    for r in rows:
        steps = ", ".join(r["generic"]) or "none"
        func = r["ratio"].get("torch.func")
        lines.append(
            [
                r["name"],
                f"{r['ms']['textbook']:.1f}",
                f"{r['ms']['ours']:.1f}",
                _ratio(r["ratio"]["textbook"]),
                _ratio(func) if func else "not timed",
                f"{r['mib']['textbook']:.0f}",
                f"{r['mib']['ours']:.0f}",
                steps if r["engine"] == "fused" else f"{r['engine']}: {r['reason']}",
            ]
        )
    heads = ["network", "textbook loop, ms", "ours, ms", "times as fast", "as torch.func"]
    return table([*heads, "loop, MiB", "ours, MiB", "generic steps"], lines)


def peers(rows: Rows) -> str:
    lines = []
    for r in rows:
        if "fault" in r:
            lines.append([r["workload"], r["peer"], f"not timed: {r['fault']}", *[""] * 4])
            continue
        ms = [1e3 * q for q in r["quartiles"]]
        memory = f"{r['peak_mib']:.0f}" if r["peak_mib"] else ""
        lines.append(
            [
                r["workload"],
                r["peer"],
                spread(ms, 0),
                _ratio(r.get("ratio_quartiles")),
                _ratio(r.get("again")),
                f"{r['first_seconds']:.1f}{held_up(r)}",
                memory,
            ]
        )
    header = ["workload", "peer", "ms (quartiles)", "times textbook", "in another run"]
    return table([*header, "first run, s", "peak MiB"], lines)


def held_up(row: dict[str, Any]) -> str:
    """A warning where setting up waited for more than it computed: then the first run's time says nothing."""
    wall = row["import_seconds"] + row["first_seconds"]
    cpu = row["setup_cpu_seconds"]
    return f" (of {wall:.0f} s computed {cpu:.0f} s)" if wall > 5 + 2 * cpu else ""


def peer_headline(rows: Rows) -> str:
    """Ours, and the fastest of each family of what a user would pick instead."""
    families = {
        "textbook PyTorch": ("textbook",),
        "torch.func": ("torch.func",),
        "torch.compile": COMPILED,
        "TorchOpt": ("torchopt",),
        "higher": ("higher",),
        "learn2learn": ("learn2learn",),
        "JAX": ("jax-vmap", "jax-vmap-patches", "jax-map", "jax-map-patches"),
        "mamlpp_fast": ("ours-fused",),
    }
    lines = []
    for workload in dict.fromkeys(r["workload"] for r in rows):
        medians = {
            r["peer"]: 1e3 * r["quartiles"][1] for r in rows if r["workload"] == workload and "quartiles" in r
        }
        best = (
            min((medians[name] for name in names if name in medians), default=None)
            for names in families.values()
        )
        lines.append([workload, *("-" if ms is None else f"{ms:.0f}" for ms in best)])
    return table(["ms a meta-gradient", *families], lines)


def environments(data: dict[str, Any]) -> str:
    lines = []
    for name, e in data.get("environments", {}).items():
        what = e.get("fault") or ", ".join(
            f"{package} {version}"
            for package, version in e["versions"].items()
            if package in ("torch", "torchopt", "higher", "learn2learn", "jax", "jaxlib", "numpy", "python")
        )
        lines.append([f"`{name}`", what])
    return table(["environment", "what is in it, or why it is not there"], lines, texts=2)


def peer_rows(data: dict[str, Any]) -> Rows:
    """The rows of all workloads, each with how often it goes into the textbook's time."""
    found = []
    for workload, content in data["workloads"].items():
        times = {r["peer"]: Times(r["seconds"]) for r in content["rows"] if r.get("seconds")}
        base = times.get("textbook")
        for r in content["rows"]:
            row = r | {"workload": workload}
            if base and r["peer"] in times:
                row["ratio_quartiles"] = base.over(times[r["peer"]])
            found.append(row)
    return found
