"""`mf.accelerate`: a model in loops of one's own, against the same model in plain PyTorch, in float64."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import moved
from torch import Tensor, nn

import mamlpp_fast as mf
from mamlpp_fast import routes as module
from mamlpp_fast.compat import learn2learn as l2l

WAYS = 3
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
Make = Callable[[], nn.Module]
Use = Callable[[nn.Module, Tensor], Tensor]


def conv_net(slope: float = 0.0, **norm: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6, **norm),
        nn.LeakyReLU(slope),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 5, 3, padding=1),
        nn.BatchNorm2d(5, **norm),
        nn.LeakyReLU(slope),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(20, WAYS),
    )


def mlp(activation: Make = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7), activation(), nn.LayerNorm(7), nn.Linear(7, WAYS))


class Scaled(nn.Module):
    """Own parameters, an attribute that decides, a buffer that is read, a branch on ``self.training``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 6)
        self.gain = nn.Parameter(torch.tensor([0.7, 1.3, 0.9, 1.1, 0.2, 2.0]))
        self.register_buffer("shift", torch.linspace(-1, 1, 6))
        self.last = nn.Linear(6, WAYS)
        self.power = 2.0

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x.flatten(1))) * self.gain + self.shift
        if self.training:
            h = h * self.power
        return self.last(h)


MODELS: dict[str, Make] = {
    "conv": conv_net,
    "leaky": lambda: conv_net(slope=0.2),
    "no statistics": lambda: conv_net(track_running_stats=False),
    "momentum": lambda: conv_net(momentum=0.3),
    "colours and padding": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(144, WAYS),
    ),
    "mlp": mlp,
    "gelu": lambda: mlp(nn.GELU),
    "own parameters": Scaled,
}  # fmt: skip


def data(tasks: int = 2, images: int = 6) -> list[tuple[Tensor, ...]]:
    torch.manual_seed(3)
    made = []
    for _ in range(tasks):
        x = torch.randn(2, images, 1, 8, 8, dtype=torch.float64)
        y = torch.arange(images) % WAYS
        made.append((x[0], y, x[1], y.flip(0)))
    return made


def pair(make: Make) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = make().double()
    return plain, mf.accelerate(copy.deepcopy(plain))


def same(make: Make, use: Use) -> None:
    """Asserts that a use of an accelerated model leaves what it leaves of a plain one."""
    plain, fast = pair(make)
    x = data(1)[0][0]
    torch.testing.assert_close(use(fast, x), use(plain, x), **CLOSE)
    for found, expected in zip(fast.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def served(model: nn.Module) -> bool:
    return "one operation" in mf.acceleration(model) and "plain PyTorch" not in mf.acceleration(model)


pytestmark = pytest.mark.usefixtures("nothing_accelerated")


def textbook(
    model: nn.Module,
    tasks: list[tuple[Tensor, ...]] | None = None,
    *,
    second_order: bool = True,
    multi_step: bool = False,
    steps: int = 3,
) -> list[Tensor]:
    """Losses, meta-gradients and buffers of MAML as a textbook writes it."""
    own = dict(model.named_parameters())
    losses = []
    for x, y, target_x, target_y in data() if tasks is None else tasks:
        fast, total = dict(own), torch.zeros((), dtype=torch.float64)
        for k in range(steps):
            loss = F.cross_entropy(torch.func.functional_call(model, fast, (x,)), y)
            fast = moved(loss, fast, 0.1, second_order)
            if multi_step or k == steps - 1:
                total = total + F.cross_entropy(
                    torch.func.functional_call(model, fast, (target_x,)), target_y
                )
        total.backward()
        losses.append(total.detach())
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in own.values()]
    return [*losses, *grads, *(b.double() for b in model.buffers())]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"second_order": False}, {"multi_step": True}], ids=str)
def test_a_textbook_loop_gets_what_it_got(name: str, options: dict[str, bool]) -> None:
    plain, fast = pair(MODELS[name])
    for found, expected in zip(textbook(fast, **options), textbook(plain, **options), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)
    assert served(fast), mf.acceleration(fast)


def test_float32_stays_as_near_to_float64_as_pytorch() -> None:
    exact, _ = pair(conv_net)
    plain, fast = copy.deepcopy(exact).float(), mf.accelerate(copy.deepcopy(exact).float())
    x, y, _, _ = data(1, 12)[0]

    def gradient(model: nn.Module, x: Tensor) -> Tensor:
        parameters = list(model.parameters())
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True)
        inner = torch.stack([g.square().sum() for g in grads]).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(inner, parameters)]).double()

    expected = gradient(exact, x)
    own, theirs = (float((gradient(m, x.float()) - expected).norm()) for m in (fast, plain))
    assert served(fast) and own <= 2 * theirs + 1e-6 * float(expected.norm())


