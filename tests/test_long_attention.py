"""Attention of long sequences: the four rules a few heads at a time, and the memory that they plan."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_generic_rules import N, assert_four_rules
from torch import Tensor, nn
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast.engine.fused.steps import Attention, attention

D = torch.float64
TASKS, HEADS, LENGTH, KEYS = 2, 3, 5, 7


def plain(causal: bool) -> Any:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = 0.5 * q @ k.transpose(-2, -1)
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
        return scores.softmax(-1) @ v

    return run


@pytest.mark.parametrize("still", [(), (0,), (1,), (2,), (0, 1), (1, 2)])
@pytest.mark.parametrize(("at_once", "causal"), [(1, False), (2 * LENGTH * KEYS, False), (2**20, True)])
def test_the_four_rules(
    at_once: int, causal: bool, still: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One head at a time, two and what is left over, and all; some inputs without a direction."""
    monkeypatch.setattr(attention, "_AT_ONCE", at_once)
    keys = LENGTH if causal else KEYS
    step = Attention("f", (0, 1, 2), 3, (HEADS, LENGTH, 2), keys, 0.5, causal)
    shapes = {0: (N, HEADS, LENGTH, 4), 1: (N, HEADS, keys, 4), 2: (N, HEADS, keys, 2)}
    assert_four_rules(step, plain(causal), shapes, TASKS, still, rtol=1e-9, atol=1e-10)


class Net(nn.Module):
    """Queries, keys and values of one layer, or the same for all three."""

    def __init__(self, apart: bool, **options: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 12 if apart else 4), nn.Linear(4, 3)
        self.apart, self.options = apart, options

    def forward(self, x: Tensor) -> Tensor:
        parts = self.first(x).chunk(3, -1) if self.apart else (self.first(x),) * 3
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in parts)
        y = F.scaled_dot_product_attention(q, k, v, **self.options)
        return self.last(y.transpose(1, 2).flatten(2).mean(1))


def learners(model: nn.Module) -> list[mf.MAMLPlusPlus]:
    config = mf.MAMLConfig(steps=2, inner_lr=0.1, da_epoch=-1)
    return [
        mf.MAMLPlusPlus(copy.deepcopy(model), config, engine=engine, precision="float64")  # type: ignore[arg-type]
        for engine in ("auto", "reference")
    ]


