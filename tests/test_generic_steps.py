"""Networks of operations without rules of their own: float64 equality with a textbook loop, rule by rule and whole."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from front_end_helpers import Calls
from helpers import kept_threads
from textbook import SETTINGS as MAMLPP
from textbook import Textbook
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast.engine.fused import FusedEngine, tracing
from mamlpp_fast.engine.fused.tracing import Traced

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
TASKS, SUPPORT, TARGETS, WAYS = 3, 6, 4, 3


class Attention(nn.Module):
    """One layer of a transformer out of functions, with a mask that it holds as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(6), nn.Linear(6, 18), nn.Linear(6, 6)
        self.head = nn.Linear(6, WAYS)
        self.register_buffer("mask", torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1) > 0, -math.inf))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 3)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out((torch.softmax(q @ k.mT / 3**0.5 + self.mask, -1) @ v).transpose(1, 2).flatten(2))
        return self.head(x.mean(1))


class Positions(nn.Module):
    """Fixed and learned codes of positions, by buffers of numbers and of values."""

    def __init__(self) -> None:
        super().__init__()
        self.codes, self.head = nn.Embedding(9, 4), nn.Linear(4, WAYS)
        self.register_buffer("waves", torch.randn(9, 4))
        self.register_buffer("numbers", torch.arange(9))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.waves[: x.size(1)] + self.codes(self.numbers[: x.size(1)])  # type: ignore[index]
        return self.head(torch.tanh(x).mean(1))


def _written_into(m: Any, x: Tensor) -> Tensor:
    """Messages of a graph added up in zeros of the forward's own, a part assigned, and a constant part kept."""
    messages, to = torch.tanh(m.a(x)), torch.tensor([0, 3, 3, 7, 1, 5])
    sums = torch.zeros(len(x), 8, dtype=x.dtype).index_add_(1, to, messages)
    counts = torch.zeros(8, dtype=x.dtype).index_add_(0, to, torch.ones(6, dtype=x.dtype)).clamp(min=1)
    beside = torch.full((len(x), 8), 0.3, dtype=x.dtype)
    beside[:, 2:6] = messages[:, 1:5]
    return m.b(sums / counts + beside)


def _rnn(kind: Callable[..., nn.Module], **options: Any) -> nn.Module:
    return Calls(lambda m, x: m.head(m.rnn(x)[0][:, -1]), rnn=kind(4, 5, **options), head=nn.Linear(5, WAYS))


def _tied() -> nn.Module:
    """A matrix that is used with its transpose, and a layer that is called twice."""
    return Calls(
        lambda m, x: F.linear(m.body(m.body(torch.tanh(m.lift(x)))) @ m.lift.weight, m.lift.weight[:3]),
        lift=nn.Linear(4, 6),
        body=nn.Linear(6, 6),
    )


def _unet(m: Any, x: Tensor) -> Tensor:
    high = F.gelu(m.down(x))
    low = F.silu(m.deep(F.avg_pool2d(high, 2)))
    up = F.interpolate(low, scale_factor=2, mode="nearest")
    return m.last(torch.cat([high, up], 1)).mean((2, 3))


