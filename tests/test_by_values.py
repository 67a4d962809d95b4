"""Models whose steps touch as many elements as values say, from batch to batch others; and scalars that adapt."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from front_end_helpers import Calls
from helpers import gradients, noise
from torch import Tensor, nn
from torch.testing import assert_close

import mamlpp_fast as mf


class Changed(nn.Module):
    """A layer, a change of its values, a head."""

    keep: Tensor

    def __init__(self, change: Callable[[Changed, Tensor], None]) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)
        self.register_buffer("keep", torch.tensor([True, False, True, True, False, True]))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        h = 0.5 * self.body(x)
        self.change(self, h)
        return self.head(torch.tanh(h))


def by_mask(model: Changed, h: Tensor) -> None:
    h[h < 0.1] = -1.0


def by_mask_a_mean(model: Changed, h: Tensor) -> None:
    h[h < 0.1] = h.mean().detach()


def whole_rows(model: Changed, h: Tensor) -> None:
    h[h.sum(1) > 0.2] = 0.5


def rows_of_values(model: Changed, h: Tensor) -> None:
    h[h.sum(1) > 0.2] = h.mean(0).detach()


def as_many_values(model: Changed, h: Tensor) -> None:
    h[h < 0.1] = 0.1 * h[h < 0.1].detach()


def columns(model: Changed, h: Tensor) -> None:
    h[:, model.keep] = 0.25


def batch(seed: int) -> mf.EpisodeBatch:
    return noise(4, seed=seed)


def learner(model: nn.Module, engine: str, **settings: object) -> mf.MAMLPlusPlus:
    config = mf.MAMLConfig(steps=2, **settings)  # type: ignore[arg-type]
    return mf.MAMLPlusPlus(model, config, engine=engine, precision="float64")  # type: ignore[arg-type]


def compare(make: Callable[[], nn.Module], served: str, **settings: object) -> None:
    """Meta-gradients and evaluations on three batches; the first is the one that is checked anyhow."""
    own, plain = learner(make(), "auto", **settings), learner(make(), "reference", **settings)
    for seed in range(3):
        losses = own.meta_gradient(batch(seed)).task_losses, plain.meta_gradient(batch(seed)).task_losses
        assert_close(*losses, rtol=1e-10, atol=1e-12)
        found, expected = gradients(own.model, own.rates), gradients(plain.model, plain.rates)
        assert_close(found, expected, rtol=1e-9, atol=1e-12)
        logits = own.evaluate(batch(seed)).logits, plain.evaluate(batch(seed)).logits
        assert_close(*logits, rtol=1e-9, atol=1e-12)
    assert own.engine.name == served, own.engine_reason


@pytest.mark.parametrize(
    ("change", "served"),
    [
        (by_mask, "fused"),
        (by_mask_a_mean, "fused"),
        (whole_rows, "fused"),
        (rows_of_values, "fused"),
        (as_many_values, "autograd"),
        (columns, "autograd"),
    ],
)
def test_elements_that_a_mask_picks(change: Callable[[Changed, Tensor], None], served: str) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Changed(change)

    compare(make, served)


def test_elements_that_a_mask_picks_in_a_loop_of_ones_own() -> None:
    torch.manual_seed(0)
    plain = Changed(by_mask).double()
    torch.manual_seed(0)
    own = mf.accelerate(Changed(by_mask).double())
    for seed in range(3):
        x = batch(seed).support_x[0]
        found = []
        for model in (own, plain):
            parameters = list(model.parameters())
            grads = torch.autograd.grad(model(x).square().sum(), parameters, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in grads), parameters)
            found.append([*grads, *second])
        assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    assert "one operation" in mf.acceleration(own)


@pytest.mark.parametrize("rates", ["tensor", "element"])
def test_a_scalar_adapts_by_a_rate_of_its_own(rates: str) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Calls(
            lambda m, x: m.head(F.relu(m.body(x)) * m.scale),
            body=nn.Linear(4, 6),
            scale=nn.Parameter(torch.tensor(0.7)),
            head=nn.Linear(6, 3),
        )

    compare(make, "fused", rates=rates)
