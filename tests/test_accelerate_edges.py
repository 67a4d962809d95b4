"""`mf.accelerate` at its edges: other ways to differentiate, and models that hold more than parameters."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from test_accelerate import CLOSE, WAYS, conv_net, data, mlp, pair, same, served
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import mamlpp_fast as mf
from mamlpp_fast import accelerated as module

pytestmark = pytest.mark.usefixtures("nothing_accelerated")


def in_many(model: nn.Module, x: Tensor) -> Tensor:
    """Many gradients of one result at once."""
    y = model(x).flatten()
    every = torch.eye(len(y), dtype=y.dtype)
    grads = torch.autograd.grad(y, list(model.parameters()), every, is_grads_batched=True)
    return torch.cat([g.flatten() for g in grads])


def curved(model: nn.Module, x: Tensor) -> Tensor:
    """All second derivatives, by `vmap` over the rows."""
    own = dict(model.named_parameters())

    def loss(*values: Tensor) -> Tensor:
        held = dict(zip(own, values, strict=True))
        result: Tensor = torch.func.functional_call(model, held, (x,)).square().mean()
        return result

    given = tuple(p.detach() for p in own.values())
    rows = torch.autograd.functional.hessian(loss, given, vectorize=True)
    return torch.cat([t.flatten() for row in rows for t in row])


def forward_mode(model: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dual = {n: forward_ad.make_dual(p, p.cos()) for n, p in model.named_parameters()}
        moved = forward_ad.unpack_dual(torch.func.functional_call(model, dual, (x,))).tangent
    assert moved is not None
    return moved


def checkpointed(model: nn.Module, x: Tensor) -> Tensor:
    """A second forward pass, whose running statistics count too."""
    result: Tensor = checkpoint(model, x, use_reentrant=False)
    result.square().sum().backward()
    return result


# Forward mode's: a DeprecationWarning in torch 2.13, a FutureWarning in 2.14.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
@pytest.mark.parametrize("make", [conv_net, mlp])
@pytest.mark.parametrize("use", [in_many, curved, forward_mode, checkpointed])
def test_other_ways_to_differentiate(
    make: Callable[[], nn.Module], use: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    same(make, use)


def test_kept_results_keep_no_memory_of_their_passes() -> None:
    _, model = pair(conv_net)
    x, y, _, _ = data(1)[0]
    kept = []
    for _ in range(5):
        loss = F.cross_entropy(model(x), y)
        grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        total = loss + torch.stack([g.square().sum() for g in grads]).sum()
        total.backward()
        kept += [loss, total]
    (route,) = module._routes.values()
    assert isinstance(route, module.DifferentiableNetwork) and route.sections.lanes <= 2


class Beside(nn.Module):
    """Holds more tensors than it differentiates."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 5), nn.Linear(5, WAYS)
        self.gain = torch.ones(5, dtype=torch.float64)
        self.weight = nn.Parameter(torch.linspace(0.5, 1, 5))
        self.register_buffer("shift", torch.ones(5))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.how != "first layer constant"):
            h = self.first(x.flatten(1)).tanh()
        h = h * (self.weight.detach() if self.how == "detached" else self.weight)
        with torch.set_grad_enabled(self.how != "all constant"):
            made: Tensor = self.last(h * self.gain + self.shift)
        return made.detach() if self.how == "all constant" else made


@pytest.mark.parametrize("how", ["detached", "first layer constant", "all constant"])
def test_parameters_without_a_gradient_have_none(how: str) -> None:
    results = []
    for model in pair(lambda: Beside(how)):
        y = model(data(1)[0][0])
        if y.requires_grad:
            y.square().sum().backward()
        results.append((y, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[1][0], results[0][0], **CLOSE)
    assert results[0][0].requires_grad == results[1][0].requires_grad
    for found, expected in zip(results[1][1], results[0][1], strict=True):
        assert (found is None) == (expected is None)
    assert served(model) if how == "detached" else "no gradient" in mf.acceleration(model)


def test_a_model_without_parameters() -> None:
    plain, fast = pair(lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, affine=False)))
    x = data(1)[0][0]
    torch.testing.assert_close(fast(x), plain(x), **CLOSE)
    assert "expected parameters" in mf.acceleration(fast)


