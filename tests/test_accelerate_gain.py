"""What is left to PyTorch because nothing would be gained, and faults of our own that are no reason to stop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from front_end_helpers import Calls
from helpers import random_batch, small_conv4
from test_accelerate import conv_net, mlp
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast import routes
from mamlpp_fast.engine.fused import differentiable, lowering
from mamlpp_fast.reference.code import names_in


class First(nn.Module):
    def forward(self, given: tuple[Tensor, ...]) -> Tensor:
        return given[0]


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@pytest.fixture
def as_for_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differentiable, "EVEN_WITHOUT_GAIN", False)


def of_both_orders(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The gradients of a call, and of their squares' sum."""
    parameters = list(model.parameters())
    grads = torch.autograd.grad(model(x).square().sum(), parameters, create_graph=True)
    return [*grads, *torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), parameters)]


@pytest.mark.parametrize("last", [nn.Identity, lambda: nn.Softmax(1), nn.Softplus])
def test_linear_layers_alone_are_left_to_pytorch(as_for_users: None, last: Callable[[], nn.Module]) -> None:
    """With a softmax behind them too: its step is a generic one, and took 1.5 times PyTorch's time."""
    model = mf.accelerate(nn.Sequential(mlp(), last()))
    model(torch.randn(6, 1, 8, 8)).sum().backward()
    assert "of few steps, all of them products, pointwise functions" in mf.acceleration(model)


def test_a_linear_layer_alone_is_not_even_looked_at(
    as_for_users: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "look", None)
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    assert mf.accelerate(model) is model and type(model) is nn.Linear
    assert_close(mf.functional_call(model, {}, x), model(x), rtol=0, atol=0)
    assert "a linear layer alone" in mf.acceleration(model)


