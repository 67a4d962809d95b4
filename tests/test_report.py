"""The report: what the page holds, for whole, old, unfinished and hostile runs; confusions counted right."""

import base64
import builtins
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import torch
from PIL import Image
from train_helpers import tiny

from mamlpp_fast.cli import main
from mamlpp_fast.report import confusion, write_report
from mamlpp_fast.report.content import all_figures
from mamlpp_fast.report.figures import COLOURS, look, plotly
from mamlpp_fast.report.runs import Run, read_run, read_runs
from mamlpp_fast.train import train
from mamlpp_fast.train.run_folder import best_files, load_model, open_test, read_config

KEYS = ["curves", "steps", "rates", "norms", "times"]
# What metrics.jsonl did not hold in version 0.1.0 at first.
NEW = ("val_step_accuracy", "batch_norm", "peak_memory_mib")
HOSTILE = "</script><img src=x onerror=alert(1)> & <a href='http://x'>$y$</a> %{x}"


class Page(HTMLParser):
    """Elements by name with their attributes and the text in them; refuses elements that do not nest."""

    VOID = frozenset({"meta", "input", "img", "br", "link"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.tables_in: Counter[str] = Counter()
        self.feed(path.read_text())
        self.close()
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)
        if tag == "table":
            self.tables_in.update(self.stack)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.stack):
            self.texts.setdefault(tag, []).append(data)

    def text(self, tag: str) -> str:
        return " ".join(self.texts.get(tag, []))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def figures(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.texts["script"][-2])
        return found


def _train(out: Path, data: Path, **changes: Any) -> Path:
    with torch.random.fork_rng():
        train(tiny(**changes), out=out, engine="reference", data_path=data, quiet=True)
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return _train(tmp_path_factory.mktemp("runs") / "first", data)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run of another length, without any part of MAML++."""
    parts = {"msl": False, "lslr": False, "bnwb": False, "bnrs": False}
    return _train(tmp_path_factory.mktemp("runs") / "plain", data, epochs=2, seed=1, **parts)


def _copy(run: Path, out: Path, **changes: Any) -> Path:
    """A run's records alone, each changed by a function of its content."""
    out.mkdir(parents=True)
    for name in ("config.json", "summary.json"):
        content = json.loads((run / name).read_text())
        (out / name).write_text(json.dumps(changes.get(name.partition(".")[0], lambda c: c)(content)))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    change = changes.get("metrics", lambda line: line)
    (out / "metrics.jsonl").write_text("".join(json.dumps(change(line)) + "\n" for line in lines))
    return out


def test_a_page_has_every_figure_with_its_table(run: Path) -> None:
    assert main(["report", str(run), "--tasks", "6", "--device", "cpu"]) == 0
    page = Page(run / "report.html")
    assert [f["key"] for f in page.figures()] == KEYS
    assert len(page.all("figure")) == len(KEYS)
    assert page.tables_in["figure"] == len(KEYS)
    assert page.tables_in["details"] == len(KEYS) + 1
    ids = {attributes.get("id") for _, attributes in page.elements}
    for figure in page.figures():
        for p in range(len(figure["panels"])):
            assert f"plot-{figure['key']}-{p}" in ids
    assert {link["href"] for link in page.all("a")} <= {f"#{i}" for i in ids}
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1
    assert all(image["alt"] for image in page.all("img"))
    assert "not recorded" not in page.text("main")


def test_nothing_is_fetched(run: Path, tmp_path: Path) -> None:
    page = Page(write_report([run], tmp_path / "page.html", tasks=6))
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert not re.search(r"url\(|@import", page.text("style"))


def test_the_figures_are_plotlys_and_agree_with_the_metrics(run: Path, plain: Path) -> None:
    runs = read_runs([run, plain])
    figures = {f.key: f for f in all_figures(runs)}
    for figure in figures.values():
        for panel in plotly(figure)["panels"]:
            go.Figure(data=panel["data"], layout=panel["layout"])
    last = runs[0].epochs[-1]
    rates = figures["rates"]
    assert [p.title for p in rates.panels] == ["Step 1", "Step 2"]
    shown = rates.choices[0].frames[-1].y
    layers = list(rates.panels[0].series[0].x)
    for k in range(2):
        for layer, value in zip(layers, shown[k][0], strict=True):
            names = [n for n in last["inner_rates"] if n.removesuffix(".weight") == layer]
            assert value == last["inner_rates"][names[0]][k]
    # The shorter run has no third epoch and stays at its second.
    assert shown[0][1] == rates.choices[0].frames[1].y[0][1] == pytest.approx([0.1] * len(layers))
    assert [f.label for f in rates.choices[0].frames] == [
        f"epoch {e}, iteration {3 * e + 3}" for e in range(3)
    ]
    steps = figures["steps"].choices[0].frames[1].y[0]
    for line, own in zip(steps, runs, strict=True):
        assert line == pytest.approx([100 * v for v in own.epochs[1]["val_step_accuracy"]])
    norms = figures["norms"]
    assert len(norms.choices) == 6
    names = list(last["batch_norm"])
    assert [p.title for p in norms.panels] == names
    # Plain MAML has one row that all steps share.
    weight = runs[1].epochs[0]["batch_norm"][names[0]]["weight"]
    assert len(weight) == 1
    assert norms.choices[0].frames[0].y[0][1] == weight * 2


