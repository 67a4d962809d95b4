"""Models of several inputs, by position and by name: every engine against a textbook loop in float64; refusals."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import moved
from textbook import SETTINGS, Textbook
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils._pytree import tree_map

import mamlpp_fast as mf
from mamlpp_fast.engine.reduction import Reduction

TASKS, SUPPORT, TARGETS, WAYS = 3, 6, 4, 3
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


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


class Encoder(nn.Module):
    """The same with PyTorch's layers, told of the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.codes, self.head = nn.Embedding(9, 4), nn.Linear(4, WAYS)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.layer(self.codes(input_ids), src_key_padding_mask=attention_mask.logical_not())
        return self.head(x[:, 0])


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
    "encoder": (Encoder, {"input_ids": _ids(5), "attention_mask": _mask(torch.int64)}, {}),
    "graph": (Graph, _GRAPH, {}),
    "graph, first order": (Graph, _GRAPH, {"second_order": False, "msl": False}),
    "pictures": (Pictures, _IMAGES, {}),
    "pictures, rates by element": (Pictures, _IMAGES, {"rates": "element", "bnwb": False, "bnrs": False}),
    "text, head": (Text, {"input_ids": _ids(5), "attention_mask": _mask(torch.int64)}, {"adapt": "head"}),
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


def test_the_same_shapes_held_otherwise_are_another_form() -> None:
    """User and item ids have one shape: by their order alone a program would take the one for the other."""
    swapped, textbook = learner_of("recommender", "fused"), learner_of("recommender", "reference")
    user, item = (made("recommender").support_x[i] for i in (0, 1))
    batch = made("recommender")
    for side in (
        lambda x: {"user": x[0], "item": x[1]},
        lambda x: {"item": x[1], "user": x[0]},
        lambda x: x,
        lambda x: (x[1], x[0]),
        lambda x: list(x),
    ):
        one = mf.EpisodeBatch(side(batch.support_x), batch.support_y, side(batch.target_x), batch.target_y)
        assert_close(swapped.meta_gradient(one).loss, textbook.meta_gradient(one).loss, **CLOSE)
        assert_close(swapped.rates.rates.grad, textbook.rates.rates.grad, **CLOSE)
    assert not torch.equal(user, item)


def test_targets_of_another_form_are_handed_over() -> None:
    batch = made("recommender")
    user, item = batch.target_x
    other = mf.EpisodeBatch(batch.support_x, batch.support_y, {"user": user, "item": item}, batch.target_y)
    learner = learner_of("recommender", "auto")
    expected = learner_of("recommender", "reference").meta_gradient(other)
    assert_close(learner.meta_gradient(other).task_losses, expected.task_losses, **CLOSE)
    assert learner.engine.name == "autograd"
    assert "target_x: expected inputs in the form of those of support_x" in learner.engine_reason
    with pytest.raises(ValueError, match="target_x: expected inputs in the form"):
        learner_of("recommender", "fused").meta_gradient(other)
    longer = mf.EpisodeBatch(
        *(made("text").support_x, made("text").support_y),
        *(tree_map(lambda t: torch.cat([t, t], -1), made("text").target_x), made("text").target_y),
    )
    with pytest.raises(ValueError, match=r"target_x\['input_ids'\]: expected examples of shape \(5,\)"):
        learner_of("text", "fused").meta_gradient(longer)


def test_inputs_that_require_gradients_get_them() -> None:
    gradients = []
    for engine in ("auto", "reference"):
        batch = made("context")
        batch.support_x[0].requires_grad_()
        learner = learner_of("context", engine)
        learner.meta_gradient(batch)
        gradients.append(batch.support_x[0].grad)
    assert gradients[0] is not None
    assert_close(*gradients, **CLOSE)


def test_the_head_is_the_last_module_that_the_inputs_reach() -> None:
    torch.manual_seed(0)
    learner = mf.MAMLPlusPlus(Text(), mf.MAMLConfig(adapt="head", steps=1), precision="float64")
    learner.meta_gradient(made("text"))
    assert learner.rates.names == ("head.weight", "head.bias") and learner.engine.name == "fused"


def test_adapt_takes_what_a_model_takes() -> None:
    task, model = made("text")[0], Text().double()
    rates = mf.LSLR(model, 2, 0.1)
    fast = mf.adapt(model, task.support_x, task.support_y, rates)
    expected = dict(model.named_parameters())
    for _ in range(2):
        with sdpa_kernel(SDPBackend.MATH):
            prediction = torch.func.functional_call(model, expected, (), task.support_x)
            expected = moved(F.cross_entropy(prediction, task.support_y), expected, 0.1)
    assert_close(fast, expected, **CLOSE)


