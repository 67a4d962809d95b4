"""Losses that have no rules of their own: recorded, and held against the reference in float64."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal_on_any_threads, gradients
from test_generic_rules import autograd
from torch import Tensor, nn
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast.engine.base import Unsupported
from mamlpp_fast.engine.fused.composites import COMPOSITES
from mamlpp_fast.engine.fused.losses import recorded_loss
from mamlpp_fast.engine.fused.program import Emitter, Workspace
from mamlpp_fast.engine.fused.steps.base import Goal, Pass, aten

D = torch.float64
TASKS, N, M, WAYS = 3, 4, 6, 5
Labels = Callable[[int], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


# Labels --------------------------------------------------------------------------------------------------------------


def _generator(count: int) -> torch.Generator:
    return torch.Generator().manual_seed(count)


def classes(count: int) -> Tensor:
    return torch.randint(WAYS, (TASKS, count), generator=_generator(count))


def padded(count: int) -> Tensor:
    y = classes(count)
    y[0, 1], y[2, 2:] = -100, -100
    return y


def shares(count: int) -> Tensor:
    return torch.rand(TASKS, count, WAYS, generator=_generator(count), dtype=D).softmax(-1)


def values(count: int) -> Tensor:
    return torch.randn(TASKS, count, WAYS, generator=_generator(count), dtype=D)


def signs(count: int) -> Tensor:
    return (values(count) > 0).to(D)


def few(count: int) -> Tensor:
    return values(count)[..., :2].contiguous()


# Losses --------------------------------------------------------------------------------------------------------------

WEIGHT = torch.arange(1.0, 6.0, dtype=D) / 3
BETA = 0.3


class Scaled(nn.Module):
    """With a buffer, an attribute and a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 1.5, WAYS, dtype=D))
        self.shift, self.inner = torch.full((WAYS,), 0.2, dtype=D), nn.CrossEntropyLoss(weight=WEIGHT)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        found: Tensor = self.inner(z * self.scale + self.shift, y)
        return found


def focal(z: Tensor, y: Tensor) -> Tensor:
    """Reads a tensor that is a global."""
    log_p = F.log_softmax(z, -1).gather(1, y[:, None])[:, 0]
    return (-((1 - log_p.exp()) ** 2) * log_p * WEIGHT[y]).mean()


def penalised(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y) + BETA * z.square().mean()


def closed_over() -> Loss:
    weight = torch.linspace(1, 2, WAYS, dtype=D)
    return lambda z, y: F.nll_loss(F.log_softmax(z, -1), y, weight)


def gaussian(z: Tensor, y: Tensor) -> Tensor:
    """Of means and log deviations, a label has fewer values than a prediction."""
    return (0.5 * ((z[:, :2] - y) / z[:, 2:4].exp()).square() + z[:, 2:4]).mean()


def likelihood(z: Tensor, y: Tensor) -> Tensor:
    """PyTorch's own, which looks whether a variance is negative, and raises small ones where no gradient is taken."""
    return F.gaussian_nll_loss(z[:, :2], y, z[:, 2:4].square(), full=True, eps=0.05)


def one_variance(z: Tensor, y: Tensor) -> Tensor:
    return F.gaussian_nll_loss(z[:, :2], y, z[:, 4].exp(), reduction="sum") + F.gaussian_nll_loss(
        z[:, :2], y, torch.ones_like(y)
    )


def one_hot(z: Tensor, y: Tensor) -> Tensor:
    return (F.softmax(z, -1) - F.one_hot(y, WAYS)).square().sum(-1).mean()


