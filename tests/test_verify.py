"""The fused engine's check of itself: a program made wrong on purpose is caught, a right one not; no trace is left."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import gradients, random_batch, small_conv4, small_learner
from torch import Tensor, nn
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast.data import load
from mamlpp_fast.engine import running
from mamlpp_fast.engine.fingerprint import fingerprint
from mamlpp_fast.engine.fused import lowering, rules
from mamlpp_fast.engine.fused.steps import Conv, Linear
from mamlpp_fast.engine.verify import check_meta_gradient

CONFIG = mf.MAMLConfig(steps=2, inner_lr=0.1)


class Plain(nn.Module):
    """Every stage apart, so that each rule is called: a batch norm and an activation that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.norm(self.conv(x)), 0.2)
        return self.head(F.max_pool2d(h + F.relu(h), 2).flatten(1))


def learner(engine: str = "auto", *, precision: str = "float64", **options: Any) -> mf.MAMLPlusPlus:
    torch.manual_seed(0)
    model = Plain().double()
    return mf.MAMLPlusPlus(model, CONFIG, engine=engine, precision=precision, **options)  # type: ignore[arg-type]


# Faults --------------------------------------------------------------------------------------------------------------


def _wrong_slope(patch: pytest.MonkeyPatch) -> None:
    def rule(low: Any, input: Any, negative_slope: float = 0.01, inplace: bool = False) -> None:
        rules._activation(low, input, 0.9 * negative_slope)

    patch.setitem(lowering._RULES, F.leaky_relu, rule)


def _half_gradient(patch: pytest.MonkeyPatch) -> None:
    """Of the convolution; every inner step is shorter then."""
    backward = Conv.backward

    def scaled(self: Conv, em: Any, ps: Any, gy: Any, out: Any) -> None:
        half = em.like("half", gy)
        em.call(torch.ops.aten.mul.Scalar_out, gy, 0.5, out=half)
        backward(self, em, ps, half, out)

    patch.setattr(Conv, "backward", scaled)


def _second_order(patch: pytest.MonkeyPatch) -> None:
    """The Hessian-vector products lack a term: nothing but the meta-gradient shows it."""

    def partial(self: Linear, em: Any, ps: Any, gy: Any, gy_dot: Any, out: Any) -> None:
        self.backward(em, ps, gy_dot, out)

    patch.setattr(Linear, "backward_tangent", partial)
    patch.setattr("mamlpp_fast.engine.fused.fusions.MOST_CLASSES", 0)  # no head: the layer's own rule


def _statistics(patch: pytest.MonkeyPatch) -> None:
    made = running.RunningStats.of.__func__  # type: ignore[attr-defined]

    def of(cls: Any, *args: Any, momentum: float, **options: Any) -> Any:
        return made(cls, *args, momentum=1.01 * momentum, **options)

    patch.setattr(running.RunningStats, "of", classmethod(of))


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "slope": (_wrong_slope, "loss: is "),
    "first-order": (_half_gradient, "loss: is "),
    "second-order": (_second_order, "conv.weight: has a meta-gradient that is "),
    "statistics": (_statistics, "norm.running_mean: is a buffer that becomes "),
}


