"""Where the fused engine ends: models it cannot take are refused by name, odd ones that it can take come out right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from front_end_helpers import Calls
from helpers import gradients, lowered, random_batch, small_conv4, small_learner
from torch import Tensor, nn
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast.engine.base import Unsupported
from mamlpp_fast.engine.fused import engine as fused_engine
from mamlpp_fast.engine.fused.engine import FusedEngine
from mamlpp_fast.engine.fused.program import Emitter


def net(how: Callable[..., Any]) -> nn.Module:
    """A convolution, a linear layer and a tensor, put together."""
    return Calls(how, conv=nn.Conv2d(1, 2, 3), head=nn.Linear(32, 3), scale=nn.Parameter(torch.ones(())))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((-1, 2))


class _Pair(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def _normed_twice() -> nn.Module:
    norm = nn.BatchNorm2d(1)
    return nn.Sequential(nn.Conv2d(1, 1, 3), norm, nn.ReLU(), norm)


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_Pair(), r"_Pair: its forward raises, .*missing 1 required positional argument"),
        (net(lambda m, x: (m.conv(x), x)), "Calls: expected forward to return one tensor of predictions"),
        (net(lambda m, x: x), "Calls: expected forward to return one tensor of predictions"),
        (nn.Sequential(nn.BatchNorm2d(1, momentum=None)), "0: __float__ asks for values"),
        (_normed_twice(), "1: 1.running_mean is used more than once in a pass"),
        (net(lambda m, x: m.conv(x).view(-1, 8)), r"output: expected predictions \[N, \.\.\.\]"),
        (net(lambda m, x: m.head(m.conv(x).flatten(1)).sort(1)[0].unique()), "unique.* asks for values"),
    ],
)
def test_what_has_no_rules_is_named(model: nn.Module, message: str) -> None:
    with pytest.raises(Unsupported, match=message) as raised:
        lowered(model, (1, 6, 6))
    assert "\n" not in str(raised.value)


def kinds(model: nn.Module) -> list[str]:
    return [step.kind for step in lowered(model, (1, 6, 6)).steps]


def test_shapes_that_do_not_fit_are_named() -> None:
    message = "0: its forward raises, .* to have 3 channels, but got 1 channels"
    with pytest.raises(Unsupported, match=message):
        kinds(nn.Sequential(nn.Conv2d(3, 2, 3)))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 5), nn.Conv2d(2, 2, (1, 3), padding=(0, 1))), []),
        (nn.Sequential(nn.Conv2d(1, 2, 8, padding=3)), ["conv2d"]),
        (nn.Sequential(nn.Conv2d(1, 2, 3, dilation=2)), ["conv2d"]),
        (nn.Sequential(nn.ConvTranspose2d(1, 2, 3, 2, 1), nn.ConvTranspose2d(2, 3, 2)), []),
        (nn.Sequential(nn.ConvTranspose2d(1, 2, 3, dilation=2)), ["conv_transpose2d"]),
        (nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 3, groups=2)), ["conv2d"]),
        (nn.Sequential(nn.Conv2d(1, 1, 3, stride=3)), []),
        (nn.Sequential(nn.Conv2d(1, 1, 3, stride=(1, 2))), ["conv2d"]),
        (nn.Sequential(nn.Conv2d(1, 1, 3, padding=(1, 0))), ["conv2d"]),
        (_tied(), ["conv2d", "conv2d"]),
        (nn.Sequential(nn.GELU(), nn.Tanh(), nn.SiLU(), nn.Sigmoid(), nn.ELU(0.7), nn.GELU("tanh")), []),
        (nn.Sequential(nn.Softplus()), ["softplus"]),
        (net(lambda m, x: torch.cos(0.5 * m.conv(x)).sin_().mul_(2)), []),
        (nn.Sequential(nn.MaxPool2d(3, 2, 1)), []),
        (nn.Sequential(nn.MaxPool2d(2, dilation=2)), ["max_pool2d"]),
        (nn.Sequential(nn.MaxPool2d(4, 3, ceil_mode=True)), ["max_pool2d"]),
        (nn.Sequential(nn.AvgPool2d(2, divisor_override=3)), ["avg_pool2d"]),
        (nn.Sequential(nn.AvgPool2d(3, 2, 1)), []),
        (nn.Sequential(nn.AvgPool2d(3, 2, 1, count_include_pad=False)), ["avg_pool2d"]),
        (nn.Sequential(nn.AdaptiveAvgPool2d((2, None))), []),
        (nn.Sequential(nn.AdaptiveAvgPool2d(4)), ["adaptive_avg_pool2d"]),
        (nn.Sequential(nn.Flatten(2)), ["flatten"]),
        (nn.Sequential(nn.Unflatten(2, (2, 3))), ["unflatten"]),
        (nn.Sequential(nn.LayerNorm(6)), ["layer_norm"]),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2)), []),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(4, 4), nn.InstanceNorm2d(4)), []),
        (nn.Sequential(nn.Linear(6, 3)), ["linear"]),
        (net(lambda m, x: m.conv(x) + m.scale), ["add"]),
        (net(lambda m, x: m.conv(x) + 1), ["add"]),
        (net(lambda m, x: m.conv(x) * len(x)), ["mul"]),
        (net(lambda m, x: m.conv(x).mean(1)), ["mean"]),
    ],
)
def test_other_operations_and_arguments_become_generic_steps(model: nn.Module, names: list[str]) -> None:
    whole = nn.Sequential(model, nn.Flatten(), nn.LazyLinear(3)).double()
    whole(torch.zeros(2, 1, 6, 6, dtype=torch.float64))
    generic = [kind for kind in kinds(whole) if kind.startswith("generic") and kind != "generic flatten"]
    assert generic == [f"generic {name}" for name in names if name != "flatten"]
    learners = [
        mf.MAMLPlusPlus(copy.deepcopy(whole), mf.MAMLConfig(steps=2), engine=e, precision="float64")  # type: ignore[arg-type]
        for e in ("reference", "fused")
    ]
    for learner in learners:
        learner.meta_gradient(random_batch(size=6))
    expected, found = (gradients(learner.model, learner.rates) for learner in learners)
    assert_close(found, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    "flat",
    [
        lambda x: torch.flatten(x, 1),
        lambda x: x.flatten(1),
        lambda x: x.contiguous().view(x.shape[0], -1),
        lambda x: x.reshape((x.size()[0], -1)),
        lambda x: x.reshape(len(x), 32),
    ],
    ids=["function", "method", "shape", "size", "numbers"],
)
def test_ways_to_flatten(flat: Callable[[Tensor], Tensor]) -> None:
    assert kinds(net(lambda m, x: m.head(flat(m.conv(x))))) == ["Conv", "Bias", "Flatten", "Linear"]


def test_a_mean_of_height_and_width_is_a_pooling() -> None:
    model = nn.Sequential(nn.Conv2d(1, 32, 3), Mean(), nn.Linear(32, 3))
    assert kinds(model) == ["Conv", "Bias", "AveragePool", "Linear"]


FROZEN = {
    "kernel": ["0.weight"],
    "all but the bias of the norm": ["0.weight", "0.bias", "3.weight", "6.weight", "6.bias"],
    "all but the last bias": ["0.weight", "0.bias", "3.weight", "3.bias", "6.weight"],
    "all but the last layer": ["0.weight", "0.bias", "3.weight", "3.bias"],
    "the last layer": ["6.weight", "6.bias"],
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN.keys())
def test_frozen_parts_take_no_gradient_and_change_nothing_else(frozen: list[str]) -> None:
    learners = []
    for engine in ("reference", "fused"):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.LayerNorm([4, 5, 5]),
            nn.LeakyReLU(),
            nn.Flatten(),
            nn.Linear(100, 3),
        ).double()
        for name, p in model.named_parameters():
            p.requires_grad_(name not in frozen)
        config = mf.MAMLConfig(steps=3, bnwb=False, adapt_norm=True)
        learner = mf.MAMLPlusPlus(model, config, engine=engine, precision="float64")  # type: ignore[arg-type]
        learner.meta_gradient(random_batch())
        learners.append(learner)
    expected, found = (gradients(learner.model, learner.rates) for learner in learners)
    assert found.keys() == expected.keys() and not any(name.removeprefix("0.") in frozen for name in found)
    assert_close(found, expected, rtol=1e-8, atol=1e-11)


def test_where_nothing_fits_the_smallest_form_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_engine, "free_bytes", lambda device: 0)
    learner, plenty = small_learner(engine="fused"), small_learner(engine="reference")
    learner.meta_gradient(random_batch())
    assert "2 tasks in groups of 1" in learner.explain()
    assert "support activations recomputed" in learner.explain()
    plenty.meta_gradient(random_batch())
    assert_close(gradients(learner.model), gradients(plenty.model), rtol=1e-8, atol=1e-11)


def test_free_memory_is_guessed_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused_engine.free_bytes(torch.device("cpu")) > 0

    def unknown(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr("os.sysconf", unknown)
    assert fused_engine.free_bytes(torch.device("cpu")) == 2**33


def test_one_value_per_channel_cannot_be_normalised() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 1))
    learner = mf.MAMLPlusPlus(model, mf.MAMLConfig(steps=1), engine="fused")
    one, label = torch.ones(1, 1, 1, 1, 1), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"1: its forward raises, .*expected more than one value per channel"
    ):
        learner.meta_gradient(mf.EpisodeBatch(one, label, one, label))


def test_a_profile_has_every_call_and_runs_the_program() -> None:
    learner = small_learner(engine="fused")
    engine = learner.engine
    assert isinstance(engine, FusedEngine)
    prepared = engine.prepare(random_batch(), True, True)
    times = prepared.program.profile(repeats=2)
    known = {(i.phase.name, i.label, i.name) for i in prepared.program.instructions}
    assert times.keys() == known
    assert all(seconds >= 0 for seconds in times.values())


def test_a_buffer_has_no_tensor_before_its_program_has_memory() -> None:
    with pytest.raises(RuntimeError, match="buffer y has no memory yet"):
        Emitter(torch.device("cpu"), torch.float32).new("y", (8,)).tensor()


def test_explanation_of_a_narrow_network() -> None:
    learner = mf.MAMLPlusPlus(small_conv4(), mf.MAMLConfig(steps=3), engine="fused")
    learner.meta_gradient(random_batch())
    assert "computed in float64 and rounded at the end: no layer has more than" in learner.explain()