def constant_part(z: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        share = F.softmax(z, -1)
    return (F.cross_entropy(z, y, reduction="none") * share.amax(-1) + z.detach().square().sum(-1)).mean()


KINDS: dict[str, tuple[Loss, Labels]] = {
    "class-weights": (functools.partial(F.cross_entropy, weight=WEIGHT), classes),
    "class-weights-smoothed": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), classes),
    "ignored": (F.cross_entropy, padded),
    "ignored-smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), padded),
    "ignored-class-weights": (nn.CrossEntropyLoss(weight=WEIGHT), padded),
    "ignore-index": (nn.CrossEntropyLoss(ignore_index=2), classes),
    "shares": (F.cross_entropy, shares),
    "shares-smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), shares),
    "sum": (functools.partial(F.cross_entropy, reduction="sum"), classes),
    "logits": (F.binary_cross_entropy_with_logits, signs),
    "logits-weights": (nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT.flip(0)), signs),
    "probabilities": (lambda z, y: F.binary_cross_entropy(torch.sigmoid(z), y), signs),
    "l1": (F.l1_loss, values),
    "huber": (nn.HuberLoss(delta=0.5), values),
    "smooth-l1": (nn.SmoothL1Loss(beta=0.7), values),
    "squares-sum": (nn.MSELoss(reduction="sum"), values),
    "squares-by-hand": (lambda z, y: ((z - y) ** 2).mean(), values),
    "kl": (lambda z, y: F.kl_div(F.log_softmax(z, -1), y, reduction="batchmean"), shares),
    "module": (Scaled(), classes),
    "focal": (focal, classes),
    "penalised": (penalised, classes),
    "closed-over": (closed_over(), classes),
    "gaussian": (gaussian, few),
    "likelihood": (likelihood, few),
    "likelihood-one-variance": (one_variance, few),
    # Shares in the process's own float32, whatever the predictions are.
    "typed-shares": (
        lambda z, y: (0.1 * (1 - (p := F.one_hot(y, WAYS))) * z.sigmoid() + p.float() * (1 - z) ** 2).sum(),
        classes,
    ),
    "one-hot": (one_hot, classes),
    # Casts, and sizes that follow the number of examples.
    "typed": (
        lambda z, y: ((z - y.to(z.dtype).unsqueeze(1)) ** 2).sum() / len(z) + z.new_zeros(len(z)).sum(),
        classes,
    ),
    "constant-part": (constant_part, classes),
}


def batch(labels: Labels, *shape: int, tasks: int = TASKS) -> mf.EpisodeBatch:
    xs = (
        torch.randn(TASKS, count, *(shape or (3,)), generator=_generator(count), dtype=D) for count in (N, M)
    )
    fields = [t[:tasks] for t in (next(xs), labels(N), next(xs), labels(M))]
    return mf.EpisodeBatch(*fields, by_class=False)


def learner(
    loss: Any, engine: str = "fused", model: nn.Module | None = None, **settings: Any
) -> mf.MAMLPlusPlus:
    torch.manual_seed(0)
    precision: Any = settings.pop("precision", "float64")
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, WAYS)) if model is None else model
    config = mf.MAMLConfig(**{"steps": 2, "inner_lr": 0.1, "da_epoch": -1} | settings)
    return mf.MAMLPlusPlus(copy.deepcopy(model), config, engine=engine, precision=precision, loss_fn=loss)  # type: ignore[arg-type]


def results(own: mf.MAMLPlusPlus, given: mf.EpisodeBatch) -> dict[str, Tensor]:
    metrics = own.meta_gradient(given)
    found = {"losses": metrics.task_losses, **gradients(own.model, own.rates)}
    evaluation = own.evaluate(given)
    return found | {"logits": evaluation.logits, "evaluation": evaluation.loss}


