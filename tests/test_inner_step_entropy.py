"""Inner steps on a cross entropy, whose derivatives their node has, against plain PyTorch in float64.

What each hands on to the step before it, and who must hear of it all the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_accelerate import CLOSE, conv_net, data, pair
from test_inner_step import RATE, adapted, gradients, unpooled
from torch import Tensor, nn

from mamlpp_fast.compat.learn2learn import plain_batch_norm
from mamlpp_fast.compat.learn2learn.algorithms import MAML
from mamlpp_fast.engine.fused import inner_step
from mamlpp_fast.engine.fused.sections import Place

pytestmark = pytest.mark.usefixtures("nothing_accelerated", "poisoned_memory")

Loop = Callable[[MAML], list[Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


def target_loss(learner: MAML, task: int = 0) -> Tensor:
    _, _, x, y = data()[task]
    return F.cross_entropy(learner(x), y)


ENTROPIES: dict[str, Loss] = {
    "plain": F.cross_entropy,
    "weighted": lambda z, y: F.cross_entropy(z, y, torch.linspace(0.5, 2, z.shape[1], dtype=z.dtype)),
    "summed": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "some labels do not count": lambda z, y: F.cross_entropy(z, y.where(y != 0, -100)),
    "second class": lambda z, y: F.cross_entropy(z, y, ignore_index=1),
    "in two": lambda z, y: F.nll_loss(z.log_softmax(-1), y),
}
OTHERS: dict[str, Loss] = {
    # No probabilities of classes, but the same nodes.
    "over examples": lambda z, y: F.nll_loss(z.log_softmax(0), y),
    "smoothed": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "twice": lambda z, y: 2 * F.cross_entropy(z, y),
}


def by_loss(loss: Loss, model: MAML) -> list[Tensor]:
    x, y, *_ = data()[0]
    learner = model.clone()
    for _ in range(3):
        learner.adapt(loss(learner(x), y))
    target_loss(learner).backward()
    return gradients(model)


def kept(model: MAML) -> list[Tensor]:
    """The graph is gone through twice."""
    x, y, *_ = data()[0]
    learner = model.clone()
    adapted(learner, x, y)
    loss = target_loss(learner)
    loss.backward(retain_graph=True)
    loss.backward()
    return gradients(model)


def penalised(model: MAML) -> list[Tensor]:
    """Fast weights of each step take part in the loss by themselves, biases without a gradient too."""
    x, y, *_ = data()[0]
    learner = model.clone()
    total = torch.zeros((), dtype=torch.float64)
    for _ in range(3):
        adapted(learner, x, y, 1)
        total = total + 0.1 * torch.stack([p.square().sum() for p in learner.parameters()]).sum()
    (total + target_loss(learner)).backward()
    return gradients(model)


def other_count(model: MAML) -> list[Tensor]:
    """The target set is of another size."""
    x, y, target_x, target_y = data()[0]
    learner = model.clone()
    adapted(learner, x, y)
    F.cross_entropy(learner(torch.cat([target_x, target_x + 1])), target_y.repeat(2)).backward()
    return gradients(model)


def in_turn(model: MAML) -> list[Tensor]:
    """Tasks side by side, one step each in turn, and one backward pass."""
    learners = [model.clone() for _ in range(2)]
    for _ in range(3):
        for learner, (x, y, *_) in zip(learners, data(), strict=False):
            adapted(learner, x, y, 1)
    torch.stack([target_loss(learner, i) for i, learner in enumerate(learners)]).sum().backward()
    return gradients(model)


def cloned_between(model: MAML) -> list[Tensor]:
    """Two learners go on from the same step."""
    x, y, *_ = data()[0]
    learner = model.clone()
    adapted(learner, x, y, 2)
    other = learner.clone()
    adapted(other, x + 1, y, 2)
    adapted(learner, x, y, 1)
    (target_loss(learner) + target_loss(other)).backward()
    return gradients(model)


def some_alone(model: MAML) -> list[Tensor]:
    """Gradients of some parameters, and of fast weights on the way."""
    x, y, *_ = data()[0]
    learner = model.clone()
    adapted(learner, x, y, 1)
    fast = list(learner.parameters())
    adapted(learner, x, y, 2)
    loss = target_loss(learner)
    loss.backward(inputs=fast[:2], retain_graph=True)
    loss.backward(inputs=list(model.parameters())[-1:])
    return [t.grad for t in fast[:2]] + [list(model.parameters())[-1].grad]


def by_logits(model: MAML) -> list[Tensor]:
    """Of the target loss, by what steps were made of."""
    x, y, *_ = data()[0]
    learner, made = model.clone(), []
    for _ in range(3):
        logits = learner(x)
        log_p = logits.log_softmax(1)
        made += [logits, log_p]
        learner.adapt(F.nll_loss(log_p, y))
    loss = target_loss(learner)
    found = torch.autograd.grad(loss, made, retain_graph=True)
    made[0].retain_grad()
    loss.backward(inputs=made[:2] + list(model.parameters()))
    return [*found, made[0].grad, *gradients(model)]


def losses_too(model: MAML) -> list[Tensor]:
    """Inner losses are part of the outer one."""
    x, y, *_ = data()[0]
    learner, total = model.clone(), torch.zeros((), dtype=torch.float64)
    for _ in range(3):
        loss = F.cross_entropy(learner(x), y)
        learner.adapt(loss)
        total = total + loss
    (total + target_loss(learner)).backward()
    return gradients(model)


@pytest.mark.parametrize("make", [conv_net, unpooled])
@pytest.mark.parametrize(
    "loop",
    [
        *(pytest.param(functools.partial(by_loss, loss), id=n) for n, loss in (ENTROPIES | OTHERS).items()),
        *(kept, penalised, other_count, in_turn, cloned_between, some_alone, by_logits, losses_too),
    ],
)
def test_a_loop_gets_what_it_got(make: Callable[[], nn.Module], loop: Loop) -> None:
    plain, fast = pair(make)
    for _ in range(2):  # by the places of the first again
        found = loop(MAML(fast, lr=RATE))
        with plain_batch_norm():
            expected = loop(MAML(plain, lr=RATE))
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("name", ENTROPIES | OTHERS)
def test_what_is_a_cross_entropy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []
    entropy = inner_step._entropy

    def noted(*args: Any) -> Any:
        made = entropy(*args)
        found.append(made is not None)
        return made

    monkeypatch.setattr(inner_step, "_entropy", noted)
    by_loss((ENTROPIES | OTHERS)[name], MAML(pair(conv_net)[1], lr=RATE))
    assert found == [name in ENTROPIES] * 3


@pytest.mark.parametrize(
    ("loop", "times"),
    [
        (functools.partial(by_loss, F.cross_entropy), 3),
        (kept, 6),
        (other_count, 2),
        (in_turn, 3),
        (some_alone, 0),
    ],
)
def test_steps_hand_on_what_they_have(loop: Loop, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To each of three by the next, or by the target's call; not to the clone, nor where gradients are taken out.

    Nor where another task's are on their way.
    """
    handed: list[Place] = []
    hand = Place.hand_to

    def noted(self: Place, other: Place) -> None:
        handed.append(other)
        hand(self, other)

    monkeypatch.setattr(Place, "hand_to", noted)
    loop(MAML(pair(conv_net)[1], lr=RATE))
    assert len(handed) == times