def _in_place(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    h.mul_(2).sin_()
    h = torch.ones_like(h).zero_() + torch.zeros_like(h).copy_(h)
    h[:, :2] = h[:, 2:4].exp()
    h += 1
    return m.last(F.elu(input=h, inplace=True))


def flat(*inner: nn.Module, features: int, size: int) -> nn.Module:
    return nn.Sequential(*inner, nn.Flatten(), nn.Linear(features * size * size, WAYS))


FEATURES, SEQUENCE, IMAGES, TOKENS = (4,), (5, 4), (2, 6, 6), (7,)
# By the shape of an example.
_MADE: dict[tuple[int, ...], dict[str, Callable[[], nn.Module]]] = {
    FEATURES: {
        "softplus": lambda: nn.Sequential(nn.Linear(4, 8), nn.Softplus(), nn.Linear(8, WAYS)),
        "gelu": lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, WAYS)),
        "siren": lambda: Calls(
            lambda m, x: m.c(torch.sin(3 * m.b(torch.sin(3 * m.a(x))))),
            a=nn.Linear(4, 6),
            b=nn.Linear(6, 6),
            c=nn.Linear(6, WAYS),
        ),
        "pointwise": lambda: Calls(
            lambda m, x: m.b(F.softplus(h := m.a(x)) * h.sigmoid() + F.elu(h).square().clamp(max=1) / 2),
            a=nn.Linear(4, 6),
            b=nn.Linear(6, WAYS),
        ),
        "context": lambda: Calls(
            lambda m, x: m.b(torch.tanh(m.a(torch.cat([x, m.context.expand(len(x), 2)], 1)))),
            a=nn.Linear(6, 5),
            b=nn.Linear(5, WAYS),
            context=nn.Parameter(torch.tensor([0.3, -0.2])),
        ),
        "batchnorm1d": lambda: nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, WAYS)
        ),
        "tied": _tied,
        "computed-weights": lambda: Calls(
            lambda m, x: m.head(F.softplus(F.linear(x, m.scale * F.normalize(m.v, dim=1), m.scale[:, 0]))),
            v=nn.Parameter(torch.randn(6, 4)),
            scale=nn.Parameter(torch.rand(6, 1) + 0.5),
            head=nn.Linear(6, WAYS),
        ),
        "in-place": lambda: Calls(_in_place, first=nn.Linear(4, 6), last=nn.Linear(6, WAYS)),
        "examples-mixed": lambda: Calls(
            lambda m, x: m.b(h - h.mean(0) * len(x) if (h := torch.tanh(m.a(x))) is not None else h),
            a=nn.Linear(4, 6),
            b=nn.Linear(6, WAYS),
        ),
        "detached": lambda: Calls(
            lambda m, x: m.b(torch.tanh(h := m.a(x)) * h.detach().cos() + h.abs().sign()),
            a=nn.Linear(4, 6),
            b=nn.Linear(6, WAYS),
        ),
        "constants": lambda: Calls(
            lambda m, x: m.b(torch.tanh(m.a(x) * torch.arange(6.0) + torch.full((len(x), 1), 0.5))),
            a=nn.Linear(4, 6),
            b=nn.Linear(6, WAYS),
        ),
        "chosen": lambda: Calls(
            lambda m, x: m.h(torch.where((a := m.a(x)) > 0, a.exp(), x).masked_fill(x > 1, 0.0)),
            a=nn.Linear(4, 4),
            h=nn.Linear(4, WAYS),
        ),
        "solved": lambda: Calls(
            lambda m, x: m.h(torch.linalg.solve(torch.eye(4, dtype=x.dtype) * 3 + m.w, x.T).T),
            w=nn.Parameter(torch.randn(4, 4) / 2),
            h=nn.Linear(4, WAYS),
        ),
        "written-into": lambda: Calls(_written_into, a=nn.Linear(4, 6), b=nn.Linear(8, WAYS)),
        "arguments-returned": lambda: Calls(
            lambda m, x: m.b(torch.mul(*torch.broadcast_tensors(torch.tanh(m.a(x)), m.scale))),
            a=nn.Linear(4, 6),
            scale=nn.Parameter(torch.rand(6)),
            b=nn.Linear(6, WAYS),
        ),
        "scatter": lambda: Calls(
            lambda m, x: m.b(
                torch.zeros(len(x), 8, dtype=x.dtype)
                .index_add(1, torch.tensor([0, 3, 3, 7, 1, 5]), m.a(x))
                .exp()
            ),
            a=nn.Linear(4, 6),
            b=nn.Linear(8, WAYS),
        ),
    },
    SEQUENCE: {
        "conv1d": lambda: nn.Sequential(
            *(nn.Conv1d(5, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2)),
            *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, WAYS)),
        ),
        "gru": lambda: _rnn(nn.GRU, batch_first=True),
        "gru-2-layers-both-ways": lambda: Calls(
            lambda m, x: m.head(m.rnn(x.transpose(0, 1))[1].transpose(0, 1).flatten(1)),
            rnn=nn.GRU(4, 3, num_layers=2, bidirectional=True),
            head=nn.Linear(12, WAYS),
        ),
        "lstm": lambda: _rnn(nn.LSTM, batch_first=True),
        "lstm-projected": lambda: Calls(
            lambda m, x: m.head(m.rnn(x)[0].mean(1)),
            rnn=nn.LSTM(4, 5, batch_first=True, proj_size=3, bias=False),
            head=nn.Linear(3, WAYS),
        ),
        "rnn": lambda: _rnn(nn.RNN, batch_first=True),
        "encoder-layer": lambda: Calls(
            lambda m, x: m.head(m.layer(x).mean(1)),
            layer=nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, activation="gelu"),
            head=nn.Linear(4, WAYS),
        ),
        "positions": Positions,
        "several-results": lambda: Calls(
            lambda m, x: m.h(
                m.a(x).max(1)[0] + m.b(x).topk(2, 1).values.sum(1) + torch.stack(x.unbind(1)).mean(0)
            ),
            a=nn.Linear(4, 4),
            b=nn.Linear(4, 4),
            h=nn.Linear(4, WAYS),
        ),
    },
    (5, 6): {"attention": Attention},
    TOKENS: {
        "embedding": lambda: Calls(
            lambda m, x: m.head(m.table(x).mean(1)), table=nn.Embedding(9, 4), head=nn.Linear(4, WAYS)
        ),
        "counted-into": lambda: Calls(
            lambda m, x: m.b(torch.zeros(len(x), 9, dtype=m.b.weight.dtype).scatter_(1, x, 1.0)),
            b=nn.Linear(9, WAYS),
        ),
    },
    IMAGES: {
        "conv5x5": lambda: flat(
            nn.Conv2d(2, 4, 5, padding=2), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), features=4, size=3
        ),
        "dilated": lambda: flat(nn.Conv2d(2, 3, 3, dilation=2, padding=2), nn.GELU(), features=3, size=6),
        "depthwise": lambda: flat(
            nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU(), features=4, size=6
        ),
        "transposed": lambda: flat(
            nn.ConvTranspose2d(2, 3, 2, 2), nn.LeakyReLU(), nn.MaxPool2d(3, 2, 1), features=3, size=6
        ),
        "groupnorm": lambda: flat(
            nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), features=4, size=6
        ),
        "instancenorm": lambda: flat(
            nn.Conv2d(2, 4, 3),
            nn.InstanceNorm2d(4, affine=True),
            nn.ELU(),
            nn.AvgPool2d(2),
            features=4,
            size=2,
        ),
        "unet": lambda: Calls(
            _unet,
            down=nn.Conv2d(2, 3, 3, padding=1),
            deep=nn.Conv2d(3, 4, 3, padding=1),
            last=nn.Conv2d(7, WAYS, 1),
        ),
    },
}
NETWORKS = {name: (make, shape) for shape, made in _MADE.items() for name, make in made.items()}
# Networks all of whose operations have rules of their own by now: the textbook holds for these as well.
RULED = {"gelu", "siren", "batchnorm1d", "conv1d", "conv5x5", "transposed", "groupnorm", "instancenorm"}
SETTINGS = MAMLPP | {"bnwb": False, "bnrs": False}