def test_recorded_batch_norms_are_those_of_the_checkpoint(run: Path) -> None:
    config, record = read_config(run)
    _, learner, _ = open_test(config, record)
    file = best_files(run)[0]
    load_model(run / "checkpoints" / file, learner)
    line = read_run(run).epochs[int(file[6:10])]
    name = next(iter(line["batch_norm"]))
    module: Any = learner.model.get_submodule(name)
    found = line["batch_norm"][name]
    for key, values in (
        ("weight", module.weight.mean(1)),
        ("weight_spread", module.weight.std(1, correction=0)),
        ("running_var", module.running_var.mean(1)),
    ):
        assert found[key] == pytest.approx(values.tolist(), rel=1e-5)


def test_several_runs_on_one_page(run: Path, plain: Path, tmp_path: Path) -> None:
    page = Page(write_report([run, plain], tmp_path / "page.html", tasks=0))
    assert [b["data-run"] for b in page.all("input") if b["type"] == "checkbox"] == ["0", "1"]
    for name in ("first", "plain"):
        assert name in page.text("main")
    assert "What differs" in page.text("main")
    assert page.text("main").count("Not computed: not asked for") == 2
    runs = {trace["meta"]["run"] for f in page.figures() for p in f["panels"] for trace in p["data"]}
    assert runs == {0, 1, None}


def test_runs_that_recorded_less_say_so(run: Path, tmp_path: Path) -> None:
    old = _copy(run, tmp_path / "old", metrics=lambda line: {k: v for k, v in line.items() if k not in NEW})
    page = Page(write_report([old], tmp_path / "old.html"))
    text = page.text("main")
    assert text.count("Not recorded by any of these runs.") == 2
    assert "old: not recorded: memory." in text
    assert re.search(r"Not computed: the best checkpoint, checkpoints/epoch-000\d\.pt, was not kept", text)
    assert {f["key"]: len(f["panels"]) for f in page.figures()} == {
        "curves": 4,
        "steps": 0,
        "rates": 2,
        "norms": 0,
        "times": 2,
    }
    both = Page(write_report([old, run], tmp_path / "both.html", tasks=0))
    assert "old: not recorded." in both.text("main")
    assert len(both.figures()[1]["panels"]) == 1


@pytest.mark.parametrize("keep", ["epoch", "val_loss"])
def test_lines_with_next_to_nothing(run: Path, tmp_path: Path, keep: str) -> None:
    bare = _copy(run, tmp_path / "bare", metrics=lambda line: {keep: line[keep]})
    Page(write_report([bare], tmp_path / "bare.html", tasks=0))