@pytest.mark.parametrize("settings", [{}, {"msl": False, "second_order": False}], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_the_reference_s_meta_gradient_and_evaluation(name: str, settings: dict[str, Any]) -> None:
    loss, labels = KINDS[name]
    ours, reference = learner(loss, **settings), learner(loss, "reference", **settings)
    given = batch(labels)
    assert_close(results(ours, given), results(reference, given), rtol=1e-9, atol=1e-12, equal_nan=True)
    assert ours.engine.name == "fused"


@pytest.mark.parametrize("name", ["ignored-class-weights", "logits-weights", "module", "penalised"])
def test_convolutions_on_lanes(name: str) -> None:
    loss, labels = KINDS[name]
    layers = (nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    model, given = nn.Sequential(*layers, nn.Linear(144, WAYS)), batch(labels, 2, 6, 6)
    expected = results(learner(loss, "reference", model), given)
    assert_close(results(learner(loss, model=model), given), expected, rtol=1e-9, atol=1e-11)
    assert_equal_on_any_threads(lambda: results(learner(loss, model=model), given))


@pytest.mark.parametrize("name", KINDS)
def test_float32_is_checked_in_float64(name: str) -> None:
    """With what a loss holds in float32, as a user makes it."""
    loss, labels = KINDS[name]

    def narrow(part: Any) -> Any:
        return part.float() if isinstance(part, Tensor) and part.is_floating_point() else part

    if isinstance(loss, functools.partial):
        loss = functools.partial(loss.func, **{k: narrow(v) for k, v in loss.keywords.items()})
    elif isinstance(loss, nn.Module):
        loss = copy.deepcopy(loss).float()
        if isinstance(loss, Scaled):
            loss.shift = loss.shift.float()
    elif name in ("focal", "closed-over"):
        pytest.skip("holds float64 where a function cannot be changed")
    given = batch(labels).to(dtype=torch.float32)
    ours, autograd_ = (learner(loss, engine, precision="float32") for engine in ("fused", "autograd"))
    assert_close(results(ours, given), results(autograd_, given), rtol=1e-4, atol=1e-5, equal_nan=True)


# The rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("name", KINDS)
def test_gradient_and_tangent_against_autograd(name: str, tasks: int) -> None:
    loss, labels = KINDS[name]
    given, targets = labels(N)[:tasks], labels(M)
    own = recorded_loss(loss, (((WAYS,), given[0]), ((WAYS,), targets[0])), D, nn.Linear(1, 1))
    em = Emitter(torch.device("cpu"), D)
    z, z_dot = (torch.randn(tasks, N, WAYS, generator=_generator(s), dtype=D) for s in (1, 2))
    weights = torch.tensor([0.3, 0.7], dtype=D)  # of two steps
    buffers = {n: em.own(n, b) for n, b in own.buffers.items()}
    goal = Goal(em.own("labels", given.clone()), em.own("weights", weights), 1, want_loss=True)
    answers = em.own("answers", torch.ones(tasks, dtype=torch.bool))
    ps = Pass(tasks, N, 0, {}, {}, {0: em.own("z", z)}, goal=goal, buffers=buffers, answers=answers)
    value = own.of_pass(em, ps, 0)
    left = {"loss": value.loss, "grad": value.grad, "tangent": own.tangent(em, value, em.own("u", z_dot))}
    kept = {}
    for key, ref in left.items():
        assert ref is not None
        kept[key] = em.own(key, torch.full(ref.shape, torch.nan, dtype=D))
        em.call(aten.copy_.default, kept[key], ref)
    program, workspace = em.finish(), Workspace(torch.device("cpu"))
    program.bind(workspace)
    workspace.memory.fill_(255)  # NaN
    program.run()
    assert bool(answers.tensor().all())
    for t in range(tasks):
        if labels is padded and not bool((given[t] != -100).any()):
            continue
        rules = autograd(
            lambda x, y=given[t]: 0.7 * loss(x, y),
            {0: z[t]},
            {0: z_dot[t]},
            torch.ones((), dtype=D),
            torch.zeros((), dtype=D),
        )
        for key, expected in (("loss", "y"), ("grad", "g 0"), ("tangent", "g_dot 0")):
            assert_close(kept[key].tensor()[t], rules[expected], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"weight": WEIGHT}, {"pos_weight": WEIGHT}, {"reduction": "sum"}])
def test_the_composite_of_logits(options: dict[str, Any]) -> None:
    z, y = 40 * values(N)[0], signs(N)[0]
    z[0, 0] = -800  # where the exponential of its negative is infinite
    composite = COMPOSITES[F.binary_cross_entropy_with_logits]
    assert_close(composite(z, y, **options), F.binary_cross_entropy_with_logits(z, y, **options))


# Between calls -------------------------------------------------------------------------------------------------------


