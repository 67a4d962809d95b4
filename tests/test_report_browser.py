"""The report in headless Chromium: it loads in silence, offline, and works with the keyboard alone."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser
from PIL import Image
from train_helpers import draw_folder, tiny

from mamlpp_fast.report import write_report
from mamlpp_fast.train import train

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with hostile names, compared."""
    folder = tmp_path_factory.mktemp("report")
    data = draw_folder(folder / "images")
    runs = []
    for seed, name in enumerate(("<img src=x onerror=alert(1)>", "b & <b>'c'</b>".replace("/", "∕"))):
        runs.append(folder / name)
        with torch.random.fork_rng():
            train(tiny(seed=seed), out=runs[-1], engine="reference", data_path=data, quiet=True)
    return write_report(runs, folder / "page.html", tasks=6)


@pytest.fixture(scope="module")
def _browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(_browser: Browser, page: Path) -> Browser:
    """The page, loaded afresh."""
    _browser.problems.clear()
    _browser.requests.clear()
    _browser.open(page.as_uri())
    _browser.look(1280, 900)
    return _browser


def heights(browser: Browser, key: str) -> Any:
    return browser.run(f"document.getElementById('plot-{key}-0').data.map(trace => trace.y)")


def test_it_loads_in_silence_and_alone(browser: Browser, page: Path) -> None:
    drawn, plots = browser.run(
        "[document.querySelectorAll('.plot .main-svg').length, document.querySelectorAll('.plot').length]"
    )
    assert plots >= 10
    assert drawn >= plots
    assert browser.run("document.querySelectorAll('img[src=x]').length") == 0
    assert browser.problems == []
    assert [url for url in browser.requests if not url.startswith(("data:", "blob:"))] == [page.as_uri()]


@pytest.mark.parametrize("key", ["steps", "rates", "norms"])
def test_the_slider_moves_by_keyboard(browser: Browser, key: str) -> None:
    last = heights(browser, key)
    browser.run(f"document.getElementById('epoch-{key}').focus()")
    browser.press("Home")
    first = heights(browser, key)
    assert first != last
    assert browser.run(f"document.getElementById('shown-{key}').textContent") == "epoch 0, iteration 3"
    browser.press("ArrowRight")
    assert browser.run(f"document.getElementById('shown-{key}').textContent") == "epoch 1, iteration 6"
    assert heights(browser, key) not in (first, last)
    browser.press("End")
    assert heights(browser, key) == last
    assert browser.problems == []


def test_everything_is_reached_by_tab(browser: Browser) -> None:
    """Links, boxes, sliders, tables and their summaries take the focus in turn, and it shows."""
    wanted = browser.run(
        "[...document.querySelectorAll('a[href], input, select, summary, .scroll')]"
        ".filter(e => e.checkVisibility()).length"
    )
    browser.run("document.activeElement.blur()")
    seen = browser.run("window.seen = [], 0")
    for _ in range(wanted):
        browser.press("Tab")
        seen = browser.run(
            "(e => { if (!window.seen.includes(e)) window.seen.push(e);"
            " return getComputedStyle(e).outlineStyle === 'none' ? -1 : window.seen.length })(document.activeElement)"
        )
        assert seen > 0
    assert seen == wanted


def test_a_quantity_is_chosen_by_keyboard(browser: Browser) -> None:
    before = heights(browser, "norms")
    browser.run("document.getElementById('choice-norms').focus()")
    browser.press("ArrowDown")
    assert browser.run("document.getElementById('choice-norms').selectedIndex") == 1
    assert heights(browser, "norms") != before


def test_a_box_hides_its_run_everywhere(browser: Browser) -> None:
    visible = "[...document.querySelectorAll('.plot')].flatMap(p => p.data).filter(t => t.meta.run === 1)"
    visible += ".map(t => t.visible !== false)"
    assert all(browser.run(visible))
    browser.run("document.querySelector('input[data-run=\"1\"]').focus()")
    browser.press(" ")
    hidden = browser.run(visible)
    assert len(hidden) >= 10
    assert not any(hidden)


@pytest.mark.parametrize(
    ("name", "look"),
    [
        ("desktop", {"width": 1280, "height": 900}),
        ("dark", {"width": 1280, "height": 900, "dark": True}),
        ("phone", {"width": 360, "height": 740, "phone": True}),
    ],
)
def test_it_fits_and_is_readable(browser: Browser, tmp_path: Path, name: str, look: dict[str, Any]) -> None:
    browser.look(**look)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.run(
        "[...document.querySelectorAll('.plot')].every(p => p.getBoundingClientRect().right <= innerWidth)"
    )
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    ink = browser.run("document.getElementById('plot-curves-0').layout.font.color")
    assert (ground, ink) == (
        ("rgb(20, 24, 29)", "#e6eaee") if look.get("dark") else ("rgb(255, 255, 255)", "#1a2027")
    )
    browser.screenshot(tmp_path / f"{name}.png")
    with Image.open(tmp_path / f"{name}.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    assert max(colours)[1] == ((20, 24, 29) if look.get("dark") else (255, 255, 255))
    assert len(colours) > 50
