"""Code of the user's under a library's name, or none: by parametrizations, ``exec``, ``torch.fx``; a call."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import form_of, moved
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast.compat import learn2learn as l2l
from mamlpp_fast.engine import fingerprint
from mamlpp_fast.engine.glances import Glance
from mamlpp_fast.engine.named import of_library
from mamlpp_fast.reference.code import written_in

settings = {"scale": 1.0}


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


class Scaled(nn.Module):
    """By a number of its class."""

    by = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * self.by


class Called(nn.Module):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x) * settings["scale"]

    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


WRITTEN = """
scale = 1.0

class Settings:
    scale = 1.0

class Own(nn.Module):
    def forward(self, x):
        return x * scale * Settings.scale

def own(x):
    return x * scale * Settings.scale
"""


def parametrized() -> tuple[nn.Module, Callable[[pytest.MonkeyPatch], None]]:
    layer = Scaled()
    parametrize.register_parametrization(layer, "weight", Halved())
    return layer, lambda patch: patch.setattr(Scaled, "by", 3.0)


def called() -> tuple[nn.Module, Callable[[pytest.MonkeyPatch], None]]:
    return Called(), lambda patch: patch.setitem(settings, "scale", 3.0)


def given_a_call() -> tuple[nn.Module, Callable[[pytest.MonkeyPatch], None]]:
    def change(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Called, "__call__", lambda self, x: nn.Module.__call__(self, x) * 3)

    return Called(), change


def written(name: str, changed: str) -> Any:
    def make() -> tuple[nn.Module, Callable[[pytest.MonkeyPatch], None]]:
        space: dict[str, Any] = {"nn": nn}
        exec(WRITTEN, space)
        layer = space["Own"]() if name == "Own" else l2l.nn.Lambda(space[name])
        if changed == "scale":
            return layer, lambda patch: patch.setitem(space, "scale", 3.0)
        return layer, lambda patch: patch.setattr(space["Settings"], "scale", 3.0)

    return make


MADE = {
    "a parametrized module": parametrized,
    "a call of a module's own": called,
    "another call": given_a_call,
    "a written module": written("Own", "scale"),
    "a written namespace": written("Own", "Settings"),
    "a written function": written("own", "scale"),
    "a written function's namespace": written("own", "Settings"),
}


def network(layer: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
    return nn.Sequential(nn.Conv2d(1, 3, 3), layer, *end).double()


def meta_gradient(model: nn.Module) -> list[Tensor]:
    """The loss after a textbook's inner step, and its derivatives."""
    x = torch.randn(4, 1, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 1, 0])
    weights: dict[str, Any] = dict(model.named_parameters())
    fast = moved(F.cross_entropy(model(x), y), weights, 0.5)
    loss = F.cross_entropy(mf.reference.functional_call(model, fast, (x,)), y)
    return [loss, *torch.autograd.grad(loss, list(weights.values()))]


@pytest.mark.parametrize("name", MADE)
def test_what_such_code_names_is_followed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, change = MADE[name]()
    plain = network(layer)
    ours = mf.accelerate(copy.deepcopy(plain))
    before = meta_gradient(plain)
    for _ in range(2):
        assert_close(meta_gradient(ours), before, rtol=1e-10, atol=1e-12)
    assert "one operation" in mf.acceleration(ours)
    change(monkeypatch)
    after = meta_gradient(plain)
    assert abs(after[0] - before[0]) > 1e-3
    assert_close(meta_gradient(ours), after, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["a parametrized module", "a written module", "a call of a module's own"])
def test_by_a_learner(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, change = MADE[name]()
    x = torch.randn(1, 4, 1, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([[0, 1, 1, 0]])
    batch, config = mf.EpisodeBatch(x, y, x, y), mf.MAMLConfig.maml(steps=1, inner_lr=0.5)
    learner = mf.MAMLPlusPlus(network(layer), config, precision="float64")
    for _ in range(2):
        assert_close(learner.meta_gradient(batch).loss, meta_gradient(learner.model)[0].detach())
    assert learner.engine.name == "fused"
    change(monkeypatch)
    assert_close(learner.meta_gradient(batch).loss, meta_gradient(learner.model)[0].detach())


def test_the_address_of_what_is_gone_is_not_another_s_form() -> None:
    class Own(nn.Module):
        pass

    def forms(change: Callable[[int], nn.Module]) -> list[Any]:
        found = []
        for i in range(6):
            gc.collect()
            found.append(form_of(change(i)))
        return found

    def another_forward(i: int) -> nn.Module:
        Own.forward = None  # type: ignore[assignment]
        gc.collect()
        Own.forward = eval(f"lambda self, x: x * {i}")  # type: ignore[method-assign]
        return nn.Sequential(Own())

    def another_class(_: int) -> nn.Module:
        return nn.Sequential(type("Own", (nn.Module,), {"forward": F.relu, "__module__": __name__})())

    for change in (another_forward, another_class):
        found = forms(change)
        assert not any(a == b for i, a in enumerate(found) for b in found[:i])


def test_a_name_alone_makes_no_library() -> None:
    borrowed = type("Conv2d", (nn.Conv2d,), {"__module__": nn.Conv2d.__module__})
    space: dict[str, Any] = {"__name__": "torch.nn.functional"}
    exec("def act(x): return x * 2", space)
    assert not of_library(borrowed) and written_in(borrowed) == "" == written_in(space["act"])
    assert all(
        map(of_library, (nn.Conv2d, nn.LSTM, mf.Conv4, l2l.vision.models.OmniglotCNN, type(len), dict))
    )
    assert of_library(type(mf.accelerate(nn.Sequential(nn.ReLU()))))
    assert written_in(F.relu) == "torch.nn.functional"
    for layer in (borrowed(1, 1, 1), l2l.nn.Lambda(space["act"])):
        assert Glance.of(fingerprint._fingerprint(layer, (), form=True), layer) is None


def test_a_traced_model_can_be_traced_anew() -> None:
    ours = mf.accelerate(fx.symbolic_trace(nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())))
    x = torch.randn(2, 1, 5, 5)
    assert (ours(x) >= 0).all() and "torch.fx" in mf.acceleration(ours)
    last = next(node for node in ours.graph.nodes if node.op == "call_module" and node.target == "1")
    last.replace_all_uses_with(last.args[0])
    ours.graph.erase_node(last)
    ours.recompile()
    assert torch.equal(ours(x), F.conv2d(x, *ours.parameters()))