def test_what_a_loss_reads_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A global, a buffer's values, an attribute, an ignored label."""
    module = Scaled()
    for loss, change in (
        (penalised, lambda: monkeypatch.setitem(penalised.__globals__, "BETA", 0.9)),
        (module, lambda: module.scale.mul_(1.5)),  # type: ignore[operator]
        (module, lambda: module.shift.mul_(2)),
        (module, lambda: setattr(module.inner, "ignore_index", 1)),
    ):
        ours = learner(loss)
        for _ in range(2):
            assert_close(
                results(ours, batch(classes)),
                results(learner(loss, "reference"), batch(classes)),
                rtol=1e-9,
                atol=1e-12,
            )
            change()
        assert ours.engine.name == "fused"


def test_labels_that_count_and_that_do_not_by_turns() -> None:
    ours, reference = learner(F.cross_entropy), learner(F.cross_entropy, "reference")
    for labels in (classes, padded, shares, classes, padded):
        given = batch(labels)
        assert_close(results(ours, given), results(reference, given), rtol=1e-9, atol=1e-12, equal_nan=True)


def test_a_class_that_is_none_is_named_at_a_later_batch() -> None:
    ours = learner(one_hot)
    ours.meta_gradient(batch(classes))
    wrong = batch(classes)
    wrong.support_y[0, 0] = WAYS
    with pytest.raises((RuntimeError, IndexError), match=r"index|bounds"):
        ours.meta_gradient(wrong)


# What is refused -----------------------------------------------------------------------------------------------------

SEEN: list[float] = []


def _branches(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y) * (2 if y.sum() > 3 else 1)


def _keeps(z: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(z, y)
    SEEN.append(loss.item())
    return loss


def _by_example(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y) if len(z) > N else F.cross_entropy(z, y).square()


class _Weighted:
    def __init__(self) -> None:
        self.weight = WEIGHT

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, self.weight)


class _Learnt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=D))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z * self.scale, y)


def _hooked() -> nn.Module:
    loss = nn.CrossEntropyLoss(weight=WEIGHT)
    loss.register_forward_hook(lambda module, given, result: 2 * result)
    return loss


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (_branches, "__bool__ asks for values"),
        (lambda z, y: F.cross_entropy(z, y) * len(set(y.tolist())), "tolist asks for values"),
        (_keeps, "item asks for values"),
        (lambda z, y: F.cross_entropy(z + 0.1 * torch.randn_like(z), y), "randn_like draws random numbers"),
        (lambda z, y: F.cross_entropy(F.dropout(z, 0.5), y), "dropout draws random numbers"),
        (lambda z, y: F.cross_entropy(z.mul_(2), y), "in-place operation"),
        (lambda z, y: F.cross_entropy(z, y) * random.random(), "draws random numbers"),
        (_by_example, "executes other operations for another number of examples"),
        (_Weighted(), "got an object of _Weighted"),
        (_Weighted().__call__, "got an object of method"),
        (_Learnt(), "has parameters"),
        (_hooked(), "has a"),
        (functools.partial(F.cross_entropy, reduction="none"), "expected a scalar of torch.float64"),
        (lambda z, y: WEIGHT.sum(), "expected forward to return one tensor"),
        (
            lambda z, y: z.detach().square().mean() + 0 * y.sum(),
            "expected one that depends on the predictions",
        ),
    ],
)
def test_what_is_no_list_of_operations_is_refused(loss: Loss, why: str) -> None:
    with pytest.raises(Unsupported, match=why) as error:
        recorded_loss(loss, (((WAYS,), classes(N)[0]), ((WAYS,), classes(M)[0])), D, nn.Linear(1, 1))
    assert error.value.module == "loss"


@pytest.mark.parametrize("loss", [_branches, _by_example, _Weighted(), _Learnt(), _hooked()])
def test_auto_hands_over_what_it_cannot_take(loss: Any) -> None:
    own, reference = learner(loss, "auto"), learner(loss, "reference")
    given = batch(classes)
    assert_close(results(own, given), results(reference, given), rtol=1e-9, atol=1e-12)
    assert own.engine.name == "autograd" and "not fused: loss: " in own.engine_reason


def test_a_loss_that_raises_is_the_user_s_own_error() -> None:
    def fails(z: Tensor, y: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        learner(fails, "auto").meta_gradient(batch(classes))
