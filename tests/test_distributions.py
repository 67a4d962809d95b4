"""Losses of ``torch.distributions``, which looks at its arguments first: fused, and followed when it objects."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from front_end_helpers import Calls
from helpers import gradients
from torch import Tensor, nn
from torch import distributions as td
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast.engine.base import Unsupported
from mamlpp_fast.engine.fused.losses import recorded_loss

TASKS, SUPPORT, TARGETS, OUTPUTS = 3, 5, 4, 4
D = torch.float64
Loss = Callable[[Tensor, Tensor], Tensor]
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def _labels(kind: str) -> Callable[[int], Tensor]:
    made: dict[str, Callable[[int], Tensor]] = {
        "classes": lambda n: torch.randint(OUTPUTS, (TASKS, n)),
        "signs": lambda n: torch.randint(2, (TASKS, n, OUTPUTS)).to(D),
        "counts": lambda n: torch.randint(5, (TASKS, n, OUTPUTS)).to(D),
        "values": lambda n: torch.randn(TASKS, n, OUTPUTS, dtype=D),
        "few": lambda n: torch.randn(TASKS, n, 2, dtype=D),
        "numbers": lambda n: torch.randn(TASKS, n, dtype=D),
    }
    return made[kind]


def normal(z: Tensor, y: Tensor) -> Tensor:
    return -td.Normal(z[:, :2], F.softplus(z[:, 2:]) + 0.1).log_prob(y).mean()


def policy(z: Tensor, y: Tensor) -> Tensor:
    """An action's share, as of a policy gradient, with a bonus for what is open."""
    choice = td.Categorical(logits=z)
    return -(choice.log_prob(y) * (y.to(z.dtype) + 1) + 0.1 * choice.entropy()).mean()


def mixture(z: Tensor, y: Tensor) -> Tensor:
    parts = td.Normal(z[:, 2:], 0.7)
    return -td.MixtureSameFamily(td.Categorical(logits=z[:, :2]), parts).log_prob(y).mean()


def divergence(z: Tensor, y: Tensor) -> Tensor:
    own = td.Normal(z[:, :2], z[:, 2:].exp())
    return td.kl_divergence(own, td.Normal(y, torch.ones_like(y))).sum(-1).mean()


