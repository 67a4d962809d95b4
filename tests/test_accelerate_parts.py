"""`mf.accelerate`: gradients of some parameters alone, and of the examples, against plain PyTorch in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from front_end_helpers import Calls
from helpers import moved
from test_accelerate import CLOSE, WAYS, conv_net, data, mlp, pair, served
from torch import Tensor, nn

import mamlpp_fast as mf
from mamlpp_fast import accelerated
from mamlpp_fast import routes as module
from mamlpp_fast._modes import plainly, pytorchs_norms
from mamlpp_fast.compat import higher
from mamlpp_fast.compat import learn2learn as l2l
from mamlpp_fast.engine.fused.differentiable import DifferentiableNetwork
from mamlpp_fast.engine.fused.sections import EXAMPLES
from mamlpp_fast.nn import plain_batch_norm

pytestmark = pytest.mark.usefixtures("nothing_accelerated")


def routes() -> list[DifferentiableNetwork]:
    return [r for r in module.kept.values() if isinstance(r, DifferentiableNetwork)]


def parts() -> list[frozenset[str]]:
    """Sets of gradients beside all, for which sections were written."""
    return [part for route in routes() for part in route.sections.parts[1:]]


def anil(model: nn.Module, head: str, order: bool = True) -> dict[str, Tensor]:
    """Gradients and buffers of a loop that adapts what begins with ``head``."""
    own = dict(model.named_parameters())
    for x, y, target_x, target_y in data():
        fast = {n: p for n, p in own.items() if n.startswith(head)}
        for _ in range(3):
            loss = F.cross_entropy(mf.reference.functional_call(model, fast, (x,)), y)
            fast = moved(loss, fast, 0.3, order)
        F.cross_entropy(mf.reference.functional_call(model, fast, (target_x,)), target_y).backward()
    found = {n: p.grad for n, p in own.items() if p.grad is not None}
    return found | {f"buffer {n}": b for n, b in model.named_buffers()}


NETS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "conv": (conv_net, "9."),
    "conv, the last block": (conv_net, "4."),
    "mlp": (mlp, "4."),
    "generic": (lambda: mlp(nn.GELU), "1."),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("order", [True, False])
def test_some_parameters_adapt(name: str, order: bool) -> None:
    make, head = NETS[name]
    plain, fast = pair(make)
    expected = anil(plain, head, order)
    torch.testing.assert_close(anil(fast, head, order), expected, **CLOSE)
    assert served(fast)
    weights = {n for n, _ in plain.named_parameters() if n.startswith(head)}
    assert [part for part in parts() if part <= weights]


def test_a_part_leaves_out_the_body() -> None:
    _, fast = pair(conv_net)
    anil(fast, "9.")
    (route,) = routes()
    whole, head = (
        [i for i in route.sections.program.instructions if i.phase.name == f"backward {k}"] for k in (0, 1)
    )
    assert 0 < len(head) < len(whole) / 2
    assert not any("conv" in i.name for i in head)


def test_parts_are_few_and_one_that_fails_its_check_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = pair(conv_net)
    x, y, _, _ = data(1)[0]

    def some(model: nn.Module, name: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(model(x), y), [dict(model.named_parameters())[name]])

    names = ["0.weight", "4.weight", "9.weight", "1.weight", "5.weight", "9.bias"]
    for name in names:
        torch.testing.assert_close(some(fast, name), some(plain, name), **CLOSE)
    assert len(parts()) == 3
    module.kept.clear()

    def failing(self: DifferentiableNetwork, few: Tensor, wanted: frozenset[str]) -> None:
        raise module.Unsupported("it", "differs")

    monkeypatch.setattr(DifferentiableNetwork, "_check", failing)
    for name in names:
        torch.testing.assert_close(some(fast, name), some(plain, name), **CLOSE)
    assert served(fast) and not parts()


def test_a_frozen_body_and_no_graph() -> None:
    results = []
    for model in pair(conv_net):
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith("9."))
        x, y, _, _ = data(1)[0]
        F.cross_entropy(model(x), y).backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(results[1], results[0], **CLOSE)
    assert set(results[0]) == {"9.weight", "9.bias"}
    assert parts() == [frozenset(results[0])]


# Examples with a gradient --------------------------------------------------------------------------------------------


def critic() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.LeakyReLU(0.2),
        nn.Conv2d(6, 5, 3, stride=2, padding=1),
        nn.BatchNorm2d(5),
        nn.LeakyReLU(0.2),
        nn.Conv2d(5, 1, 4),
    )


def penalty(model: nn.Module) -> Iterator[Tensor]:
    """Losses and gradients of a WGAN's critic with a gradient penalty; the examples' own gradient too."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        real, made = (torch.randn(6, 1, 8, 8, dtype=torch.float64, generator=generator) for _ in range(2))
        share = torch.rand(6, 1, 1, 1, dtype=torch.float64, generator=generator)
        between = (share * real + (1 - share) * made).requires_grad_()
        (slope,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
        loss = (
            model(made).mean() - model(real).mean() + 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean()
        )
        model.zero_grad()
        loss.backward()
        yield from (loss.detach(), slope.detach(), between.grad)  # type: ignore[misc]
        yield from (p.grad.clone() for p in model.parameters() if p.grad is not None)
        yield from (b.clone() for b in model.buffers())


@pytest.mark.parametrize("make", [critic, lambda: Calls(lambda m, x: m.net(x).view(-1), net=critic())])
def test_a_gradient_penalty(make: Callable[[], nn.Module]) -> None:
    plain, fast = pair(make)
    torch.testing.assert_close(list(penalty(fast)), list(penalty(plain)), **CLOSE)
    assert served(fast)
    assert frozenset({EXAMPLES}) in parts()
    assert "examples with a gradient" in mf.acceleration(fast)


def field() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 1))