class Counted(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * min(1.0, 0.1 * self.calls)


def test_what_is_another_model_at_each_call_is_seldom_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a count of its calls from which it anneals; whatever the sizes."""
    looks: list[int] = []
    made = routes.look
    monkeypatch.setattr(routes, "look", lambda model: looks.append(model.calls) or made(model))
    model = mf.accelerate(Counted(4, 3))
    for call in range(100):
        model(torch.randn(2 + call % 5, 4))
    assert len(looks) <= 20


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        (
            (
                *(m for _ in range(4) for m in (nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())),
                nn.Linear(4, 3),
            ),
            (6, 4),
        ),
        ((nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(40, 3)), (6, 4, 7)),
        ((*[nn.Linear(4, 4), nn.Softplus()] * 24, nn.Linear(4, 3)), (6, 4)),
        ((nn.GRU(4, 3, batch_first=True), First(), nn.Flatten()), (6, 7, 4)),
    ],
)
def test_what_has_more_in_it_is_served(
    as_for_users: None, layers: tuple[nn.Module, ...], shape: tuple[int, ...]
) -> None:
    model = mf.accelerate(nn.Sequential(*layers))
    model(torch.randn(shape)).sum().backward()
    assert "one operation" in mf.acceleration(model)


@pytest.mark.parametrize(
    ("layers", "ids"),
    [
        ((nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), 0),
        ((nn.Embedding(2**14, 40), Turned(), nn.Conv1d(40, 3, 4), nn.Flatten()), 9),
    ],
    ids=["a-norm-or-two", "a-large-table"],
)
def test_what_has_too_little_in_it_is_left(
    as_for_users: None, layers: tuple[nn.Module, ...], ids: int
) -> None:
    """0.7 of a plain loop's speed with one batch norm of features, and with a table whose every copy takes longer."""
    model = mf.accelerate(nn.Sequential(*layers))
    model(torch.randint(ids, (6, 4)) if ids else torch.randn(6, 4)).sum().backward()
    assert "which PyTorch is faster at" in mf.acceleration(model)


@pytest.mark.parametrize("examples", [4, 5, 25])
def test_generic_steps_are_served_whatever_a_check_takes(as_for_users: None, examples: int) -> None:
    """The check takes 4 large examples: a recording of 25 and 26 told nothing of these, and nothing was served."""

    class Conditioned(nn.Module):
        """Channels that a task's context scales and shifts."""

        def __init__(self) -> None:
            super().__init__()
            self.context = nn.Parameter(torch.randn(3))
            self.conv, self.film, self.head = nn.Conv2d(3, 4, 3), nn.Linear(3, 8), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            scale, shift = self.film(self.context).view(2, 4, 1, 1)
            h = torch.relu(self.conv(x) * scale + shift)
            return self.head(torch.cat([h, h.flip(3)], 3).mean((2, 3)))

    plain = Conditioned().double()
    own, x = mf.accelerate(copy.deepcopy(plain)), torch.randn(examples, 3, 28, 28, dtype=torch.float64)
    found = []
    for model in (own, plain):
        for only in (list(model.parameters()), [model.context]):
            grads = torch.autograd.grad(model(x).square().sum(), only, create_graph=True)
            more = torch.autograd.grad(sum(g.square().sum() for g in grads), list(model.parameters()))
            found.append([*grads, *more])
    assert_close(found[:2], found[2:], rtol=1e-9, atol=1e-9)
    assert "one operation" in mf.acceleration(own) and "plain PyTorch" not in mf.acceleration(own)


def test_generic_steps_beside_attention_of_long_sequences_are_served(as_for_users: None) -> None:
    """Of which a check takes two examples, fewer than of others."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unsqueeze(1) for t in self.qkv(x * self.scale).chunk(3, -1))
            return self.head(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0].mean(1))

    plain = Attending().double()
    own, x = mf.accelerate(copy.deepcopy(plain)), torch.randn(5, 512, 4, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        assert_close(of_both_orders(own, x), of_both_orders(plain, x), rtol=1e-9, atol=1e-9)
    assert "one operation" in mf.acceleration(own)


def test_what_is_refused_again_and_again_is_seldom_looked_at(
    as_for_users: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look takes longer than many a small layer; examples of another form are looked at soon all the same."""
    looks: list[tuple[int, ...]] = []
    made = routes._route

    def watched(model: nn.Module, x: Tensor, *more: Any) -> Any:
        looks.append(tuple(x.shape))
        return made(model, x, *more)

    monkeypatch.setattr(routes, "_route", watched)
    plain = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(28, 3))
    model, x = mf.accelerate(copy.deepcopy(plain)), torch.randint(9, (6, 7))
    for _ in range(8 + 63):
        assert_close(model(x), plain(x), rtol=0, atol=0)
    assert looks == [(6, 7)] * 8
    for _ in range(16):
        assert_close(model(x[:4]), plain(x[:4]), rtol=0, atol=0)
    assert looks[8:].count((4, 7)) in range(1, 9)
    looks.clear()
    for _ in range(1000):
        model(x)
    assert len(looks) <= 4
    monkeypatch.setattr(differentiable, "EVEN_WITHOUT_GAIN", True)
    monkeypatch.setattr(routes, "kept", type(routes.kept)())
    for _ in range(1024):  # what is served from now on is found
        model(x)
    assert "one operation" in mf.acceleration(model)
    looks.clear()
    model(x)
    assert looks == [(6, 7)]


