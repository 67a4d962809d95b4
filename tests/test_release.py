"""What a release rests on: one version, a changelog that begins with it, and documents that name what there is."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import mamlpp_fast as mf

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = {"Added", "Changed", "Faster", "Fixed", "Removed"}


def test_the_version_stands_in_one_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mamlpp_fast._version.__version__"}
    code = [
        *ROOT.glob("*.py"),
        *ROOT.glob("mamlpp_fast/**/*.py"),
        *ROOT.glob("kernels/*.py"),
        *ROOT.glob("*.toml"),
    ]
    quoted = f'"{mf.__version__}"'
    assert [str(p.relative_to(ROOT)) for p in code if quoted in p.read_text()] == ["mamlpp_fast/_version.py"]


def test_the_changelog_begins_with_the_version_and_has_sections() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (\S+)", text, re.MULTILINE)
    assert versions[0] == mf.__version__
    for body in re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]:
        sections = re.findall(r"^### (.*)$", body, re.MULTILINE)
        assert sections
        assert len(sections) == len(set(sections)) and set(sections) <= SECTIONS
        assert not body.partition("###")[0].lstrip().startswith("- "), "an entry outside a section"


def test_contributing_names_files_that_exist() -> None:
    """Paths in backquotes and links; S stands for any operation, capital words for what the reader puts there."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`([\w./*-]+/[\w./*-]*|[\w-]+\.(?:py|md|toml|txt|sh))`", prose))
    named |= {link.partition("#")[0] for link in re.findall(r"\]\(([^)#:]+)", prose)}
    paths = {name for name in named if not name.startswith("..")}
    assert len(paths) > 10
    missing = []
    for path in paths:
        stems = (
            {path}
            if "S." not in path
            else {path.replace("S.", f"{s}.") for s in ("lslr_update", "norm_act_pool")}
        )
        missing += [stem for stem in stems if not any(ROOT.glob(stem.rstrip("/")))]
    assert not missing
