"""What people's forwards do besides computing: ``auto`` equals the textbook by the recorder alone."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast.engine.watch import Watch
from tests.front_end_helpers import AUTOGRAD, FUSED, Net, batch, compare, pair

# Gradients that are taken, or not ------------------------------------------------------------------------------------


class InPlaceWithoutGradient(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        with torch.no_grad():
            h.relu_()
        y: Tensor = self.head(F.max_pool2d(self.norm(h), 2).flatten(1))
        return y


class NormWithoutGradient(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.first(x)
        return super().forward(x)


class AsksForGradients(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        y: Tensor = self.head(h + h if torch.is_grad_enabled() else h)
        return y


class AsksAnActivation(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        y: Tensor = self.head(h + h if h.requires_grad else h)
        return y


class ReadsData(Net):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x).data)
        return y


@pytest.mark.parametrize(
    ("build", "engines", "why"),
    [
        (InPlaceWithoutGradient, AUTOGRAD, "relu_ changes an activation in place where no gradient is taken"),
        (NormWithoutGradient, FUSED, ""),
        (AsksForGradients, ["fused", "fused", "autograd"], ""),
        (AsksAnActivation, ["fused", "fused", "autograd"], ""),
        (ReadsData, FUSED, ""),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"bnwb": False, "adapt_norm": True}])
def test_gradients(build: Callable[[], nn.Module], engines: list[str], why: str, settings: Any) -> None:
    served, reason = compare(build, **settings)
    assert served == engines and why in reason


# Running statistics --------------------------------------------------------------------------------------------------


class FrozenNorm(Net):
    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(mode)
        self.norm.eval()
        return self


class OwnStatistics(Net):
    """A functional batch norm with buffers of its own; ``always``: in evaluation too it goes by the batch."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, always: bool = False, counter: bool = True, calls: int = 1) -> None:
        super().__init__()
        self.norm = nn.Identity()
        self.always, self.calls = always, calls
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))
        if counter:  # which nothing counts up
            self.register_buffer("num_batches_tracked", torch.tensor(0))

    def body(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        for _ in range(self.calls):
            h = F.batch_norm(
                h, self.running_mean, self.running_var, training=self.training or self.always, momentum=0.2
            )
        return F.max_pool2d(h, 2).flatten(1)


class CountsByItself(Net):
    num_batches_tracked: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        return super().forward(x)


@pytest.mark.parametrize(
    ("build", "engines"),
    [
        (FrozenNorm, FUSED),
        (OwnStatistics, FUSED),
        (functools.partial(OwnStatistics, counter=False), FUSED),
        (functools.partial(OwnStatistics, always=True), ["fused", "fused", "autograd"]),
        (functools.partial(OwnStatistics, calls=2), ["autograd", "autograd", "fused"]),
        (CountsByItself, AUTOGRAD),
    ],
)
def test_running_statistics(build: Callable[[], nn.Module], engines: list[str]) -> None:
    assert compare(build)[0] == engines


# What a pass changes besides -----------------------------------------------------------------------------------------


class Meter:
    def __init__(self) -> None:
        self.count = 0

    def update(self) -> None:
        self.count += 1


class Nested:
    """Not plain: what it holds is not compared at every call."""

    def __init__(self) -> None:
        self.meter = Meter()


class Counts(Net):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.meter, self.nested, self.kind = Meter(), Nested(), kind
        self.queue: collections.deque[int] = collections.deque(maxlen=2000)

    def passes(self) -> int:
        return self.meter.count + self.nested.meter.count + len(self.queue)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "deque":
            self.queue.append(1)
        else:
            (self.meter if self.kind == "meter" else self.nested.meter).update()
        return super().forward(x)


class Draws(Net):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.generator = random.Random(0) if kind == "random" else np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        y: Tensor = self.head(h + h if self.generator.random() < 0.4 else h)
        return y


@pytest.mark.parametrize("kind", ["meter", "nested", "deque"])
def test_objects_that_a_forward_changes(kind: str) -> None:
    """Side effects happen as often as in the textbook loop."""
    assert compare(functools.partial(Counts, kind))[0] == AUTOGRAD


@pytest.mark.parametrize("kind", ["random", "numpy"])
def test_generators_of_the_models_own(kind: str) -> None:
    """None of its numbers are drawn by a recording."""
    assert compare(functools.partial(Draws, kind))[0] == AUTOGRAD


PASSES: list[int] = []


class CountsGlobally(Net):
    def forward(self, x: Tensor) -> Tensor:
        PASSES.append(1)
        return super().forward(x)


def test_a_global_that_a_forward_changes() -> None:
    learner, _ = pair(CountsGlobally, msl=False)
    learner.meta_gradient(mf.EpisodeBatch(*batch(0)))
    assert learner.engine.name == "autograd"
    before = len(PASSES)
    learner.meta_gradient(mf.EpisodeBatch(*batch(0)))
    assert len(PASSES) - before == 2 * 3  # tasks; two support passes and a target pass


# What is changed between calls ---------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class Slotted:
    slope: float = 0.1


class Config:
    slope = 0.1


class Configured(Net):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def body(self, x: Tensor) -> Tensor:
        slope = self.config.slope if hasattr(self.config, "slope") else self.config[0].item()
        return F.max_pool2d(F.leaky_relu(self.norm(self.conv(x)), slope), 2).flatten(1)


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (Config, lambda m: setattr(m.config, "slope", 0.5)),
        (Slotted, lambda m: setattr(m.config, "slope", 0.5)),
        (lambda: type("Own", (Config,), {}), lambda m: setattr(m.config, "slope", 0.5)),
        (lambda: type("Own", (Config,), {})(), lambda m: setattr(type(m.config), "slope", 0.5)),
        (lambda: np.array([0.1]), lambda m: m.config.fill(0.5)),
        (lambda: torch.tensor([0.1]), lambda m: m.config.data.fill_(0.5)),
        (lambda: torch.tensor([0.1]), lambda m: m.config.numpy().fill(0.5)),
    ],
)
def test_settings_in_objects_follow(make: Callable[[], Any], change: Callable[[nn.Module], object]) -> None:
    assert compare(lambda: Configured(make()), change)[0] == FUSED