Listen = Callable[[dict[str, Any], list[Any]], Any]
"""Begins to listen to what a step was made of, after it; what is heard goes to the list."""


def noted(what: Callable[[dict[str, Any]], Tensor], factor: float) -> Listen:
    """By a hook that multiplies."""

    def listen(step: dict[str, Any], heard: list[Any]) -> None:
        def hook(g: Tensor) -> Tensor:
            heard.append(g.clone())
            return factor * g

        what(step).register_hook(hook)

    return listen


def retained(what: Callable[[dict[str, Any]], Tensor]) -> Listen:
    def listen(step: dict[str, Any], heard: list[Any]) -> None:
        what(step).retain_grad()
        heard.append(what(step))

    return listen


def between(step: dict[str, Any]) -> Any:
    """The node of the log softmax."""
    return step["loss"].grad_fn.next_functions[0][0]


def to_the_weights_node(step: dict[str, Any], heard: list[Any]) -> None:
    """That of all weights where they have one; in PyTorch each has its own, which does the same to one of them."""
    torch.autograd.graph.register_multi_grad_hook(
        step["fast"], lambda grads: heard.extend(torch.zeros(1) if g is None else g.clone() for g in grads)
    )


LISTENERS: dict[str, Listen] = {
    "logits": noted(lambda step: step["logits"], 2),
    "logits gradient": retained(lambda step: step["logits"]),
    "probabilities": noted(lambda step: step["log_p"], 2),
    "loss": noted(lambda step: step["loss"], 2),
    "node between": lambda step, heard: between(step).register_hook(lambda inputs, _: (2 * inputs[0],)),
    "before it": lambda step, heard: between(step).register_prehook(lambda outputs: (2 * outputs[0],)),
    "a weight": noted(lambda step: step["fast"][0], 3),
    "last weight": noted(lambda step: step["fast"][-1], 3),
    "weights gradient": retained(lambda step: step["fast"][-1]),
    "weights node": to_the_weights_node,
}


@pytest.mark.parametrize("also_in_the_loss", [False, True])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("to", LISTENERS)
def test_those_who_listen_hear_what_they_heard(to: str, early: bool, also_in_the_loss: bool) -> None:
    """To the second step of three: before it is made, or not until all are."""
    listen = LISTENERS[to]

    def loop(model: MAML) -> list[Tensor]:
        x, y, *_ = data()[0]
        heard: list[Any] = []
        learner, total, steps = model.clone(), torch.zeros((), dtype=torch.float64), []
        for i in range(3):
            logits = learner(x)
            log_p = logits.log_softmax(1)
            loss = F.nll_loss(log_p, y)
            steps.append({"logits": logits, "log_p": log_p, "loss": loss})
            if early and i == 1 and "weight" not in to:
                listen(steps[1], heard)
            learner.adapt(loss)
            steps[i]["fast"] = list(learner.parameters())
            if early and i == 1 and "weight" in to:
                listen(steps[1], heard)
            total = total + loss * also_in_the_loss
        if not early:
            listen(steps[1], heard)
        (total + target_loss(learner)).backward()
        return [*(t.grad if t.retains_grad else t.detach() for t in heard), *gradients(model)]

    plain, fast = pair(conv_net)
    found = loop(MAML(fast, lr=RATE))
    with plain_batch_norm():
        expected = loop(MAML(plain, lr=RATE))
    torch.testing.assert_close(found, expected, **CLOSE)


