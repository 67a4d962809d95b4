"""The learner: engines agree, schedules advance, state goes out and back, errors are named."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from front_end_helpers import Calls
from helpers import gradients, random_batch, small_conv4, small_learner
from torch import Tensor, nn
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast import adam

CONFIGS = {
    "maml++": mf.MAMLConfig(steps=3),
    "final": mf.MAMLConfig(steps=3, msl=False),
    "first-order": mf.MAMLConfig(steps=3, second_order=False),
    "maml": mf.MAMLConfig.maml(steps=3),
    "meta-sgd": mf.MAMLConfig(steps=3, rates="element"),
    "anil": mf.MAMLConfig(steps=3, adapt="head"),
    "adapt-norm": mf.MAMLConfig(steps=3, bnwb=False, adapt_norm=True),
}


@pytest.mark.parametrize("engine", ["autograd", "auto"])
@pytest.mark.parametrize("name", CONFIGS)
def test_engines_agree_with_the_reference(name: str, engine: str) -> None:
    learners = [small_learner(CONFIGS[name], engine=e) for e in ("reference", engine)]
    for i in range(3):
        batch = random_batch(seed=i)
        metrics = [learner.meta_step(batch) for learner in learners]
        assert_close(metrics[1], metrics[0], rtol=1e-9, atol=1e-10)
    found = [gradients(learner.model, learner.rates) for learner in learners]
    assert_close(found[1], found[0], rtol=1e-8, atol=1e-9)
    states = [dict(learner.model.state_dict()) for learner in learners]
    assert_close(states[1], states[0], rtol=1e-8, atol=1e-9)
    evaluations = [learner.evaluate(random_batch(seed=9), steps=4) for learner in learners]
    assert_close(evaluations[1], evaluations[0], rtol=1e-8, atol=1e-9)


def test_any_module_trains_and_auto_says_what_kept_it_from_the_fused_engine() -> None:
    class Gated(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (torch.sigmoid(x) if x.sum() > 0 else torch.tanh(x))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), Gated(), nn.Flatten(), nn.Linear(400, 3))
    learner = mf.MAMLPlusPlus(model, mf.MAMLConfig(steps=2), precision="float64")
    losses = [float(learner.meta_step(random_batch()).loss) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert learner.engine.name == "autograd"
    assert learner.engine_reason == "not fused: 2: __bool__ asks for values, which decide what is executed"
    assert learner.explain().startswith("engine autograd: not fused")
    with pytest.raises(
        ValueError, match=r"engine: expected a model .*the fused engine can take.*2: __bool__"
    ):
        mf.MAMLPlusPlus(model, mf.MAMLConfig(steps=2), engine="fused").meta_step(random_batch())


def test_regression_with_a_loss_of_ones_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1))
    learner = mf.MAMLPlusPlus(model, mf.MAMLConfig(steps=2, inner_lr=0.05, loss="mse"), precision="float64")
    x = torch.linspace(-3, 3, 10, dtype=torch.float64).view(1, 10, 1).repeat(4, 1, 1)
    y = torch.sin(x + torch.arange(4).view(4, 1, 1))
    batch = mf.EpisodeBatch(x, y, x, y)
    losses = [float(learner.meta_step(batch).loss) for _ in range(60)]
    assert losses[-1] < losses[0] * 0.9
    assert learner.evaluate(batch).accuracy.isnan().all()


@pytest.mark.parametrize("engine", ["autograd", "fused"])
@pytest.mark.parametrize("name", ["maml++", "final", "first-order", "meta-sgd", "anil"])
def test_engines_agree_in_regression(name: str, engine: str) -> None:
    """Sine waves through the MLP of Finn et al. 2017, from the same start."""
    x = torch.linspace(-3, 3, 10, dtype=torch.float64).view(1, 10, 1).repeat(4, 1, 1)
    batch = mf.EpisodeBatch(x, torch.sin(x + torch.arange(4).view(4, 1, 1)), x + 0.1, torch.cos(x))
    learners = []
    for kind in ("reference", engine):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
        config = dataclasses.replace(CONFIGS[name], loss="mse", inner_lr=0.05)
        learners.append(mf.MAMLPlusPlus(model, config, engine=kind, precision="float64"))  # type: ignore[arg-type]
    for learner in learners:
        learner.meta_gradient(batch)
    found = [gradients(learner.model, learner.rates) for learner in learners]
    assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
    for _ in range(3):
        metrics = [learner.meta_step(batch) for learner in learners]
    assert_close(metrics[1], metrics[0], rtol=1e-9, atol=1e-12, equal_nan=True)
    evaluations = [learner.evaluate(batch, steps=5) for learner in learners]
    assert_close(evaluations[1], evaluations[0], rtol=1e-9, atol=1e-12, equal_nan=True)


def test_a_loss_of_ones_own_agrees_with_the_reference_in_every_engine_that_takes_it() -> None:
    """Several labels an image: binary cross-entropy with logits, float targets [tasks, n, 3]."""
    batch = random_batch()
    targets = [F.one_hot(y, 3).double() for y in (batch.support_y, batch.target_y)]
    batch = mf.EpisodeBatch(batch.support_x, targets[0], batch.target_x, targets[1])
    loss = F.binary_cross_entropy_with_logits
    learners = [
        mf.MAMLPlusPlus(small_conv4(), mf.MAMLConfig(steps=3), engine=e, precision="float64", loss_fn=loss)  # type: ignore[arg-type]
        for e in ("reference", "auto")
    ]
    metrics = [learner.meta_gradient(batch) for learner in learners]
    assert_close(metrics[1], metrics[0], rtol=1e-9, atol=1e-12, equal_nan=True)
    found = [gradients(learner.model, learner.rates) for learner in learners]
    assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)
    assert learners[1].engine.name == "fused"


def test_auto_leaves_the_fused_engine_when_the_shapes_of_a_batch_stop_it() -> None:
    class Sized(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.relu() if len(x) % 2 else x)

    def network() -> nn.Module:
        torch.manual_seed(0)
        return Sized(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(200, 3))

    expected, ours = (
        mf.MAMLPlusPlus(network(), mf.MAMLConfig(steps=2), engine=e, precision="float64")  # type: ignore[arg-type]
        for e in ("reference", "auto")
    )
    assert_close(ours.meta_step(random_batch()), expected.meta_step(random_batch()), rtol=1e-9, atol=1e-12)
    assert ours.engine.name == "autograd"
    assert ours.engine_reason == "not fused: Sized: executes other operations for another number of examples"
    strict = mf.MAMLPlusPlus(network(), mf.MAMLConfig(steps=2), engine="fused", precision="float64")
    with pytest.raises(ValueError, match="Sized: executes other operations"):
        strict.meta_step(random_batch())


def test_accuracy_has_its_shape_whatever_the_predictions() -> None:
    model = Calls(lambda m, x: m.head(x).squeeze(-1), head=nn.Linear(2, 1))
    learner = mf.MAMLPlusPlus(model, mf.MAMLConfig(steps=2, loss="mse"))
    batch = mf.EpisodeBatch(*(torch.randn(3, 4, 2), torch.randn(3, 4)) * 2)
    assert learner.meta_step(batch).accuracy.shape == ()
    evaluation = learner.evaluate(batch)
    assert evaluation.logits.shape == (2, 3, 4)
    assert evaluation.accuracy.shape == (2, 3) and evaluation.accuracy.isnan().all()


def test_schedules_follow_the_iteration() -> None:
    learner = small_learner(
        mf.MAMLConfig(steps=3, msl_epochs=2, da_epoch=1, epochs=10, iterations_per_epoch=5)
    )
    assert learner.step_weights() is not None and not learner.second_order()
    learner.iteration = 10
    assert learner.epoch == 2 and learner.step_weights() is None and learner.second_order()
    before = learner.meta_lr()
    assert 1e-5 < before < 1e-3
    learner.meta_step(random_batch())
    assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(before)
    learner.iteration = 10_000
    assert learner.meta_lr() == pytest.approx(1e-5)


def test_state_round_trip_goes_on_bit_for_bit() -> None:
    first, second = small_learner(), small_learner()
    first.meta_step(random_batch())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for learner in (first, second):
        learner.meta_step(random_batch(seed=1))
    assert_close(dict(first.model.state_dict()), dict(second.model.state_dict()), rtol=0, atol=0)
    assert first.iteration == second.iteration == 2
    other = mf.MAMLPlusPlus(
        mf.Conv4(1, 3, image_size=12, stages=2, filters=8), mf.MAMLConfig(), engine="reference"
    )
    with pytest.raises(ValueError, match="state: expected the state of this model"):
        other.load_state_dict(first.state_dict())


@pytest.mark.parametrize("engine", ["reference", "autograd", "fused"])
def test_an_error_leaves_no_gradients(engine: Any) -> None:
    """Neither those of the tasks before it, nor of the batch before."""
    learner, batch = small_learner(CONFIGS["maml++"], engine=engine), random_batch()
    learner.meta_gradient(batch)
    assert any(bool(g.any()) for g in gradients(learner.model, learner.rates).values())
    wrong = batch.support_y.clone()
    wrong[-1, 0] = 99
    with pytest.raises(ValueError, match="expected labels from 0"):
        learner.meta_gradient(dataclasses.replace(batch, support_y=wrong))
    assert not any(bool(g.any()) for g in gradients(learner.model, learner.rates).values())


def test_class_structured_batches_are_flattened() -> None:
    flat = random_batch(tasks=2, ways=3, shots=2, targets=1)
    structured = mf.EpisodeBatch(
        flat.support_x.unflatten(1, (3, 2)),
        flat.support_y.unflatten(1, (3, 2)),
        flat.target_x.unflatten(1, (3, 1)),
        flat.target_y.unflatten(1, (3, 1)),
    )
    assert_close(structured.support_x, flat.support_x)
    assert structured.target_y.shape == (2, 3)
    with pytest.raises(ValueError, match="support_x and support_y: expected the same"):
        mf.EpisodeBatch(flat.support_x, flat.support_y[:, :-1], flat.target_x, flat.target_y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "quick"}, "engine: expected one of auto, reference, autograd, fused, got 'quick'"),
        ({"precision": "float8"}, "precision: expected one of"),
        ({"precision": "tf32"}, "precision: expected a CUDA device for tf32"),
        (
            {"precision": "bfloat16", "engine": "reference"},
            "precision: expected float64 or float32 for the reference",
        ),
    ],
    ids=["engine", "precision", "tf32", "reference-bf16"],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        mf.MAMLPlusPlus(small_conv4(5), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["autograd", "fused"])
def test_warming_up_a_capture_leaves_no_trace(engine: str) -> None:
    """What runs before a capture on a GPU, here without one: the update, and everything put back."""
    config = mf.MAMLConfig(steps=2, iterations_per_epoch=2, msl_epochs=1)
    plain, warmed = small_learner(config, engine=engine), small_learner(config, engine=engine)
    for seed in range(4):
        batch = random_batch(seed=seed)
        plain.meta_step(batch)
        options = warmed.step_weights(), warmed.second_order()
        graph = warmed._whole_step(warmed.engine, batch, *options)
        adam.set_learning_rate(warmed.optimizer, warmed.meta_lr())
        graph.warm_up((batch.fields, *options))
        graph(batch.fields, *options)
        warmed.iteration += 1
    states = [adam.state(own.optimizer, own.model, own.rates) for own in (plain, warmed)]
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_one_task_is_evaluated_as_a_batch_of_it() -> None:
    learner = small_learner()
    batch = random_batch(tasks=1)
    one, whole = learner.evaluate(batch[0]), learner.evaluate(batch)
    for ours, expected in zip(one, whole, strict=True):
        assert_close(ours, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        learner.evaluate(batch, steps=0)


def test_batch_norms_of_another_number_of_steps_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"model: expected per-step batch norms of 5 steps, blocks\.0\.norm has 3"
    ):
        mf.MAMLPlusPlus(small_conv4(3), mf.MAMLConfig(steps=5))


def test_clamping_passes_over_what_is_frozen() -> None:
    model = small_conv4()
    model.blocks[0].conv.weight.requires_grad_(False)
    config = mf.MAMLConfig(steps=3, clamp_meta_gradient=1e-3)
    learner = mf.MAMLPlusPlus(model, config, engine="reference", precision="float64")
    learner.meta_gradient(random_batch())
    assert model.blocks[0].conv.weight.grad is None
    largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    assert largest == 1e-3


@pytest.mark.parametrize("engine", ["autograd", "reference"])
def test_attention_is_said_to_run_by_the_math_kernel(engine: str) -> None:
    x, y = torch.randn(2, 3, 5, 4), torch.arange(3).repeat(2, 1)
    model = Calls(
        lambda m, x: m.head(m.attention(x, x, x, need_weights=False)[0].mean(1)),
        attention=nn.MultiheadAttention(4, 2, batch_first=True),
        head=nn.Linear(4, 3),
    )
    learner = mf.MAMLPlusPlus(model, mf.MAMLConfig(steps=2), engine=engine)  # type: ignore[arg-type]
    learner.meta_step(mf.EpisodeBatch(x, y, x, y))
    assert "attention (attention) by PyTorch's math kernel" in learner.explain()


def test_a_model_with_parameters_in_a_list_is_refused_in_words() -> None:
    class Listing(nn.Linear):
        def parameters(self, recurse: bool = True) -> Any:
            return list(super().parameters(recurse))

    with pytest.raises(TypeError, match=r"model: expected parameters\(\) to be PyTorch's own iterator"):
        mf.MAMLPlusPlus(Listing(3, 2), mf.MAMLConfig())
