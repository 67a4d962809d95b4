"""An inner step on the loss of one call as one node, against nested autograd of plain PyTorch, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_accelerate import CLOSE, conv_net, data, pair
from torch import Tensor, nn

from mamlpp_fast.compat.learn2learn import plain_batch_norm
from mamlpp_fast.compat.learn2learn.algorithms import MAML, maml
from mamlpp_fast.engine.fused.inner_step import steps_of_loss

RATE = 0.1
pytestmark = pytest.mark.usefixtures("nothing_accelerated")


def unpooled() -> nn.Sequential:
    """Steps of other kinds, a tensor among the parameters that has no axis, and a bias that norms take out."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(36, 5), nn.PReLU(),
        nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3),
    )  # fmt: skip


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each update whether it was one node."""
    found: list[bool] = []

    def noted(*args: Any) -> Any:
        made = steps_of_loss(*args)
        found.append(made is not None)
        return made

    monkeypatch.setattr(maml, "steps_of_loss", noted)
    return found


Loop = Callable[[MAML, list[tuple[Tensor, ...]]], list[Tensor]]


def adapted(learner: MAML, x: Tensor, y: Tensor, steps: int = 3) -> None:
    for _ in range(steps):
        learner.adapt(F.cross_entropy(learner(x), y))


def each_task(model: MAML, tasks: list[tuple[Tensor, ...]]) -> list[Tensor]:
    for x, y, target_x, target_y in tasks:
        learner = model.clone()
        adapted(learner, x, y)
        F.cross_entropy(learner(target_x), target_y).backward()
    return gradients(model)


def together(model: MAML, tasks: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """All tasks in one backward pass, a target loss after every step and on every step's support set."""
    total = torch.zeros((), dtype=torch.float64)
    for x, y, target_x, target_y in tasks:
        learner = model.clone()
        for _ in range(3):
            logits = learner(x)
            learner.adapt(F.cross_entropy(logits, y) * 1.5)
            total = total + F.cross_entropy(learner(target_x), target_y) + logits.square().mean()
    total.backward()
    return [total, *gradients(model)]