def test_a_fault_of_ours_hands_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the writing of a program: loops run plain PyTorch, learners take another engine, and both say why."""

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("no such thing")

    monkeypatch.setitem(lowering._RULES, F.conv2d, broken)
    plain = conv_net()
    model = mf.accelerate(copy.deepcopy(plain))
    x = torch.randn(6, 1, 8, 8)
    assert_close(model(x), plain(x), rtol=0, atol=0)
    assert "writing its program down failed, KeyError" in mf.acceleration(model)
    learner = mf.MAMLPlusPlus(small_conv4(5), precision="float64")
    learner.meta_step(random_batch())
    assert learner.engine.name == "autograd"
    assert "writing its program down failed, KeyError" in learner.engine_reason


@pytest.mark.parametrize(
    "power",
    [
        lambda h, p: h**2 * p,
        lambda h, p: h**0.5 * p,
        lambda h, p: h**-1 * p,
        lambda h, p: h**p,
        lambda h, p: p**h,
        lambda h, p: 2**h * p,
    ],
)
def test_powers(power: Callable[[Tensor, Tensor], Tensor]) -> None:
    plain = Calls(
        lambda m, x: power(m.body(x).exp(), m.p), body=nn.Linear(4, 3), p=nn.Parameter(torch.tensor(1.7))
    ).double()
    own = mf.accelerate(copy.deepcopy(plain))
    x = torch.randn(5, 4, dtype=torch.float64)
    assert_close(of_both_orders(own, x), of_both_orders(plain, x), rtol=1e-9, atol=1e-11)
    assert "one operation" in mf.acceleration(own)
    config = mf.MAMLConfig(steps=1)
    batch = mf.EpisodeBatch(x[None], torch.arange(5)[None] % 3, x[None], torch.arange(5)[None] % 3)
    learner = mf.MAMLPlusPlus(copy.deepcopy(plain), config, precision="float64")
    learner.meta_step(batch)
    assert learner.engine.name == "fused"


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm2d(4), nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(4, 4)]
)
def test_a_bias_that_a_norm_of_each_example_takes_out_stays_in_the_graph(norm: nn.Module) -> None:
    """Its gradient is zero, not None: weight decay moves it, and ``autograd.grad`` finds it."""
    layers = nn.Conv2d(2, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    plain = nn.Sequential(*layers).double()
    own = mf.accelerate(copy.deepcopy(plain))
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    for model in (own, plain):
        torch.autograd.grad(model(x).sum(), list(model.parameters()), create_graph=True)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(3):
            sgd.zero_grad()
            F.cross_entropy(model(x), torch.arange(5) % 3).backward()
            sgd.step()
    assert_close(list(own.parameters()), list(plain.parameters()), rtol=1e-9, atol=1e-12)
    assert "one operation" in mf.acceleration(own)


@pytest.mark.parametrize("norm", [nn.GroupNorm(4, 4), nn.InstanceNorm2d(4)])
def test_one_value_a_group(norm: nn.Module) -> None:
    """PyTorch takes it for group norm, whose results are the bias, and refuses it for instance norm."""
    plain = nn.Sequential(nn.Conv2d(2, 4, 6), norm, nn.Flatten(), nn.Linear(4, 3)).double()
    own = mf.accelerate(copy.deepcopy(plain))
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    if isinstance(norm, nn.InstanceNorm2d):
        with pytest.raises(ValueError, match="Expected more than 1 spatial element"):
            own(x)
        return
    for model in (own, plain):
        model(x).square().sum().backward()
    assert_close(
        [p.grad for p in own.parameters()], [p.grad for p in plain.parameters()], rtol=1e-9, atol=1e-12
    )


def test_examples_that_cannot_be_checked_on_decide_nothing() -> None:
    class Own(nn.Sequential):
        """Of a class of its own, by which forms are kept."""

    model = mf.accelerate(Own(*conv_net()))
    x = torch.randn(6, 1, 8, 8)
    model(x.clone().fill_(torch.nan))
    assert "one operation" not in mf.acceleration(model)
    model(x)
    assert "one operation" in mf.acceleration(model)


class Fitting(nn.Module):
    """With a method that takes derivatives, which its forward does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.norm(self.first(x))
        return made

    def fit(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self(x).square().sum(), list(self.parameters()))


def test_methods_that_a_forward_does_not_call_cost_its_calls_nothing() -> None:
    """An accelerated model's forward names the class; each call was watched for derivatives, and its buffers copied."""
    assert names_in(mf.accelerate(Fitting())) == names_in(Fitting()) >= {"norm", "first"}
    assert "grad" not in names_in(mf.accelerate(Fitting()))