def batch_of(shape: tuple[int, ...], tasks: int = TASKS, loss: str = "cross_entropy") -> Batch:
    def side(count: int) -> tuple[Tensor, Tensor]:
        size = tasks, count, *shape
        x = torch.randint(9, size) if shape == TOKENS else torch.randn(size, dtype=torch.float64)
        if loss == "mse":
            return x, torch.randn(tasks, count, WAYS, dtype=torch.float64)
        return x, torch.randint(WAYS, (tasks, count))

    return (*side(SUPPORT), *side(TARGETS))


def pair(name: str, tasks: int = TASKS, **changes: Any) -> tuple[mf.MAMLPlusPlus, Textbook, Batch]:
    """A learner on the fused engine, the textbook on the same parameters, and a batch."""
    make, shape = NETWORKS[name]
    settings = SETTINGS | changes
    torch.manual_seed(0)
    own, textbook = make().double(), make().double()
    textbook.load_state_dict(own.state_dict())
    batch = batch_of(shape, tasks, settings["loss"])
    book = Textbook(textbook, settings)
    learner = mf.MAMLPlusPlus(own, mf.MAMLConfig(**settings), engine="fused", precision="float64")
    return learner, book, batch


def compare(learner: mf.MAMLPlusPlus, book: Textbook, batch: Batch) -> None:
    """One meta-gradient and one evaluation."""
    found = learner.meta_gradient(mf.EpisodeBatch(*batch, by_class=False))
    with sdpa_kernel(SDPBackend.MATH):  # the only one with second derivatives
        expected = book.gradient(batch)
    assert_close(found.task_losses, expected, rtol=1e-9, atol=1e-12)
    scale = max(float(p.grad.abs().max()) for p in book.model.parameters() if p.grad is not None)
    own = dict(learner.model.named_parameters())
    for name, p in book.model.named_parameters():
        grad = own[name].grad if own[name].grad is not None else torch.zeros_like(p)
        assert_close(
            grad, p.grad, rtol=1e-9, atol=1e-9 * scale, msg=lambda text, name=name: f"{name}: {text}"
        )
    if learner.rates.rates.requires_grad:
        rates = learner.rates.as_dict(learner.rates.rates.grad)
        for name, rate in book.rates.items():
            assert_close(rates[name], rate.grad, rtol=1e-9, atol=1e-9 * scale)