@pytest.fixture(autouse=True)
def validating(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile switches it off for the process, in whichever test."""
    monkeypatch.setattr(td.Distribution, "_validate_args", True)


CASES: dict[str, tuple[Loss, str]] = {
    "normal": (normal, "few"),
    "normal, fixed": (lambda z, y: -td.Normal(z, 0.5).log_prob(y).sum(), "values"),
    "normal, unasked": (lambda z, y: -td.Normal(z, 0.5, validate_args=False).log_prob(y).sum(), "values"),
    "independent": (lambda z, y: -td.Independent(td.Normal(z, 1.0), 1).log_prob(y).mean(), "values"),
    "categorical": (lambda z, y: -td.Categorical(logits=z).log_prob(y).mean(), "classes"),
    "categorical, shares": (lambda z, y: -td.Categorical(probs=z.softmax(-1)).log_prob(y).mean(), "classes"),
    "policy": (policy, "classes"),
    "bernoulli": (lambda z, y: -td.Bernoulli(logits=z).log_prob(y).mean(), "signs"),
    "bernoulli, shares": (lambda z, y: -td.Bernoulli(probs=z.sigmoid()).log_prob(y).mean(), "signs"),
    "poisson": (lambda z, y: -td.Poisson(z.exp()).log_prob(y).mean(), "counts"),
    "several": (
        lambda z, y: -td.MultivariateNormal(z, torch.eye(OUTPUTS, dtype=D)).log_prob(y).mean(),
        "values",
    ),
    "mixture": (mixture, "numbers"),
    "divergence": (divergence, "few"),
}


def batch(name: str, seed: int = 0) -> mf.EpisodeBatch:
    torch.manual_seed(seed)
    labels = _labels(CASES[name][1])
    sides = ((torch.randn(TASKS, n, 3, dtype=D), labels(n)) for n in (SUPPORT, TARGETS))
    return mf.EpisodeBatch(*next(sides), *next(sides), by_class=False)


def learner(loss: Loss, engine: str = "auto", *, drop: float = 0.0, wide: bool = False) -> mf.MAMLPlusPlus:
    """With a convolution where ``wide``: tasks then go side by side, on lanes."""
    torch.manual_seed(1)
    first: list[nn.Module] = [nn.Linear(3, 6)]
    if wide:
        first = [nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 16, 3, padding=1), nn.Flatten(), nn.Linear(48, 6)]
    model = nn.Sequential(*first, nn.Tanh(), nn.Dropout(drop), nn.Linear(6, OUTPUTS))
    config = mf.MAMLConfig(steps=2, inner_lr=0.05, da_epoch=-1)
    return mf.MAMLPlusPlus(model, config, engine=engine, precision="float64", loss_fn=loss)  # type: ignore[arg-type]


def textbook(own: mf.MAMLPlusPlus, loss: Loss, given: mf.EpisodeBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of the tasks and the meta-gradients of a loop in plain PyTorch; all steps count alike."""
    model, losses = copy.deepcopy(own.model), []
    meta = dict(model.named_parameters())
    rates = own.rates.as_dict(own.rates.rates.detach().clone().requires_grad_())
    for task in given:
        fast, total = dict(meta), torch.zeros((), dtype=D)
        for k in range(own.config.steps):
            z = torch.func.functional_call(model, fast, (task.support_x,))
            grads = torch.autograd.grad(loss(z, task.support_y), list(fast.values()), create_graph=True)
            fast = {n: p - rates[n][k] * g for (n, p), g in zip(fast.items(), grads, strict=True)}
            z = torch.func.functional_call(model, fast, (task.target_x,))
            total = total + loss(z, task.target_y) / own.config.steps
        losses.append(total)
    found = torch.autograd.grad(torch.stack(losses).mean(), [*meta.values(), *rates.values()])
    return torch.stack(losses).detach(), dict(zip([*meta, *(f"rate {n}" for n in rates)], found, strict=True))


def compare(own: mf.MAMLPlusPlus, loss: Loss, given: mf.EpisodeBatch) -> None:
    losses, expected = textbook(own, loss, given)
    result = own.meta_gradient(given)
    assert_close(result.task_losses, losses, **CLOSE)
    rates = own.rates.as_dict(own.rates.rates.grad)
    found = {n: p.grad for n, p in own.model.named_parameters()} | {f"rate {n}": g for n, g in rates.items()}
    assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_equals_a_textbook_loop(name: str) -> None:
    loss, _ = CASES[name]
    own = learner(loss)
    for seed in range(2):
        compare(own, loss, batch(name, seed))
        assert own.engine.name == "fused"
    assert_close(
        own.evaluate(batch(name)).loss, learner(loss, "reference").evaluate(batch(name)).loss, **CLOSE
    )


@pytest.mark.parametrize("name", ["normal", "bernoulli"])
def test_on_lanes(name: str) -> None:
    loss, _ = CASES[name]
    own = learner(loss, wide=True)
    compare(own, loss, batch(name))
    assert own.engine.name == "fused"


# When it objects ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [False, True])
def test_what_pytorch_raises_for_is_raised(wide: bool) -> None:
    """By a later batch, in one task: a program computes something of labels that are none."""
    loss, _ = CASES["bernoulli"]
    own = learner(loss, wide=wide)
    own.meta_gradient(batch("bernoulli"))
    assert own.engine.name == "fused"
    wrong = batch("bernoulli", 1)
    wrong.target_y[1, 0, 0] = 0.5
    before = {n: b.clone() for n, b in own.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"within the support \(Boolean\(\)\)"):
        own.meta_gradient(wrong)
    assert "loss: finds its arguments otherwise" in own.engine_reason
    assert_close(own.model.state_dict(), before, rtol=0, atol=0)
    compare(own, loss, batch("bernoulli"))
    forced = learner(loss, "fused", wide=wide)
    forced.meta_gradient(batch("bernoulli"))
    with pytest.raises(ValueError, match="loss: finds its arguments otherwise"):
        forced.meta_gradient(wrong)


def test_a_variance_that_becomes_negative_is_raised_for() -> None:
    """By ``F.gaussian_nll_loss``, which asks before it computes."""
    own = learner(lambda z, y: F.gaussian_nll_loss(z[:, :2], y, z[:, 2:].square() + y + 9))
    given = batch("normal")
    own.meta_gradient(given)
    assert own.engine.name == "fused"
    with pytest.raises(ValueError, match="var has negative entry"):
        own.meta_gradient(dataclasses.replace(given, support_y=given.support_y - 99))


def test_validation_that_is_switched_on_later_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, _ = CASES["bernoulli"]
    own, wrong = learner(loss), batch("bernoulli", 1)
    wrong.target_y[1, 0, 0] = 0.5
    monkeypatch.setattr(td.Distribution, "_validate_args", False)
    own.meta_gradient(batch("bernoulli"))
    own.meta_gradient(wrong)  # as PyTorch computes on
    assert own.engine.name == "fused"
    monkeypatch.setattr(td.Distribution, "_validate_args", True)
    with pytest.raises(ValueError, match=r"within the support \(Boolean\(\)\)"):
        own.meta_gradient(wrong)


def test_predictions_that_are_no_numbers_are_raised_for() -> None:
    loss, _ = CASES["normal"]
    own, given = learner(loss), batch("normal", 1)
    own.meta_gradient(batch("normal"))
    given.support_x[2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="Expected parameter loc"):
        own.meta_gradient(given)


def test_a_batch_that_is_handed_over_draws_what_a_loop_draws() -> None:
    """Of an answer that changes without an error; the masks of dropout are drawn anew, from where they were."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        try:
            return -td.Normal(z, y.exp()).log_prob(y).mean()
        except ValueError:
            return z.square().mean()

    given = batch("normal, fixed")
    own, reference = learner(loss, drop=0.3), learner(loss, "reference", drop=0.3)
    own.meta_gradient(given)
    assert own.engine.name == "fused"
    given.support_y[0, 0, 0] = torch.nan
    results, states = [], []
    for one in (own, reference):
        torch.manual_seed(3)
        losses = one.meta_gradient(given).task_losses
        results.append({"losses": losses, **gradients(one.model, one.rates)})
        states.append(torch.get_rng_state())
    assert own.engine.name == "autograd"
    assert_close(results[0], results[1], **CLOSE)
    assert torch.equal(*states)


def test_questions_of_a_loss_s_own_are_refused() -> None:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        made = td.Normal(z, 1.0)
        return -made.log_prob(y).mean() if made.mean.sum() > 0 else z.square().mean()

    labels = [_labels("values")(n)[0] for n in (SUPPORT, TARGETS)]
    with pytest.raises(Unsupported, match="__bool__ asks for values, which decide what is executed"):
        recorded_loss(loss, (((OUTPUTS,), labels[0]), ((OUTPUTS,), labels[1])), D, nn.Linear(1, 1))
    own = learner(loss)
    own.meta_gradient(batch("normal, fixed"))
    assert own.engine.name == "autograd"


def test_a_model_that_has_a_distribution_is_handed_over() -> None:
    model = Calls(lambda m, x: td.Normal(m.layer(x), 1.0).mean, layer=nn.Linear(3, OUTPUTS))
    own = mf.MAMLPlusPlus(model, mf.MAMLConfig(steps=1), precision="float64", loss_fn=F.mse_loss)
    own.meta_gradient(batch("normal, fixed"))
    assert own.engine.name == "autograd" and "__bool__ asks for values" in own.engine_reason