@pytest.fixture(params=FAULTS)
def fault(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Puts a fault into the engine; what is to be said of it."""
    put, message = FAULTS[request.param]
    put(monkeypatch)
    return message


def test_a_wrong_program_is_left_to_the_autograd_engine(fault: str) -> None:
    ours, expected = learner(), learner("reference")
    for seed in range(2):
        result, right = (one.meta_step(random_batch(seed=seed)) for one in (ours, expected))
        assert_close(result.loss, right.loss)
    assert ours.engine.name == "autograd"
    message = ours.engine_reason
    assert message.startswith(f"not fused: {fault}")
    assert message.endswith(" off the reference loop's in float64")
    assert float(message.removesuffix(" off the reference loop's in float64").split()[-1]) > 1e-6
    assert_close(dict(ours.model.state_dict()), dict(expected.model.state_dict()), rtol=1e-9, atol=1e-9)
    assert_close(ours.rates.rates, expected.rates.rates)


def test_a_wrong_program_asked_for_is_an_error(fault: str) -> None:
    ours = learner("fused")
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(
        ValueError, match=f"expected a model and a batch that the fused engine can take, {fault}"
    ):
        ours.meta_step(random_batch())
    assert_close(ours.state_dict(), before, rtol=0, atol=0)


def test_without_the_check_it_passes(fault: str) -> None:
    ours, expected = learner(verify=False), learner("reference")
    for one in (ours, expected):
        one.meta_gradient(random_batch())
    assert ours.engine.name == "fused"
    mine, right = ({**gradients(o.model), **dict(o.model.named_buffers())} for o in (ours, expected))
    with pytest.raises(AssertionError):
        assert_close(mine, right)


def test_every_form_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was right says nothing of another: the fault lies in what only the second order needs."""
    _second_order(monkeypatch)
    config = mf.MAMLConfig(steps=2, da_epoch=0, iterations_per_epoch=1)
    torch.manual_seed(0)
    ours = mf.MAMLPlusPlus(Plain().double(), config, precision="float64")
    ours.meta_step(random_batch())
    assert ours.engine.name == "fused"
    ours.meta_step(random_batch())
    assert ours.engine.name == "autograd"


def test_evaluation_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    _wrong_slope(monkeypatch)
    ours, expected = learner(), learner("reference")
    result, right = (one.evaluate(random_batch(), steps=3) for one in (ours, expected))
    assert_close(result.logits, right.logits)
    assert ours.engine.name == "autograd"
    assert ours.engine_reason.startswith("not fused: output: has predictions that are ")
    with pytest.raises(ValueError, match=r"output: has predictions that are .* off the reference loop's"):
        learner("fused").evaluate(random_batch())
    passed = learner("fused", verify=False).evaluate(random_batch(), steps=3)
    assert not torch.allclose(passed.logits, right.logits)


def test_rates_that_come_out_wrong_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from mamlpp_fast.engine.fused.transfer import Transfer

    gradients = Transfer.gradients

    def wrong(self: Transfer, places: Any) -> list[tuple[Tensor, Tensor]]:
        return [(p, t * 1.001 if p is places.rates else t) for p, t in gradients(self, places)]

    monkeypatch.setattr(Transfer, "gradients", wrong)
    ours = learner()
    ours.meta_step(random_batch())
    assert ours.engine_reason.startswith(
        "not fused: the inner rates: has a meta-gradient that is 1.0e-03 off"
    )


# No trace ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_the_check_changes_no_result(precision: str) -> None:
    """To the last bit, through several forms and evaluations."""
    ends = []
    for verify in (True, False):
        torch.manual_seed(0)
        model = small_conv4(2)
        one = mf.MAMLPlusPlus(model, CONFIG, engine="fused", precision=precision, verify=verify)  # type: ignore[arg-type]
        for seed, tasks in enumerate((2, 3, 2)):
            one.meta_step(random_batch(seed=seed, tasks=tasks))
            one.evaluate(random_batch(seed=seed), steps=3)
        ends.append({**one.state_dict(), **gradients(one.model, one.rates)})
    assert_close(ends[0], ends[1], rtol=0, atol=0)


@pytest.mark.parametrize("evaluation", [False, True])
def test_preparing_changes_nothing_of_the_learner(evaluation: bool) -> None:
    ours = learner("fused")
    ours.meta_step(random_batch())
    engine: Any = ours.engine
    state, known = copy.deepcopy(ours.state_dict()), fingerprint(ours.model)
    left = {name: (p.grad, p.grad.clone()) for name, p in ours.model.named_parameters() if p.grad is not None}
    generators = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()  # noqa: NPY002
    ours.model.train(not evaluation)
    flags = [m.training for m in ours.model.modules()]
    batch = random_batch(tasks=4, shots=3)
    if evaluation:
        engine.prepare_evaluation(batch, 4, "running")
    else:
        engine.prepare(batch, False, True)
    assert [m.training for m in ours.model.modules()] == flags
    assert_close(ours.state_dict(), state, rtol=0, atol=0)
    assert fingerprint(ours.model) == known
    for name, p in ours.model.named_parameters():
        assert p.grad is left[name][0]
        assert_close(p.grad, left[name][1], rtol=0, atol=0)
    assert random.getstate() == generators[0]
    now = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    assert all(np.array_equal(now[key], value) for key, value in generators[1]["state"].items())
    assert torch.equal(torch.get_rng_state(), generators[2])


def test_large_counts_and_indices_hide_no_wrong_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    _statistics(monkeypatch)
    torch.manual_seed(0)
    model = Plain().double()
    model.register_buffer("order", torch.tensor([10**9]))
    ours = mf.MAMLPlusPlus(model, CONFIG, precision="float64")
    ours.meta_step(random_batch())
    assert ours.engine_reason.startswith("not fused: norm.running_mean: is a buffer that becomes ")


def test_the_inner_step_and_adam_are_left_alone() -> None:
    torch.manual_seed(0)
    ours = mf.MAMLPlusPlus(small_conv4(2), CONFIG, engine="fused", precision="float64")
    norms = [m for m in ours.model.modules() if isinstance(m, mf.PerStepBatchNorm2d)]
    before = [(m.step, m.eval_stats, m.plain) for m in norms]
    ours.meta_gradient(random_batch())
    ours.evaluate(random_batch())
    assert [(m.step, m.eval_stats, m.plain) for m in norms] == before
    assert ours.iteration == 0 and not ours.optimizer.state


# No false alarm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_first_batch_from_which_nothing_can_be_told(value: float) -> None:
    ours, expected = learner("fused"), learner("reference")
    batch = random_batch()
    bad = mf.EpisodeBatch(batch.support_x * value, batch.support_y, batch.target_x * value, batch.target_y)
    assert not torch.isfinite(ours.meta_gradient(bad).loss)
    assert not torch.isfinite(ours.evaluate(bad).logits).any()
    assert_close(ours.evaluate(batch).logits, expected.evaluate(batch).logits)


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e6])
def test_images_of_any_scale_are_taken(scale: float) -> None:
    ours = learner()
    batch = random_batch()
    ours.meta_gradient(
        mf.EpisodeBatch(batch.support_x * scale, batch.support_y, batch.target_x * scale, batch.target_y)
    )
    assert ours.engine.name == "fused", ours.engine_reason


