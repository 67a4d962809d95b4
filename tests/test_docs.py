"""The site builds without a warning, its links lead somewhere, and what the pages show as code is code that works."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
import torch.distributed as dist
from helpers import random_batch
from lightning_helpers import QUIET, lightning_warnings
from torch import nn

import mamlpp_fast as mf
from mamlpp_fast.cli import _parser
from mamlpp_fast.data import load
from mamlpp_fast.engine.fused import lowering
from mamlpp_fast.train import parse_settings, preset_names

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    p.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "results/*.md", "csrc/*.md")
    for p in ROOT.glob(pattern)
)
_FENCE = re.compile(
    r"(?:^<!-- (?P<mark>\S+): (?P<what>.+?) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
_LINK = re.compile(r"\]\((?P<path>[^()\s#:]*)(?:#(?P<anchor>[^()\s]*))?\)")


@dataclass(frozen=True)
class Block:
    mark: str | None
    what: str | None
    language: str
    code: str


def blocks(page: str, language: str) -> list[Block]:
    found = (Block(**m.groupdict()) for m in _FENCE.finditer((ROOT / page).read_text()))
    return [b for b in found if b.language == language]


def with_blocks(language: str) -> list[str]:
    return [page for page in PAGES if blocks(page, language)]


# The site ------------------------------------------------------------------------------------------------------------


class _Html(HTMLParser):
    """Anchors of a page, and what it refers to: (tag, address)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.references: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and (name == "id" or (name == "name" and tag == "a")):
                self.anchors.add(value)
            elif value and name in ("href", "src"):
                self.references.append((tag, value))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # The theme's advice to move to its successor is no warning about these pages.
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "MAMLPP_FAST_NATIVE": "0"},
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "WARNING" not in output and "ERROR" not in output, output
    return folder


@pytest.fixture(scope="module")
def html(site: Path) -> dict[Path, _Html]:
    # 404.html is served at any depth, so its addresses are absolute.
    return {p: _Html(p.read_text()) for p in site.rglob("*.html") if p.name != "404.html"}


def test_every_link_of_the_site_leads_somewhere(html: dict[Path, _Html]) -> None:
    broken = []
    for page, content in html.items():
        for _, address in content.references:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if not target.is_file():
                broken.append(f"{page.name}: {address}")
            elif parts.fragment and target in html and parts.fragment not in html[target].anchors:
                broken.append(f"{page.name}: {address} has no such anchor")
    assert not broken
    assert len(html) > 30


def test_the_site_asks_nothing_of_the_network(html: dict[Path, _Html]) -> None:
    loaded = {a for content in html.values() for tag, a in content.references if tag != "a"}
    assert not [a for a in loaded if urlsplit(a).netloc]


def test_formulas_and_docstrings_are_rendered(site: Path) -> None:
    derivation = (site / "derivations/lslr_update.html").read_text()
    assert "<math" in derivation and "arithmatex" not in derivation
    learner = (site / "api/learner.html").read_text()
    assert ":class:" not in learner and ":func:" not in learner
    documented = _Html(learner).anchors | _Html((site / "api/operations.html").read_text()).anchors
    public = {f"mamlpp_fast.{name}" for name in mf.__all__} | {f"mamlpp_fast.ops.{n}" for n in mf.ops.__all__}
    assert public - documented == {"mamlpp_fast.ops", "mamlpp_fast.__version__"}
    assert "usage: mamlpp-fast train" in (site / "cli.html").read_text()


