"""`mf.accelerate` at its edges: other ways to differentiate, and models that hold more than parameters."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from test_accelerate import CLOSE, WAYS, Make, Use, conv_net, data, mlp, pair, same, served
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import mamlpp_fast as mf
import mamlpp_fast.compat.learn2learn as l2l
from mamlpp_fast import routes as module

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
def test_other_ways_to_differentiate(make: Make, use: Use) -> None:
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
    (route,) = module.kept.values()
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
    before = len(module.kept)
    torch.testing.assert_close(fast(x), plain(x), **CLOSE)
    assert before == 1 and len(module.kept) == 2 and served(fast)


class Counted(Beside):
    """Counts its calls, so that each finds it in another form."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


def _noted(monkeypatch: pytest.MonkeyPatch, what: Callable[[], int] = lambda: 1) -> list[int]:
    """Grows by ``what()`` with each program that is tried from now on."""
    found: list[int] = []
    made = module._made
    monkeypatch.setattr(module, "_made", lambda *given: found.append(what()) or made(*given))
    return found


def test_a_model_that_changes_at_each_call_is_not_recorded_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = pair(lambda: Counted("plain"))
    x = data(1)[0][0]
    tries = _noted(monkeypatch)
    for _ in range(40):
        torch.testing.assert_close(fast(x), plain(x), **CLOSE)
    assert len(tries) == module._TRIES and "changes attributes" in mf.acceleration(fast)
    torch.testing.assert_close(copy.deepcopy(fast)(x), copy.deepcopy(plain)(x), **CLOSE)


def test_what_a_forward_sets_of_its_class_the_users_class_has() -> None:
    class Written(Beside):
        calls = 0
        latest: Tensor

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            if hasattr(type(self), "latest"):
                del type(self).latest
            self.__class__.latest = super().forward(x) * type(self).calls
            return self.latest

    x = data(1)[0][0]
    results = []
    for accelerated in (False, True):
        torch.manual_seed(0)
        model = Written("plain").double()
        Written.calls = 0
        cls = type(mf.accelerate(model) if accelerated else model)
        results.append(torch.stack([model(x).detach() for _ in range(6)]))
        assert Written.calls == cls.calls == 6 and cls.latest is Written.latest
        cls.calls = 9
        assert Written.calls == 9
        del cls.latest
        assert not hasattr(Written, "latest")
    torch.testing.assert_close(results[1], results[0], **CLOSE)