@pytest.mark.parametrize("name", ["conv", "gelu", "own parameters"])
def test_gradcheck_twice(name: str) -> None:
    _, model = pair(MODELS[name])
    x = data(1, 4)[0][0]
    names = [n for n, _ in model.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in model.parameters())

    def call(*parameters: Tensor) -> Tensor:
        result: Tensor = mf.reference.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))
        return result

    torch.autograd.gradcheck(call, values, fast_mode=True)
    torch.autograd.gradgradcheck(call, values, fast_mode=True)
    assert served(model)


def test_every_parameter_has_a_gradient_those_that_batch_statistics_take_out_too() -> None:
    _, model = pair(conv_net)
    x, y, _, _ = data(1)[0]
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    assert all(g.shape == p.shape for g, p in zip(grads, model.parameters(), strict=True))
    assert float(grads[1].abs().max()) == 0


def test_a_graph_may_be_gone_through_again_in_any_order() -> None:
    plain, fast = pair(conv_net)
    x, y, other, _ = data(1)[0]

    def several(model: nn.Module) -> list[Tensor]:
        parameters = list(model.parameters())
        first, second = F.cross_entropy(model(x), y), model(other).square().mean()
        a = torch.autograd.grad(first, parameters, create_graph=True)
        b = torch.autograd.grad(second, parameters, create_graph=True)
        c = torch.autograd.grad(2 * first.square(), parameters, create_graph=True)
        outer = [torch.stack([(g * g).sum() for g in found]).sum() for found in (a, b, c)]
        found = [
            torch.autograd.grad(outer[i], parameters, retain_graph=True, allow_unused=True)
            for i in (2, 0, 1, 0)
        ]
        flat = [g for grads in found for g in grads if g is not None]
        return [*a, *b, *c, *flat, *torch.autograd.grad(first, parameters)]

    for found, expected in zip(several(fast), several(plain), strict=False):
        torch.testing.assert_close(found, expected, **CLOSE)
    assert served(fast)


def test_memory_is_used_again() -> None:
    _, model = pair(conv_net)
    textbook(model)
    (route,) = module.kept.values()
    sections = route.sections  # type: ignore[union-attr]
    made = sections.lanes
    for _ in range(3):
        textbook(model)
    assert sections.lanes == made == sum(map(len, sections.free.values()))


@pytest.mark.parametrize("name", ["conv", "gelu", "own parameters"])
def test_a_third_derivative_has_norms_that_are_right_in_it(name: str) -> None:
    def third(model: nn.Module) -> list[Tensor]:
        x, y, _, _ = data(1)[0]
        parameters = list(model.parameters())
        loss = F.cross_entropy(model(x), y)
        for _ in range(3):
            grads = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            loss = torch.stack([g.sin().sum() for g in grads if g is not None]).sum()
        return [loss.detach(), *(b.clone() for b in model.buffers())]

    plain, fast = pair(MODELS[name])
    found = third(fast)
    assert served(fast)
    with mf.reference.norms_of_any_order():
        expected = third(plain)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-11)