def generic(learner: mf.MAMLPlusPlus) -> list[str]:
    engine = learner.engine
    assert isinstance(engine, FusedEngine)
    network = next(iter(engine._prepared.values())).network
    return [s.kind.removeprefix("generic ") for s in network.steps if s.kind.startswith("generic ")]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_textbook(name: str) -> None:
    learner, book, batch = pair(name)
    compare(learner, book, batch)
    assert bool(generic(learner)) == (name not in RULED)


CHANGES: dict[str, dict[str, Any]] = {
    "final-loss": {"msl": False},
    "first-order": {"second_order": False},
    "fixed-rates": {"lslr": False},
    "element-rates": {"rates": "element"},
    "squared": {"loss": "mse"},
    "one-step": {"steps": 1},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["softplus", "gelu", "attention", "dilated", "tied"])
def test_every_form_of_the_sweep(name: str, change: str) -> None:
    compare(*pair(name, **CHANGES[change]))


@pytest.mark.parametrize("name", ["gelu", "attention", "gru", "tied"])
def test_one_task_alone(name: str) -> None:
    compare(*pair(name, tasks=1))


@pytest.mark.parametrize("name", ["gelu", "encoder-layer", "embedding", "batchnorm1d", "conv5x5"])
def test_evaluation(name: str) -> None:
    learner, book, batch = pair(name)
    found = learner.evaluate(mf.EpisodeBatch(*batch, by_class=False)).logits
    assert_close(found, book.evaluate(batch, "batch", 2), rtol=1e-9, atol=1e-11)
    assert learner.engine.name == "fused"


def test_an_operator_that_returns_a_list() -> None:
    """A cell's gates are split by one, in evaluation."""
    torch.manual_seed(0)
    cell = Calls(
        lambda m, x: m.head(m.cell(x[:, 1], m.cell(x[:, 0]))), cell=nn.GRUCell(4, 5), head=nn.Linear(5, WAYS)
    ).double()
    config, batch = mf.MAMLConfig(steps=2), mf.EpisodeBatch(*batch_of(SEQUENCE))
    found = [
        mf.MAMLPlusPlus(copy.deepcopy(cell), config, engine=engine, precision="float64").evaluate(batch)
        for engine in ("fused", "reference")
    ]
    assert_close(found[0].logits, found[1].logits, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize("group", [1, 3])
def test_memory_and_groups_change_nothing(memory: Any, group: int) -> None:
    learner, book, batch = pair("attention")
    engine = FusedEngine(learner.model, learner.rates, precision="float64", memory=memory, group=group)
    episodes = mf.EpisodeBatch(*batch, by_class=False)
    engine.meta_gradient(episodes, learner.step_weights(), True)
    book.gradient(batch)
    for (_, p), (_, q) in zip(learner.model.named_parameters(), book.model.named_parameters(), strict=True):
        assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11)


