"""Predictions of any shape: of every pixel, every token, one number an example; against a textbook loop in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal_on_any_threads, gradients
from textbook import SETTINGS, Textbook
from torch import Tensor, nn
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast.engine.fused import FusedEngine

TASKS, SUPPORT, TARGETS, WAYS = 3, 5, 4, 3
HEIGHT, WIDTH, LENGTH, WORDS = 6, 5, 4, 7
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


class Pixels(nn.Module):
    """Images [n, 2, H, W] to classes of every pixel [n, WAYS, H, W]."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width)
        self.last = nn.Conv2d(width, WAYS, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


class Tokens(nn.Module):
    """Ids [n, L] to the next ones [n, L, WORDS]."""

    def __init__(self) -> None:
        super().__init__()
        self.codes, self.hidden, self.last = nn.Embedding(WORDS, 4), nn.Linear(4, 6), nn.Linear(6, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.hidden(self.codes(x))))


class Number(nn.Module):
    """Features [n, 4] to one number an example, [n]."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.hidden(x))).squeeze(-1)


def _some(high: int, ignored: int | None, *shape: int) -> Callable[[int], Tensor]:
    """Classes, some of them that which does not count."""

    def make(count: int) -> Tensor:
        y = torch.randint(high, (TASKS, count, *shape))
        return y if ignored is None else y.masked_fill(torch.rand(y.shape) < 0.3, ignored)

    return make


def _values(*shape: int) -> Callable[[int], Tensor]:
    return lambda count: torch.rand(TASKS, count, *shape, dtype=torch.float64)


def last_axis(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.reshape(-1, z.size(-1)), y.reshape(-1), ignore_index=0)


def flattened(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def channels_last(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.permute(0, 2, 3, 1).reshape(-1, WAYS), y.view(-1), reduction="sum") / len(z)


def dice(z: Tensor, y: Tensor) -> Tensor:
    """One less the overlap of probabilities and labels, over the pixels of each example."""
    p, own = torch.softmax(z, 1), F.one_hot(y, WAYS).movedim(-1, 1).to(z.dtype)
    return 1 - ((2 * (p * own).sum((2, 3)) + 1) / ((p + own).sum((2, 3)) + 1)).mean()


PIXELS, IDS, FEATURES = (
    lambda n: torch.randn(TASKS, n, 2, HEIGHT, WIDTH, dtype=torch.float64),
    lambda n: torch.randint(WORDS, (TASKS, n, LENGTH)),
    lambda n: torch.randn(TASKS, n, 4, dtype=torch.float64),
)
GRID = (HEIGHT, WIDTH)
_Make = Callable[[int], Tensor]
CASES: dict[str, tuple[Callable[[], nn.Module], _Make, _Make, Any]] = {
    "pixels": (Pixels, PIXELS, _some(WAYS, None, *GRID), F.cross_entropy),
    "pixels, ignored": (Pixels, PIXELS, _some(WAYS, -100, *GRID), F.cross_entropy),
    "pixels, ignore_index": (
        Pixels,
        PIXELS,
        _some(WAYS, 255, *GRID),
        nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), ignore_index=255),
    ),
    "pixels, smoothed": (
        Pixels,
        PIXELS,
        _some(WAYS, 1, *GRID),
        functools.partial(F.cross_entropy, ignore_index=1, label_smoothing=0.1),
    ),
    "pixels, channels last": (Pixels, PIXELS, _some(WAYS, -100, *GRID), channels_last),
    "pixels, dice": (Pixels, PIXELS, _some(WAYS, None, *GRID), dice),
    "pixels, values": (Pixels, PIXELS, _values(WAYS, *GRID), F.mse_loss),
    "pixels, logits": (Pixels, PIXELS, _values(WAYS, *GRID), F.binary_cross_entropy_with_logits),
    "tokens": (Tokens, IDS, _some(WORDS, -100, LENGTH), flattened),
    "tokens, last axis": (Tokens, IDS, _some(WORDS, None, LENGTH), last_axis),
    "tokens, classes second": (
        Tokens,
        IDS,
        _some(WORDS, -100, LENGTH),
        lambda z, y: F.cross_entropy(z.mT, y),
    ),
    "number": (Number, FEATURES, _values(), F.mse_loss),
    "number, logits": (Number, FEATURES, _values(), nn.BCEWithLogitsLoss()),
}


def made(name: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    _, xs, ys, _ = CASES[name]
    return xs(SUPPORT), ys(SUPPORT), xs(TARGETS), ys(TARGETS)


def learner_of(name: str, engine: str = "auto", **settings: Any) -> mf.MAMLPlusPlus:
    torch.manual_seed(1)
    config: Any = {"steps": 2, "inner_lr": 0.1, "da_epoch": -1, "bnwb": False, "bnrs": False, **settings}
    model = CASES[name][0]()
    options: Any = {"engine": engine, "precision": "float64", "loss_fn": CASES[name][3]}
    return mf.MAMLPlusPlus(model, mf.MAMLConfig(**config), **options)


@pytest.mark.parametrize("settings", [{}, {"msl": False, "rates": "element"}], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_a_textbook_loop(name: str, settings: dict[str, Any]) -> None:
    learner = learner_of(name, **settings)
    torch.manual_seed(1)
    book = Textbook(CASES[name][0](), {**SETTINGS, "bnwb": False, "bnrs": False, **settings})
    book.loss = CASES[name][3]
    for seed in range(2):
        batch = made(name, seed)
        episodes = mf.EpisodeBatch(*batch, by_class=False)
        result, expected = learner.meta_gradient(episodes), book.gradient(batch)
        assert learner.engine.name == "fused"
        assert_close(result.task_losses, expected, **CLOSE)
        own = dict(learner.model.named_parameters())
        for parameter, p in book.model.named_parameters():
            assert_close(own[parameter].grad, p.grad, **CLOSE)
        for buffer, b in book.model.named_buffers():
            assert_close(dict(learner.model.named_buffers())[buffer], b, **CLOSE)
        if learner.config.rates == "tensor":
            assert_close(
                learner.rates.rates.grad, torch.stack([r.grad for r in book.rates.values()]), **CLOSE
            )
    evaluated = learner.evaluate(episodes)
    assert learner.engine.name == "fused"
    assert_close(evaluated.logits, book.evaluate(batch, "batch", 2), **CLOSE)
    reference = learner_of(name, "reference", **settings).evaluate(episodes)
    assert_close(evaluated.accuracy, reference.accuracy, equal_nan=True)
    assert evaluated.logits.shape == (2, TASKS, *reference.logits.shape[2:])


def test_groups_and_lanes_change_nothing() -> None:
    name = "pixels, ignore_index"
    learner = learner_of(name, "reference")
    learner.meta_gradient(mf.EpisodeBatch(*made(name), by_class=False))
    expected = gradients(learner.model, learner.rates)
    for options in ({"group": 1}, {"group": 3}, {"memory": "recompute"}):
        other: Any = learner_of(name, "reference")
        engine = FusedEngine(other.model, other.rates, CASES[name][3], precision="float64", **options)  # type: ignore[arg-type]
        engine.meta_gradient(mf.EpisodeBatch(*made(name), by_class=False), other.step_weights(), True)
        assert_close(gradients(other.model, other.rates), expected, **CLOSE)


def test_the_same_bits_on_any_number_of_threads() -> None:
    def run() -> dict[str, Tensor]:
        learner = learner_of("pixels")
        learner.meta_gradient(mf.EpisodeBatch(*made("pixels"), by_class=False))
        return gradients(learner.model, learner.rates)

    assert_equal_on_any_threads(run)


def test_no_memory_is_read_before_it_is_written(poisoned_memory: None) -> None:
    learner, batch = learner_of("tokens"), mf.EpisodeBatch(*made("tokens"), by_class=False)
    learner.meta_gradient(batch)
    first = gradients(learner.model, learner.rates)
    assert isinstance(learner.engine, FusedEngine)
    learner.engine.workspace.memory.view(torch.uint8).fill_(255)  # float64 of these bits are NaN
    learner.meta_gradient(batch)
    assert_close(gradients(learner.model, learner.rates), first, rtol=0, atol=0)


def test_targets_that_pytorch_would_broadcast_are_none() -> None:
    """[n, H, W] for predictions [n, WAYS, H, W], with as many examples as ways."""
    x, y, tx, ty = made("pixels, values")
    wrong = mf.EpisodeBatch(x[:, :WAYS], y[:, :WAYS, 0], tx[:, :WAYS], ty[:, :WAYS, 0], by_class=False)
    with pytest.raises(
        ValueError, match=r"labels: expected a target for each prediction \[tasks, n, 3, 6, 5\]"
    ):
        learner_of("pixels, values", "fused").meta_gradient(wrong)


def test_predictions_that_are_not_each_example_s_are_handed_over() -> None:
    """All pixels of all examples in one axis, as some losses want them."""

    class Rows(Pixels):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).movedim(1, -1).reshape(-1, WAYS)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y.flatten())

    torch.manual_seed(0)
    learner = mf.MAMLPlusPlus(Rows(), mf.MAMLConfig(steps=1), precision="float64", loss_fn=loss)
    learner.meta_gradient(mf.EpisodeBatch(*made("pixels"), by_class=False))
    assert learner.engine.name == "autograd"
    assert "output: expected predictions [N, ...], of each example as many" in learner.engine_reason