@pytest.mark.parametrize("name", ["gain", "shift"])
def test_gradients_reach_attributes_and_buffers(name: str) -> None:
    results = []
    for model in pair(lambda: Beside("plain")):
        x = data(1)[0][0]
        model(x)  # is served, which the next call may not be
        z = torch.linspace(1, 2, 5, dtype=torch.float64, requires_grad=True)
        setattr(model, name, z * 2)
        results.append(torch.autograd.grad(model(x).square().sum(), [z, *model.parameters()]))
    torch.testing.assert_close(results[1], results[0], **CLOSE)
    assert "takes a gradient" in mf.acceleration(model)


SETTINGS = types.SimpleNamespace(scale=1.0)


class Settings:
    scale = 1.0


class Options:
    def __init__(self) -> None:
        self.scale = 1.0


OPTIONS = Options()


def scaled(h: Tensor) -> Tensor:
    return h * SETTINGS.scale


class Configured(nn.Module):
    """Reads what it computes from places that are not its own."""

    table: ClassVar[dict[str, float]] = {"scale": 1.0}

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 5), nn.Linear(5, WAYS)

    def body(self, x: Tensor) -> Tensor:
        return self.first(x.flatten(1)).tanh() * OPTIONS.scale

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.last(scaled(self.body(x)) * self.table["scale"]) * Settings.scale
        return made


@pytest.mark.parametrize("place", [SETTINGS, Settings, OPTIONS, Configured.table, Configured])
def test_settings_elsewhere_are_seen(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = pair(Configured)
    x = data(1)[0][0]
    torch.testing.assert_close(fast(x), plain(x), **CLOSE)
    body = Configured.body
    if isinstance(place, dict):
        monkeypatch.setitem(place, "scale", 2.0)
    elif place is Configured:
        monkeypatch.setattr(place, "body", lambda self, x: body(self, x) - 1)
    else:
        monkeypatch.setattr(place, "scale", 2.0)
    before = len(module._routes)
    torch.testing.assert_close(fast(x), plain(x), **CLOSE)
    assert before == 1 and len(module._routes) == 2 and served(fast)


class Counted(Beside):
    """Counts its calls, so that each finds it in another form."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


def test_a_model_that_changes_at_each_call_is_not_recorded_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = pair(lambda: Counted("plain"))
    x = data(1)[0][0]
    tries: list[int] = []
    made = module._made
    monkeypatch.setattr(module, "_made", lambda *given: tries.append(1) or made(*given))
    for _ in range(40):
        torch.testing.assert_close(fast(x), plain(x), **CLOSE)
    assert len(tries) == module._TRIES and "changes attributes" in mf.acceleration(fast)
    torch.testing.assert_close(copy.deepcopy(fast)(x), copy.deepcopy(plain)(x), **CLOSE)


class Around(Beside):
    def __call__(self, x: Tensor) -> Tensor:
        made: Tensor = super().__call__(x)
        return made * 2


def test_a_call_of_its_own_is_made_once() -> None:
    plain, fast = pair(lambda: Around("plain"))
    x = data(1)[0][0]
    torch.testing.assert_close(fast(x), plain(x), **CLOSE)
    assert "__call__ of its own" in mf.acceleration(fast)


def test_a_forward_that_is_set_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = pair(lambda: Beside("plain"))
    x = data(1)[0][0]
    torch.testing.assert_close(fast(x), plain(x), **CLOSE)
    for forward in (lambda self, x: self.last(self.first(x.flatten(1))), lambda self, x: (self.how, x)):
        monkeypatch.setattr(Beside, "forward", forward)
        torch.testing.assert_close(fast(x)[1], plain(x)[1], **CLOSE)