def test_the_same_bits_on_any_number_of_threads() -> None:
    results = []
    with kept_threads():
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            learner, _, batch = pair("dilated", tasks=5)
            learner.meta_gradient(mf.EpisodeBatch(*batch, by_class=False))
            results.append([p.grad.clone() for p in learner.model.parameters() if p.grad is not None])
    assert_close(results[1], results[0], rtol=0, atol=0)
    assert_close(results[2], results[0], rtol=0, atol=0)


def test_buffers_may_change_between_calls() -> None:
    learner, book, batch = pair("attention")
    compare(learner, book, batch)
    for model in (learner.model, book.model):
        model.mask.mul_(0).add_(0.5 * torch.eye(5))  # type: ignore[operator, union-attr]
        model.mask.nan_to_num_(0.1)  # type: ignore[operator, union-attr]
    compare(learner, book, batch)


def test_no_memory_is_read_before_it_is_written(poisoned_memory: None) -> None:
    learner, book, batch = pair("encoder-layer")
    engine = learner.engine
    assert isinstance(engine, FusedEngine)
    compare(learner, book, batch)
    engine.workspace.memory.view(torch.uint8).fill_(255)  # float64 of these bits are NaN
    compare(learner, book, batch)


def test_results_that_nobody_reads_are_not_computed() -> None:
    learner, _, batch = pair("lstm")
    learner.meta_gradient(mf.EpisodeBatch(*batch, by_class=False))
    assert generic(learner) == ["lstm", "__getitem__"]


def test_a_rule_that_is_wrong_is_caught_by_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    second = Traced.second

    def scaled(self: Traced, directions: Any, gy: Any, gy_dot: Any) -> Any:
        self.function, whole = (lambda given: whole(given) * 1.0001), self.function
        return second(self, directions, gy, gy_dot)

    monkeypatch.setattr(Traced, "second", scaled)
    learner, _, batch = pair("softplus")
    with pytest.raises(ValueError, match=r"meta-gradient that is .* off the reference loop's"):
        learner.meta_gradient(mf.EpisodeBatch(*batch, by_class=False))


def test_explain_names_generic_steps() -> None:
    learner, _, batch = pair("softplus")
    learner.meta_gradient(mf.EpisodeBatch(*batch, by_class=False))
    assert "generic softplus" in learner.explain()


def test_what_cannot_be_one_program_goes_to_autograd() -> None:
    for how, why in (
        (lambda m, x: F.rrelu(m.a(x), training=True), "draws random numbers"),
        (lambda m, x: m.a(x)[m.a(x).sum(1) > 0].sum() + m.a(x), "asks for values"),
    ):
        model = Calls(how, a=nn.Linear(4, 3)).double()  # type: ignore[arg-type]
        learner = mf.MAMLPlusPlus(model, mf.MAMLConfig(steps=1), precision="float64")
        learner.meta_gradient(mf.EpisodeBatch(*batch_of(FEATURES), by_class=False))
        assert learner.engine.name == "autograd" and why in learner.engine_reason


@pytest.mark.parametrize(("length", "given_back"), [(2**8, False), (2**16, True)])
def test_memory_of_large_examples_is_given_back(
    length: int, given_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(tracing, "release_memory", lambda: calls.append(None))
    form = tracing.Form((4, length), (length, 1), torch.float32)
    traced = Traced(lambda given: given["x"].tanh(), {"x": tracing.Leaf(form)}, 1, torch.device("cpu"))
    traced.value()
    traced.value()
    assert len(calls) == given_back
