"""Where the fused engine ends: models it cannot take are refused by name, odd ones that it can take come out right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import gradients, lowered, random_batch, small_conv4, small_learner
from torch import Tensor, nn
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast.engine.base import Unsupported
from mamlpp_fast.engine.fused import engine as fused_engine
from mamlpp_fast.engine.fused.engine import FusedEngine
from mamlpp_fast.engine.fused.program import Emitter


class Calls(nn.Module):
    """A convolution, a linear layer and a tensor of its own, put together by ``how``."""

    def __init__(self, how: Callable[..., Any]) -> None:
        super().__init__()
        self.how = how
        self.conv, self.head = nn.Conv2d(1, 2, 3), nn.Linear(32, 3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Any:
        return self.how(self, x)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((-1, 2))


class _Pair(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_Pair(), r"_Pair: its forward raises, .*missing 1 required positional argument"),
        (Calls(lambda m, x: m.conv(x) * m.scale), "Calls: mul has no fused rules"),
        (Calls(lambda m, x: (m.conv(x), x)), "Calls: expected forward to return one tensor of predictions"),
        (Calls(lambda m, x: x), "Calls: expected forward to return one tensor of predictions"),
        (_tied(), "1: shares a parameter with 0"),
        (Calls(lambda m, x: m.conv(x) + 1), "Calls: add: expected an activation, got 1"),
        (
            Calls(lambda m, x: m.conv(x) + m.scale),
            "Calls: add: expected an activation, got the parameter scale",
        ),
        (nn.Sequential(nn.BatchNorm2d(1, momentum=None)), "0: __float__ asks for values"),
        (
            nn.Sequential(nn.AvgPool2d(2, divisor_override=3)),
            "0: average pooling: expected no divisor_override",
        ),
        (nn.Sequential(nn.AvgPool2d(3, stride=2)), "0: average pooling: expected square windows"),
        (
            nn.Sequential(nn.AdaptiveAvgPool2d(2)),
            "0: adaptive average pooling: expected output size 1, got 2",
        ),
        (
            nn.Sequential(nn.Flatten(2)),
            r"0: flatten: expected to flatten all but the examples, got \(1, 6, 6\) to \(1, 36\)",
        ),
        (nn.Sequential(nn.Conv2d(1, 1, 3, padding=(1, 0))), "0: convolution: expected equal padding below"),
        (
            Calls(lambda m, x: m.conv(x).mean(1)),
            r"mean: expected height and width \(dim=\(2, 3\)\), got dim=1",
        ),
        (Calls(lambda m, x: m.conv(x).view(-1, 8)), r"view: expected examples along the first axis"),
        (Calls(lambda m, x: m.conv(x).sigmoid()), "Calls: sigmoid has no fused rules"),
        (Calls(lambda m, x: m.head(m.conv(x).flatten(1)) / len(x)), "depends on the number of examples"),
    ],
)
def test_what_has_no_rules_is_named(model: nn.Module, message: str) -> None:
    with pytest.raises(Unsupported, match=message) as raised:
        lowered(model, (1, 6, 6))
    assert "\n" not in str(raised.value)


def kinds(model: nn.Module) -> list[str]:
    return [step.kind for step in lowered(model, (1, 6, 6)).steps]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3)), r"output: expected predictions \[N, ways\], got \[N, 2, 4, 4\]"),
        (
            nn.Sequential(nn.Conv2d(3, 2, 3)),
            "0: its forward raises, .* to have 3 channels, but got 1 channels",
        ),
        (
            nn.Sequential(nn.LayerNorm(6)),
            r"0: layer norm: expected normalized_shape \(1, 6, 6\), got \(6,\)",
        ),
        (
            nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, 6, 6))),
            r"1: unflatten has no fused rules",
        ),
        (nn.Sequential(nn.Linear(6, 3)), r"0: linear: expected features \[N, 6\], got \(6, 6, 1\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(model: nn.Module, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        kinds(model)


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
    assert kinds(Calls(lambda m, x: m.head(flat(m.conv(x))))) == ["Conv", "Bias", "Flatten", "Linear"]


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
    monkeypatch.setattr(fused_engine, "_free_bytes", lambda device: 0)
    learner, plenty = small_learner(engine="fused"), small_learner(engine="reference")
    learner.meta_gradient(random_batch())
    assert "2 tasks in groups of 1" in learner.explain()
    assert "support activations recomputed" in learner.explain()
    plenty.meta_gradient(random_batch())
    assert_close(gradients(learner.model), gradients(plenty.model), rtol=1e-8, atol=1e-11)


def test_free_memory_is_guessed_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused_engine._free_bytes(torch.device("cpu")) > 0

    def unknown(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr("os.sysconf", unknown)
    assert fused_engine._free_bytes(torch.device("cpu")) == 2**33


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