def test_what_is_taken_as_what() -> None:
    """Masks stay, pixels become floating point, ids int64; a list of arguments is a tuple, any mapping a dict."""

    class Given(NamedTuple):
        mask: Tensor
        image: Tensor

    n = (2, 3)
    y = torch.zeros(n)
    mask, image, ids = (
        torch.ones(n, dtype=torch.bool),
        torch.ones(*n, 4, dtype=torch.uint8),
        torch.ones(n, dtype=torch.int32),
    )
    taken = mf.EpisodeBatch([mask, [image]], y, UserDict(mask=mask, ids=ids), y).to("cpu", torch.float64)
    assert [t.dtype for t in taken.tensors] == [
        torch.bool,
        *[torch.float64] * 2,
        torch.bool,
        torch.int64,
        torch.float64,
    ]
    assert isinstance(taken.support_x, tuple) and isinstance(taken.support_x[1], list)
    assert type(taken.target_x) is dict
    assert isinstance(mf.EpisodeBatch(Given(mask, image), y, mask, y)[0].support_x, Given)
    copied = tree_map(torch.clone, taken)
    assert copied.form == taken.form and torch.equal(copied.target_x["ids"], taken.target_x["ids"])


def test_classes_are_flattened_where_every_input_has_them() -> None:
    y = torch.zeros(2, 3, 4, dtype=torch.int64)
    image, point, word = torch.zeros(2, 3, 4, 1, 5, 5), torch.zeros(2, 3, 4, 7), torch.zeros(2, 3, 4)
    flat = mf.EpisodeBatch((image, point), y, (image, point), y)
    assert [t.shape[:2] for t in flat.tensors] == [(2, 12)] * 6
    kept = mf.EpisodeBatch((point, word), y, (point, word), y)  # a label for each of four words
    assert [t.shape[:3] for t in kept.tensors] == [(2, 3, 4)] * 6
    asked = mf.EpisodeBatch((point, word), y, (point, word), y, by_class=True)
    assert [t.shape[:2] for t in asked.tensors] == [(2, 12)] * 6


_X, _Y = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("inputs", "kind", "message"),
    [
        ({"x": _X, "mask": None}, TypeError, r"support_x\['mask'\]: expected a tensor, got NoneType"),
        ((_X, ["words"]), TypeError, r"support_x\[1\]\[0\]: expected a tensor, got str"),
        (None, TypeError, "support_x: expected a tensor, got NoneType"),
        ({0: _X}, TypeError, "support_x: expected names of the model's arguments as keys, got 0"),
        ((), ValueError, r"support_x: expected at least one tensor, got \(\)"),
        (
            {"x": _X, "mask": _X[:1]},
            ValueError,
            r"support_x\['mask'\] and support_y: .* got \(1, 3, 4\) and \(2, 3\)",
        ),
        ((_X, torch.zeros(4, 4)), ValueError, r"support_x\[1\] and support_y: .* got \(4, 4\) and \(2, 3\)"),
    ],
)
def test_what_is_no_input_is_named(inputs: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        mf.EpisodeBatch(inputs, _Y, _X, _Y)
    with pytest.raises(kind, match=message):
        mf.Episode(inputs, _Y, _X, _Y)


def test_ids_that_the_model_does_not_take_are_named() -> None:
    batch = made("context")
    ids = (batch.support_x[0], batch.support_x[1].long())
    model = nn.Bilinear(4, 2, 1)
    learner = mf.MAMLPlusPlus(model, mf.MAMLConfig(loss="mse", steps=1), precision="float64")
    with pytest.raises(
        ValueError, match=r"support_x\[1\]: expected inputs that the model takes, got token ids"
    ):
        learner.meta_gradient(mf.EpisodeBatch(ids, batch.support_y, ids, batch.support_y))


def test_ranks_count_the_passes_of_norms() -> None:
    class Two:
        size, rank = 2, 0

        def broadcast(self, tensors: Any) -> None:
            """One process plays both."""

    learner = learner_of("pictures", "reference")
    reduction = Reduction(Two(), learner.model, learner.rates)  # type: ignore[arg-type]
    reduction.begin(made("pictures")[0].support_x, True)
    assert reduction.norms is not None
    assert [norm.passes[True].tolist() for norm in reduction.norms] == [[2, 2]]  # support and target, by step
