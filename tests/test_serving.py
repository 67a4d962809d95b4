"""Batches, types and models that the fused engine cannot take go to autograd, or are refused by name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from front_end_helpers import Calls
from helpers import maml_loss
from torch import Tensor, nn
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast.engine.fused import FusedEngine, recent
from tests.front_end_helpers import AUTOGRAD, Net, batch, compare, pair
from tests.textbook import Batch, Textbook


class Pooled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x))).mean((2, 3))


def test_targets_of_another_size() -> None:
    learner, textbook = pair(Pooled)
    tasks: Batch = (*batch(0)[:2], *batch(1, size=10)[2:])
    result = learner.meta_gradient(mf.EpisodeBatch(*tasks))
    assert_close(result.task_losses, textbook.gradient(tasks))
    assert_close(learner.evaluate(mf.EpisodeBatch(*tasks)).logits, textbook.evaluate(tasks, "batch", 2))
    assert learner.engine.name == "autograd" and "target_x" in learner.engine_reason


def _sizes(learner: mf.MAMLPlusPlus, textbook: Textbook, sizes: Sequence[int]) -> list[str]:
    """The engines that served batches of these sizes, each result held against the textbook's."""
    served = []
    for size in sizes:
        tasks = batch(0, size=8)
        tasks = (tasks[0].repeat(1, size, 1, 1, 1), tasks[1].repeat(1, size), *tasks[2:])
        assert_close(learner.meta_gradient(mf.EpisodeBatch(*tasks)).task_losses, textbook.gradient(tasks))
        served.append(learner.engine.name)
    return served


