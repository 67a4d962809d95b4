"""What the site adds to the pages of docs/: the README in front, the files that pages link to, help texts, formulas.

A link from a page to a file outside docs/ works in the checkout as it stands. Here the file becomes a page under
``files/``, and the link leads there; a link to what does not exist is left alone and fails the strict build.
"""

from __future__ import annotations

import argparse
import functools
import posixpath
import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
FRONT = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
_LINK = re.compile(r"(?<=\]\()(?P<path>[^()\s#:]+)(?P<anchor>#[^()\s]*)?(?=\))")
_HELP = re.compile(r"<!-- help:(?P<command>\S*) -->")
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
_HIDDEN = "---\nsearch:\n  exclude: true\n---\n\n"


def page_of(path: str) -> str:
    """The page of the site (its source) for a file or folder of the checkout, both relative to their roots."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"files/{path}/index.md"
    return f"files/{path}" if path.endswith(".md") else f"files/{path}.md"


def origin_of(page: str) -> str:
    """The file or folder of the checkout that a page of the site shows."""
    if page == "index.md":
        return "README.md"
    if not page.startswith("files/"):
        return f"docs/{page}"
    path = page.removeprefix("files/")
    if (ROOT / path).exists():
        return path
    return path.removesuffix("/index.md") if path.endswith("/index.md") else path.removesuffix(".md")


def target_of(link: str, origin: str) -> str:
    """A link's target relative to the checkout's root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))


def linked(origin: str) -> list[str]:
    """The files and folders outside docs/ that a Markdown file links to."""
    if not origin.endswith(".md"):
        return []
    targets = (target_of(m["path"], origin) for m in _LINK.finditer((ROOT / origin).read_text()))
    return [t for t in targets if not t.startswith(("docs/", "..")) and (ROOT / t).exists()]


def content(origin: str) -> str:
    """The page of a file or folder outside docs/."""
    path = ROOT / origin
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.suffix == ".py")
        return _HIDDEN + f"# {origin}\n\n" + "".join(f"- [{n}]({path.name}/{n})\n" for n in names)
    text = path.read_text()
    if path.suffix == ".md":
        return text
    fence = "`" * 6
    return f"{_HIDDEN}# {path.name}\n\n{fence}{path.suffix[1:]}\n{text}{fence}\n"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    origins = [*FRONT, *(origin_of(f.src_uri) for f in files.documentation_pages())]
    seen = set(origins)
    for origin in origins:  # grows
        more = linked(origin)
        if (ROOT / origin).is_dir():
            more = [p.relative_to(ROOT).as_posix() for p in sorted((ROOT / origin).glob("*.py"))]
        new = dict.fromkeys(t for t in more if t not in seen)
        seen.update(new)
        origins.extend(new)
        if not origin.startswith("docs/"):
            inclusion = InclusionLevel.INCLUDED if origin.endswith(".md") else InclusionLevel.NOT_IN_NAV
            page = File.generated(config, page_of(origin), content=content(origin), inclusion=inclusion)
            files.append(page)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = page.file.src_uri
    origin = origin_of(source)
    here = posixpath.dirname(source)

    def moved(match: re.Match[str]) -> str:
        target = target_of(match["path"], origin)
        if target.startswith("..") or not (ROOT / target).exists():
            return match[0]
        return posixpath.relpath(page_of(target), here or ".") + (match["anchor"] or "")

    return _HELP.sub(lambda m: help_of(m["command"]), _LINK.sub(moved, markdown))


def help_of(command: str) -> str:
    """What ``mamlpp-fast COMMAND --help`` prints, as a block."""
    from mamlpp_fast.cli import _parser

    parser: argparse.ArgumentParser = _parser()
    if command:
        choices: Any = next(a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parser = choices[command]
    parser.formatter_class = functools.partial(argparse.HelpFormatter, width=100)
    return f"```text\n{parser.format_help().rstrip()}\n```"


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    return _FORMULA.sub(formula, html)


def formula(match: re.Match[str]) -> str:
    """MathML, which browsers draw by themselves."""
    display = "block" if match["tag"] == "div" else "inline"
    return convert(unescape(match["latex"]).strip(), display=display)
