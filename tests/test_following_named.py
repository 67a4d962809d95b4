"""What a forward or a loss names beside the model and is changed between calls: nothing of it is recorded for good."""

from __future__ import annotations

import copy
import functools
import os
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import mamlpp_fast as mf

scale = 1.0
act: Callable[[Tensor], Tensor] = F.softsign


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3, padding=1), nn.GroupNorm(3, 3), nn.Linear(3, 3)

    def body(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(F.gelu(self.norm(self.conv(x))).mean((2, 3)))
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.factor()

    def factor(self) -> float:
        return 1.0


class ByProperty(Base):
    @property
    def now(self) -> float:
        return scale

    def factor(self) -> float:
        return self.now


class ByStaticMethod(Base):
    @staticmethod
    def now() -> float:
        return scale

    def factor(self) -> float:
        return self.now()


class ByClassMethod(Base):
    @classmethod
    def now(cls) -> float:
        return scale

    def factor(self) -> float:
        return self.now()


class Within(Base):
    def factor(self) -> float:
        return sum(scale for _ in range(1))


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


class Settings:
    """Holds a tensor as well, so that it is no plain record."""

    def __init__(self) -> None:
        self.scale, self.other = 1.0, torch.ones(2)

    def twice(self) -> float:
        return 2 * self.scale


class Inherited(Settings):
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


class ByDecorator(Base):
    @Bound
    def now(self) -> float:
        return scale

    def factor(self) -> float:
        return self.now()


class ByPartialMethod(Base):
    def _forward(self, x: Tensor, by: float) -> Tensor:
        return self.body(x) * by * scale

    forward = functools.partialmethod(_forward, by=2.0)  # type: ignore[assignment]


@functools.lru_cache
def kept() -> float:
    return scale


class ByCache(Base):
    def factor(self) -> float:
        return kept()


class OfAllClasses(type):
    @property
    def now(cls) -> float:
        return scale


class OfAKind(metaclass=OfAllClasses):
    pass


class ByMetaclass(Base):
    def factor(self) -> float:
        return OfAKind.now


_held = {"scale": 1.0}
shown = types.MappingProxyType(_held)


class ByProxy(Base):
    def factor(self) -> float:
        return shown["scale"]


MODELS = (
    *(ByProperty, ByStaticMethod, ByClassMethod, Within, ByLambda, OtherFunction, ByEnvironment, ByDefault),
    *(OfAnObject, OfACall, OfAClassItHolds, OfItsClassSCall, OfItsClassSObject, ByDescriptor, ByDecorator),
    *(ByPartialMethod, ByCache, ByMetaclass, ByProxy),
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
def test_an_accelerated_model(kind: type[Base], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    kept.cache_clear()
    plain, x = kind().double(), torch.randn(4, 1, 5, 5, dtype=torch.float64)
    ours = mf.accelerate(copy.deepcopy(plain))
    before = plain(x)
    for _ in range(2):
        assert_close(ours(x), before)
    for model in (plain, ours):
        change(model, monkeypatch)
    assert not torch.allclose(plain(x), before, rtol=1e-2)
    assert_close(ours(x), plain(x))
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
    g = torch.Generator().manual_seed(0)
    x, q = (torch.randn(2, 6, 1, 5, 5, dtype=torch.float64, generator=g) for _ in range(2))
    y = torch.arange(6).remainder(3).repeat(2, 1)
    batch, found = mf.EpisodeBatch(x, y, q, y), []
    for name in ("reference", engine):
        torch.manual_seed(0)
        loss = make()
        config = mf.MAMLConfig.maml(steps=2, inner_lr=0.1)
        learner = mf.MAMLPlusPlus(Base().double(), config, engine=name, precision="float64", loss_fn=loss)  # type: ignore[arg-type]
        before = learner.meta_gradient(batch).loss
        change_loss(loss)
        after = learner.meta_gradient(batch).loss
        assert abs(after - before) > 0.1
        found.append([before, after, *(p.grad for p in learner.model.parameters())])
    assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)
