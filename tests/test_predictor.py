"""Adapted predictors are snapshots; learners can be copied and pickled at any time."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import random_batch, small_conv4, small_learner
from rank_helpers import on_ranks
from torch import Tensor, nn
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast.copying import copy_of

ENGINES = ["reference", "autograd", "fused"]
CONFIGS = {
    "maml++": mf.MAMLConfig(steps=3),
    "anil": mf.MAMLConfig(steps=3, adapt="head"),
    "running": mf.MAMLConfig(steps=3, eval_stats="running"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_predictor_keeps_its_answers_while_the_learner_goes_on(config: mf.MAMLConfig) -> None:
    learner, batch = small_learner(config), random_batch()
    learner.meta_step(batch)
    predict = learner.adapt(batch.support_x[0], batch.support_y[0])
    expected = learner.evaluate(batch).logits[-1, 0]
    state = copy.deepcopy(learner.state_dict())
    pickled = pickle.loads(pickle.dumps(predict))
    for seed in range(3):
        learner.meta_step(random_batch(seed=seed))
    learner.adapt(batch.support_x[1], batch.support_y[1], steps=1)
    learner.evaluate(batch, steps=5)
    with torch.no_grad():
        learner.model.head.weight.zero_()  # type: ignore[union-attr, operator]
    for own in (predict, copy.deepcopy(predict), pickled):
        assert_close(own(batch.target_x[0]), expected, rtol=1e-9, atol=1e-12)
    learner.load_state_dict(state)
    again = learner.adapt(batch.support_x[0], batch.support_y[0])
    assert_close(again(batch.target_x[0]), expected, rtol=1e-9, atol=1e-12)
    assert not predict(batch.target_x[0]).requires_grad


def test_a_predictor_serves_threads_while_the_learner_trains() -> None:
    learner, batch = small_learner(engine="fused"), random_batch()
    predictors = [learner.adapt(x, y) for x, y in zip(batch.support_x, batch.support_y, strict=True)]
    expected = [p(x) for p, x in zip(predictors, batch.target_x, strict=True)]
    found: list[list[Tensor]] = [[], []]

    def ask(i: int) -> None:
        for _ in range(20):
            found[i].append(predictors[i](batch.target_x[i]))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for seed in range(3):
        learner.meta_step(random_batch(seed=seed))
    for thread in threads:
        thread.join()
    for answers, right in zip(found, expected, strict=True):
        assert_close(answers, [right] * 20, rtol=0, atol=0)


class Normed(nn.Module):
    """As old ``weight_norm`` does: a weight that is computed before every pass stays in the module with its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
        self.kept: dict[str, list[Tensor]] = {"weights": []}
        self.refresh()

    def refresh(self) -> None:
        self.weight = self.v / self.v.norm(dim=1, keepdim=True)
        self.kept = {"weights": [self.weight]}

    def forward(self, x: Tensor) -> Tensor:
        self.refresh()
        return x @ self.weight.T


def test_models_that_hold_results_of_computations_are_copied() -> None:
    model = Normed()
    with pytest.raises(RuntimeError, match="created explicitly by the user"):
        copy.deepcopy(model)
    again = copy_of(model)
    assert again.kept["weights"][0] is again.weight and again.weight.is_leaf
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    batch = mf.EpisodeBatch(x, torch.arange(3).repeat(2, 1), x + 0.1, torch.arange(3).repeat(2, 1))
    learner = mf.MAMLPlusPlus(model, mf.MAMLConfig.maml(steps=2), precision="float64", engine="autograd")
    expected = learner.evaluate(batch).logits[-1, 0]
    predict = learner.adapt(batch.support_x[0], batch.support_y[0])
    other = copy.deepcopy(learner)
    learner.meta_step(batch)
    assert_close(predict(batch.target_x[0]), expected, rtol=1e-9, atol=1e-12)
    assert_close(other.evaluate(batch).logits[-1, 0], expected, rtol=1e-9, atol=1e-12)


def test_a_model_that_cannot_be_copied_is_called_itself_with_the_weights_of_then() -> None:
    learner, batch = small_learner(), random_batch()
    learner.model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"model: expected one that copy\.deepcopy can copy, cannot pickle"):
        copy_of(learner.model)
    predict = learner.adapt(batch.support_x[0], batch.support_y[0])
    expected = learner.evaluate(batch).logits[-1, 0]
    learner.meta_step(batch)
    learner.adapt(batch.support_x[1], batch.support_y[1], steps=1)
    assert_close(predict(batch.target_x[0]), expected, rtol=1e-9, atol=1e-12)


# Copies of learners.


def loaded(learner: mf.MAMLPlusPlus, engine: str) -> mf.MAMLPlusPlus:
    own = small_learner(engine=engine)
    own.load_state_dict(learner.state_dict())
    return own


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_copy_trains_as_a_learner_with_the_same_state(engine: str, way: str, when: str) -> None:
    learner = small_learner(engine=engine)
    if when == "after":
        learner.meta_step(random_batch())
        learner.evaluate(random_batch())
    expected, untouched = loaded(learner, engine), copy.deepcopy(learner.state_dict())
    other: mf.MAMLPlusPlus = (
        copy.deepcopy(learner) if way == "deepcopy" else pickle.loads(pickle.dumps(learner))
    )
    for seed in range(3):
        batch = random_batch(seed=seed)
        found, right = other.meta_step(batch), expected.meta_step(batch)
        assert_close(found, right, rtol=0, atol=0)
    assert_close(other.evaluate(batch), expected.evaluate(batch), rtol=0, atol=0)
    assert_close(other.state_dict()["model"], expected.state_dict()["model"], rtol=0, atol=0)
    assert_close(learner.state_dict(), untouched, rtol=0, atol=0)
    # And the original goes on as if there were no copy.
    expected = small_learner(engine=engine)
    expected.load_state_dict(untouched)
    assert_close(learner.meta_step(batch), expected.meta_step(batch), rtol=0, atol=0)
    assert other.engine is not learner.engine and other.engine.name == learner.engine.name == engine


