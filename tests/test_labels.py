"""Inputs and labels of every kind: the same in every engine, right by plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import moved, random_batch, small_learner
from torch import Tensor, nn
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast import labels

ENGINES = ["auto", "fused", "autograd", "reference"]
D = torch.float64
Fields = tuple[Tensor, Tensor, Tensor, Tensor]


def plain(
    model: nn.Module, fields: Fields, loss_fn: Any
) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor]]:
    """Textbook MAML, two steps of 0.1: losses of the tasks, meta-gradients, target predictions."""
    losses, predictions = [], []
    model.zero_grad()
    for task in zip(*fields, strict=True):
        fast = dict(model.named_parameters())
        for _ in range(2):
            fast = moved(loss_fn(mf.reference.functional_call(model, fast, task[0]), task[1]), fast, 0.1)
        prediction = mf.reference.functional_call(model, fast, task[2])
        loss = loss_fn(prediction, task[3])
        (loss / len(fields[0])).backward()
        losses.append(loss.detach())
        predictions.append(prediction.detach())
    return losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, predictions


def learner(model: nn.Module, engine: str, loss_fn: Any = F.cross_entropy, **config: Any) -> mf.MAMLPlusPlus:
    return mf.MAMLPlusPlus(
        model, mf.MAMLConfig.maml(steps=2, **config), engine=engine, precision="float64", loss_fn=loss_fn  # type: ignore[arg-type]
    )  # fmt: skip


def assert_right(
    make: Callable[[], nn.Module], given: Fields, meant: Fields, engine: str, loss_fn: Any
) -> mf.MAMLPlusPlus:
    """Given fields are served as the meant ones are by plain PyTorch; returns the learner."""
    losses, gradients, predictions = plain(make(), meant, loss_fn)
    own = learner(make(), engine, loss_fn)
    batch = mf.EpisodeBatch(*given)
    metrics = own.meta_gradient(batch)
    assert_close(metrics.task_losses, torch.stack(losses), rtol=1e-9, atol=1e-12)
    found = {n: p.grad for n, p in own.model.named_parameters()}
    assert_close(found, gradients, rtol=1e-9, atol=1e-12)
    evaluation = own.evaluate(batch)
    assert_close(evaluation.logits[-1], torch.stack(predictions), rtol=1e-9, atol=1e-12)
    assert_close(evaluation.loss, torch.stack(losses), rtol=1e-9, atol=1e-12)
    predict = own.adapt(batch.support_x[0], batch.support_y[0])
    assert_close(predict(batch.target_x[0]), predictions[0], rtol=1e-9, atol=1e-12)
    return own


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 5)
    ).to(D)


def images() -> Fields:
    g = torch.Generator().manual_seed(0)
    sx, tx = (torch.randn(2, n, 1, 8, 8, dtype=D, generator=g) for n in (10, 12))
    sy, ty = (torch.randint(0, 5, (2, n), generator=g) for n in (10, 12))
    return sx, sy, tx, ty


def padded() -> Fields:
    """Unequal numbers of examples: some labels do not count."""
    sx, sy, tx, ty = images()
    sy[0, 7:] = sy[1, 9:] = ty[1, 6:] = -100
    return sx, sy, tx, ty


def soft() -> Fields:
    sx, sy, tx, ty = images()
    return sx, F.one_hot(sy, 5).to(D) * 0.9 + 0.02, tx, F.one_hot(ty, 5).to(D)


def _penalised(p: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(p, y) + 1e-3 * p.square().mean()


LOSSES: dict[str, tuple[Callable[[], Fields], Any]] = {
    "padded": (padded, F.cross_entropy),
    "padded-smoothed": (padded, nn.CrossEntropyLoss(label_smoothing=0.1)),
    "ignore-index": (images, nn.CrossEntropyLoss(ignore_index=0)),
    "ignore-index-of-a-partial": (images, functools.partial(F.cross_entropy, ignore_index=0)),
    "class-weights": (images, nn.CrossEntropyLoss(weight=torch.arange(1.0, 6.0, dtype=D))),
    "sum": (images, nn.CrossEntropyLoss(reduction="sum")),
    "soft": (soft, F.cross_entropy),
    "closure": (images, _penalised),
}


@pytest.mark.parametrize("engine", ["auto", "autograd", "reference"])
@pytest.mark.parametrize(("make", "loss_fn"), LOSSES.values(), ids=LOSSES)
def test_losses_and_labels_of_many_kinds(make: Callable[[], Fields], loss_fn: Any, engine: str) -> None:
    own = assert_right(network, make(), make(), engine, loss_fn)
    assert own.engine.name == ("fused" if engine == "auto" else engine)


def test_batches_of_every_kind_in_turn() -> None:
    own = learner(network(), "auto")
    expected = learner(network(), "reference")
    for make in (images, padded, images, soft, images, padded):
        for ours in (own, expected):
            ours.model.zero_grad(set_to_none=True)
        found, right = (ours.meta_step(mf.EpisodeBatch(*make())) for ours in (own, expected))
        assert own.engine.name == "fused"
        assert_close(found, right, rtol=1e-9, atol=1e-12)
    assert_close(
        dict(own.model.named_parameters()), dict(expected.model.named_parameters()), rtol=1e-8, atol=1e-9
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
)
def test_labels_of_any_integer_width_and_truth_values(dtype: torch.dtype, engine: str) -> None:
    sx, sy, tx, ty = images()
    sy, ty = (y % 2 if dtype is torch.bool else y for y in (sy, ty))
    assert_right(network, (sx, sy.to(dtype), tx, ty.to(dtype)), (sx, sy, tx, ty), engine, F.cross_entropy)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32, torch.float16])
def test_pictures_of_any_type_are_taken_as_they_are(dtype: torch.dtype, engine: str) -> None:
    sx, sy, tx, ty = images()
    sx, tx = (x.mul(2).abs().to(dtype) for x in (sx, tx))
    assert_right(network, (sx, sy, tx, ty), (sx.to(D), sy, tx.to(D), ty), engine, F.cross_entropy)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32])
def test_regression_takes_targets_of_any_type(dtype: torch.dtype, engine: str) -> None:
    """x [tasks, n, 1] and integer y [tasks, n, 1] are no class structure."""

    def mlp() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 1)).to(D)

    x = torch.linspace(-3, 3, 20, dtype=D).view(2, 10, 1)
    y = x.square().round().to(dtype)
    given = (x, y, x + 0.1, y)
    own = assert_right(mlp, given, (x, y.to(D), x + 0.1, y.to(D)), engine, F.mse_loss)
    assert own.evaluate(mf.EpisodeBatch(*given)).accuracy.isnan().all()


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("engine", ENGINES)
def test_targets_that_would_be_broadcast_are_refused(engine: str) -> None:
    x = torch.linspace(-3, 3, 20, dtype=D).view(2, 10, 1)
    batch = mf.EpisodeBatch(x, x[..., 0], x, x[..., 0])
    own = learner(nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1)), engine, F.mse_loss)
    before = [p.clone() for p in own.model.parameters()]
    expected = (
        "engine: expected" if engine == "fused" else "target_y: expected a target for each prediction, "
    )
    for call in (own.meta_step, own.evaluate):
        with pytest.raises(ValueError, match=expected):
            call(batch)
    assert_close(list(own.model.parameters()), before, rtol=0, atol=0)


class Text(nn.Module):
    """A label a text, or with ``each`` one a token, classes along the second axis as cross-entropy has them."""

    def __init__(self, *, each: bool = False, recurrent: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.read = nn.LSTM(8, 8, batch_first=True) if recurrent else None
        self.head = nn.Linear(8, 3)
        self.each = each

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.words(x)
        if self.read is not None:
            hidden = self.read(hidden)[0]
        return self.head(hidden).transpose(1, 2) if self.each else self.head(hidden.mean(1))


@pytest.mark.parametrize("engine", ["auto", "autograd", "reference"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
@pytest.mark.parametrize("recurrent", [False, True], ids=["bag", "lstm"])
def test_token_ids_stay_integers(recurrent: bool, dtype: torch.dtype, engine: str) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Text(recurrent=recurrent).to(D)

    g = torch.Generator().manual_seed(0)
    x, q = (torch.randint(0, 20, (2, n, 7), generator=g) for n in (5, 6))
    y, t = (torch.randint(0, 3, (2, n), generator=g) for n in (5, 6))
    own = assert_right(make, (x.to(dtype), y, q.to(dtype), t), (x, y, q, t), engine, F.cross_entropy)
    task = mf.EpisodeBatch(x.to(dtype), y, q.to(dtype), t)[0]
    assert_close(own.evaluate(task).loss, own.evaluate(mf.EpisodeBatch(x, y, q, t)).loss[:1])


@pytest.mark.parametrize("engine", ["auto", "autograd", "reference"])
def test_a_label_for_each_token(engine: str) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Text(each=True).to(D)

    g = torch.Generator().manual_seed(0)
    x, q = (torch.randint(0, 20, (2, n, 3), generator=g) for n in (5, 6))
    y, t = x % 3, q % 3
    t[0, 2:] = -100
    own = assert_right(make, (x, y, q, t), (x, y, q, t), engine, F.cross_entropy)
    evaluation = own.evaluate(mf.EpisodeBatch(x, y, q, t))
    chosen = evaluation.logits.argmax(3)
    for task, count in ((0, 6), (1, 18)):
        right = (chosen[:, task] == t[task]).flatten(1).sum(1) / count
        assert_close(evaluation.accuracy[:, task], right.float())

    class Flat(Text):
        """Classes last, for a loss of the user's own."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).transpose(1, 2)

    def flat() -> nn.Module:
        torch.manual_seed(0)
        return Flat(each=True).to(D)

    def flattening(p: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(p.flatten(0, 1), y.flatten())

    other = assert_right(flat, (x, y, q, t), (x, y, q, t), engine, flattening)
    assert_close(other.evaluate(mf.EpisodeBatch(x, y, q, t)).accuracy, evaluation.accuracy)
    x, q, y, t = x[:, :, :2], q[:, :, :2], y[:, :, :2], t[:, :, :2]
    with pytest.raises(ValueError, match=r"support_y: expected labels \[5, 3\] for predictions \[5, 2, 3\]"):
        learner(flat(), engine).meta_step(mf.EpisodeBatch(x, y, q, t))


def test_integers_for_a_model_that_takes_none_are_named() -> None:
    x, y = torch.randint(0, 9, (2, 5, 4)), torch.arange(5).repeat(2, 1)
    for engine in ("auto", "autograd", "reference"):
        own = learner(nn.Linear(4, 5), engine)
        for call in (
            lambda own=own: own.meta_step(mf.EpisodeBatch(x, y, x, y)),
            lambda own=own: own.adapt(x[0], y[0]),
        ):
            with pytest.raises(
                ValueError, match="support_x: expected inputs that the model takes, got token ids"
            ):
                call()


# Axes of a batch.


def test_class_structure_is_told_from_labels_for_tokens() -> None:
    y = torch.randint(0, 3, (2, 4, 5))
    tokens = mf.EpisodeBatch(y, y, y, y)
    assert tokens.support_x.shape == tokens.target_y.shape == (2, 4, 5)
    features = torch.randn(2, 4, 5, 6)
    merged = mf.EpisodeBatch(features, y, features, y)
    assert merged.support_x.shape == (2, 20, 6) and merged.support_y.shape == (2, 20)
    kept = mf.EpisodeBatch(features, y, features, y, by_class=False)
    for batch in (kept, kept.tasks(0, 2), kept.to(dtype=D), mf.EpisodeBatch.of(kept[0])):
        assert batch.support_x.shape[1:] == (4, 5, 6) and batch.support_y.shape[1:] == (4, 5)
    targets = torch.randn(2, 4, 5)
    assert mf.EpisodeBatch(features, targets, features, targets).support_y.shape == (2, 4, 5)
    forced = mf.EpisodeBatch(features, targets, features, targets, by_class=True)
    assert forced.support_y.shape == (2, 20) and forced.support_x.shape == (2, 20, 6)
    with pytest.raises(
        ValueError, match=r"support_x and support_y: expected the same \[tasks, ways, shots\]"
    ):
        mf.EpisodeBatch(features, y[..., :2], features, y, by_class=True)


@pytest.mark.parametrize("engine", ["auto", "autograd", "reference"])
def test_vectors_with_a_label_each(engine: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 4, 5, 6, dtype=D), torch.randint(0, 3, (2, 4, 5))

    def flattening(p: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(p.flatten(0, 1), t.flatten())

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(6, 3).to(D)

    losses, gradients, _ = plain(make(), (x, y, x, y), flattening)
    own = learner(make(), engine, flattening)
    metrics = own.meta_gradient(mf.EpisodeBatch(x, y, x, y, by_class=False))
    assert_close(metrics.task_losses, torch.stack(losses), rtol=1e-9, atol=1e-12)
    assert_close({n: p.grad for n, p in own.model.named_parameters()}, gradients, rtol=1e-9, atol=1e-12)


# Labels that are no class.


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("side", ["support", "target"])
def test_labels_out_of_range_are_named(side: str, engine: str) -> None:
    own = small_learner(engine=engine)
    for seen in range(2):
        batch = random_batch()
        y = batch.support_y if side == "support" else batch.target_y
        y[1, 2], y[0, 0] = 7, -1
        with pytest.raises(
            ValueError, match=rf"^{side}_y: expected labels from 0 to 2, .* 3 classes .*, got -1, 7$"
        ):
            own.meta_step(batch)
        with pytest.raises(ValueError, match=rf"^{side}_y: expected labels from 0 to 2"):
            own.evaluate(batch)
        if side == "support":
            with pytest.raises(ValueError, match=r"^support_y: expected labels from 0 to 2"):
                own.adapt(batch.support_x[0], batch.support_y[0])
        if not seen:
            own.meta_step(random_batch())


def test_labels_that_do_not_count_are_in_no_range() -> None:
    own = learner(network(), "auto", nn.CrossEntropyLoss(ignore_index=9))
    sx, sy, tx, ty = images()
    sy[0, 0] = ty[1, 1] = 9
    own.meta_step(mf.EpisodeBatch(sx, sy, tx, ty))
    sy[0, 1] = -100
    with pytest.raises(ValueError, match=r"support_y: expected labels from 0 to 4.*\(or 9, .*got -100"):
        own.meta_step(mf.EpisodeBatch(sx, sy, tx, ty))


# Accuracy.


def test_accuracy_leaves_out_what_does_not_count() -> None:
    logits = torch.eye(3).repeat(2, 1, 1)  # [2 tasks, 3 examples, 3 classes]: predicts 0, 1, 2
    target = torch.tensor([[0, 2, -100], [-100, -100, -100]])
    for loss_fn in (F.cross_entropy, functools.partial(F.cross_entropy, label_smoothing=0.1), _penalised):
        found = labels.accuracy(logits, target, loss_fn)
        assert found[0] == 0.5 and found[1].isnan()
    ignoring = functools.partial(functools.partial(F.cross_entropy, ignore_index=2), label_smoothing=0.1)
    target = torch.tensor([[0, 2, 2], [1, 1, 2]])
    assert_close(labels.accuracy(logits, target, ignoring), torch.tensor([1.0, 0.5]))
    assert_close(
        labels.accuracy(logits, target, nn.CrossEntropyLoss(ignore_index=1)), torch.tensor([2 / 3, 1.0])
    )
    steps = torch.stack([logits, logits.flip(1)])
    assert labels.accuracy(steps, target, F.cross_entropy, 2).shape == (2, 2)


def test_accuracy_of_shares_is_that_of_the_largest() -> None:
    logits = torch.eye(3).repeat(2, 1, 1)
    shares = torch.tensor([[[0.6, 0.4, 0.0], [0.5, 0.5, 0.0], [0.1, 0.1, 0.8]]]).repeat(2, 1, 1)
    assert_close(labels.accuracy(logits, shares, F.cross_entropy), torch.full((2,), 2 / 3))
    for other in (F.mse_loss, F.binary_cross_entropy_with_logits, _penalised):
        assert labels.accuracy(logits, shares, other).isnan().all()
