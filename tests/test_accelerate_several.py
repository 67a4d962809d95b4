"""`mf.accelerate` and the `autograd` engine on models of several inputs, against plain PyTorch in float64."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import maml_loss
from test_several_inputs import CASES, CLOSE, Pictures, Recommender, learner_of, made
from torch import Tensor, func, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

import mamlpp_fast as mf

pytestmark = pytest.mark.usefixtures("nothing_accelerated")

Call = Callable[[nn.Module, Any], Tensor]
"""A model called with the inputs of a side, as ``CASES`` has them."""
CALLS: dict[str, tuple[str, Call]] = {
    "by name": ("pictures", lambda m, x: m(**x)),
    "by position and name": ("pictures", lambda m, x: m(x["image"], x["beside"], attributes=x["attributes"])),
    "by position": ("text", lambda m, x: m(x["input_ids"], x["attention_mask"])),
    "one by name": ("text, bool", lambda m, x: m(x["input_ids"], attention_mask=x["attention_mask"])),
    "nested": ("graph", lambda m, x: m(*x)),
}


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = CASES[name][0]().double()
    return plain, mf.accelerate(copy.deepcopy(plain))


def textbook(model: nn.Module, name: str, call: Call) -> list[Tensor]:
    """Losses, meta-gradients and buffers of second-order MAML."""

    def swapped(model: nn.Module, fast: dict[str, Tensor], x: Any) -> Tensor:
        with mf.reference.swapped(model, fast):
            return call(model, *x)

    own, losses = dict(model.named_parameters()), []
    for task in made(name):
        total = maml_loss(swapped, model, (task.support_x, task.support_y, task.target_x, task.target_y))
        total.backward()
        losses.append(total.detach())
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in own.values()]
    return [*losses, *grads, *(b.double() for b in model.buffers())]


@pytest.mark.parametrize("how", CALLS)
def test_a_textbook_loop_gets_what_it_got(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamlpp_fast.engine.fused.differentiable.EVEN_WITHOUT_GAIN", True)
    name, call = CALLS[how]
    plain, fast = pair(name)
    with sdpa_kernel(SDPBackend.MATH):
        expected = textbook(plain, name, call)
    assert_close(textbook(fast, name, call), expected, **CLOSE)
    said = mf.acceleration(fast)
    assert "one operation" in said and "plain PyTorch" not in said, said


@pytest.mark.parametrize("shared", [(), ("attributes",), ("image", "beside")])
def test_tasks_of_vmap(shared: tuple[str, ...]) -> None:
    """MAML in `torch.func`, where the tasks share some of the inputs."""
    torch.manual_seed(0)
    plain = Pictures().double()
    plain.norm = nn.GroupNorm(2, 4).double()
    fast = mf.accelerate(copy.deepcopy(plain))
    batch = made("pictures")
    sides = [{k: t[0] if k in shared else t for k, t in x.items()} for x in (batch.support_x, batch.target_x)]
    axes = {k: None if k in shared else 0 for k in sides[0]}

    def loss(model: nn.Module, held: dict[str, Tensor], x: dict[str, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(func.functional_call(model, held, (), x), y)

    def task(model: nn.Module, held: dict[str, Tensor], *parts: Any) -> Tensor:
        x, y, target, goal = parts
        grads = func.grad(functools.partial(loss, model))(held, x, y)
        return loss(model, {n: p - 0.1 * grads[n] for n, p in held.items()}, target, goal)

    def total(model: nn.Module, held: dict[str, Tensor]) -> Tensor:
        over = func.vmap(functools.partial(task, model), (None, axes, 0, axes, 0))
        return over(held, sides[0], batch.support_y, sides[1], batch.target_y).mean()

    own = {n: p.detach() for n, p in plain.named_parameters()}
    expected, found = (func.grad_and_value(functools.partial(total, m))(own) for m in (plain, fast))
    assert_close(found, expected, **CLOSE)
    assert "under torch.func: one operation" in mf.acceleration(fast), mf.acceleration(fast)


def test_a_graph_keeps_what_it_was_given() -> None:
    """An input beside the first that is overwritten after the pass is as it was in the passes that follow."""
    plain, fast = pair("pictures")
    task = made("pictures")[0]

    def second(model: nn.Module, change: bool) -> list[Tensor]:
        own, given = list(model.parameters()), {k: t.clone() for k, t in task.support_x.items()}
        loss = F.cross_entropy(model(**given), task.support_y)
        if change:
            given["beside"].zero_()
        # The second of them finds the first one's values in the place of the pass.
        first, again = (torch.autograd.grad(loss, own, create_graph=True) for _ in range(2))
        along = torch.stack([(g * g.detach().cos()).sum() for g in (*first, *again)]).sum()
        return list(torch.autograd.grad(along, own))

    assert_close(second(fast, True), second(plain, False), **CLOSE)
    assert "one operation" in mf.acceleration(fast)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda x: {**x, "image": x["image"].requires_grad_(), "beside": x["beside"].requires_grad_()},
            "expected at most one argument that takes a gradient, got several",
        ),
        (
            lambda x: {**x, "beside": x["beside"].float()},
            "examples of the parameters' torch.float64, got torch.float32",
        ),
        (
            lambda x: {**x, "attributes": x["attributes"][:1]},
            "other calls: plain PyTorch: arguments are of another number of examples",
        ),
    ],
)
def test_other_calls_run_as_ever(change: Callable[[Any], Any], why: str) -> None:
    class Cast(Pictures):
        def forward(self, image: Tensor, beside: Tensor, *, attributes: Tensor) -> Tensor:
            beside = beside.to(image.dtype)
            return super().forward(image, beside, attributes=attributes.expand(len(image), -1))

    torch.manual_seed(0)
    plain = Cast().double()
    fast = mf.accelerate(copy.deepcopy(plain))
    results = []
    for model in (plain, fast):
        x = change({k: t.clone() for k, t in made("pictures")[0].support_x.items()})
        grads = torch.autograd.grad(
            model(**x).square().sum(), [*model.parameters(), *(t for t in x.values() if t.requires_grad)]
        )
        results.append(grads)
    assert_close(results[1], results[0], **CLOSE)
    assert why in mf.acceleration(fast)


def derivatives(model: nn.Module, y: Tensor, given: Any) -> list[Tensor]:
    """A call's output, its gradients by parameters and inputs, and derivatives of these."""
    by = [*model.parameters(), *(t for t in tree_leaves(given) if isinstance(t, Tensor) and t.requires_grad)]
    first = torch.autograd.grad((y.square() * y.detach().cos()).sum(), by, create_graph=True)
    along = torch.stack([(g * g.detach().cos()).sum() for g in first]).sum()
    second = torch.autograd.grad(along, by, allow_unused=True)
    return [y, *first, *(torch.zeros_like(t) if g is None else g for g, t in zip(second, by, strict=True))]