def test_of_many_sizes_those_that_come_often_get_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing a program takes longer than a plain loop for a size that comes once."""
    monkeypatch.setattr(recent, "FREE", 2)
    monkeypatch.setattr(recent, "OFTEN", 3)
    learner, textbook = pair(Pooled)
    assert _sizes(learner, textbook, [1, 2, 3, 4, 1, 3]) == ["fused"] * 2 + ["autograd"] * 2 + [
        "fused",
        "autograd",
    ]
    assert "has not come 3 times yet" in learner.engine_reason
    assert _sizes(learner, textbook, [3, 3, 3, 4]) == ["autograd", "fused", "fused", "autograd"]


def test_programs_that_are_not_used_for_longest_go() -> None:
    """The engine that was asked for serves every size; its memory has a bound."""
    learner, textbook = pair(Pooled)
    engine = FusedEngine(learner.model, learner.rates, precision="float64", verify=False)
    engine._prepared._most = 2
    made = []
    for size in (1, 2, 1, 3, 1, 2):
        tasks = batch(0, size=8)
        given = mf.EpisodeBatch(tasks[0].repeat(1, size, 1, 1, 1), tasks[1].repeat(1, size), *tasks[2:])
        generation = engine.generation
        found = engine.meta_gradient(given, learner.step_weights(), True)
        assert_close(found.task_losses, textbook.gradient(given.fields))  # type: ignore[arg-type]
        made.append((len(engine._prepared), engine._gone, engine.generation > generation))
    assert [gone for _, gone, _ in made] == [0, 0, 0, 1, 1, 2]
    assert max(count for count, _, _ in made) == 2
    assert made[3][2] and made[5][2]  # what was captured with those that went is not to be replayed


@pytest.mark.parametrize("verify", [False, True])
def test_inputs_that_require_gradients_get_them(verify: bool) -> None:
    tasks = batch(0)
    gradients = []
    for engine in ("auto", "reference"):
        torch.manual_seed(0)
        x = tasks[0].clone().requires_grad_()
        learner = mf.MAMLPlusPlus(
            Net(),
            mf.MAMLConfig(steps=2),
            precision="float64",
            engine=engine,  # type: ignore[arg-type]
            verify=verify,
        )
        learner.meta_gradient(mf.EpisodeBatch(x, *tasks[1:]))
        gradients.append(x.grad)
    assert gradients[0] is not None
    assert_close(*gradients)


@pytest.mark.parametrize("cast", [Tensor.float, lambda x: x.to(torch.float32)])
def test_casts_to_the_models_own_dtype(cast: Callable[[Tensor], Tensor]) -> None:
    """Verified in float64 all the same."""

    class Casts(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(cast(x)).float()

    torch.manual_seed(0)
    learner = mf.MAMLPlusPlus(Casts(), mf.MAMLConfig(steps=2))
    torch.manual_seed(0)
    witness = mf.MAMLPlusPlus(Net(), mf.MAMLConfig(steps=2), precision="float64", engine="reference")
    tasks = mf.EpisodeBatch(*batch(0))
    found, expected = learner.meta_gradient(tasks), witness.meta_gradient(tasks)
    assert learner.engine.name == "fused"
    assert_close(found.loss, expected.loss, check_dtype=False, rtol=1e-5, atol=1e-5)
    found_logits = learner.evaluate(tasks).logits
    assert learner.engine.name == "fused"
    assert_close(found_logits, witness.evaluate(tasks).logits, check_dtype=False, rtol=1e-4, atol=1e-4)


class Turned(nn.Module):
    """Complex numbers as a parameter, a buffer, or both."""

    def __init__(self, weight: bool) -> None:
        super().__init__()
        self.lift, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("turn", torch.polar(torch.ones(3), torch.arange(3.0)))
        self.scale = nn.Parameter(torch.randn(3, dtype=torch.complex64)) if weight else None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.view_as_complex(self.lift(x).view(-1, 3, 2)) * self.turn
        made: Tensor = self.head(torch.view_as_real(h if self.scale is None else h * self.scale).flatten(1))
        return made


@pytest.mark.parametrize("weight", [False, True])
def test_complex_numbers_stay_what_they_are(weight: bool) -> None:
    """``Module.to`` of another precision makes real numbers of them."""
    torch.manual_seed(0)
    model = Turned(weight)
    own = copy.deepcopy(model).double()
    own.turn = model.turn.to(torch.complex128)
    if own.scale is not None and model.scale is not None:
        own.scale = nn.Parameter(model.scale.detach().to(torch.complex128))
    tasks = torch.randn(2, 5, 4, dtype=torch.float64), torch.randint(3, (2, 5))
    learner = mf.MAMLPlusPlus(model, mf.MAMLConfig.maml(steps=2), precision="float64")
    learner.meta_gradient(mf.EpisodeBatch(*tasks, *tasks))
    assert learner.engine.name == "autograd" and "complex" in learner.engine_reason
    total = torch.zeros(())
    for task in zip(*tasks, strict=True):
        total = total + maml_loss(torch.func.functional_call, own, task * 2) / 2
    total.backward()
    for name, p in own.named_parameters():
        assert_close(learner.model.get_parameter(name).grad, p.grad)
    assert learner.model.get_buffer("turn").dtype is torch.complex128
    learner.meta_step(mf.EpisodeBatch(*tasks, *tasks))


def test_arguments_that_a_rule_does_not_foresee() -> None:
    x, y = torch.ones(2, 3, 4), torch.ones(2, 3, 1)
    model = Calls(lambda m, x: F.linear(x, m.weight), weight=nn.Parameter(torch.ones(4)))
    learner = mf.MAMLPlusPlus(model, mf.MAMLConfig(steps=1, loss="mse"))
    with pytest.raises(ValueError, match="expected a target for each prediction"):
        learner.meta_gradient(mf.EpisodeBatch(x, y, x, y))


class ReturnsTuple(Net):
    def forward(self, x: Tensor) -> Any:
        return (super().forward(x),)


def test_a_forward_that_returns_no_tensor() -> None:
    learner, _ = pair(ReturnsTuple)
    with pytest.raises(ValueError, match="model: expected a forward that returns a tensor, got tuple"):
        learner.meta_gradient(mf.EpisodeBatch(*batch(0)))


def test_a_scripted_part() -> None:
    class Scripted(Net):
        def __init__(self) -> None:
            super().__init__()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of `torch.jit.script` itself
                warnings.simplefilter("ignore", FutureWarning)  # as of torch 2.14
                self.act = torch.jit.script(nn.ReLU())

        def body(self, x: Tensor) -> Tensor:
            y: Tensor = self.act(super().body(x))
            return y

    served, reason = compare(Scripted)
    assert served == AUTOGRAD and "is compiled" in reason
