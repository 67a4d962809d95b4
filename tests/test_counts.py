"""Counts that modules keep of their own calls: moved as a plain loop moves them, and never computed with by chance."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close

import mamlpp_fast as mf


def block() -> type[nn.Module]:
    """A class of its own for each test: what is known of counts is known of a class."""

    class Block(nn.Module):
        """As in many a ResNet-12 for few shots."""

        def __init__(
            self, channels: int, drop_rate: float = 0.0, use: Callable[[Any], Any] = lambda b: 1
        ) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.drop_rate, self.use = drop_rate, use
            self.num_batches_tracked = 0

        def forward(self, x: Tensor) -> Tensor:
            self.num_batches_tracked += 1
            x = F.max_pool2d(F.leaky_relu(self.norm(self.conv(x)), 0.1), 2)
            if self.drop_rate > 0:
                keep = max(1.0 - self.drop_rate / 40000 * self.num_batches_tracked, 1.0 - self.drop_rate)
                x = x * (torch.rand_like(x) < keep)
            made: Tensor = x * self.use(self)
            return made

    return Block


def net(use: Callable[[Any], Any] = lambda b: 1, drop_rate: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    cls: Any = block()
    layers = cls(1, drop_rate, use), cls(4), nn.Flatten(), nn.Linear(16, 3)
    return nn.Sequential(*layers).double()


def counts(model: nn.Module) -> list[int]:
    return [m.num_batches_tracked for m in model.modules() if type(m).__name__ == "Block"]


def batch(seed: int) -> mf.EpisodeBatch:
    g = torch.Generator().manual_seed(seed)
    x, tx = torch.randn(2, 2, 6, 1, 8, 8, generator=g, dtype=torch.float64)
    y = torch.arange(3).repeat(2).expand(2, 6)
    return mf.EpisodeBatch(x, y, tx, y)


@pytest.mark.parametrize("msl", [False, True])
@pytest.mark.parametrize("engine", ["autograd", "fused", "auto"])
def test_every_engine_moves_them_as_the_reference_does(engine: Any, msl: bool) -> None:
    model, config = net(), mf.MAMLConfig(steps=3, msl=msl)
    plain, own = (
        mf.MAMLPlusPlus(copy.deepcopy(model), config, engine=e, precision="float64")
        for e in ("reference", engine)
    )
    for seed in range(3):
        for learner in (plain, own):
            learner.meta_step(batch(seed))
        assert counts(own.model) == counts(plain.model)
        for p, expected in zip(own.model.parameters(), plain.model.parameters(), strict=True):
            assert_close(p, expected, rtol=1e-9, atol=1e-9)
    assert own.engine.name == ("autograd" if engine == "autograd" else "fused")
    for learner in (plain, own):
        learner.evaluate(batch(3))
    assert counts(own.model) == counts(plain.model) and counts(own.model)[0] > 0
    for learner in (plain, own):
        learner.adapt(batch(4).support_x[0], batch(4).support_y[0])
    assert counts(own.model) == counts(plain.model)


def test_an_accelerated_call_moves_them_once() -> None:
    plain = net()
    model, x = mf.accelerate(copy.deepcopy(plain)), batch(0).support_x[0]
    for call in range(1, 5):
        assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)
        assert counts(model) == counts(plain) == [call, call]
    model[0].num_batches_tracked = 70  # is no other form
    model(x)
    assert counts(model) == [71, 5] and "one operation" in mf.acceleration(model)
    assert "plain PyTorch" not in mf.acceleration(model)


@pytest.mark.parametrize(
    "use",
    [
        lambda b: 0.5 if b.num_batches_tracked > 2 else 2.0,
        lambda b: b.num_batches_tracked * 0.1,
        lambda b: 1.0 / b.num_batches_tracked,
        lambda b: 0.9**b.num_batches_tracked,
        lambda b: (1.0, 2.0, 3.0)[b.num_batches_tracked % 3],
        lambda b: torch.arange(200).tolist()[b.num_batches_tracked],
        lambda b: float(b.num_batches_tracked),
        lambda b: float(str(b.num_batches_tracked)),
        lambda b: float(f"{b.num_batches_tracked}"),
        lambda b: 2.0 if b.num_batches_tracked in (2, 4) else 1.0,
        lambda b: {1: 2.0}.get(b.num_batches_tracked, 1.0),
        lambda b: torch.full((), b.num_batches_tracked, dtype=torch.float64),
        lambda b: torch.tensor(b.num_batches_tracked, dtype=torch.float64),
        lambda b: b.num_batches_tracked.bit_length(),
        lambda b: copy.deepcopy(b.num_batches_tracked),
        lambda b: (b.num_batches_tracked + 1) and 2.0,
        lambda b: len(range(b.num_batches_tracked)),
        lambda b: abs(-b.num_batches_tracked),
    ],
)
@pytest.mark.parametrize("mode", [True, False])
def test_what_computes_with_its_count_is_right_at_every_call(use: Callable[[Any], Any], mode: bool) -> None:
    plain = net(use)
    model, x = mf.accelerate(copy.deepcopy(plain)).train(mode), batch(0).support_x[0]
    plain.train(mode)
    for _ in range(5):
        assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)
        assert counts(model) == counts(plain)
    own, expected = (
        mf.MAMLPlusPlus(copy.deepcopy(net(use)), mf.MAMLConfig(steps=2), engine=e, precision="float64")
        for e in ("auto", "reference")
    )
    for seed in range(3):
        found = [float(learner.meta_step(batch(seed)).loss) for learner in (own, expected)]
        assert found[0] == pytest.approx(found[1], rel=1e-9)
        assert counts(own.model) == counts(expected.model)


def test_a_value_that_evaluation_only_reads_makes_a_form_of_its_own() -> None:
    """A temperature annealed in training, say."""

    class Cooled(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.calls += 1
            return super().forward(x) / (1 + 0.5 * self.calls)

    torch.manual_seed(0)
    plain = nn.Sequential(Cooled(4, 8), nn.Tanh(), Cooled(8, 3)).double()
    model, x = mf.accelerate(copy.deepcopy(plain)), torch.randn(5, 4, dtype=torch.float64)
    for _ in range(4):
        for training in (True, False, False):
            assert_close(model.train(training)(x), plain.train(training)(x), rtol=1e-9, atol=1e-9)
    assert "evaluation: one operation" in mf.acceleration(model)


def test_what_it_hands_on_is_none_of_its_own() -> None:
    """To another module's count, of the same value; to another attribute."""
    for other in ("num_batches_tracked", "last"):
        plain = net(lambda b, other=other: setattr(b.conv, other, b.num_batches_tracked) or 1.0)
        plain[0].conv.num_batches_tracked = 0
        model, x = mf.accelerate(copy.deepcopy(plain)), batch(0).support_x[0]
        for _ in range(4):
            assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)
            assert vars(model[0].conv)[other] == vars(plain[0].conv)[other] == model[0].num_batches_tracked


