"""What a forward or a loss reaches by other ways than a name of its own, changed between calls: followed as well."""

from __future__ import annotations

import contextvars
import copy
import functools
import importlib
import operator
import os
from collections.abc import Callable
from pathlib import Path
from random import random  # a builtin method, which belongs to no module
from typing import Any

import following_helpers
import named_helpers
import pytest
import torch
import torch.nn.functional as F
from following_helpers import Settings, around_a_change, assert_model_followed
from torch import Tensor, nn
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast.engine.fingerprint import fingerprint

scale = 1.0
context = contextvars.ContextVar("context", default=1.0)
D = torch.float64


class Own(Settings):
    def own(self) -> float:
        return self.scale


bound = Own().own


class Base(following_helpers.Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.GroupNorm(1, 3), nn.Linear(3, 3)
        self.settings = Settings()

    def body(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(x))
        return y


class OtherOfAModule(Base):
    def forward(self, x: Tensor) -> Tensor:
        return named_helpers.act(self.body(x))


class ImportedWithin(Base):
    def factor(self) -> float:
        from named_helpers import scale as own

        return own


class Parent(Base):
    def factor(self) -> float:
        return scale


class BySuper(Parent):
    def factor(self) -> float:
        return super().factor()


class BySuperForward(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).neg()


class Child(nn.Module):
    def helper(self) -> float:
        return scale


class ByAnotherModule(Base):
    def __init__(self) -> None:
        super().__init__()
        self.child = Child()

    def factor(self) -> float:
        return self.child.helper()


def nested(depth: int) -> Callable[[], float]:
    if depth == 0:
        return lambda: scale
    inner = nested(depth - 1)
    return lambda: inner()


deep = nested(12)


class ByIndex(Base):
    def __getitem__(self, name: str) -> float:
        return scale

    def factor(self) -> float:
        return self["scale"]


class ByMissing(Base):
    def __getattr__(self, name: str) -> Any:
        return scale if name == "missing" else super().__getattr__(name)

    def factor(self) -> Any:
        return self.missing


class Times:
    def __rmul__(self, other: Tensor) -> Tensor:
        return other * scale


class ByOperator(Base):
    def __init__(self) -> None:
        super().__init__()
        self.times = Times()

    def factor(self) -> Any:
        return self.times


class Entered:
    def __enter__(self) -> float:
        return scale

    def __exit__(self, *_: object) -> None: ...


class ByWith(Base):
    def factor(self) -> float:
        with Entered() as own:
            return own


Change = Callable[[nn.Module, pytest.MonkeyPatch], Any]


def _global(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(globals(), "scale", 3.0)


def _module(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(named_helpers, "scale", 3.0)


def _settings(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.settings.scale = 3.0


FACTORS: dict[str, tuple[Callable[[Any], Any], Change]] = {
    "ThroughAModule": (lambda self: named_helpers.factor(), _module),
    "ConstantOfAModule": (lambda self: named_helpers.scale, _module),
    "TableOfAModule": (
        lambda self: named_helpers.settings["scale"],
        lambda model, patch: patch.setitem(named_helpers.settings, "scale", 3.0),
    ),
    "ClassOfAModule": (
        lambda self: named_helpers.Settings.scale,
        lambda model, patch: patch.setattr(named_helpers.Settings, "scale", 3.0),
    ),
    "ByGetattr": (lambda self: getattr(named_helpers, "scale"), _module),  # noqa: B009
    "EnvironmentByGetattr": (
        lambda self: float(getattr(os, "environ").get("SCALE", "1")),  # noqa: B009
        lambda model, patch: patch.setenv("SCALE", "3"),
    ),
    "ObjectByGetattr": (lambda self: getattr(self.settings, "scale"), _settings),  # noqa: B009
    "ByAttrgetter": (lambda self: operator.attrgetter("settings.scale")(self), _settings),
    "ByGlobals": (lambda self: globals()["scale"], _global),
    "ByContext": (lambda self: context.get(), lambda model, patch: context.set(3.0)),
    "ByABoundMethod": (
        lambda self: bound(),
        lambda model, patch: patch.setattr(bound.__self__, "scale", 3.0),  # type: ignore[attr-defined]
    ),
    "Deep": (lambda self: deep(), _global),
}
MODELS: dict[type[Base], Change] = {
    **{type(name, (Base,), {"factor": factor}): change for name, (factor, change) in FACTORS.items()},
    OtherOfAModule: lambda model, patch: patch.setattr(named_helpers, "act", torch.cosh),
    ImportedWithin: _module,
    **dict.fromkeys(
        (BySuper, BySuperForward, ByAnotherModule, ByIndex, ByMissing, ByOperator, ByWith), _global
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_an_accelerated_model(
    kind: type[Base], monkeypatch: pytest.MonkeyPatch, nothing_accelerated: None
) -> None:
    x = torch.randn(4, 3, dtype=D)
    contextvars.copy_context().run(
        assert_model_followed, kind, x, lambda model: MODELS[kind](model, monkeypatch)
    )


class Drawing(Base):
    def factor(self) -> float:
        return random()


def test_a_function_of_no_module(nothing_accelerated: None) -> None:
    ours = mf.accelerate(Drawing().double())
    ours(torch.randn(4, 3, dtype=D))
    assert "draws random numbers" in mf.acceleration(ours)


def test_what_libraries_do_is_not_followed() -> None:
    """A function of Python's own names hundreds of others."""

    class Net(Base):
        def factor(self) -> float:
            return len(copy.deepcopy([1.0]))

    model = Net()
    before = fingerprint(model)
    assert fingerprint(model) == before
    copy._deepcopy_dispatch[Times] = lambda value, memo: value  # type: ignore[attr-defined]
    try:
        assert fingerprint(model) == before
    finally:
        del copy._deepcopy_dispatch[Times]  # type: ignore[attr-defined]


def test_what_is_installed_is_followed_for_its_own_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other people's packages change as they like; not the one that a model or a loss is of."""
    folder = tmp_path / "site-packages" / "strangers_of_ours"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(
        "scale = 1.0\n\ndef factor():\n    return scale\n\ndef loss(y, labels):\n    return factor()\n"
    )
    monkeypatch.syspath_prepend(str(folder.parent))
    strangers = importlib.import_module("strangers_of_ours")

    def own(y: Tensor, labels: Tensor) -> Any:
        return strangers.factor()

    followed, model = {}, Base()
    for loss in (own, strangers.loss, functools.partial(strangers.loss)):
        with monkeypatch.context() as patch:
            before = fingerprint(model, loss)
            patch.setattr(strangers, "scale", 2.0)
            followed[loss] = fingerprint(model, loss) != before
    assert list(followed.values()) == [False, True, True]


def of_a_module(y: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(y, labels) * named_helpers.factor()


def of_a_context(y: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(y, labels) * context.get()


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("loss", [of_a_module, of_a_context])
def test_a_loss(loss: Any, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in ("reference", engine):
        with monkeypatch.context() as patch:

            def change(patch: pytest.MonkeyPatch = patch) -> None:
                patch.setattr(named_helpers, "scale", 3.0)
                context.set(3.0)

            found.append(contextvars.copy_context().run(around_a_change, name, Base, (3,), loss, change))
    assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)