def test_class_attributes_and_closed_over_values_follow() -> None:
    def build() -> nn.Module:
        slope = 0.1

        class Own(Net):
            slope = 0.1

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.head(F.leaky_relu(self.body(x), slope))
                return y

            def set(self) -> None:
                nonlocal slope
                slope, type(self).slope = 0.5, 0.3

        return Own()

    assert compare(build, lambda m: m.set())[0] == FUSED  # type: ignore[operator]


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (nn.CrossEntropyLoss, lambda loss: setattr(loss, "label_smoothing", 0.3)),
        (nn.CrossEntropyLoss, lambda loss: setattr(loss, "reduction", "sum")),
        (
            nn.CrossEntropyLoss,
            lambda loss: loss.register_forward_hook(lambda _module, _args, result: 2 * result),
        ),
        (
            functools.partial(functools.partial, F.cross_entropy, label_smoothing=0.1),
            lambda loss: loss.keywords.update(label_smoothing=0.4),
        ),
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_the_loss_follows(make: Callable[[], Any], change: Callable[[Any], object], first: bool) -> None:
    """``first``: changed before the learner has it, too."""
    torch.manual_seed(0)
    model, loss = Net(), make()
    if first:
        change(loss)
    learner = mf.MAMLPlusPlus(model, mf.MAMLConfig(steps=2), precision="float64", loss_fn=loss, verify=False)
    tasks = mf.EpisodeBatch(*batch(0))
    for _ in range(2):
        witness = mf.MAMLPlusPlus(
            copy.deepcopy(learner.model),
            learner.config,
            precision="float64",
            loss_fn=loss,
            engine="reference",
        )
        assert_close(learner.meta_gradient(tasks).loss, witness.meta_gradient(tasks).loss)
        assert_close(model.conv.weight.grad, witness.model.conv.weight.grad)
        change(loss)


class Merges(Net):
    merged = False

    def train(self, mode: bool = True) -> Merges:
        super().train(mode)
        self.merged = not mode
        return self


@pytest.mark.parametrize("mode", [True, False])
def test_looking_at_a_model_puts_it_back_by_its_own_train(mode: bool) -> None:
    model = Merges().train(mode)
    watch = Watch(model)
    assert (model.training, model.merged) == (mode, not mode) and not watch.changed(model)
