"""``adapt``, ``LSLR`` and ``graphed`` in a loop of one's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import random_batch, small_conv4
from torch.func import functional_call
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import mamlpp_fast as mf
from mamlpp_fast.adaptation import inner_steps


def _textbook(model: mf.Conv4, rates: mf.LSLR, task: mf.Episode) -> dict[str, torch.Tensor]:
    own = dict(model.named_parameters())
    fast = {name: own[name] for name in rates.names}
    for k in range(rates.num_steps):
        mf.set_step(model, k)
        loss = F.cross_entropy(functional_call(model, fast, (task.support_x,)), task.support_y)
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True, allow_unused=True)
        by_name = dict(zip(fast, grads, strict=True))
        zeros = {n: torch.zeros_like(p) if by_name[n] is None else by_name[n] for n, p in fast.items()}
        fast = rates(fast, zeros, k)
    return fast


@pytest.mark.parametrize("kind", ["tensor", "element"])
def test_adapt_is_the_textbook_loop(kind: str) -> None:
    model, task = small_conv4(), random_batch()[0]
    rates = mf.LSLR(model, 3, 0.2, rates=kind)  # type: ignore[arg-type]
    results = []
    for fast in (_textbook(model, rates, task), mf.adapt(model, task.support_x, task.support_y, rates)):
        loss = F.cross_entropy(functional_call(model, fast, (task.target_x,)), task.target_y)
        grads = torch.autograd.grad(loss, [*model.parameters(), rates.rates], allow_unused=True)
        results.append((loss, *(g for g in grads if g is not None and g.any())))
    assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)


def test_inner_steps_yields_every_state_and_first_order_cuts_the_graph() -> None:
    model, task = small_conv4(), random_batch()[0]
    rates = mf.LSLR([("head.weight", model.head.weight)], 3, 0.2)
    states = list(inner_steps(model, task.support_x, task.support_y, rates, steps=4, first_order=True))
    assert len(states) == 4 and set(states[0]) == {"head.weight"}
    total = states[-1]["head.weight"].sum()
    grad = torch.autograd.grad(total, model.head.weight)[0]
    assert_close(grad, torch.ones_like(grad))


def test_a_fixed_rate_is_a_constant_lslr() -> None:
    model, task = small_conv4(), random_batch()[0]
    fixed = mf.adapt(model, task.support_x, task.support_y, 0.2, steps=3)
    learned = mf.adapt(model, task.support_x, task.support_y, mf.LSLR(model, 3, 0.2))
    assert_close(fixed, learned, rtol=1e-12, atol=1e-12)


def test_lslr_shapes_names_and_errors() -> None:
    model = small_conv4()
    rates = mf.LSLR(model.named_parameters(), 3, 0.05, rates="element")
    assert rates.rates.shape == (3, sum(p.numel() for p in model.parameters()))
    assert rates.as_dict()["head.weight"].shape == (3, *model.head.weight.shape)
    flat = rates.flatten(dict(model.named_parameters()))
    assert_close(rates.unflatten(flat)["blocks.1.conv.weight"], model.get_parameter("blocks.1.conv.weight"))
    assert not mf.LSLR(model.named_parameters(), 3, learnable=False).rates.requires_grad
    with pytest.raises(ValueError, match="adapting: expected at least one"):
        mf.LSLR([], 3)
    with pytest.raises(ValueError, match="num_steps: expected at least 1, got 0"):
        mf.LSLR(model.named_parameters(), 0)
    with pytest.raises(ValueError, match="rates: expected 'tensor' or 'element'"):
        mf.LSLR(model.named_parameters(), 3, rates="layer")  # type: ignore[arg-type]
    stranger = mf.LSLR([("body.weight", model.head.weight)], 3)
    task = random_batch()[0]
    with pytest.raises(
        ValueError, match=r"rates: expected names of parameters of the model, got 'body\.weight'"
    ):
        mf.adapt(model, task.support_x, task.support_y, stranger)
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        mf.adapt(model, task.support_x, task.support_y, rates, steps=0)
    other = mf.LSLR(small_conv4(filters=5), 3)
    with pytest.raises(ValueError, match=r"rates: expected 'blocks.0.conv.weight' of shape \(5, 1, 3, 3\)"):
        mf.adapt(model, task.support_x, task.support_y, other)
    with pytest.raises(TypeError, match=r"rates: expected mf.LSLR or a number, got list"):
        mf.adapt(model, task.support_x, task.support_y, [0.1])  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"adapting: expected a model or \(name, parameter\) pairs .* got Parameter"
    ):
        mf.LSLR(model.parameters(), 3)  # type: ignore[arg-type]


def test_adapt_without_gradients_gives_the_same_weights_as_constants() -> None:
    model, task = small_conv4(), random_batch()[0]
    rates = mf.LSLR(model, 3, 0.2)
    expected = mf.adapt(model, task.support_x, task.support_y, rates)
    with torch.no_grad():
        constants = mf.adapt(model, task.support_x, task.support_y, rates)
    assert not any(p.requires_grad for p in constants.values())
    assert_close(constants, {name: p.detach() for name, p in expected.items()}, rtol=1e-12, atol=1e-12)


def test_graphed_calls_through_on_the_cpu() -> None:
    calls = []

    def step(pair: tuple[torch.Tensor, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
        calls.append(scale)
        return {"sum": (pair[0] + pair[1]) * scale}

    fast = mf.graphed(step)
    assert_close(fast((torch.ones(2), torch.ones(2)), 3.0)["sum"], torch.full((2,), 6.0))
    assert calls == [3.0]


def test_graphed_takes_keywords_and_names_mistakes() -> None:
    fast = mf.graphed(lambda x, *, scale: x * scale)
    assert_close(fast(torch.ones(2), scale=2.0), torch.full((2,), 2.0))
    assert fast.graphs == 0
    with pytest.raises(TypeError, match="step: expected a callable, got Tensor"):
        mf.graphed(torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="preserve: expected a callable, got list"):
        mf.graphed(torch.add, preserve=[])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="warmup: expected at least 1, got 0"):
        mf.graphed(torch.add, warmup=0)


def test_the_tensors_of_episodes_are_seen_by_a_capture() -> None:
    batch = random_batch()
    leaves, spec = pytree.tree_flatten({"batch": batch, "task": batch[0]})
    assert [tuple(leaf.shape[:2]) for leaf in leaves[:4]] == [(2, 6)] * 4 and len(leaves) == 8
    again = pytree.tree_unflatten(leaves, spec)
    assert isinstance(again["batch"], mf.EpisodeBatch) and isinstance(again["task"], mf.Episode)
    assert again["batch"].target_x is batch.target_x