def test_a_parameter_changed_in_place_before_the_backward_pass_is_an_error() -> None:
    _, model = pair(mlp)
    x, y, _, _ = data(1)[0]
    loss = F.cross_entropy(model(x), y)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def penalty(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return gx.square().sum()


def through_func(model: nn.Module, x: Tensor) -> Tensor:
    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(model, parameters, (x,)).square().mean()
        return result

    own = {n: p.detach() for n, p in model.named_parameters()}
    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(own, torch.stack([x, 2 * x]))
    return torch.cat([g.flatten() for g in grads.values()])


def autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        result: Tensor = model.float()(x.float())
    return result


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = model.train()(x).detach() + model.eval()(x)
    return result


def unrecorded(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(x)
    return result


@pytest.mark.parametrize(
    ("make", "use"),
    [
        (conv_net, penalty),
        (mlp, through_func),
        (conv_net, autocast),
        (conv_net, evaluated),
        (conv_net, unrecorded),
        (lambda: nn.Sequential(mlp(), nn.Dropout(0.5)), lambda model, x: torch.manual_seed(1) and model(x)),
        (mlp, lambda model, x: model(input=x)),
    ],
)
def test_what_is_not_served_runs_as_ever(make: Make, use: Use) -> None:
    same(make, use)


def test_what_changes_in_the_model_is_seen() -> None:
    plain, fast = pair(Scaled)
    x = data(1)[0][0]
    calls: list[int] = []

    def check() -> None:
        torch.testing.assert_close(fast(x), plain(x), **CLOSE)

    check()
    for model in (plain, fast):
        model.power = -1.5  # type: ignore[assignment]
    check()
    for model in (plain, fast):
        model.eval()
    check()
    for model in (plain, fast):
        model.shift.mul_(3)  # type: ignore[operator]
        model.last = nn.Sequential(model.last, nn.Softplus())  # type: ignore[arg-type]
    check()
    fast.first.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    check()
    assert calls == [1] and "has a forward hook" in mf.acceleration(fast)


def test_reasons_are_named() -> None:
    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(64, WAYS)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.last(x.flatten(1))
            return h if h.sum() > 0 else -h

    assert mf.acceleration(mlp()).startswith("not accelerated")
    plain, fast = pair(Deciding)
    x = data(1)[0][0]
    assert mf.acceleration(fast) == "no call yet"
    torch.testing.assert_close(fast(x), plain(x), **CLOSE)
    assert "plain PyTorch: Deciding" in mf.acceleration(fast) or "decide" in mf.acceleration(fast)


def test_a_wrong_rule_is_found_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from mamlpp_fast.engine.fused.steps import Bias

    backward = Bias.backward_tangent

    def wrong(self: Bias, em: Any, ps: Any, gy: Any, gy_dot: Any, out: Any) -> None:
        backward(self, em, ps, gy, gy_dot, out)
        for place in out.params.values():
            em.call(torch.ops.aten.add_.Tensor, place, em.constant(0.01))

    monkeypatch.setattr(Bias, "backward_tangent", wrong)
    plain, fast = pair(
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, WAYS))
    )
    x = data(1)[0][0]
    torch.testing.assert_close(fast(x), plain(x), **CLOSE)
    assert "second order: differs, by" in mf.acceleration(fast)


def test_the_model_stays_itself() -> None:
    torch.manual_seed(0)
    model = Scaled().double()
    before, state = type(model), {k: v.clone() for k, v in model.state_dict().items()}
    assert mf.accelerate(model) is model and mf.accelerate(model) is model
    assert isinstance(model, before) and type(model).__name__ == "Scaled"
    assert list(model.state_dict()) == list(state)
    x = data(1)[0][0]
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    assert served(model) and len(module.kept) == 1  # copies share what was prepared


def test_frozen_and_permuted_parameters() -> None:
    def make() -> nn.Module:
        model = conv_net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model[4].weight.requires_grad_(False)
        model[9].weight = nn.Parameter(model[9].weight.detach().t().contiguous().t())
        assert isinstance(model, nn.Module)
        return model

    results = []
    for model in pair(make):
        x, y, _, _ = data(1)[0]
        F.cross_entropy(model(x), y).backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    assert served(model)
    torch.testing.assert_close(results[1], results[0], **CLOSE)
    for p in model.parameters():
        if p.grad is not None:  # as an optimizer that pairs memory needs it
            assert all(a == b for n, a, b in zip(p.shape, p.grad.stride(), p.stride(), strict=True) if n > 1)


def test_a_learner_and_learn2learn_take_it_as_the_model_it_is() -> None:
    plain, fast = pair(conv_net)
    x, y, target_x, target_y = data(1)[0]
    found = []
    for model in (plain, fast):
        maml = l2l.algorithms.MAML(copy.deepcopy(model), lr=0.1)
        learner = maml.clone()
        for _ in range(2):
            learner.adapt(F.cross_entropy(learner(x), y))
        F.cross_entropy(learner(target_x), target_y).backward()
        config = mf.MAMLConfig(steps=2, inner_lr=0.1)
        own = mf.MAMLPlusPlus(copy.deepcopy(model), config, precision="float64", device="cpu")
        batch = mf.EpisodeBatch(*(t[None] for t in (x, y, target_x, target_y)))
        metrics = own.meta_gradient(batch)
        found.append(([p.grad for p in maml.parameters()], metrics.loss))
        assert served(learner.module), mf.acceleration(learner.module)  # clones always are
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def test_threads() -> None:
    plain, fast = pair(conv_net)
    tasks = data()
    expected = textbook(plain, tasks)
    results: list[list[Tensor]] = []

    def work(model: nn.Module) -> None:
        results.append(textbook(model, tasks))

    threads = [threading.Thread(target=work, args=(copy.deepcopy(fast),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    for found in results:
        torch.testing.assert_close(found, expected, **CLOSE)