def _slug(heading: str) -> str:
    """The anchor that a code host gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower().strip()).replace(" ", "-")


def _headings(page: Path) -> set[str]:
    text = _FENCE.sub("", page.read_text())
    return {_slug(h) for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_in_the_checkout(page: str) -> None:
    for m in _LINK.finditer(_FENCE.sub("", (ROOT / page).read_text())):
        target = ((ROOT / page).parent / m["path"]).resolve() if m["path"] else ROOT / page
        assert target.exists(), f"{m[0]}: no such file"
        assert m["anchor"] is None or m["anchor"] in _headings(target), f"{m[0]}: no such heading"


# Python --------------------------------------------------------------------------------------------------------------

# What is smaller here than on the page: (page, as it stands there, as it is run).
SMALLER = (
    ("docs/data.md", 'load("omniglot", "/path/to/omniglot.npz")', 'load("strokes")'),
    ("docs/drop_in.md", 'load("omniglot", PATH)', 'load("strokes")'),
    ("docs/drop_in.md", "import lightning as L", "import pytorch_lightning as L"),
    ("docs/drop_in.md", "ways=20", "ways=2"),
    ("docs/drop_in.md", "mf.Conv4(1, 20)", "mf.Conv4(1, 2, filters=4)"),
    ("docs/drop_in.md", "epochs=100, iterations_per_epoch=500", "epochs=1, iterations_per_epoch=1"),
    ("docs/drop_in.md", "L.Trainer(max_epochs=100)", "L.Trainer(max_epochs=1, **QUIET)"),
    ("docs/drop_in.md", "iterations=500)", "iterations=1, val_tasks=2)"),
    ("README.md", "mf.Conv4(in_channels=1, num_classes=20)", "mf.Conv4(1, 20, filters=4)"),
)


def _batch(ways: int, size: int) -> mf.EpisodeBatch:
    return random_batch(ways=ways, shots=1, targets=1, size=size, dtype=torch.float32)


def _network(ways: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 100, ways)
    )


def _given_readme(code: str) -> dict[str, Any]:
    if "for support_x" in code:
        tasks = [(e.support_x, e.support_y, e.target_x, e.target_y) for e in _batch(3, 12)]
        return {"model": _network(3), "tasks": tasks}
    batch = _batch(20, 28)
    names = ("support_x", "support_y", "target_x", "target_y")
    one = {
        "new_support_x": batch.support_x[0],
        "new_support_y": batch.support_y[0],
        "new_x": batch.target_x[0],
    }
    return {n: getattr(batch, n) for n in names} | one


def _given_drop_in(code: str) -> dict[str, Any]:
    if "rates(fast" in code:
        model = nn.Sequential()
        model.add_module("head", nn.Linear(3, 2))
        fast = {f"head.{n}": p for n, p in model.get_submodule("head").named_parameters()}
        return {"mf": mf, "model": model, "K": 2, "k": 0, "fast": fast, "gradients": fast}
    if "init_process_group" in code:
        sampler = load("strokes").sampler("train", ways=3, shots=1, targets=1, seed=0)
        config = mf.MAMLConfig(steps=2)
        model = mf.Conv4(1, 3, filters=4, num_steps=2)
        own = {"model": model, "config": config, "device": "cpu", "batch": sampler.batch(0, 8)}
        return own | {"sampler": sampler, "i": 1}
    batch = _batch(2, 28)
    return {"QUIET": QUIET, "support_x": batch.support_x[0], "support_y": batch.support_y[0]}


# The names that a page takes for granted, before each of its snippets.
GIVEN: dict[str, Callable[[str], dict[str, Any]]] = {
    "README.md": _given_readme,
    "docs/drop_in.md": _given_drop_in,
}


def _smaller(page: str, code: str) -> str:
    for where, shown, run in SMALLER:
        code = code.replace(shown, run) if where == page else code
    return code


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What torchrun would say to its only process; files go to a temporary folder."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for name, value in {"ADDR": "127.0.0.1", "PORT": port}.items():
        monkeypatch.setenv(f"MASTER_{name}", str(value))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.chdir(tmp_path)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("page", with_blocks("python"))
@pytest.mark.usefixtures("one_rank")
def test_snippets_run_in_order(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("snippets")
    monkeypatch.setitem(sys.modules, "snippets", module)
    monkeypatch.setattr(lowering, "_RULES", dict(lowering.rules()))
    for i, block in enumerate(blocks(page, "python")):
        if block.mark == "quoted":
            continue
        vars(module).update(GIVEN.get(page, lambda code: {})(block.code))
        with lightning_warnings():
            exec(compile(_smaller(page, block.code), f"{page}[{i}]", "exec"), vars(module))
        if dist.is_initialized():  # each snippet is a script of its own in this
            dist.destroy_process_group()


def test_what_is_run_smaller_is_on_its_page() -> None:
    for page, shown, _ in SMALLER:
        assert shown in (ROOT / page).read_text()


@pytest.mark.parametrize("page", PAGES)
def test_quotations_are_those_of_the_code(page: str) -> None:
    for block in blocks(page, "python"):
        if block.mark == "quoted":
            assert block.what is not None and block.code in (ROOT / block.what).read_text()
        else:
            assert block.mark is None


def test_the_layer_of_the_page_is_exact_in_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("snippets")
    monkeypatch.setitem(sys.modules, "snippets", module)
    monkeypatch.setattr(lowering, "_RULES", dict(lowering.rules()))
    for block in blocks("docs/adding_a_layer.md", "python"):
        if block.mark is None and ("class Tanh(Step)" in block.code or "@rule(" in block.code):
            exec(block.code, vars(module))
    results = []
    for engine in ("reference", "fused"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 100, 3))
        config = mf.MAMLConfig(steps=3)
        learner = mf.MAMLPlusPlus(model, config, engine=engine, precision="float64")  # type: ignore[arg-type]
        learner.meta_gradient(random_batch())
        results.append([p.grad for p in (*learner.model.parameters(), learner.rates.rates)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)


# The command line ----------------------------------------------------------------------------------------------------


def _lines(code: str) -> Iterator[str]:
    """The commands of a block of shell, variables put in."""
    variables: dict[str, str] = {}
    for line in code.replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        if m := re.fullmatch(r"(\w+)=(\"?)(.*)\2", line.strip()):
            variables[m[1]] = m[3]
        else:
            yield line


def _arguments(line: str) -> list[str] | None:
    """The arguments of our command in a line of shell, if it calls that, last of several."""
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    found = list(words)
    for i, word in enumerate(found):
        if Path(word).name == "mamlpp-fast" or (word == "mamlpp_fast" and found[i - 1] == "-m"):
            own = itertools.takewhile(lambda w: w.strip("&|;<>"), found[i + 1 :])
            return [w for w in own if w not in ("…", "...")]
    return None


SHELL = [
    (page, arguments)
    for page in PAGES
    for block in blocks(page, "bash")
    for line in _lines(block.code)
    if (arguments := _arguments(line)) is not None
]


@pytest.mark.parametrize(("page", "arguments"), SHELL, ids=[" ".join(a)[:60] for _, a in SHELL])
def test_commands_shown_are_commands(page: str, arguments: list[str]) -> None:
    parsed = _parser().parse_args(arguments)
    parse_settings(getattr(parsed, "set", []))
    assert getattr(parsed, "preset", None) in (None, *preset_names())


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_are_commands(page: str) -> None:
    text = _FENCE.sub("", (ROOT / page).read_text())
    subparsers = next(a for a in _parser()._actions if a.dest == "command")
    assert isinstance(subparsers.choices, dict)
    for code in re.findall(r"`mamlpp-fast ([a-z][^`]*)`", text):
        command, *words = code.split()
        known = subparsers.choices[command]._option_string_actions
        assert {w for w in words if w.startswith("--")} <= known.keys(), f"mamlpp-fast {code}"
