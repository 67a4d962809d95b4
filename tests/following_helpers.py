"""What tests of changes between calls share: models of a body times a factor, and how a change is followed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from helpers import noise
from torch import Tensor, nn
from torch.testing import assert_close

import mamlpp_fast as mf


class Settings:
    """Holds a tensor as well, so that it is no plain record."""

    def __init__(self) -> None:
        self.scale, self.other = 1.0, torch.ones(2)


class Base(nn.Module):
    body: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.factor()

    def factor(self) -> Any:
        return 1.0


def assert_model_followed(
    kind: Callable[[], nn.Module], x: Tensor, change: Callable[[nn.Module], Any]
) -> tuple[nn.Module, nn.Module]:
    """An accelerated copy of the model gives what the model gives, before and after a change of both; returns them."""
    torch.manual_seed(0)
    plain = kind().double()
    ours = mf.accelerate(copy.deepcopy(plain))
    before = plain(x)
    for _ in range(2):
        assert_close(ours(x), before)
    assert "one operation" in mf.acceleration(ours)
    for model in (plain, ours):
        change(model)
    assert not torch.allclose(plain(x), before, rtol=1e-2)
    assert_close(ours(x), plain(x))
    return plain, ours


def around_a_change(
    engine: Any, kind: Callable[[], nn.Module], shape: tuple[int, ...], loss: Any, change: Callable[[], Any]
) -> list[Any]:
    """A learner's losses before and after a change of what its loss names, and the meta-gradient after it."""
    torch.manual_seed(0)
    config = mf.MAMLConfig.maml(steps=2, inner_lr=0.1)
    learner = mf.MAMLPlusPlus(kind(), config, engine=engine, precision="float64", loss_fn=loss)
    batch = noise(*shape)
    before = learner.meta_gradient(batch).loss
    change()
    after = learner.meta_gradient(batch).loss
    assert abs(after - before) > 0.1
    return [before, after, *(p.grad for p in learner.model.parameters())]