class Annealed(Beside):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def test_programs_that_serve_few_calls_are_written_less_and_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attribute that is another one at each call makes a form of each, which is right but slow."""
    plain, fast = pair(lambda: Annealed("plain"))
    x = data(1)[0][0]
    written = _noted(monkeypatch, lambda: call)
    for call in range(80):
        plain.scale = fast.scale = 1 + call / 8
        torch.testing.assert_close(fast(x), plain(x), **CLOSE)
    assert written == [*range(module._FREE)]
    plain.scale = fast.scale = 1.0
    for _ in range(module._CALLS):  # a form that is there
        fast(x)
    for call in (80, 81):
        plain.scale = fast.scale = 1 + call / 8
        torch.testing.assert_close(fast(x), plain(x), **CLOSE)
    assert written == [*range(module._FREE), 80]


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


QUESTIONS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "is_contiguous": lambda model, x: x.is_contiguous(),
    "stride": lambda model, x: x.stride(2) < x.stride(3),
    "storage_offset": lambda model, x: x.storage_offset(),
    "_version": lambda model, x: x._version,
    "is_leaf": lambda model, x: next(model.parameters()).is_leaf,
    "grad_fn": lambda model, x: next(model.parameters()).grad_fn is None,
    "grad": lambda model, x: next(model.parameters()).grad is None,
    "_backward_hooks": lambda model, x: next(model.parameters())._backward_hooks is None,
    "requires_grad": lambda model, x: all(p.requires_grad for p in model.parameters()),
}


class Asks(Beside):
    def __init__(self, question: str) -> None:
        super().__init__("plain")
        self.question = question

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        return h * 3 if QUESTIONS[self.question](self, x) else h


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("question", QUESTIONS)
def test_what_differs_from_call_to_call_may_be_asked(question: str) -> None:
    """Of tensors of the same shapes and types: of another layout, memory, graph, with hooks and gradients or none."""
    plain, fast = pair(lambda: Asks(question))
    x = data(1)[0][0]
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    behind = torch.cat([x, x])[len(x) :].mul_(1)
    found = []
    for given in (x, transposed, behind):
        torch.testing.assert_close(fast(given), plain(given), **CLOSE)
        found.append(plain(given))
    weights = {n: p * 1 for n, p in plain.named_parameters()}
    held = [mf.reference.functional_call(model, weights, (x,)) for model in (plain, fast)]
    torch.testing.assert_close(held[1], held[0], **CLOSE)
    for model in (plain, fast):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.zeros_like(p)
            p.register_hook(torch.Tensor.clone)
            p.requires_grad_(i > 0)
    torch.testing.assert_close(fast(x), plain(x), **CLOSE)
    assert any(not torch.allclose(y, found[0]) for y in (*found, held[0], plain(x)))
    assert question in mf.acceleration(fast) or "which tensors take a gradient" in mf.acceleration(fast)


class Fills(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, WAYS, 3, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3)) * torch.full((WAYS,), 2.0)


def test_what_a_forward_makes_is_of_the_type_that_is_the_default_at_the_call() -> None:
    plain, x = Fills(), data(1)[0][0].float()
    fast, before = mf.accelerate(copy.deepcopy(plain)), torch.get_default_dtype()
    for default in (torch.float32, torch.float64, torch.float32):
        torch.set_default_dtype(default)
        try:
            ours, expected = fast(x), plain(x)
        finally:
            torch.set_default_dtype(before)
        assert ours.dtype is expected.dtype is default
        torch.testing.assert_close(ours, expected)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@pytest.mark.parametrize("before", [True, False])
def test_parametrizations_come_and_go(before: bool) -> None:
    plain, x = Beside("plain").double(), data(1)[0][0]
    if before:
        parametrize.register_parametrization(plain, "weight", Doubled())
    fast = mf.accelerate(copy.deepcopy(plain))
    other = mf.accelerate(copy.deepcopy(fast))
    torch.testing.assert_close(fast(x), plain(x), **CLOSE)
    if not before:
        for model in (plain, fast, other):
            parametrize.register_parametrization(model, "weight", Doubled())
        fast = mf.accelerate(fast)
        torch.testing.assert_close(fast(x), plain(x), **CLOSE)
    assert "one operation" in mf.acceleration(fast)
    kept = plain.weight.detach().clone()
    for model in (plain, fast):
        parametrize.remove_parametrizations(model, "weight")
    assert torch.equal(fast.weight, kept) and type(fast).__mro__[1] is Beside
    torch.testing.assert_close(fast(x), plain(x), **CLOSE)
    if before:  # of a class that is no longer what it was
        again = Beside("plain").double()
        parametrize.register_parametrization(again, "weight", Doubled())
        torch.testing.assert_close(mf.accelerate(copy.deepcopy(again))(x), again(x), **CLOSE)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_model_whose_shapes_the_first_call_tells() -> None:
    x, found = data(1)[0][0], []
    for accelerated in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.LazyConv2d(3, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(WAYS))
        model = mf.accelerate(model) if accelerated else model
        found.append([model(x.float()), model(x.float()), *model.state_dict().values()])
    torch.testing.assert_close(found[1], found[0])
    assert "one operation" in mf.acceleration(model)


class Functional(nn.Module):
    """As code for MAML of old: weights in one list, and running statistics that are no buffers."""

    def __init__(self, statistics: str = "parameters", listed: bool = True) -> None:
        super().__init__()
        features = (
            3 if statistics == "parameters" else 1100
        )  # more than a look at a model reads the values of
        weights = torch.randn(features, 64), torch.ones(features), torch.zeros(features)
        self.vars = nn.ParameterList([*weights, torch.randn(WAYS, features)])
        self.mean, self.var = torch.zeros(2, features, dtype=torch.float64)
        self.var += 1
        if statistics == "parameters":
            self.mean, self.var = (nn.Parameter(t, requires_grad=False) for t in (self.mean, self.var))
        self.listed = listed

    def parameters(self, recurse: bool = True) -> Any:
        return self.vars if self.listed else super().parameters(recurse)

    def forward(self, x: Tensor, vars: Any = None) -> Tensor:
        first, gain, shift, last = self.vars if vars is None else vars
        h = F.batch_norm(F.linear(x.flatten(1), first), self.mean, self.var, gain, shift, True)
        return F.linear(h.tanh(), last)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("statistics", ["parameters", "attributes"])
@pytest.mark.parametrize("way", ["accelerate", "functional_call", "clone"])
def test_running_statistics_that_are_no_buffers(way: str, statistics: str, listed: bool) -> None:
    """They move as often as the model is called; and ``parameters()`` may be a list."""
    torch.manual_seed(0)
    plain = Functional(statistics, listed).double()
    fast = copy.deepcopy(plain)
    if way == "accelerate":
        mf.accelerate(fast)
    for x, y, target, _ in data(3):
        found = []
        for model in (plain, fast):
            call: Any = model
            if model is fast and way == "functional_call":
                call = lambda x: mf.functional_call(fast, {}, x)  # noqa: E731
            elif model is fast and way == "clone":
                call = l2l.algorithms.MAML(fast, 0.1).clone()
            own = list(plain.vars if model is plain else fast.vars)
            grads = torch.autograd.grad(F.cross_entropy(call(x), y), own, create_graph=True)
            curved = torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), own)
            found.append([*grads, *curved, call(target)])
            if way != "clone" or statistics == "attributes":  # a clone has parameters of its own
                found[-1] += [model.mean.clone(), model.var.clone()]
        torch.testing.assert_close(found[1], found[0], **CLOSE)