def test_equal_images_and_dead_layers_are_taken() -> None:
    """Meta-gradients that are zero but for rounding, in one and the other order of summation."""
    ours = learner()
    batch = random_batch()
    same = mf.EpisodeBatch(
        torch.ones_like(batch.support_x), batch.support_y, torch.ones_like(batch.target_x), batch.target_y
    )
    ours.meta_gradient(same)
    assert ours.engine.name == "fused", ours.engine_reason
    with torch.no_grad():
        for p in ours.model.parameters():
            p.zero_()
    ours.meta_gradient(random_batch(tasks=3))
    assert ours.engine.name == "fused", ours.engine_reason


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(2))
def test_low_precision_is_checked_in_float64(precision: str, seed: int) -> None:
    """A network wide enough for products in the precision itself, which alone would not be within 1e-6."""
    torch.manual_seed(seed)
    model = mf.Conv4(1, 5, image_size=28, filters=16, num_steps=2)
    ours = mf.MAMLPlusPlus(model, CONFIG, precision=precision)  # type: ignore[arg-type]
    ours.meta_step(random_batch(ways=5, shots=1, size=28, seed=seed, dtype=torch.float32))
    ours.evaluate(random_batch(ways=5, shots=1, size=28, seed=seed, dtype=torch.float32))
    assert ours.engine.name == "fused", ours.engine_reason