def test_unfinished_runs(run: Path, tmp_path: Path) -> None:
    fresh = _copy(run, tmp_path / "fresh")
    for name in ("summary.json", "metrics.jsonl"):
        (fresh / name).unlink()
    assert "not finished" in Page(write_report([fresh], tmp_path / "pages" / "fresh.html")).text("main")
    cut = _copy(run, tmp_path / "cut")
    content = (cut / "metrics.jsonl").read_text()
    (cut / "metrics.jsonl").write_text(content[:-40])
    assert len(read_run(cut).epochs) == 2
    (cut / "metrics.jsonl").write_text("{\n" + content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: expected JSON in line 1"):
        read_run(cut)


def test_nan_losses(run: Path, tmp_path: Path) -> None:
    """A loss that was not finite is null in the file."""
    lost = _copy(
        run, tmp_path / "lost", metrics=lambda line: line | {"val_loss": None, "val_accuracy_ci95": None}
    )
    (lost / "metrics.jsonl").write_text((lost / "metrics.jsonl").read_text().replace("null", "NaN"))
    page = write_report([lost], tmp_path / "lost.html", tasks=0)
    script = Page(page).texts["script"][-2]

    def never(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    json.loads(script, parse_constant=never)


def test_hostile_names(run: Path, tmp_path: Path) -> None:
    def rename(line: dict[str, Any]) -> dict[str, Any]:
        for key in ("inner_rates", "batch_norm"):
            line[key] = {f"{HOSTILE}.{name}": value for name, value in line[key].items()}
        return line

    other = _copy(
        run,
        tmp_path / HOSTILE.replace("/", "∕"),
        metrics=rename,
        config=lambda c: c | {"preset": HOSTILE, HOSTILE: HOSTILE, "data": HOSTILE, "dataset": HOSTILE},
        summary=lambda s: s | {"engine": HOSTILE, "dataset": HOSTILE, "versions": {HOSTILE: HOSTILE}},
    )
    path = write_report([other], tmp_path / "page.html")
    page = Page(path)
    assert not page.all("img")
    assert {link["href"] for link in page.all("a")} == {
        "#main", "#results", *(f"#{key}" for key in KEYS), "#confusions", "#settings"
    }  # fmt: skip
    assert HOSTILE in page.text("table")
    assert HOSTILE.replace("/", "∕") in page.text("h1")
    for figure in page.figures():
        for panel in figure["panels"]:
            assert "<" not in json.dumps([panel["data"], panel["layout"]])


def test_confusions_are_counted_over_real_classes(run: Path) -> None:
    """Against a plain loop over tasks."""
    tasks = 9
    found = confusion.confusions(run, tasks=tasks)
    config, record = read_config(run)
    data, learner, sampler = open_test(config, record)
    load_model(run / "checkpoints" / best_files(run)[0], learner)
    wrong: Counter[tuple[str, str]] = Counter()
    met: Counter[tuple[str, str]] = Counter()
    for i in range(tasks):
        batch = sampler.batch(i, 1)
        classes = [data.test.names[c] for c in sampler.draws(i, 1)[0][0].tolist()]
        predicted = learner.evaluate(batch).logits[-1, 0].argmax(-1).tolist()
        for y, p in zip(batch.target_y[0].tolist(), predicted, strict=True):
            wrong[classes[y], classes[p]] += y != p
            met.update((classes[y], other) for other in classes if other != classes[y])
    expected = {pair: (n, met[pair]) for pair, n in wrong.items() if n}
    assert expected
    assert {(p.true, p.predicted): (p.count, p.met) for p in found.pairs} == expected
    assert [p.count for p in found.pairs] == sorted((p.count for p in found.pairs), reverse=True)
    assert (found.tasks, found.images, found.wrong) == (tasks, tasks * 4, sum(wrong.values()))
    assert all(0.5 <= p.probability <= 1 for p in found.pairs)
    assert len(confusion.confusions(run, tasks=tasks, worst=1).pairs) == 1


def test_confusions_show_images_of_their_classes(run: Path) -> None:
    config, record = read_config(run)
    data, *_ = open_test(config, record)
    for pair in confusion.confusions(run, tasks=9).pairs:
        for png, name in ((pair.image, pair.true), (pair.support, pair.predicted)):
            pixels = torch.tensor(list(Image.open(io.BytesIO(base64.b64decode(png))).tobytes()))
            c = data.test.names.index(name)
            start, count = int(data.test.class_start[c]), int(data.test.class_count[c])
            own = data.test.images[start : start + count, 0].flatten(1).long()
            assert bool((own == pixels).all(1).any())


def test_confusions_without_data_say_so(run: Path, tmp_path: Path) -> None:
    found = confusion.confusions(run, data_path=tmp_path / "nowhere")
    assert found.reason is not None
    assert "expected an existing file or folder" in found.reason
    assert found.pairs == ()


def test_names_tell_runs_apart(run: Path, tmp_path: Path) -> None:
    a, b = _copy(run, tmp_path / "a" / "run"), _copy(run, tmp_path / "b" / "run")
    assert [r.name for r in read_runs([a, b])] == ["a/run", "b/run"]
    with pytest.raises(ValueError, match="DIR: expected every run once"):
        read_runs([a, a])


def test_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "expected a run's folder" in capsys.readouterr().err
    original = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("plotly"):
            raise ImportError("No module named 'plotly'")
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["report", str(tmp_path)]) == 2
    assert "expected plotly, which comes with the package" in capsys.readouterr().err


def test_long_runs_have_thinned_tables() -> None:
    lines = [
        {"epoch": e, "iteration": e + 1, "inner_rates": {"a.weight": [0.1 * e, 0.2]}} for e in range(100)
    ]
    runs = [Run("long", Path("long"), {}, lines, None)]
    rates = next(f for f in all_figures(runs) if f.key == "rates")
    assert len(rates.choices[0].frames) == 100
    epochs = [row[1] for row in rates.table.rows]
    assert (epochs[0], epochs[-1], len(epochs)) == ("0", "99", 25)
    assert any("25 epochs" in note for note in rates.notes)


@pytest.mark.parametrize("losses", [(4.0, 0.02), (4.0, 0.5)], ids=["decades", "near"])
def test_losses_of_several_decades_have_a_logarithmic_scale(losses: tuple[float, ...]) -> None:
    lines = [{"epoch": e, "iteration": e + 1, "train_loss": loss} for e, loss in enumerate(losses)]
    curves = next(f for f in all_figures([Run("run", Path("run"), {}, lines, None)]) if f.key == "curves")
    panel = plotly(curves)["panels"][0]
    go.Figure(data=panel["data"], layout=panel["layout"])
    ticks = panel["layout"]["yaxis"].get("tickvals")
    if losses[1] > 0.1:
        assert ticks is None
    else:
        assert ticks[0] <= losses[1] < losses[0] <= ticks[-1] and ticks == sorted(ticks)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_lines_differ_by_more_than_colour() -> None:
    looks = [look(i) for i in range(64)]
    assert len(set(looks)) == 64
    assert len({symbol for _, symbol, _ in looks[:8]}) == 8


@pytest.mark.parametrize("ground", ["#ffffff", "#14181d"])
def test_colours_stand_out(ground: str) -> None:
    for colour in COLOURS:
        light, dark = sorted((_luminance(colour), _luminance(ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3
