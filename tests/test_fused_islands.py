"""What takes part in no gradient, what nothing reads, rates by element, and strides: fused against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import jittered, random_batch
from test_fused_sweep import FORMS, assert_same, compare, engines, step_weights
from torch import Tensor, nn

from mamlpp_fast.engine.fused import FusedEngine
from mamlpp_fast.engine.fused.steps import Detach


class Net(nn.Module):
    """Two paths from a convolution to a head, put together as a test says: ``join(self, hidden)``."""

    def __init__(self, join: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, padding=1, stride=2)
        self.stem_norm = nn.BatchNorm2d(3)
        self.side = nn.Conv2d(3, 3, 3, padding=1)
        self.side_norm = nn.BatchNorm2d(3, momentum=0.3)
        self.last = nn.Conv2d(3, 3, 1)
        self.last_norm = nn.BatchNorm2d(3)
        self.linear = nn.Linear(3 * 36, 3)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        h = self.join(self, F.leaky_relu(self.stem_norm(self.stem(x)), 0.1))
        return self.linear(F.relu(self.last_norm(self.last(h))).flatten(1))


def _side(net: Any, h: Tensor) -> Tensor:
    return F.relu(net.side_norm(net.side(h)))


def _island(net: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        y = _side(net, h)
    return h + y


def _island_alone(net: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        return _side(net, h)


def _island_in_island(net: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        y = net.side(h)
        with torch.enable_grad():
            z = net.side_norm(y)
    return h + F.relu(z)


ISLANDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "island": _island,
    "island-alone": _island_alone,
    "detached-side": lambda net, h: h + _side(net, h).detach(),
    "side-of-detached": lambda net, h: h + _side(net, h.detach()),
    "both-detached": lambda net, h: _side(net, h.detach()) + h.detach(),
    "data": lambda net, h: h + F.leaky_relu(net.side(h).data, 0.2),
    # The bias has a gradient, the product has none.
    "half": lambda net, h: h + net.side_norm(h).detach() + F.relu(h),
    "island-in-island": _island_in_island,
}


def _fused(pair: Any, batch: Any) -> list[str]:
    """Kinds of the steps of the program that served."""
    ours = pair[1]
    assert isinstance(ours, FusedEngine)
    return [step.kind for step in ours.prepare(batch, True, True).network.steps]


@pytest.mark.parametrize("name", ISLANDS)
def test_islands_without_gradients(name: str) -> None:
    torch.manual_seed(1)
    pair = engines(jittered(Net(ISLANDS[name])), 2, verify=False)
    batch = random_batch()
    compare(
        pair, batch, step_weights(2), floor=1e-3
    )  # biases in front of batch norm: rounding and exactly zero
    assert Detach.__name__ in _fused(pair, batch)
    expected, ours = (engine.evaluate(batch, steps=3, stats="running") for engine in pair)
    assert_same(ours, expected, "evaluation")


@pytest.mark.parametrize(("multi_step", "second_order"), FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_an_island_in_every_form(multi_step: bool, second_order: bool, memory: str) -> None:
    torch.manual_seed(1)
    pair = engines(jittered(Net(_island)), 3, memory=memory, group=1, verify=False)
    compare(pair, random_batch(), step_weights(3) if multi_step else None, second_order, floor=1e-3)


@pytest.mark.parametrize(
    ("join", "adapt"),
    [("detached-side", ("side", "linear")), ("side-of-detached", ("side",)), ("island", ("linear",))],
)
def test_islands_where_a_part_adapts(join: str, adapt: tuple[str, ...]) -> None:
    """Parameters inside an island adapt by name, and stay where they are."""
    torch.manual_seed(1)
    pair = engines(jittered(Net(ISLANDS[join])), 2, adapt=adapt, verify=False)
    compare(pair, random_batch(), step_weights(2), floor=1e-3)


def test_adapting_norms_inside_an_island() -> None:
    torch.manual_seed(1)
    pair = engines(jittered(Net(_island)), 2, adapt_norm=True, verify=False)
    compare(pair, random_batch(), step_weights(2), floor=1e-3)


# Dead branches -------------------------------------------------------------------------------------------------------


def _dead_norm(net: Any, h: Tensor) -> Tensor:
    net.side_norm(net.side(h))
    return F.relu(h)


def _dead_end(net: Any, h: Tensor) -> Tensor:
    y = _side(net, h)
    F.max_pool2d(y, 2)
    F.relu(y + h)
    return F.relu(h)


def _dead_norm_of_the_input_alone(net: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        net.side_norm(net.side(h))
    return F.relu(h)


DEAD = {"norm": _dead_norm, "end": _dead_end, "norm-in-no-grad": _dead_norm_of_the_input_alone}


@pytest.mark.parametrize("name", DEAD)
@pytest.mark.parametrize("group", [1, 2])
def test_what_nothing_reads_still_keeps_statistics(name: str, group: int) -> None:
    torch.manual_seed(1)
    pair = engines(jittered(Net(DEAD[name])), 2, group=group, verify=False)
    compare(pair, random_batch(), step_weights(2), floor=1e-3)
    for engine in pair:
        norm = engine.model.get_submodule("side_norm")
        assert norm.num_batches_tracked == 8  # of 2 tasks and steps, support and target
        assert norm.running_mean.abs().min() > 0 and (norm.running_var != 1).all()
    for name in ("side.weight", "side.bias", "side_norm.weight", "side_norm.bias"):
        gradient = pair[1].model.get_parameter(name).grad
        assert gradient is None or not gradient.any()


# Rates by element ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "memory"), [(1, "keep"), (2, "recompute"), (4, "keep")])
@pytest.mark.parametrize("second_order", [True, False])
def test_rates_by_element_in_every_grouping(group: int, memory: str, second_order: bool) -> None:
    torch.manual_seed(1)
    pair = engines(
        jittered(Net(ISLANDS["detached-side"])), 2, rates="element", group=group, memory=memory, verify=False
    )
    compare(pair, random_batch(tasks=4), step_weights(2), second_order, floor=1e-3)
    grad = pair[1].rates.rates.grad
    assert grad is not None and grad.shape == pair[0].rates.rates.shape
    assert len(grad.unique()) > 0.2 * grad.numel()


# Strides -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rates", ["tensor", "element"])
def test_channels_last_parameters_get_gradients_of_their_strides(rates: str) -> None:
    """Optimizers that work on memory, fused Adam say, pair what lies in the same place."""
    torch.manual_seed(1)
    model = jittered(Net(_island)).to(memory_format=torch.channels_last)
    pair = engines(model, 2, rates=rates, verify=False)
    compare(pair, random_batch(), step_weights(2), floor=1e-3)
    strides = set()
    for name, p in pair[1].model.named_parameters():
        assert p.grad is not None and p.grad.stride() == p.stride(), name
        strides.add(p.is_contiguous())
    assert strides == {True, False}


def test_transposed_weights_get_gradients_of_their_strides() -> None:
    torch.manual_seed(1)
    model = jittered(Net(_island))
    model.linear.weight = nn.Parameter(model.linear.weight.detach().t().contiguous().t())
    pair = engines(model, 2, verify=False)
    compare(pair, random_batch(), step_weights(2), floor=1e-3)
    weight = pair[1].model.get_parameter("linear.weight")
    assert not weight.is_contiguous()
    assert weight.grad is not None and weight.grad.stride() == weight.stride()