def physics(model: nn.Module, steps: int) -> list[Tensor]:
    """Gradients of the residual of a heat equation, u_t − u_xx."""
    found = []
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        z = torch.rand(12, 2, dtype=torch.float64, generator=generator, requires_grad=True)
        u = model(z)
        (du,) = torch.autograd.grad(u.sum(), z, create_graph=True)
        (ddu,) = torch.autograd.grad(du[:, 0].sum(), z, create_graph=True)
        loss = (du[:, 1] - ddu[:, 0]).square().mean() + u.square().mean()
        found += [loss.detach(), *torch.autograd.grad(loss, [*model.parameters(), z])]
    return found


def test_a_physics_informed_loss_goes_to_pytorch_where_it_is_taken_again_and_again() -> None:
    plain, fast = pair(field)
    torch.testing.assert_close(physics(fast, 6), physics(plain, 6), **CLOSE)
    assert served(fast)
    (route,) = routes()
    assert route._rest > 0 and accelerated._resting[fast] is route
    # The calls that are left to PyTorch come to an end, and are twice as many then.
    torch.testing.assert_close(physics(fast, 80), physics(plain, 80), **CLOSE)
    assert route._next_rest == 4 * 64 and 100 < route._rest <= 128


def learned(model: nn.Module) -> nn.Module:
    return l2l.clone_module(model)


def monkeypatched(model: nn.Module) -> nn.Module:
    return higher.monkeypatch(model, copy_initial_weights=False)


