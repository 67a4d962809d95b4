"""`mf.accelerate`: in what order autograd comes to the passes of a call, and how often each is made."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_accelerate import CLOSE, Make, conv_net, data, mlp, pair, served, textbook
from torch import Tensor, nn

from mamlpp_fast import routes as module
from mamlpp_fast.engine import lanes
from mamlpp_fast.engine.fused.differentiable import DifferentiableNetwork
from mamlpp_fast.engine.fused.sections import Place

pytestmark = pytest.mark.usefixtures("nothing_accelerated")


@pytest.mark.parametrize("second_order", [True, False])
def test_each_pass_is_made_once(monkeypatch: pytest.MonkeyPatch, second_order: bool) -> None:
    """Two tasks of three inner steps and a target: eight forwards and eight backwards, six second halves."""
    _, fast = pair(conv_net)
    textbook(fast, second_order=second_order)
    made = dict.fromkeys(("load", "direct", "second"), 0)
    for name in made:
        whole = getattr(DifferentiableNetwork, name)

        def counted(
            self: DifferentiableNetwork, *args: object, name: str = name, whole: object = whole
        ) -> object:
            made[name] += 1
            return whole(self, *args)  # type: ignore[operator]

        monkeypatch.setattr(DifferentiableNetwork, name, counted)
    textbook(fast, second_order=second_order)
    assert made == {"load": 8, "direct": 6 * second_order, "second": 6 * second_order}


def grads_of(y: Tensor, model: nn.Module, **options: bool) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, list(model.parameters()), create_graph=True, **options)


def norm(grads: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([g.square().sum() for g in grads]).sum()


def linear(model: nn.Module, x: Tensor) -> list[Tensor]:
    """A loss that is linear in the output: its gradient does not move."""
    return list(grads_of(norm(grads_of(model(x)[:, 0].sum(), model)), model, allow_unused=True))


def twice(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The graph is kept, and passed through again."""
    total = norm(grads_of(model(x).square().sum(), model))
    first = torch.autograd.grad(total, list(model.parameters()), retain_graph=True)
    return [*first, *torch.autograd.grad(total, list(model.parameters()))]