class Casting(Plain):
    """Casts to its own precision, as many models do with what they are given."""

    def __init__(self, cast: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.cast = cast

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.cast(x))


CASTS = {
    "float": lambda x: x.float(),
    "to": lambda x: x.to(torch.float32),
    "to-keyword": lambda x: x.to(dtype=torch.float32),
    "type": lambda x: x.type(torch.float32),
}


@pytest.mark.parametrize("cast", CASTS)
def test_models_that_cast_to_their_own_precision(cast: str) -> None:
    ours = mf.MAMLPlusPlus(Casting(CASTS[cast]), CONFIG)
    batch = random_batch(dtype=torch.float32)
    ours.meta_gradient(batch)
    ours.evaluate(batch)
    assert ours.engine.name == "fused", ours.engine_reason


class Single(Plain):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("single precision alone")
        return super().forward(x)


def test_a_model_that_cannot_run_in_float64_is_not_fused() -> None:
    batch = random_batch(dtype=torch.float32)
    torch.manual_seed(0)
    ours, expected = (mf.MAMLPlusPlus(Single(), CONFIG, engine=engine) for engine in ("auto", "autograd"))
    expected.model.load_state_dict(ours.model.state_dict())
    assert_close(ours.meta_gradient(batch).loss, expected.meta_gradient(batch).loss)
    why = "Single: its forward raises in float64, which the check of the first batch is in, single precision alone"
    assert ours.engine_reason == f"not fused: {why}"
    assert_close(ours.evaluate(batch).logits, expected.evaluate(batch).logits)
    with pytest.raises(ValueError, match=why):
        mf.MAMLPlusPlus(Single(), CONFIG, engine="fused").evaluate(batch)
    unchecked = mf.MAMLPlusPlus(Single(), CONFIG, engine="fused", verify=False)
    unchecked.model.load_state_dict(ours.model.state_dict())
    assert_close(unchecked.evaluate(batch).logits, expected.evaluate(batch).logits)


def test_labels_that_do_not_fit_are_named_as_such() -> None:
    batch = random_batch(ways=4)
    for engine in ("auto", "fused"):
        with pytest.raises(ValueError, match="support_y: expected"):
            learner(engine).meta_gradient(batch)


@pytest.mark.data
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_real_episodes_raise_no_alarm(real_data: Path, precision: str) -> None:
    """Strokes on even paper: whole regions of equal pixels, where poolings tie."""
    if not (real_data / "omniglot.npz").is_file():
        pytest.skip(f"no omniglot.npz in {real_data}")
    data = load("omniglot", real_data)
    torch.manual_seed(0)
    ours = mf.MAMLPlusPlus(
        mf.Conv4(1, 5, image_size=28, filters=8, num_steps=2),
        CONFIG,
        precision=precision,  # type: ignore[arg-type]
    )
    for index in range(3):
        # Of another shape each time, so that each is checked.
        sampler = data.sampler("train", ways=5, shots=1, targets=index + 1, seed=0)
        ours.meta_step(sampler.batch(2 * index, 2))
        assert ours.engine.name == "fused", ours.engine_reason


def test_a_form_whose_first_batch_tells_nothing_is_checked_by_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bool] = []

    def counted(*arguments: Any) -> bool:
        seen.append(check_meta_gradient(*arguments))
        return seen[-1]

    monkeypatch.setattr("mamlpp_fast.engine.fused.engine.check_meta_gradient", counted)
    learner = small_learner(engine="fused", verify=True)
    good, bad = random_batch(), random_batch()
    bad.support_x[0, 0] = float("inf")
    for batch in (bad, good, good):
        learner.meta_gradient(batch)
    assert seen == [False, True]
