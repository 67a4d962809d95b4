"""What a forward or a loss names beside the model and is changed between calls: nothing of it is recorded for good."""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable
from typing import Any

import following_helpers
import pytest
import torch
import torch.nn.functional as F
from following_helpers import Settings, around_a_change, assert_model_followed
from torch import Tensor, nn
from torch.testing import assert_close

scale = 1.0
act: Callable[[Tensor], Tensor] = F.softsign


class Base(following_helpers.Base):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3, padding=1), nn.GroupNorm(3, 3), nn.Linear(3, 3)

    def body(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(F.gelu(self.norm(self.conv(x))).mean((2, 3)))
        return y


class ByProperty(Base):
    @property
    def now(self) -> float:
        return scale

    def factor(self) -> float:
        return self.now


class ByMethod(Base):
    now: Callable[[], float]

    def factor(self) -> float:
        return self.now()


class ByStaticMethod(ByMethod):
    @staticmethod
    def now() -> float:
        return scale


class ByClassMethod(ByMethod):
    @classmethod
    def now(cls) -> float:
        return scale


class ByLambda(Base):
    def forward(self, x: Tensor) -> Tensor:
        scaled = lambda z: z * scale  # noqa: E731
        y: Tensor = scaled(self.body(x))
        return y


class OtherFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        return act(self.body(x))


class ByEnvironment(Base):
    @property
    def now(self) -> str:
        return os.environ.get("SCALE", "1")

    def factor(self) -> float:
        return float(self.now)


class ByDefault(Base):
    def forward(self, x: Tensor, by: float = 1.0) -> Tensor:
        return self.body(x) * by


class Twice(Settings):
    def twice(self) -> float:
        return 2 * self.scale


class Inherited(Twice):
    """Has the method of its base."""


class OfAnObject(Base):
    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings()

    def factor(self) -> float:
        return self.settings.scale


class Called:
    def __call__(self, y: Tensor) -> Tensor:
        return y * scale


class OfACall(Base):
    def __init__(self) -> None:
        super().__init__()
        self.scaled = Called()

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.body(x))


class OfAClassItHolds(Base):
    def __init__(self) -> None:
        super().__init__()
        self.kind = Called

    def forward(self, x: Tensor) -> Tensor:
        return self.kind()(self.body(x))


class OfItsClassSCall(Base):
    scaled = Called()

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.body(x))


class OfItsClassSObject(Base):
    settings = Settings()

    def factor(self) -> float:
        return self.settings.scale


class Now:
    def __get__(self, instance: object, owner: type) -> float:
        return scale


class ByDescriptor(Base):
    now = Now()

    def factor(self) -> float:
        return self.now


class Bound:
    """Decorates a method."""

    def __init__(self, function: Callable[..., float]) -> None:
        self.function = function

    def __get__(self, instance: object, owner: type) -> Callable[[], float]:
        return functools.partial(self.function, instance)


class ByDecorator(ByMethod):
    @Bound
    def now(self) -> float:
        return scale


class ByPartialMethod(Base):
    def _forward(self, x: Tensor, by: float) -> Tensor:
        return self.body(x) * by * scale

    forward = functools.partialmethod(_forward, by=2.0)  # type: ignore[assignment]


@functools.lru_cache
def kept() -> float:
    return scale


class OfAllClasses(type):
    @property
    def now(cls) -> float:
        return scale


class OfAKind(metaclass=OfAllClasses):
    pass


_held = {"scale": 1.0}
shown = types.MappingProxyType(_held)


FACTORS: dict[str, Callable[[Any], float]] = {
    "Within": lambda self: sum(scale for _ in range(1)),
    "ByCache": lambda self: kept(),
    "ByMetaclass": lambda self: OfAKind.now,
    "ByProxy": lambda self: shown["scale"],
}
MODELS = (
    *(ByProperty, ByStaticMethod, ByClassMethod, ByLambda, OtherFunction, ByEnvironment, ByDefault),
    *(OfAnObject, OfACall, OfAClassItHolds, OfItsClassSCall, OfItsClassSObject, ByDescriptor, ByDecorator),
    *(ByPartialMethod, *(type(name, (Base,), {"factor": factor}) for name, factor in FACTORS.items())),
)


def change(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(globals(), "scale", 3.0)
    patch.setitem(globals(), "act", F.tanhshrink)
    patch.setenv("SCALE", "3")
    patch.setattr(ByDefault.forward, "__defaults__", (3.0,))
    patch.setitem(_held, "scale", 3.0)
    patch.setattr(OfItsClassSObject.settings, "scale", 3.0)
    kept.cache_clear()
    if isinstance(model, OfAnObject):
        model.settings.scale = 3.0


@pytest.mark.parametrize("kind", MODELS)
def test_an_accelerated_model(
    kind: type[Base], monkeypatch: pytest.MonkeyPatch, nothing_accelerated: None
) -> None:
    kept.cache_clear()
    x = torch.randn(4, 1, 5, 5, dtype=torch.float64)
    plain, ours = assert_model_followed(kind, x, lambda model: change(model, monkeypatch))
    assert_close(torch.func.vmap(ours)(x[None])[0], plain(x))


def of_settings() -> Callable[[Tensor, Tensor], Tensor]:
    settings = Inherited()

    def loss(y: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(y, labels) * settings.scale * settings.twice()

    loss.settings = settings  # type: ignore[attr-defined]
    return loss


def of_itself() -> Callable[[Tensor, Tensor], Tensor]:
    def loss(y: Tensor, labels: Tensor) -> Tensor:
        by: float = loss.scale  # type: ignore[attr-defined]
        return F.cross_entropy(y, labels) * by

    loss.scale = 1.0  # type: ignore[attr-defined]
    return loss


def of_a_default() -> Callable[[Tensor, Tensor], Tensor]:
    def loss(y: Tensor, labels: Tensor, by: list[float] = [1.0]) -> Tensor:  # noqa: B006
        return F.cross_entropy(y, labels) * by[0]

    return loss


def of_a_module() -> Callable[[Tensor, Tensor], Tensor]:
    held: Any = nn.Linear(2, 2)
    held.scale = 1.0

    def loss(y: Tensor, labels: Tensor) -> Tensor:
        by: float = held.scale
        return F.cross_entropy(y, labels) * by

    loss.settings = held  # type: ignore[attr-defined]
    return loss


def change_loss(loss: Any) -> None:
    for held in (loss, getattr(loss, "settings", None)):
        if hasattr(held, "scale"):
            held.scale = 3.0
    if loss.__defaults__:
        loss.__defaults__[0][0] = 3.0


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("make", [of_settings, of_itself, of_a_default, of_a_module])
def test_a_loss(make: Callable[[], Any], engine: str) -> None:
    found = []
    for name in ("reference", engine):
        loss = make()
        found.append(around_a_change(name, Base, (1, 5, 5), loss, lambda loss=loss: change_loss(loss)))
    assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)