def two_of_one(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Two backward passes of one forward, both differentiated."""
    y = model(x)
    one, two = grads_of(y.square().sum(), model), grads_of(y.sin().sum(), model)
    total = norm(one) + 3 * norm(two) + y.exp().mean()
    return list(torch.autograd.grad(total, list(model.parameters())))


def one_thrown_away(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    grads_of(y.square().sum(), model)
    return list(torch.autograd.grad(norm(grads_of(y.sin().sum(), model)), list(model.parameters())))


def in_place(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output is changed in place."""
    y = model(x).mul_(2)
    return list(torch.autograd.grad(norm(grads_of(y.square().sum(), model)), list(model.parameters())))


def hooked(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Hooks on the output and its gradient change what passes."""
    y = model(x)
    y.retain_grad()
    y.register_hook(lambda g: 1.5 * g)
    grads = grads_of(y.square().sum(), model)
    norm(grads).backward()
    found = [p.grad for p in model.parameters()]
    assert y.grad is not None
    return [y.grad, *(torch.zeros(1) if g is None else g for g in found)]


def the_gradient_alone(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Of what depends on the gradient of the output alone: the forward's node takes no part."""
    y = model(x)
    gy = torch.ones_like(y, requires_grad=True)
    grads = torch.autograd.grad(y, list(model.parameters()), gy, create_graph=True)
    return list(torch.autograd.grad(norm(grads), [gy]))


def freed(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The first graph is freed although a graph of the gradient is made."""
    y = model(x)
    gy = torch.ones_like(y, requires_grad=True)
    parameters = list(model.parameters())
    grads = torch.autograd.grad(y, parameters, gy, create_graph=True, retain_graph=False)
    return [g.detach() for g in grads]


def batched_behind(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    total = norm(grads_of(y.square().sum(), model))
    many = torch.eye(y.numel() + 1, dtype=y.dtype)
    outer = [many[:, 0], many[:, 1:].reshape(-1, *y.shape)]
    found = torch.autograd.grad([total, y], list(model.parameters()), outer, is_grads_batched=True)
    return list(found)


def unbiased() -> nn.Module:
    """Without biases in front of batch statistics, whose gradient is rounding noise in plain PyTorch."""
    model = conv_net()
    model[0].bias = model[4].bias = None
    return model


USES = [
    linear,
    twice,
    two_of_one,
    one_thrown_away,
    in_place,
    hooked,
    the_gradient_alone,
    freed,
    batched_behind,
]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("make", [unbiased, mlp, lambda: mlp(nn.GELU)])
def test_graphs_of_all_kinds(make: Make, use: Callable[[nn.Module, Tensor], list[Tensor]]) -> None:
    plain, fast = pair(make)
    x = data(1)[0][0]
    for _ in range(2):
        for found, expected in zip(use(fast, x), use(plain, x), strict=True):
            # An operation has zeros where plain PyTorch finds that nothing depends on a parameter.
            torch.testing.assert_close(
                found, torch.zeros_like(found) if expected is None else expected, **CLOSE
            )
        plain.zero_grad()
        fast.zero_grad()
    assert served(fast)


def test_an_error_between_the_two_halves_leaves_nothing_behind() -> None:
    plain, fast = pair(conv_net)
    x, y, _, _ = data(1)[0]
    results = []
    for model in (plain, fast):
        made = model(x)
        (handle,) = [made.register_hook(_raise)]
        handle.remove()
        grads = grads_of(F.cross_entropy(made, y), model)
        total = norm(grads)
        handle = made.register_hook(_raise)
        with pytest.raises(ZeroDivisionError):
            total.backward(retain_graph=True)
        handle.remove()
        model.zero_grad()
        results.append(
            torch.autograd.grad(F.cross_entropy(made, y), list(model.parameters()), retain_graph=True)
        )
        results.append(torch.autograd.grad(total, list(model.parameters())))
    torch.testing.assert_close(results[2:], results[:2], **CLOSE)


def _raise(g: Tensor) -> Tensor:
    raise ZeroDivisionError


def places() -> list[Place]:
    (route,) = (r for r in module.kept.values() if isinstance(r, DifferentiableNetwork))
    found = [place for free in route.sections.free.values() for place in free]
    assert len(found) == route.sections.lanes
    return found


def passages() -> int:
    """How many of them share what is passing with none."""
    return len({id(place._passage) for place in places()})


@pytest.mark.usefixtures("poisoned_memory")
def test_what_is_passing_has_one_place_while_halves_follow_each_other() -> None:
    plain, fast = pair(conv_net)
    for _ in range(2):
        found, expected = (textbook(model, multi_step=True) for model in (fast, plain))
        torch.testing.assert_close(found, expected, **CLOSE)
    assert len(places()) > 4 and passages() == 1


@pytest.mark.usefixtures("poisoned_memory")
def test_a_half_that_comes_in_between_has_memory_of_its_own() -> None:
    """Both backward passes are differentiated before the first forward's node is come to."""
    plain, fast = pair(unbiased)
    x = data(1)[0][0]

    def both(model: nn.Module) -> list[Tensor]:
        made = [model(x), model(x.flip(0) * 2)]
        grads = [grads_of(y.square().sum(), model) for y in made]
        total = norm(grads[0]) + 2 * norm(grads[1]) + made[0].exp().mean()
        return list(torch.autograd.grad(total, list(model.parameters())))

    for _ in range(3):
        torch.testing.assert_close(both(fast), both(plain), **CLOSE)
    assert len(places()) == passages() == 2  # and no more by the third time
    textbook(fast, steps=1)
    assert not any(place._passage.taken.locked() for place in places())


@pytest.mark.usefixtures("poisoned_memory")
def test_lanes_have_passages_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = pair(conv_net)
    expected = textbook(plain)
    textbook(copy.deepcopy(fast))
    monkeypatch.setattr(lanes, "here", lambda: False)
    found: dict[int, list[Tensor]] = {}
    tasks = data()  # here: lanes would draw from one generator

    def work(lane: int, halt: object) -> None:
        with torch.enable_grad():
            found[lane] = textbook(models[lane], tasks)

    for _ in range(2):
        models = [copy.deepcopy(fast) for _ in range(2)]
        lanes.run(work, 2)
        torch.testing.assert_close(found, {0: expected, 1: expected}, **CLOSE)
    assert {place.number for place in places()} == {0, 1} and passages() == 2


def test_places_are_free_when_the_graph_is_gone() -> None:
    _, fast = pair(conv_net)
    x = data(1)[0][0]
    for use in USES:
        use(fast, x)
    assert all(place.pending is None and not place._passage.taken.locked() for place in places())