def test_hooks_of_the_nodes_themselves_are_given_all_gradients() -> None:
    """Of a step's and of the target's call, which hand theirs on where nobody asks."""
    model = MAML(pair(conv_net)[1], lr=RATE)
    x, y, target_x, target_y = data()[0]
    expected = by_loss(F.cross_entropy, model)
    model.zero_grad()
    learner, given = model.clone(), []

    def note(inputs: tuple[Tensor | None, ...], _: Any) -> None:
        given.append([t for t in inputs if t is not None])

    adapted(learner, x, y, 2)
    node = next(learner.parameters()).grad_fn
    assert node is not None
    node.register_hook(note)
    adapted(learner, x, y, 1)
    logits = learner(target_x)
    logits.grad_fn.register_hook(note)
    F.cross_entropy(logits, target_y).backward()
    torch.testing.assert_close(gradients(model), expected, **CLOSE)
    assert [len(each) for each in given] == [len(expected)] * 2


def test_labels_that_change_after_a_step_change_nothing_of_it() -> None:
    model = MAML(pair(conv_net)[1], lr=RATE)
    own, found = list(model.parameters()), []
    x, y, *_ = data()[0]
    for changes in (False, True):
        labels, learner = y.clone(), model.clone()
        learner.adapt(F.cross_entropy(learner(x), labels))
        if changes:
            labels.zero_()
        first = torch.autograd.grad(target_loss(learner), own, create_graph=True)
        total = torch.stack([g.square().sum() for g in first]).sum()
        found.append([*first, *torch.autograd.grad(total, own)])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_after_an_error_on_the_way_all_is_as_before() -> None:
    """What was handed on is left alone: the next pass comes to its own numbers."""
    plain, fast = pair(conv_net)
    x, y, *_ = data()[0]
    model = MAML(fast, lr=RATE)

    def fail(_: Tensor) -> None:
        raise ArithmeticError("on the way")

    for _ in range(2):
        learner = model.clone()
        adapted(learner, x, y, 1)
        bias = learner.module[-1].bias
        adapted(learner, x, y, 2)
        loss = target_loss(learner)
        handle = bias.register_hook(fail)
        with pytest.raises(ArithmeticError, match="on the way"):
            loss.backward(retain_graph=True)
        handle.remove()
        model.zero_grad()
        loss.backward()
        found = gradients(model)
        model.zero_grad()
    with plain_batch_norm():
        other = MAML(plain, lr=RATE)
        expected = by_loss(F.cross_entropy, other)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_a_graph_that_is_gone_is_an_error() -> None:
    model = MAML(pair(conv_net)[1], lr=RATE)
    x, y, *_ = data()[0]
    learner = model.clone()
    adapted(learner, x, y, 2)
    loss = target_loss(learner)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_whether_somebody_listens() -> None:
    """Behind a tensor, as far as is asked."""
    ops = torch.ops.mamlpp_fast
    a = torch.ones(2, requires_grad=True)
    for listen in (
        lambda b: b.register_hook(lambda g: g),
        lambda b: b.retain_grad(),
        lambda b: b.grad_fn.register_hook(lambda inputs, outputs: None),
        lambda b: b.grad_fn.register_prehook(lambda outputs: None),
    ):
        b = a * 2
        c = b.exp()
        assert not ops.heard(c, 2)
        listen(b)
        assert ops.heard(c, 2) and ops.heard(b, 1) and not ops.heard(c, 1)
    with pytest.raises(ValueError, match="t: expected 4 nodes behind it, there are 3"):
        ops.heard((a * 2).exp(), 4)  # the leaf's own is the third
    with pytest.raises(ValueError, match="t: expected 1 nodes behind it, there are 0"):
        ops.heard(torch.ones(2), 1)
    with pytest.raises(ValueError, match="nodes: expected at least 1, got 0"):
        ops.heard(a * 2, 0)


def test_whether_all_gradients_go_to_leaves() -> None:
    ops = torch.ops.mamlpp_fast
    found: list[bool] = []
    a = torch.ones(2, requires_grad=True)
    b = a * 2
    b.register_hook(lambda g: found.append(ops.to_leaves()))
    loss = b.sum()
    loss.backward(retain_graph=True)
    loss.backward(inputs=[a], retain_graph=True)
    torch.autograd.grad(loss, a)
    assert found == [True, False, False] and not ops.to_leaves()
