"""Accelerated models under `torch.func`, against the same model in plain PyTorch, in float64."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_accelerate import CLOSE, Scaled, conv_net, mlp, pair
from torch import Tensor, func, nn

import mamlpp_fast as mf
from mamlpp_fast import routes as module
from mamlpp_fast.engine.fused import transforms, uses
from mamlpp_fast.reference.code import ROUTED

# Forward mode loads decompositions written for torch.jit: a DeprecationWarning in torch 2.13, a FutureWarning in 2.14.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

TASKS, IMAGES, WAYS = 3, 6, 3
Held = Mapping[str, Tensor]
Use = Callable[[nn.Module], Any]


def norms() -> nn.Module:
    return conv_net(track_running_stats=False)


class Waves(nn.Module):
    """A tensor of numbers as a plain attribute, whose values are looked at within transforms too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 6), nn.Linear(18, WAYS)
        self.frequencies = 2.0 ** torch.arange(3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(1)).unsqueeze(-1) * self.frequencies.to(x)
        made: Tensor = self.last(torch.sin(h).flatten(1))
        return made


MODELS: dict[str, Callable[[], nn.Module]] = {
    "waves": Waves,
    "conv": norms,
    "mlp": lambda: mlp(nn.GELU),
    "own parameters": Scaled,
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    module.kept.clear()
    batch()  # not made first within a transform, which its tensors would be bound to


@functools.cache
def batch() -> tuple[Tensor, ...]:
    """Support and target of several tasks."""
    random = torch.Generator().manual_seed(3)
    x = torch.randn(2, TASKS, IMAGES, 1, 8, 8, dtype=torch.float64, generator=random)
    y = (torch.arange(TASKS * IMAGES).view(TASKS, IMAGES) * 2 // 3) % WAYS
    return x[0], y, x[1], y.flip(1)


def own(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def many(model: nn.Module) -> dict[str, Tensor]:
    """Parameters of several tasks."""
    factors = torch.linspace(0.5, 1.5, TASKS, dtype=torch.float64)
    return {n: torch.stack([p * f + 0.01 * f for f in factors]) for n, p in own(model).items()}


def out(model: nn.Module, held: Held, x: Tensor) -> Tensor:
    made: Tensor = func.functional_call(model, dict(held), (x,))
    return made


def loss(model: nn.Module, held: Held, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out(model, held, x), y)


def task_loss(model: nn.Module, held: Held, x: Tensor, y: Tensor, target: Tensor, goal: Tensor) -> Tensor:
    fast = held
    for _ in range(2):
        grads = func.grad(functools.partial(loss, model))(dict(fast), x, y)
        fast = {name: p - 0.1 * grads[name] for name, p in fast.items()}
    return loss(model, fast, target, goal)


def over_tasks(f: Callable[..., Any], axes: tuple[int | None, ...], *args: Any) -> Any:
    """What `vmap` computes, one task after the other."""

    def one(task: int, value: Any, axis: int | None) -> Any:
        if axis is None:
            return value
        if isinstance(value, dict):
            return {n: t.select(axis, task) for n, t in value.items()}
        return value.select(axis, task)

    made = [f(*(one(i, a, axis) for a, axis in zip(args, axes, strict=True))) for i in range(TASKS)]
    return torch.utils._pytree.tree_map(lambda *parts: torch.stack(parts), *made)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, **CLOSE)


def served(model: nn.Module) -> bool:
    return "under torch.func: one operation" in mf.acceleration(model)


def meta(vmap: Callable[..., Any], model: nn.Module) -> Any:
    """MAML: the gradient of a loss that calls `grad`."""

    def total(held: Held) -> Tensor:
        losses: Tensor = vmap(functools.partial(task_loss, model), (None, 0, 0, 0, 0), held, *batch())
        return losses.mean()

    return func.grad_and_value(total)(own(model))


def mapped(f: Callable[..., Any], axes: tuple[int | None, ...], *args: Any, **options: Any) -> Any:
    return func.vmap(f, axes, **options)(*args)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("vmap", [over_tasks, mapped])
def test_maml_is_what_it_is_task_by_task(name: str, vmap: Callable[..., Any]) -> None:
    plain, fast = pair(MODELS[name])
    close(meta(vmap, fast), meta(over_tasks, plain))
    assert served(fast), mf.acceleration(fast)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_tasks_do_not_depend_on_threads(threads: int, own_threads: None) -> None:
    plain, fast = pair(norms)
    torch.set_num_threads(threads)
    close(meta(mapped, fast), meta(over_tasks, plain))


@pytest.mark.parametrize("name", MODELS)
def test_autograd_around_vmap(name: str) -> None:
    found = []
    for model, vmap in zip(pair(MODELS[name]), (over_tasks, mapped), strict=True):
        held = dict(model.named_parameters())
        losses = vmap(functools.partial(task_loss, model), (None, 0, 0, 0, 0), held, *batch())
        losses.square().sum().backward()
        found.append({n: p.grad for n, p in held.items()})
    close(found[1], found[0])


AXES: dict[str, tuple[tuple[int | None, ...], Callable[[nn.Module], tuple[Any, ...]]]] = {
    "examples": ((None, 0, 0), lambda m: (own(m), *batch()[:2])),
    "parameters": ((0, None, None), lambda m: (many(m), batch()[0][1], batch()[1][1])),
    "both": ((0, 0, 0), lambda m: (many(m), *batch()[:2])),
    "another axis": ((0, 2, 1), lambda m: (many(m), batch()[0].movedim(0, 2), batch()[1].t())),
    "neither": ((None, None, 0), lambda m: (own(m), batch()[0][1], batch()[1])),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("second", [False, True])
def test_what_is_mapped(name: str, axes: str, second: bool) -> None:
    dims, arguments = AXES[axes]

    def use(model: nn.Module, vmap: Callable[..., Any]) -> Any:
        f: Callable[..., Any] = func.grad(functools.partial(loss, model))
        if second:
            inner = f
            f = func.grad(lambda *a: torch.stack([g.pow(3).sum() for g in inner(*a).values()]).sum())
        return vmap(f, dims, *arguments(model))

    plain, fast = pair(MODELS[name])
    close(use(fast, mapped), use(plain, over_tasks))
    assert served(fast), mf.acceleration(fast)


def twice_mapped(vmap: Callable[..., Any], model: nn.Module) -> Any:
    """Several draws of several tasks, parameters of the outer level."""
    x, y, _, _ = batch()
    f = func.grad(functools.partial(loss, model))

    def inner(held: Held, x: Tensor, y: Tensor) -> Any:
        return vmap(f, (None, 0, 0), held, x, y)

    return vmap(inner, (0, 0, None), many(model), torch.stack([x, 2 * x, x + 1]), y)


def through_both(vmap: Callable[..., Any], model: nn.Module) -> Any:
    """The outer gradient through both levels, and one between them."""
    x, y, _, _ = batch()
    f = func.grad(functools.partial(loss, model))

    def inner(held: Held, x: Tensor) -> Tensor:
        grads = vmap(f, (None, 0, 0), held, x, y)
        return torch.stack([g.square().sum() for g in grads.values()]).sum()

    def total(held: Held) -> Tensor:
        between = vmap(func.grad(inner), (None, 0), held, torch.stack([x, 2 * x, x + 1]))
        return torch.stack([g.sum() for g in between.values()]).sum()

    return total(own(model))


@pytest.mark.parametrize("use", [twice_mapped, through_both])
@pytest.mark.parametrize("name", MODELS)
def test_vmap_in_vmap(name: str, use: Callable[..., Any]) -> None:
    plain, fast = pair(MODELS[name])
    close(use(mapped, fast), use(over_tasks, plain))
    assert served(fast), mf.acceleration(fast)


def x0() -> Tensor:
    return batch()[0][0]


def first(model: nn.Module) -> Callable[..., Tensor]:
    return lambda held: loss(model, held, x0(), batch()[1][0])


def squares(grads: Held) -> Tensor:
    return torch.stack([g.square().sum() for g in grads.values()]).sum()


def random(model: nn.Module) -> Any:
    torch.manual_seed(5)

    def noisy(held: Held, x: Tensor, y: Tensor) -> Tensor:
        return loss(model, held, x + torch.randn_like(x), y)

    return mapped(func.grad(noisy), (None, 0, 0), own(model), *batch()[:2], randomness="different")


def aux(model: nn.Module) -> Any:
    def f(held: Held) -> tuple[Tensor, Tensor]:
        y = out(model, held, x0())
        return y.square().mean(), y

    return func.grad(f, has_aux=True)(own(model)), func.grad_and_value(f, has_aux=True)(own(model))


def pulled(model: nn.Module) -> Any:
    y, pull = func.vjp(lambda held: out(model, held, x0()), own(model))
    return y, pull(y), pull(2 * y)[0], func.vmap(pull)(torch.stack([y, y.cos()]))


def pulled_in_vmap(model: nn.Module) -> Any:
    """Cotangents that are mapped inside of tasks that are."""

    def f(x: Tensor) -> Any:
        y, pull = func.vjp(lambda held: out(model, held, x), own(model))
        return func.vmap(pull)(torch.stack([y, y.cos(), y + 1]))

    return (over_tasks if plainly(model) else mapped)(f, (0,), batch()[0])


def plainly(model: nn.Module) -> bool:
    return not vars(type(model)).get(ROUTED)


def both_again(model: nn.Module) -> Any:
    """Two backward passes of one call, each differentiated."""

    def f(held: dict[str, Tensor]) -> Tensor:
        y, pull = func.vjp(lambda held: out(model, held, x0()), held)
        return squares(pull(y.cos())[0]).sin() + squares(pull(y.sin())[0])

    return func.grad(f)(own(model))


def jacrev_of_grad(model: nn.Module) -> Any:
    name, p = next(iter(own(model).items()))
    return func.jacrev(lambda t: func.grad(first(model))({**own(model), name: t}))(p)


def forward_mode(model: nn.Module) -> Any:
    held = own(model)
    along = {n: p.cos() for n, p in held.items()}
    return func.jvp(first(model), (held,), (along,)), func.jvp(func.grad(first(model)), (held,), (along,))


def reverse_over_forward(model: nn.Module) -> Any:
    held = own(model)
    return func.grad(lambda h: func.jvp(first(model), (h,), (held,))[1])(held)


def jacfwd(model: nn.Module) -> Any:
    name, p = list(own(model).items())[-1]
    return func.jacfwd(lambda t: out(model, {**own(model), name: t}, x0()))(p)


def hessian(model: nn.Module) -> Any:
    name, p = list(own(model).items())[-1]
    return func.hessian(lambda t: first(model)({**own(model), name: t}))(p)


def by_examples(model: nn.Module) -> Any:
    return func.grad(lambda x: out(model, own(model), x).square().sum())(x0())


def by_examples_inside(model: nn.Module) -> Any:
    """The examples are differentiated at the outer level, the parameters at the inner."""
    y = batch()[1][0]
    return func.grad(lambda x: squares(func.grad(functools.partial(loss, model))(own(model), x, y)))(x0())


def by_examples_of_autograd(model: nn.Module) -> Any:
    x = x0().clone().requires_grad_()
    squares(func.grad(functools.partial(loss, model))(own(model), x, batch()[1][0])).backward()
    return x.grad


def unrecorded(model: nn.Module) -> Any:
    with torch.no_grad():
        return mapped(functools.partial(out, model), (None, 0), own(model), batch()[0])


def only_mapped(model: nn.Module) -> Any:
    return mapped(functools.partial(out, model), (None, 0), own(model), batch()[0])


SERVED = [random, aux, pulled, pulled_in_vmap, both_again, jacrev_of_grad, only_mapped]
PLAIN = [
    forward_mode,
    reverse_over_forward,
    jacfwd,
    hessian,
    by_examples,
    by_examples_inside,
    by_examples_of_autograd,
    unrecorded,
]


@pytest.mark.parametrize("name", ["mlp", "own parameters", "conv"])
@pytest.mark.parametrize("use", SERVED + PLAIN)
def test_other_uses(name: str, use: Use) -> None:
    plain, fast = pair(MODELS[name])
    with mf.reference.norms_of_any_order():  # gradients of PyTorch's own tangents through norms are wrong
        expected = use(plain)
    close(use(fast), expected)
    assert served(fast) == (use in SERVED), mf.acceleration(fast)


def test_a_third_derivative_has_norms_that_are_right_in_it() -> None:
    def third(model: nn.Module, vmap: Callable[..., Any]) -> Any:
        def f(held: Held) -> Tensor:
            return squares(func.grad(first(model))(held))

        def g(held: Held) -> Tensor:
            return squares(func.grad(f)(held))

        def tasks(held: Held) -> Tensor:
            losses: Tensor = vmap(functools.partial(task_loss, model), (None, 0, 0, 0, 0), held, *batch())
            return losses.sum()

        return func.grad(g)(own(model)), func.grad(lambda held: squares(func.grad(tasks)(held)))(own(model))

    plain, fast = pair(MODELS["mlp"])
    with mf.reference.norms_of_any_order():
        expected = third(plain, over_tasks)
    torch.testing.assert_close(third(fast, mapped), expected, rtol=1e-8, atol=1e-11)
    assert served(fast)


def test_a_tangent_that_only_a_backward_pass_meets_is_refused_in_words() -> None:
    _, fast = pair(MODELS["mlp"])
    y, pull = func.vjp(lambda held: out(fast, held, x0()), own(fast))
    with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
        func.jvp(lambda t: pull(t)[0], (y,), (y,))


def test_running_statistics_are_as_in_pytorch() -> None:
    def inside(model: nn.Module) -> Any:
        return func.grad(first(model))(own(model))

    def mapped_inside(model: nn.Module) -> Any:
        return mapped(functools.partial(task_loss, model), (None, 0, 0, 0, 0), own(model), *batch())

    def given(model: nn.Module) -> Any:
        def f(held: Held, buffers: Held, x: Tensor) -> tuple[Tensor, Held]:
            buffers = {n: b.clone() for n, b in buffers.items()}
            y = func.functional_call(model, ({**held}, buffers), (x,))
            return y.square().mean(), buffers

        return func.grad(f, has_aux=True)(own(model), dict(model.named_buffers()), x0())

    for use in (inside, mapped_inside, given):
        plain, fast = pair(conv_net)
        try:
            expected: Any = use(plain)
        except RuntimeError as error:
            expected = str(error)
        if isinstance(expected, str):
            with pytest.raises(RuntimeError) as raised:
                use(fast)
            assert str(raised.value) == expected
        else:
            close(use(fast), expected)
        close(dict(fast.named_buffers()), dict(plain.named_buffers()))
        assert "keeps running statistics" in mf.acceleration(fast)


def test_buffers_may_be_mapped_and_differentiated() -> None:
    shifts = torch.stack([torch.linspace(-i, 1, 6, dtype=torch.float64) for i in range(TASKS)])

    def use(model: nn.Module, vmap: Callable[..., Any]) -> Any:
        def f(held: Held, shift: Tensor, x: Tensor) -> Tensor:
            return out(model, {**held, "shift": shift}, x).square().mean()

        several = vmap(func.grad(f), (None, 0, 0), own(model), shifts, batch()[0])
        return several, func.grad(f, 1)(own(model), shifts[1], x0())

    plain, fast = pair(Scaled)
    close(use(fast, mapped), use(plain, over_tasks))
    assert served(fast) and "buffers that are differentiated by" in mf.acceleration(fast)


def test_memory_is_used_again() -> None:
    _, fast = pair(norms)
    expected = meta(mapped, fast)
    route = next(r for r in module.kept.values() if isinstance(r, transforms.Transformed))
    sections = route.net.sections
    made = sections.lanes
    for _ in range(3):
        torch.testing.assert_close(meta(mapped, fast), expected, rtol=0, atol=0)
    assert sections is route.net.sections and sections.lanes == made == sum(map(len, sections.free.values()))


@pytest.mark.parametrize(
    ("use", "passes"),
    [
        # Of two steps and a target: each step's backward pass, the target's, and of each step a derivative in halves,
        # of which the second goes on to the parameters by way of the loss as well.
        (functools.partial(meta, mapped), ["y", "g", "y", "g", "y", "g", "t", "s", "t", "s"]),
        (
            functools.partial(meta, over_tasks),
            ["y", "g", "y", "g", "y"] * TASKS + ["g", "t", "s", "t", "s"] * TASKS,
        ),
        # Two backward passes of one call overwrite each other: of what is gone there is another pass.
        (both_again, ["y", "g", "g", "t", "gt", "s", "gts"]),
    ],
)
def test_how_often_the_kernels_run(use: Use, passes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = pair(norms)
    use(fast)
    found: list[str] = []
    each = uses._State.each

    def noted(self: Any, works: Iterable[uses.Work], *args: Any, **kwargs: Any) -> None:
        works = list(works)
        kinds = {"y": "inputs", "g": "gy", "t": "directions", "s": "moves"}
        given = [works[0]._asdict()[name] for name in kinds.values()]
        found.append("".join(k for k, g in zip(kinds, given, strict=True) if isinstance(g, Tensor) or g))
        each(self, works, *args, **kwargs)

    monkeypatch.setattr(uses._State, "each", noted)
    use(fast)
    assert found == passes


def test_eager_calls_and_transforms_share_what_was_prepared() -> None:
    plain, fast = pair(norms)
    for model in (plain, fast):
        F.cross_entropy(model(x0()), batch()[1][0]).backward()
    close(meta(mapped, fast), meta(over_tasks, plain))
    (x, y, _, _) = batch()
    for model in (plain, fast):
        F.cross_entropy(model(x[1]), y[1]).backward()
    close({n: p.grad for n, p in fast.named_parameters()}, {n: p.grad for n, p in plain.named_parameters()})
    nets = {id(r.net if isinstance(r, transforms.Transformed) else r) for r in module.kept.values()}
    assert len(nets) == 1


def test_float32_stays_as_near_to_float64_as_pytorch() -> None:
    exact, _ = pair(MODELS["conv"])
    plain, fast = copy.deepcopy(exact).float(), mf.accelerate(copy.deepcopy(exact).float())

    def gradient(model: nn.Module, vmap: Callable[..., Any]) -> Tensor:
        dtype = next(model.parameters()).dtype
        given = [t.to(dtype) if t.is_floating_point() else t for t in batch()]

        def total(held: Held) -> Tensor:
            losses: Tensor = vmap(functools.partial(task_loss, model), (None, 0, 0, 0, 0), held, *given)
            return losses.mean()

        return torch.cat([g.flatten() for g in func.grad(total)(own(model)).values()]).double()

    expected = gradient(exact, over_tasks)
    ours, theirs = (
        float((gradient(m, v) - expected).norm()) for m, v in ((fast, mapped), (plain, over_tasks))
    )
    assert served(fast) and ours <= 2 * theirs + 1e-6 * float(expected.norm())