def again(model: MAML, tasks: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """The graph is kept and gone through again: by the fast weights of a step, by one of them, by the parameters."""
    (x, y, target_x, target_y), *_ = tasks
    learner = model.clone()
    adapted(learner, x, y, 1)
    fast = list(learner.module.parameters())
    adapted(learner, x, y, 2)
    loss = F.cross_entropy(learner(target_x), target_y)
    ways = (fast, fast[:1], list(learner.module.parameters()), list(model.parameters()))
    return [g for by in ways for g in torch.autograd.grad(loss, by, retain_graph=True)]


def third(model: MAML, tasks: list[tuple[Tensor, ...]]) -> list[Tensor]:
    (x, y, target_x, target_y), *_ = tasks
    learner = model.clone()
    adapted(learner, x, y, 2)
    own = list(model.parameters())
    first = torch.autograd.grad(F.cross_entropy(learner(target_x), target_y), own, create_graph=True)
    total = torch.stack([g.square().sum() for g in first]).sum()
    return [*first, *torch.autograd.grad(total, own)]


def many(model: MAML, tasks: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Many gradients in one."""
    (x, y, target_x, _), *_ = tasks
    learner = model.clone()
    adapted(learner, x, y, 2)
    made = learner(target_x).flatten()
    along = torch.eye(len(made), dtype=made.dtype)
    return list(torch.autograd.grad(made, list(model.parameters()), along, is_grads_batched=True))


def thrown_away(model: MAML, tasks: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """A gradient of the same forward pass is taken before and after the step."""
    (x, y, target_x, target_y), *_ = tasks
    learner = model.clone()
    loss = F.cross_entropy(learner(x), y)
    own = list(learner.module.parameters())
    before = torch.autograd.grad(loss, own, create_graph=True)
    learner.adapt(loss)
    after = torch.autograd.grad(loss, own, create_graph=True)
    total = F.cross_entropy(learner(target_x), target_y)
    for a, b in zip(before, after, strict=True):
        total = total + (a * b).sum()
    total.backward()
    return gradients(model)


def changed_on_the_way(model: MAML, tasks: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Hooks between the loss and the call change the gradient, and logits keep it."""
    (x, y, target_x, target_y), *_ = tasks
    learner = model.clone()
    logits = learner(x)
    logits.register_hook(lambda g: 2 * g)
    logits.retain_grad()
    warmer = logits * 1.5
    warmer.register_hook(lambda g: 3 * g)
    learner.adapt(F.cross_entropy(warmer, y))
    F.cross_entropy(learner(target_x), target_y).backward()
    assert logits.grad is not None
    return [logits.grad, *gradients(model)]


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


@pytest.mark.parametrize("loop", [each_task, together, again, third, many, thrown_away, changed_on_the_way])
@pytest.mark.parametrize("make", [conv_net, unpooled])
@pytest.mark.usefixtures("poisoned_memory")
def test_a_loop_gets_what_it_got(make: Callable[[], nn.Module], loop: Loop, taken: list[bool]) -> None:
    if make is unpooled and loop is many:
        pytest.skip("PyTorch's own batch norm of features takes no batch of gradients")
    plain, fast = pair(make)
    found = loop(MAML(fast, lr=RATE), data())
    assert taken and all(taken)
    with plain_batch_norm():  # nothing of ours is in it
        expected = loop(MAML(plain, lr=RATE), data())
    torch.testing.assert_close(found, expected, **CLOSE)
    for one, other in zip(fast.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def call(change: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> Any:
    """A loss on a fast model and its parameters."""
    _, fast = pair(conv_net)
    x, y, *_ = data(1)[0]
    fast(x)
    return change(fast, x, y), list(fast.parameters())


def plainly(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def changed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = plainly(model, x, y)
    with torch.no_grad():
        model[0].weight.mul_(2)
    return loss


def noted(note: Callable[[Any], object]) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """Something is done with the node of the call's result."""

    def change(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = model(x)
        note(logits.grad_fn)
        return F.cross_entropy(logits, y)

    return change


OTHERS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "scaled by a leaf": lambda m, x, y: plainly(m, x, y) * torch.ones((), dtype=x.dtype, requires_grad=True),
    "penalised": lambda m, x, y: plainly(m, x, y) + sum(p.square().sum() for p in m.parameters()),
    "two calls": lambda m, x, y: plainly(m, x, y) + plainly(m, x + 1, y),
    "by the examples": lambda m, x, y: plainly(m, x.requires_grad_(), y),
    "frozen": lambda m, x, y: m[0].weight.requires_grad_(False) is None or plainly(m, x, y),
    "listened to": lambda m, x, y: m[0].weight.register_hook(lambda g: 2 * g) and plainly(m, x, y),
    "a node listened to": noted(lambda node: node.register_hook(lambda inputs, outputs: None)),
    "a node listened to before": noted(lambda node: node.register_prehook(lambda outputs: None)),
    "changed": changed,
    "freed": lambda m, x, y: (loss := plainly(m, x, y)).backward() or loss,
    "of many": lambda m, x, y: m(x)[:, :1].square().sum(0),
}


def test_what_is_no_loss_of_one_call_alone_is_for_autograd() -> None:
    loss, own = call(plainly)
    assert steps_of_loss(loss, own, RATE) is not None
    assert steps_of_loss(loss, own[1:], RATE) is None  # a head alone, say
    assert steps_of_loss(loss, [*own[1:], torch.ones(1, requires_grad=True)], RATE) is None
    assert steps_of_loss(loss.detach(), own, RATE) is None
    with torch.no_grad():
        assert steps_of_loss(loss, own, RATE) is None
    for name, other in OTHERS.items():
        assert steps_of_loss(*call(other), RATE) is None, name


def retained(model: MAML) -> list[Tensor]:
    """Fast weights that keep their gradient, or change it on its way, the inner one too."""
    x, y, target_x, target_y = data(1)[0]
    learner = model.clone()
    weight, bias = learner.module[0].weight, learner.module[-1].bias
    weight.retain_grad()
    bias.register_hook(lambda g: 3 * g)
    adapted(learner, x, y, 2)
    F.cross_entropy(learner(target_x), target_y).backward()
    return [weight.grad, *gradients(model)]


def test_those_who_listen_to_parameters_hear_the_inner_gradient() -> None:
    plain, fast = pair(conv_net)
    found = retained(MAML(fast, lr=RATE))
    with plain_batch_norm():
        torch.testing.assert_close(found, retained(MAML(plain, lr=RATE)), **CLOSE)


def test_a_long_way_to_the_call_is_not_followed() -> None:
    def long(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        loss = plainly(model, x, y)
        for _ in range(100):
            loss = loss * 1.0
        return loss

    assert steps_of_loss(*call(long), RATE) is None