def batch(length: int) -> mf.EpisodeBatch:
    generator = torch.Generator().manual_seed(0)
    xs = (torch.randn(2, n, length, 4, generator=generator, dtype=D) for n in (3, 4))
    sx, tx = xs
    return mf.EpisodeBatch(
        sx, torch.arange(3).expand(2, 3), tx, torch.arange(4).expand(2, 4) % 3, by_class=False
    )


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_networks_with_it(apart: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LONG", 1)
    monkeypatch.setattr(attention, "_AT_ONCE", 40)
    torch.manual_seed(0)
    ours, reference = learners(Net(apart, **options).double())
    found, expected = (own.meta_gradient(batch(6)).task_losses for own in (ours, reference))
    assert_close(found, expected, rtol=1e-9, atol=1e-12)
    for p, q in zip(ours.model.parameters(), reference.model.parameters(), strict=True):
        assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    kinds = [step.kind for step in next(iter(ours.engine._prepared.values())).network.steps]  # type: ignore[attr-defined]
    assert ours.engine.name == "fused" and "Attention" in kinds


@pytest.mark.parametrize("length", [6, 362])
def test_short_sequences_are_one_call(length: int) -> None:
    """2 heads of 362 by 362 are fewer than 2^18 probabilities, of 363 by 363 more."""
    for size, kind in ((length, "generic scaled_dot_product_attention"), (363, "Attention")):
        engine: Any = learners(Net(True).double())[0].engine
        engine.verify = False
        steps = engine.prepare(batch(size), False, True).network.steps
        assert kind in [step.kind for step in steps]


def test_no_rule_keeps_the_probabilities_of_all_heads() -> None:
    """Of six passes of three sequences and two heads; one matrix of L x L is 2 MiB."""
    length = 512
    engine: Any = learners(Net(True).double())[0].engine
    engine.verify = False
    prepared = engine.prepare(batch(length), False, True)
    matrix = length * length * 8
    assert prepared.workspace_bytes < 20 * matrix


class Heads(nn.Module):
    """PyTorch's own layers around attention; ``how`` calls ``layer`` on sequences [N, L, 4]."""

    def __init__(self, layer: nn.Module, how: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.how = layer, how
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.how(self.layer, x).mean(1))


def _attend(**options: Any) -> nn.Module:
    return nn.MultiheadAttention(4, 2, **{"batch_first": True} | options)


def _causal(layer: nn.Module, x: Tensor) -> Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
    return layer(x, src_mask=mask, is_causal=True)


def _encoder(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, **{"batch_first": True, "dropout": 0.0} | options)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "weights that nobody reads": (_attend, lambda m, x: m(x, x, x)[0]),
    "without weights": (lambda: _attend(bias=False), lambda m, x: m(x, x, x, need_weights=False)[0]),
    "of others": (_attend, lambda m, x: m(x, x[:, 1:], x[:, :-1].tanh())[0]),
    "length first": (
        lambda: _attend(batch_first=False),
        lambda m, x: m(*[x.transpose(0, 1)] * 3, need_weights=False)[0].transpose(0, 1),
    ),
    "encoder": (_encoder, lambda m, x: m(x)),
    "encoder, norm first": (lambda: _encoder(norm_first=True, activation="gelu"), lambda m, x: m(x)),
    "causal encoder": (_encoder, _causal),
}
WHOLE: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "weights": (_attend, lambda m, x: m(x, x, x)[1] @ x),
    "mask": (_attend, lambda m, x: m(x, x, x, attn_mask=torch.ones(6, 6).triu(1).bool())[0]),
    "added key": (lambda: _attend(add_bias_kv=True), lambda m, x: m(x, x, x, need_weights=False)[0]),
    "dropout": (lambda: _attend(dropout=0.2), lambda m, x: m(x, x, x, need_weights=False)[0]),
    "of the examples": (lambda: _attend(batch_first=False), lambda m, x: m(x, x, x)[0]),
}


@pytest.mark.parametrize("name", [*LAYERS, *WHOLE])
def test_heads_of_long_sequences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are taken apart, or stay one step; both are what the reference makes of them."""
    monkeypatch.setattr(attention, "LONG", 1)
    monkeypatch.setattr(attention, "_AT_ONCE", 40)
    make, how = (LAYERS | WHOLE)[name]
    torch.manual_seed(0)
    ours, reference = learners(Heads(make(), how).double())
    found, expected = [], []
    for own, results in ((ours, found), (reference, expected)):
        torch.manual_seed(1)
        results.append(own.meta_gradient(batch(6)).task_losses)
        results += [p.grad for p in own.model.parameters()]
        results.append(own.evaluate(batch(6)).logits)
    assert_close(found, expected, rtol=1e-9, atol=1e-11)
    network = next(iter(ours.engine._prepared.values())).network  # type: ignore[attr-defined]
    kinds = [step.kind for step in network.steps]
    assert ours.engine.name == "fused"
    assert ("Attention" in kinds) == (name in LAYERS)
    assert ("generic multi_head_attention_forward" in kinds) == (name in WHOLE)


def test_heads_of_short_sequences_are_all_at_once() -> None:
    make, how = LAYERS["without weights"]
    engine: Any = learners(Heads(make(), how).double())[0].engine
    engine.verify = False
    kinds = [step.kind for step in engine.prepare(batch(6), False, True).network.steps]
    assert "generic scaled_dot_product_attention" in kinds and "Attention" not in kinds