def functional(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: mf.functional_call(model, dict(model.named_parameters()), (x,))


def per_step() -> nn.Module:
    return mf.convert_batch_norm(conv_net(), 2)


NORMS = pytest.mark.parametrize(
    ("make", "used"),
    [(conv_net, learned), (conv_net, monkeypatched), (per_step, nn.Module.train), (per_step, functional)],
)


@NORMS
def test_third_derivatives_go_on_where_norms_of_ours_are_left_to_pytorch(
    make: Callable[[], nn.Module], used: Callable[[nn.Module], Callable[[Tensor], Tensor]]
) -> None:
    def penalties(model: nn.Module, used: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> list[Tensor]:
        found, own = [], list(model.parameters())
        x, y, *_ = data(1)[0]
        for _ in range(4):
            loss = F.cross_entropy(used(model)(x), y)
            for _ in range(2):
                grads = torch.autograd.grad(loss, own, create_graph=True, allow_unused=True)
                loss = torch.stack([g.square().sum() for g in grads if g is not None]).sum()
            found += [loss.detach(), *torch.autograd.grad(loss, own)]
        return found

    plain, fast = pair(make)
    with plain_batch_norm(plain), mf.reference.norms_of_any_order():
        expected = penalties(plain, nn.Module.train)
    torch.testing.assert_close(penalties(fast, used), expected, rtol=1e-8, atol=1e-11)
    (route,) = routes()
    assert route._rest > 0


@NORMS
def test_a_graph_of_pytorchs_norms_outlives_a_pass_of_ours(
    make: Callable[[], nn.Module], used: Callable[[nn.Module], Callable[[Tensor], Tensor]]
) -> None:
    plain, fast = pair(make)
    x = data(1)[0][0]
    net = used(fast)
    with plainly(), pytorchs_norms():
        found = net(x)
    with torch.no_grad():
        net(x)  # moves the running statistics
    own = list(fast.parameters())
    expected = torch.autograd.grad(plain(x).square().sum(), list(plain.parameters()))
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), own), expected, **CLOSE)


def test_examples_that_lead_to_a_graph_of_their_own() -> None:
    """An embedding in front, and a network behind another."""
    results = []
    torch.manual_seed(0)
    table, front = nn.Embedding(9, 64).double(), nn.Linear(64, 64).double()
    for model in pair(mlp):
        mine = copy.deepcopy(table), copy.deepcopy(front)
        tokens = torch.arange(6) % 4
        h = mine[1](mine[0](tokens)).view(6, 1, 8, 8)
        loss = F.cross_entropy(model(h), tokens % WAYS)
        weights = [*mine[0].parameters(), *mine[1].parameters(), *model.parameters()]
        grads = torch.autograd.grad(loss, weights, create_graph=True)
        torch.stack([g.square().sum() for g in grads]).sum().backward()
        results.append([loss.detach(), *(g.detach() for g in grads), *(p.grad for p in weights)])
        assert model is not None
    torch.testing.assert_close(results[1], results[0], **CLOSE)
    assert [r.inputs for r in routes()] == [True]


@pytest.mark.parametrize("make", [conv_net, mlp, lambda: mlp(nn.GELU)])
def test_the_examples_alone_and_many_at_once(make: Callable[[], nn.Module]) -> None:
    def use(model: nn.Module) -> list[Tensor]:
        x = data(1)[0][0].requires_grad_()
        y = model(x)
        many = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
        (jacobian,) = torch.autograd.grad(y, x, many, is_grads_batched=True, retain_graph=True)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return [jacobian, first.detach(), second]

    plain, fast = pair(make)
    torch.testing.assert_close(use(fast), use(plain), **CLOSE)
    assert served(fast)


@pytest.mark.parametrize("make", [conv_net, critic, field])
def test_gradcheck(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = mf.accelerate(make().double())
    shape = (5, 2) if isinstance(model[0], nn.Linear) else (3, 1, 8, 8)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    names, values = zip(*model.named_parameters(), strict=True)
    # Biases in front of batch statistics have a gradient of exactly zero.
    values = [v.detach().clone().requires_grad_() for v in values]

    def call(x: Tensor, *given: Tensor) -> Tensor:
        made: Tensor = mf.reference.functional_call(model, dict(zip(names, given, strict=True)), (x,))
        return made

    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *values), fast_mode=True, atol=1e-4)
    assert served(model)


def test_outputs_of_any_shape() -> None:
    def images() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))

    plain, fast = pair(images)
    results = []
    for model in (plain, fast):
        x = data(1)[0][0]
        loss = model(x).square().mean()
        grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        torch.stack([g.square().sum() for g in grads]).sum().backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(results[1], results[0], **CLOSE)
    assert served(fast)
