"""Docstrings write :class:`name` and :func:`name`, which editors know; on the site they become links."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|exc):`(?P<short>~?)(?P<name>[\w.]+)`")


class Roles(griffe.Extension):
    """Rewrites the docstrings of a package when all of it is there, so that relative names can be resolved."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        _rewrite(pkg)


def _rewrite(obj: griffe.Object) -> None:
    if obj.docstring is not None:
        obj.docstring.value = _ROLE.sub(lambda match: _link(obj, match), obj.docstring.value)
    for member in obj.members.values():
        if isinstance(member, griffe.Object):
            _rewrite(member)


def _link(obj: griffe.Object, match: re.Match[str]) -> str:
    """A link where the name has a page; the name alone otherwise."""
    name = match["name"]
    try:
        path = obj.resolve(name)
    except griffe.NameResolutionError:
        path = name
    shown = name.rpartition(".")[2] if match["short"] else name
    return f'<autoref identifier="{path}" optional>`{shown}`</autoref>'