@pytest.mark.parametrize("name", ["image", "beside", "attributes"])
def test_one_argument_takes_a_gradient(name: str) -> None:
    """Whichever; calls without a gradient, or with one of another argument, are other forms."""
    plain, fast = pair("pictures")
    for by in (None, name):
        results = []
        for model in (plain, fast):
            x = {k: t.clone().requires_grad_(k == by) for k, t in made("pictures")[0].support_x.items()}
            results.append(derivatives(model, model(**x), x))
        assert_close(results[1], results[0], **CLOSE)
    said = mf.acceleration(fast).splitlines()
    assert len(said) == 2 and all("one operation" in line for line in said), said
    assert "examples with a gradient" in said[1]


def test_one_tensor_by_name_takes_a_gradient() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).double()
    fast = mf.accelerate(copy.deepcopy(plain))
    x = torch.randn(4, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    found, expected = (derivatives(model, model(input=x), x) for model in (fast, plain))
    assert_close(found, expected, **CLOSE)
    assert "one operation" in mf.acceleration(fast)


class Chosen(Pictures):
    """What else it is told decides; nothing is asked of tensors."""

    def forward(self, image: Tensor, told: Any, attributes: Tensor, *, scale: Any = 1) -> Tensor:  # type: ignore[override]
        if told.get("doubled"):
            attributes = attributes * 2
        if told["beside"] is None:
            return self.head(F.pad(attributes, (0, 48))) * scale
        if told["beside"] is image:
            return super().forward(
                image, image[:, :, :2, :2].expand(-1, 2, -1, -1).exp(), attributes=attributes
            )
        return super().forward(image, told["beside"], attributes=attributes) * scale


def test_flags_are_told_apart_and_other_arguments_run_as_ever() -> None:
    torch.manual_seed(0)
    plain = Chosen().double()
    fast = mf.accelerate(copy.deepcopy(plain))
    image, attributes, beside = made("pictures")[0].support_x.values()
    forms: list[tuple[dict[str, Any], Any]] = [
        ({"doubled": True, "beside": beside}, True),
        ({"doubled": False, "beside": beside}, True),
        ({"doubled": None, "beside": beside}, True),
        ({"doubled": True, "beside": beside}, False),
        ({"beside": beside}, 2.5),
        ({"beside": image}, None),
    ]
    for told, scale in forms:
        found, expected = (derivatives(m, m(image, told, attributes, scale=scale), ()) for m in (fast, plain))
        assert_close(found, expected, **CLOSE)
    *served, number, twice = mf.acceleration(fast).splitlines()
    assert len(served) == 4 and all("one operation" in line for line in served), served
    assert number == "other calls: plain PyTorch: an argument is of the type float"
    assert twice == "other calls: plain PyTorch: two arguments are one tensor, which a forward may ask about"


def test_reasons_stay_few() -> None:
    """Whatever the sizes of the calls that are left: a reason is kept as long as its model."""
    fast = mf.accelerate(nn.Sequential(nn.Linear(1, 2)))
    for size in range(1, 6):
        fast(torch.randn(size, size + 1, 1)[:0])
        torch.testing.assert_close(fast(torch.ones(1)), fast[0].weight.T[0] + fast[0].bias)
    assert mf.acceleration(fast).splitlines() == [
        "other calls: plain PyTorch: it has no examples",
        "other calls: plain PyTorch: its examples have 1 axes",
    ]


def test_a_model_is_told_of_its_own_calls() -> None:
    """Not of those of others of its class; of its copies'."""
    one, other = (mf.accelerate(nn.Sequential(nn.Conv1d(2, size, 3), nn.Flatten())) for size in (3, 4))
    copied = copy.deepcopy(one)
    one(torch.randn(4, 2, 5))
    with torch.no_grad():
        other(torch.randn(4, 2, 5))
    (said,) = mf.acceleration(one).splitlines()
    assert said.startswith("[4, 2, 5] float32, training: one operation") and said == mf.acceleration(copied)
    assert mf.acceleration(other) == "other calls: plain PyTorch: no gradient is recorded"


def test_the_tasks_of_the_autograd_engine_go_side_by_side() -> None:
    learner, reference = learner_of("pictures", "autograd"), learner_of("pictures", "reference")
    for one in (learner, reference):
        one.meta_gradient(made("pictures"))
    assert "tasks side by side" in learner.explain()
    for p, q in zip(learner.model.parameters(), reference.model.parameters(), strict=True):
        assert_close(p.grad, q.grad, **CLOSE)


def test_map_tasks() -> None:
    """A step may call the model as it likes."""
    torch.manual_seed(0)
    model = Recommender().double()
    plain = copy.deepcopy(model)

    def step(model: nn.Module, task: mf.Episode) -> Tensor:
        fast = mf.adapt(model, task.support_x, task.support_y, 0.1, loss_fn=F.mse_loss)
        return F.mse_loss(mf.reference.functional_call(model, fast, task.target_x), task.target_y)

    losses = mf.map_tasks(step, list(made("recommender")), model)
    expected = [step(plain, task) for task in made("recommender")]
    torch.stack(expected).sum().backward()
    assert_close(losses, [loss.detach() for loss in expected], **CLOSE)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert_close(p.grad, q.grad, **CLOSE)