def test_examples_are_no_calls() -> None:
    class Seen(nn.Linear):
        seen = 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen += len(x)
            return super().forward(x)

    model = mf.accelerate(nn.Sequential(Seen(4, 8), nn.Tanh(), nn.Linear(8, 3)))
    for n in (5, 7, 5, 6):
        model(torch.randn(n, 4))
    assert model[0].seen == 23


def test_drawn_masks_are_looked_at_for_a_few_counts() -> None:
    plain = net(drop_rate=0.5)
    model, x = mf.accelerate(copy.deepcopy(plain)), batch(0).support_x[0]
    said = []
    for seed in range(12):
        found = []
        for one in (model, plain):
            torch.manual_seed(seed)
            found.append(one(x))
        assert_close(*found, rtol=1e-9, atol=1e-9)
        said.append(mf.acceleration(model))
    assert said[3:] == said[3:4] * 9 and counts(model) == counts(plain) == [12, 12]


def test_transforms_count_as_pytorch_does() -> None:
    plain = nn.Sequential(block()(1), nn.Flatten(), nn.Linear(64, 3)).double()  # type: ignore[call-arg]
    plain[0].norm = nn.Identity()
    model, x = mf.accelerate(copy.deepcopy(plain)), batch(0).support_x
    for m in (model, plain):
        p = {n: t.detach() for n, t in m.named_parameters()}
        vmap(grad(lambda w, t, m=m: functional_call(m, w, (t,)).square().sum()), in_dims=(None, 0))(p, x)
    assert counts(model) == counts(plain) == [1]


def test_a_loss_that_counts_is_handed_over() -> None:
    class Loss(nn.Module):
        calls = 0

        def forward(self, prediction: Tensor, labels: Tensor) -> Tensor:
            self.calls += 1
            return F.cross_entropy(prediction, labels)

    losses = Loss(), Loss()
    for engine, loss in zip(("auto", "reference"), losses, strict=True):
        learner = mf.MAMLPlusPlus(
            net(), mf.MAMLConfig(steps=2), engine=engine, precision="float64", loss_fn=loss
        )  # type: ignore[arg-type]
        learner.meta_step(batch(0))
        before = loss.calls
        learner.meta_step(batch(1))
        loss.calls -= before
    assert losses[0].calls == losses[1].calls > 0