def test_a_copy_of_a_changed_model_and_of_frozen_parameters() -> None:
    learner = small_learner(engine="fused")
    learner.meta_step(random_batch())
    learner.model.get_submodule("blocks.0").requires_grad_(False)
    other = copy.deepcopy(learner)
    assert other.rates.names == learner.rates.names and "blocks.0.conv.weight" not in other.rates.names
    for own in (learner, other):
        own.meta_step(random_batch(seed=1))
        own.model.get_submodule("blocks.0").requires_grad_(True)
        own.meta_step(random_batch(seed=2))
    assert_close(other.state_dict(), learner.state_dict(), rtol=0, atol=0)


def test_learners_that_load_one_state_do_not_share_it() -> None:
    """``Optimizer.load_state_dict`` keeps the tensors it is given."""
    learner = small_learner()
    learner.meta_step(random_batch())
    other, expected = small_learner(), small_learner()
    other.load_state_dict(learner.state_dict())
    expected.load_state_dict(copy.deepcopy(learner.state_dict()))
    learner.meta_step(random_batch(seed=1))
    for own in (other, expected):
        own.meta_step(random_batch(seed=2))
    assert_close(other.state_dict(), expected.state_dict(), rtol=0, atol=0)


def _refusals() -> list[str]:
    own = mf.MAMLPlusPlus(small_conv4(), mf.MAMLConfig(steps=3), process_group=dist.group.WORLD)
    said = []
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError) as caught:
            attempt(own)
        said.append(str(caught.value))
    return said


def test_a_learner_in_a_process_group_is_refused_in_words() -> None:
    for said in on_ranks(2, _refusals):
        for line in said:
            assert line.startswith("learner: expected one without a process group to copy or pickle")
            assert "\n" not in line


# Modes of the caller.

MODES = {"inference": torch.inference_mode, "no-grad": torch.no_grad}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("engine", ENGINES)
def test_a_learner_works_within_inference_mode_and_outside_afterwards(engine: str, mode: Any) -> None:
    def everything(learner: mf.MAMLPlusPlus, batch: mf.EpisodeBatch) -> list[Any]:
        predict = learner.adapt(batch.support_x[0], batch.support_y[0])
        found: list[Any] = [learner.evaluate(batch), predict(batch.target_x[0]), learner.evaluate(batch[0])]
        learner.load_state_dict(copy.deepcopy(learner.state_dict()))
        found += [learner.step_weights(), learner.meta_step(batch), learner.meta_gradient(batch)]
        return [*found, [p.grad for p in learner.model.parameters()]]

    expected, ours = small_learner(engine=engine), small_learner(engine=engine)
    first = everything(expected, random_batch())
    with mode():
        found = everything(ours, random_batch())
        later, other = random_batch(seed=1), copy.deepcopy(ours)
    assert_close(found, first, rtol=0, atol=0)
    right = expected.meta_step(random_batch(seed=1))
    for learner in (ours, other):
        assert_close(learner.meta_step(later), right, rtol=0, atol=0)
        assert_close(learner.evaluate(later), expected.evaluate(random_batch(seed=1)), rtol=0, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_learner_made_in_inference_mode(engine: str) -> None:
    model, batch = small_conv4(), random_batch()
    made = mf.MAMLPlusPlus(copy.deepcopy(model), mf.MAMLConfig(steps=3), precision="float64")
    with torch.inference_mode():
        learner = mf.MAMLPlusPlus(model, mf.MAMLConfig(steps=3), engine=engine, precision="float64")  # type: ignore[arg-type]
        first = learner.evaluate(batch)
        with pytest.raises(
            ValueError, match=r"model: expected one made outside torch\.inference_mode, blocks"
        ):
            small_learner(engine=engine)
    assert_close(first, made.evaluate(batch), rtol=1e-9, atol=1e-12)
    for _ in range(2):
        assert_close(learner.meta_step(batch), made.meta_step(batch), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_autocast_around_a_learner_changes_nothing(engine: str) -> None:
    results = []
    for enabled in (False, True):
        learner = small_learner(engine=engine)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found: list[Any] = [learner.meta_step(random_batch()), learner.evaluate(random_batch())]
        results.append(found)
    assert_close(results[1], results[0], rtol=0, atol=0)


class _Frozen(nn.Sequential):
    """Many a network keeps its norms in evaluation mode by a ``train`` of its own, which returns nothing."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_whose_train_returns_nothing(engine: str) -> None:
    found, batch = [], random_batch()
    for kind in (nn.Sequential, _Frozen):
        torch.manual_seed(0)
        pixels, ways = batch.support_x[0, 0].numel(), 1 + int(batch.support_y.max())
        learner = mf.MAMLPlusPlus(
            kind(nn.Flatten(), nn.Linear(pixels, ways)),
            mf.MAMLConfig(steps=2),
            engine=engine,
            precision="float64",  # type: ignore[arg-type]
        )
        loss = learner.meta_step(batch).loss
        predict = learner.adapt(batch.support_x[0], batch.support_y[0])
        found.append((loss, learner.evaluate(batch).logits, predict(batch.target_x[0])))
    assert_close(found[1], found[0], rtol=0, atol=0)
