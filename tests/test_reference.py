"""The specification itself: schedules, what adapts, gradients against finite differences, evaluation rules."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import gradients, random_batch, small_conv4, small_learner
from torch import Tensor, nn
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast import reference


@pytest.mark.parametrize(
    ("epoch", "msl_epochs", "expected"),
    [
        (0, 10, [0.2] * 5),
        (9, 10, [0.02] * 4 + [0.92]),
        (14, 15, [1 / 75] * 4 + [71 / 75]),
        (49, 50, [0.006] * 4 + [0.976]),
        (10, 10, None),
        (0, 0, None),
    ],
)
def test_msl_weights_are_the_published_schedule(
    epoch: int, msl_epochs: int, expected: list[float] | None
) -> None:
    weights = reference.msl_weights(epoch, 5, msl_epochs)
    if expected is None:
        assert weights is None
    else:
        assert weights == pytest.approx(expected, rel=1e-12)
        assert weights is not None and sum(weights) == pytest.approx(1, rel=1e-12)


def test_derivative_order_anneals_strictly_after_the_epoch() -> None:
    orders = [reference.is_second_order(e, True, 50) for e in (0, 50, 51)]
    assert orders == [False, False, True]
    assert not reference.is_second_order(99, False, -1)


def test_cosine_annealing_runs_from_first_to_last_rate() -> None:
    rates = [reference.cosine_annealing(e, 100, 1e-3, 1e-5) for e in (0, 50, 100)]
    assert rates == pytest.approx([1e-3, (1e-3 + 1e-5) / 2, 1e-5])


def test_adapted_names_leave_norms_out_and_find_the_head() -> None:
    model = small_conv4()
    assert reference.adapted_names(model) == (
        "blocks.0.conv.weight",
        "blocks.0.conv.bias",
        "blocks.1.conv.weight",
        "blocks.1.conv.bias",
        "head.weight",
        "head.bias",
    )
    assert reference.adapted_names(model, "head") == ("head.weight", "head.bias")
    assert reference.adapted_names(model, "blocks.1.") == reference.adapted_names(model, ("blocks.1.",))
    assert reference.adapted_names(model, ("blocks.1.",)) == ("blocks.1.conv.weight", "blocks.1.conv.bias")
    shared = small_conv4(per_step_affine=False)
    assert "blocks.0.norm.weight" in reference.adapted_names(shared, adapt_norm=True)
    with pytest.raises(ValueError, match="adapt_norm: expected one weight"):
        reference.adapted_names(model, adapt_norm=True)
    with pytest.raises(ValueError, match="adapt: expected a choice"):
        reference.adapted_names(model, ("nothing",))


class _Smooth(nn.Module):
    """Tanh and average pooling: finite differences see no kinks."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = reference.PerStepBatchNorm2d(3, steps)
        self.head = nn.Linear(3 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool2d(torch.tanh(self.norm(self.conv(x))), 4)
        out: Tensor = self.head(y.flatten(1))
        return out


@pytest.mark.parametrize("weights", [None, [0.2, 0.3, 0.5]], ids=["final", "msl"])
def test_meta_gradient_matches_finite_differences(weights: list[float] | None) -> None:
    torch.manual_seed(0)
    model = _Smooth(3).double().train()
    batch = list(random_batch())
    names = ("conv.weight", "conv.bias", "head.weight", "head.bias")
    rates = {n: torch.tensor([0.3, 0.2, 0.4], dtype=torch.float64, requires_grad=True) for n in names}

    def loss() -> float:
        own = dict(model.named_parameters())
        params = {n: own[n] for n in names}
        total = 0.0
        for task in batch:
            value, _ = reference.task_loss(
                model,
                params,
                rates,
                task,
                steps=3,
                step_weights=weights,
                loss_fn=F.cross_entropy,
                second_order=False,
            )
            total += float(value.detach()) / len(batch)
        return total

    result = reference.meta_gradient(model, rates, batch, steps=3, step_weights=weights)
    assert float(result.loss) == pytest.approx(loss(), rel=1e-12)
    checked = dict(model.named_parameters()) | {f"rate {n}": r for n, r in rates.items()}
    generator = torch.Generator().manual_seed(2)
    for name, p in checked.items():
        assert p.grad is not None, name
        direction = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        direction /= direction.norm()
        h = 1e-5
        start = p.detach().clone()
        p.data = start + h * direction
        above = loss()
        p.data = start - h * direction
        below = loss()
        p.data = start
        slope = (above - below) / (2 * h)
        assert float((p.grad * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-8), name


def test_first_order_still_teaches_rates_but_not_early_rows() -> None:
    learner = small_learner(mf.MAMLConfig(steps=3, second_order=False, msl=False))
    learner.meta_gradient(random_batch())
    norm = learner.model.get_submodule("blocks.0.norm")
    assert norm.weight.grad[:2].abs().max() == 0
    assert norm.weight.grad[2].abs().max() > 0
    assert learner.rates.rates.grad is not None
    head = learner.rates.names.index("head.weight")
    assert (learner.rates.rates.grad[head] != 0).all()


def test_plain_maml_and_mamlpp_agree_before_the_first_update() -> None:
    """Spec 1.13: with MSL off, identity affine and constant rates, loss and convolution gradients are the same."""
    batch = random_batch()
    found = []
    for config in (mf.MAMLConfig(steps=3, msl=False), mf.MAMLConfig.maml(steps=3)):
        torch.manual_seed(3)
        model = mf.Conv4(
            1,
            3,
            image_size=12,
            filters=4,
            stages=2,
            num_steps=3,
            per_step_affine=config.bnwb,
            per_step_stats=config.bnrs,
        )
        learner = mf.MAMLPlusPlus(model, config, engine="reference", precision="float64")
        metrics = learner.meta_gradient(batch)
        found.append((metrics.loss, learner.model.get_parameter("blocks.1.conv.weight").grad))
    assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)


def test_bias_in_front_of_batch_norm_gets_an_exact_zero() -> None:
    learner = small_learner()
    learner.meta_step(random_batch())
    bias = learner.model.get_parameter("blocks.0.conv.bias")
    assert bias.grad is not None and not bias.grad.any()


@pytest.mark.parametrize(
    "config",
    [
        mf.MAMLConfig.maml(steps=3),
        mf.MAMLConfig.maml(steps=3, second_order=False),
        mf.MAMLConfig.maml(steps=3, msl=True),
        mf.MAMLConfig.maml(steps=3, lslr=True),
        mf.MAMLConfig.maml(steps=3, bnwb=True, bnrs=True),
        mf.MAMLConfig(steps=3),
        mf.MAMLConfig(steps=3, rates="element"),
        mf.MAMLConfig(steps=3, adapt="head"),
        mf.MAMLConfig(steps=3, bnwb=False, adapt_norm=True),
        mf.MAMLConfig(steps=3, da_epoch=50),
    ],
    ids=["maml", "fomaml", "msl", "lslr", "bn", "maml++", "meta-sgd", "anil", "adapt-norm", "da"],
)
def test_every_setting_learns(config: mf.MAMLConfig) -> None:
    learner = small_learner(config)
    batch = random_batch(tasks=4)
    losses = [float(learner.meta_step(batch).loss) for _ in range(12)]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    assert bool(learner.rates.rates.grad is not None) == (config.lslr or config.rates == "element")


def test_meta_sgd_starts_equal_to_lslr() -> None:
    """A rate per element summed over its tensor is the rate per tensor: so are their gradients."""
    batch = random_batch()
    by_tensor, by_element = (
        mf.MAMLPlusPlus(
            small_conv4(), mf.MAMLConfig(steps=3, rates=kind), engine="reference", precision="float64"
        )
        for kind in ("tensor", "element")
    )
    for learner in (by_tensor, by_element):
        learner.meta_gradient(batch)
    element = by_element.rates
    assert element.rates.grad is not None
    summed = torch.stack([part.sum(1) for part in element.rates.grad.split(element.sizes, dim=1)])
    assert_close(summed, by_tensor.rates.rates.grad, rtol=1e-10, atol=1e-12)
    assert_close(gradients(by_element.model), gradients(by_tensor.model), rtol=1e-10, atol=1e-12)


def test_running_statistics_make_predictions_independent_of_the_batch() -> None:
    learner = small_learner(mf.MAMLConfig(steps=3, eval_stats="running"))
    batch = random_batch()
    for _ in range(3):
        learner.meta_step(batch)
    task = batch[0]
    together = learner.evaluate(task).logits[-1, 0]
    one = mf.Episode(task.support_x, task.support_y, task.target_x[2:3], task.target_y[2:3])
    assert_close(learner.evaluate(one).logits[-1, 0], together[2:3], rtol=1e-10, atol=1e-12)
    predict = learner.adapt(task.support_x, task.support_y)
    assert_close(predict(task.target_x[2:3]), together[2:3], rtol=1e-10, atol=1e-12)
    transductive = small_learner(mf.MAMLConfig(steps=3))
    transductive.load_state_dict(learner.state_dict())
    assert not torch.allclose(transductive.evaluate(task).logits[-1, 0], together)


def test_evaluation_changes_no_state() -> None:
    for stats in ("batch", "running"):
        learner = small_learner(mf.MAMLConfig(steps=3, eval_stats=stats))
        before = {k: v.clone() for k, v in learner.model.state_dict().items()}
        learner.evaluate(random_batch())
        assert_close(dict(learner.model.state_dict()), before, rtol=0, atol=0)


def test_steps_beyond_the_trained_ones_use_the_last_row_and_rate() -> None:
    learner = small_learner()
    batch = random_batch()
    longer = learner.evaluate(batch, steps=5)
    assert longer.logits.shape[0] == 5
    assert_close(longer.logits[:3], learner.evaluate(batch).logits, rtol=1e-12, atol=1e-12)
    extended = small_learner(mf.MAMLConfig(steps=5))
    with torch.no_grad():
        for name, p in extended.model.named_parameters():
            source = learner.model.get_parameter(name)
            p.copy_(torch.cat([source, source[-1:], source[-1:]]) if ".norm." in name else source)
        rates = learner.rates.rates
        extended.rates.rates.copy_(torch.cat([rates, rates[:, -1:], rates[:, -1:]], dim=1))
    assert_close(longer.logits, extended.evaluate(batch).logits, rtol=1e-12, atol=1e-12)
    shorter = learner.evaluate(batch, steps=1)
    assert_close(shorter.logits, longer.logits[:1], rtol=1e-12, atol=1e-12)


def test_clamp_holds_for_the_network_but_not_for_rates() -> None:
    free = small_learner()
    clamped = small_learner(mf.MAMLConfig(steps=3, clamp_meta_gradient=1e-3))
    for learner in (free, clamped):
        learner.meta_gradient(random_batch())
    for name, p in clamped.model.named_parameters():
        expected = free.model.get_parameter(name).grad
        assert expected is not None
        assert_close(p.grad, expected.clamp(-1e-3, 1e-3))
    assert_close(clamped.rates.rates.grad, free.rates.rates.grad)
