"""Models of several inputs, by position and by name: every engine against a textbook loop in float64; refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from textbook import Textbook
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils._pytree import tree_map

import mamlpp_fast as mf

TASKS, SUPPORT, TARGETS, WAYS = 3, 6, 4, 3
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
SETTINGS: dict[str, Any] = {
    "steps": 2,
    "inner_lr": 0.1,
    "lslr": True,
    "rates": "tensor",
    "second_order": True,
    "msl": True,
    "bnwb": True,
    "bnrs": True,
    "adapt": "all",
    "adapt_norm": False,
    "loss": "cross_entropy",
    "meta_lr": 1e-3,
}


class Recommender(nn.Module):
    """User and item ids [n] to ratings [n, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(9, 4), nn.Embedding(9, 4)
        self.hidden, self.head = nn.Linear(8, 6), nn.Linear(6, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        x = torch.cat([self.users(user), self.items(item)], -1)
        return self.head(torch.tanh(self.hidden(x)))


class Text(nn.Module):
    """Token ids [n, L] with a mask, bool or ones and zeros, to [n, WAYS]; attention to the tokens that count."""

    def __init__(self) -> None:
        super().__init__()
        self.codes, self.qkv = nn.Embedding(9, 4), nn.Linear(4, 12)
        self.head = nn.Linear(4, WAYS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        counts = attention_mask.bool()
        q, k, v = self.qkv(self.codes(input_ids)).unsqueeze(1).chunk(3, -1)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=counts[:, None, None]).squeeze(1)
        weights = counts.unsqueeze(-1).to(x.dtype)
        return self.head((x * weights).sum(1) / weights.sum(1))


class Graph(nn.Module):
    """Two layers over nodes; features [n, V, F] and adjacency [n, V, V], beside a weight of each graph [n]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, WAYS)

    def forward(self, nodes: Tensor, rest: list[Tensor]) -> Tensor:
        adjacency, weight = rest
        h = F.elu(adjacency @ self.first(nodes))
        return (adjacency @ self.second(h)).mean(1) * weight.unsqueeze(-1)


class Pictures(nn.Module):
    """Images [n, 1, 8, 8] behind a norm and pooling, and a second picture and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.other = (
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.Conv2d(2, 3, 3, padding=1),
        )
        self.head = nn.Linear(36 + 12 + 2, WAYS)

    def forward(self, image: Tensor, beside: Tensor, *, attributes: Tensor) -> Tensor:
        a = F.max_pool2d(F.relu(self.norm(self.conv(image))), 2).flatten(1)
        b = torch.sigmoid(self.other(beside)).flatten(1)
        return self.head(torch.cat([a, b, attributes], 1))


class Context(nn.Module):
    """CAVIA: a vector that alone adapts, beside what an example brings."""

    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.zeros(3))
        self.hidden, self.head = nn.Linear(4 + 2 + 3, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        context = self.context.expand(len(x), -1)
        return self.head(F.relu(self.hidden(torch.cat([x, mask, context], 1))))


def _normal(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(TASKS, n, *shape, dtype=torch.float64)


def _ids(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randint(9, (TASKS, n, *shape))


def _mask(dtype: torch.dtype) -> Callable[[int], Tensor]:
    return lambda n: (torch.arange(5) < torch.randint(1, 6, (TASKS, n, 1))).to(dtype)


_GRAPH = (_normal(4, 4), [_normal(4, 4), _normal()])
_IMAGES = {"image": _normal(1, 8, 8), "attributes": _normal(2), "beside": _normal(2, 2, 2)}
CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "recommender": (Recommender, (_ids(), _ids()), {"loss": "mse"}),
    "text": (Text, {"input_ids": _ids(5), "attention_mask": _mask(torch.int64)}, {}),
    "text, bool": (Text, {"attention_mask": _mask(torch.bool), "input_ids": _ids(5)}, {}),
    "graph": (Graph, _GRAPH, {}),
    "graph, first order": (Graph, _GRAPH, {"second_order": False, "msl": False}),
    "pictures": (Pictures, _IMAGES, {}),
    "pictures, rates by element": (Pictures, _IMAGES, {"rates": "element", "bnwb": False, "bnrs": False}),
    "context": (Context, (_normal(4), _normal(2)), {"loss": "mse", "adapt": "context"}),
}
"""Models, what makes each of their inputs for n examples, and settings."""


def made(name: str, seed: int = 0) -> mf.EpisodeBatch:
    torch.manual_seed(seed)
    _, makers, changes = CASES[name]

    def side(count: int) -> tuple[Any, Tensor]:
        if changes.get("loss") == "mse":
            y = torch.randn(TASKS, count, 1, dtype=torch.float64)
        else:
            y = torch.randint(WAYS, (TASKS, count))
        return tree_map(lambda make: make(count), makers), y

    return mf.EpisodeBatch(*side(SUPPORT), *side(TARGETS))


def by_task(batch: mf.EpisodeBatch) -> Any:
    """As the textbook takes it."""
    tasks = list(batch)
    return [t.support_x for t in tasks], batch.support_y, [t.target_x for t in tasks], batch.target_y


def learner_of(name: str, engine: str, **options: Any) -> mf.MAMLPlusPlus:
    torch.manual_seed(1)
    settings = {**SETTINGS, **CASES[name][2], "da_epoch": -1}
    return mf.MAMLPlusPlus(
        CASES[name][0](),
        mf.MAMLConfig(**settings),
        engine=engine,
        precision="float64",
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("engine", ["reference", "autograd", "fused"])
@pytest.mark.parametrize("name", CASES)
def test_equals_a_textbook_loop(name: str, engine: str) -> None:
    learner = learner_of(name, engine)
    torch.manual_seed(1)
    textbook = Textbook(CASES[name][0](), {**SETTINGS, **CASES[name][2]})
    for seed in range(2):
        batch = made(name, seed)
        result = learner.meta_gradient(batch)
        with sdpa_kernel(SDPBackend.MATH):
            expected = textbook.gradient(by_task(batch))
        assert_close(result.task_losses, expected, **CLOSE)
        own = dict(learner.model.named_parameters())
        for parameter, p in textbook.model.named_parameters():
            found = own[parameter].grad
            assert_close(torch.zeros_like(p) if found is None else found, p.grad, **CLOSE)
        rates = textbook.rates.values()
        if learner.config.rates == "tensor":
            assert_close(
                learner.rates.rates.grad, torch.stack([r.grad for r in rates if r.grad is not None]), **CLOSE
            )
        for buffer, expected in textbook.model.named_buffers():
            assert_close(dict(learner.model.named_buffers())[buffer], expected, **CLOSE)
    evaluated = learner.evaluate(batch)
    assert_close(evaluated.logits, textbook.evaluate(by_task(batch), "batch", 2), **CLOSE)
    assert learner.engine.name == engine
    task = batch[1]
    predictor = learner.adapt(task.support_x, task.support_y)
    assert_close(predictor(task.target_x), evaluated.logits[-1, 1], **CLOSE)
    assert_close(learner.evaluate(task).logits[:, 0], evaluated.logits[:, 1], **CLOSE)
