"""Differentiable optimizers of ``compat.higher`` against ``torch.optim``, and their gradients by finite differences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.optim as O
from torch import Tensor, nn
from torch.testing import assert_close

import mamlpp_fast.compat.higher as higher
from mamlpp_fast.compat.higher import optim

STEPS = 4
SETTINGS = [
    (O.SGD, {}),
    (O.SGD, {"momentum": 0.9, "weight_decay": 0.1, "dampening": 0.3}),
    (O.SGD, {"momentum": 0.9, "nesterov": True}),
    (O.SGD, {"maximize": True}),
    (O.Adam, {"eps": 0.0}),
    (O.Adam, {"eps": 0.0, "betas": (0.5, 0.7), "weight_decay": 0.1, "amsgrad": True}),
    (O.Adam, {"eps": 0.0, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    (O.AdamW, {"eps": 0.0, "weight_decay": 0.1}),
    (O.RMSprop, {}),
    (O.RMSprop, {"momentum": 0.5, "centered": True, "weight_decay": 0.1}),
    (O.Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.2}),
    (O.Adadelta, {"weight_decay": 0.1}),
    (O.Adamax, {"weight_decay": 0.1}),
    (O.ASGD, {"t0": 1, "lambd": 0.01, "weight_decay": 0.1}),
    (O.Rprop, {}),
]
NAMED = [
    pytest.param(
        *s, id=s[0].__name__ + "-" + "-".join(s[1]), marks=pytest.mark.filterwarnings("ignore:Rprop uses")
    )
    for s in SETTINGS
]


@pytest.fixture
def _float64() -> Iterator[None]:
    """For ASGD of ``torch.optim``, which keeps its rate in a tensor of the default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def parameters() -> list[Tensor]:
    return [
        torch.randn(3, 2, dtype=torch.float64),
        torch.randn(4, dtype=torch.float64),
        torch.randn((), dtype=torch.float64),
    ]


def loss_of(params: list[Tensor]) -> Tensor:
    """Not symmetric in its parameters, and with a curvature everywhere."""
    return (
        sum(((p - 0.3 * i).sin() * (i + 1) + p.pow(4) / 8).sum() for i, p in enumerate(params))
        * params[2].exp()
    )


def differentiable(
    kind: type[O.Optimizer], settings: dict[str, Any], start: list[Tensor], **more: Any
) -> Any:
    leaves = [p.detach().clone().requires_grad_() for p in start]
    return optim.get_diff_optim(kind(leaves, lr=0.05, **settings), leaves, **more)


@pytest.mark.parametrize(("kind", "settings"), NAMED)
@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.usefixtures("_float64")
def test_values_are_those_of_torch_optim(
    kind: type[O.Optimizer], settings: dict[str, Any], warm: int
) -> None:
    """From scratch, and from the state of an optimizer that has made steps already."""
    theirs = [p.requires_grad_() for p in parameters()]
    opt = kind(theirs, lr=0.05, **settings)

    def step() -> None:
        opt.zero_grad()
        loss_of(theirs).backward()
        opt.step()

    for _ in range(warm):
        step()
    diffopt = optim.get_diff_optim(opt, theirs)
    ours = [p.detach().clone().requires_grad_() for p in theirs]
    for _ in range(STEPS):
        ours = diffopt.step(loss_of(ours), params=ours)
        step()
        assert_close([p.detach() for p in ours], [p.detach() for p in theirs], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "settings"), [n for n in NAMED if n.values[0] is not O.Rprop])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_steps_are_differentiable(
    kind: type[O.Optimizer], settings: dict[str, Any], one_by_one: bool
) -> None:
    """In the initial parameters and the learning rate, by finite differences; as one buffer and tensor by tensor."""
    start = [p.requires_grad_() for p in parameters()]
    rate = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)

    def unrolled(rate: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        lr = rate.expand(2) if one_by_one else rate
        fast = list(params)
        if one_by_one:  # shapes that a rate [2] fits
            fast[1], fast[2] = fast[1].view(2, 2), fast[2].expand(2)
            diffopt = differentiable(kind, settings, fast, override={"lr": [lr]})
            loss = lambda: loss_of([fast[0], fast[1].flatten(), fast[2].mean()])  # noqa: E731
        else:
            diffopt = differentiable(kind, settings, fast, override={"lr": [lr]})
            loss = lambda: loss_of(fast)  # noqa: E731
        for _ in range(2):
            fast = diffopt.step(loss(), params=fast)
        return tuple(fast)

    assert torch.autograd.gradcheck(unrolled, (rate, *start))


def test_every_setting_of_adam_is_differentiable() -> None:
    start = parameters()
    settings = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.05, 0.8, 0.9, 1e-2, 0.1)]

    def unrolled(lr: Tensor, beta1: Tensor, beta2: Tensor, eps: Tensor, decay: Tensor) -> tuple[Tensor, ...]:
        override = {"lr": [lr], "betas": [(beta1, beta2)], "eps": [eps], "weight_decay": [decay]}
        diffopt = differentiable(O.Adam, {}, start, override=override)
        fast = [p.detach().requires_grad_() for p in start]
        for _ in range(3):
            fast = diffopt.step(loss_of(fast), params=fast)
        return tuple(fast)

    assert torch.autograd.gradcheck(unrolled, settings)


def test_adam_s_eps_comes_before_the_bias_correction() -> None:
    p, g, eps = torch.tensor([1.0, 2.0]).double().requires_grad_(), torch.tensor([0.3, -2.0]).double(), 0.5
    (new,) = differentiable(O.Adam, {"eps": eps}, [p]).step((p * g).sum(), params=[p])
    mean, square = 0.1 * g, 0.001 * g * g
    size = 0.05 * (1 - 0.999) ** 0.5 / (1 - 0.9)
    assert_close(new.detach(), p.detach() - size * mean / (square.sqrt() + eps))


@pytest.mark.parametrize("kind", [O.Adam, O.RMSprop, O.Adagrad])
def test_a_zero_gradient_gives_no_nan(kind: type[O.Optimizer]) -> None:
    start = torch.randn(3, dtype=torch.float64, requires_grad=True)
    dead = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    fast = [start]
    diffopt = differentiable(kind, {"centered": True} if kind is O.RMSprop else {}, fast)
    for _ in range(2):
        fast = diffopt.step((fast[0].square() * dead).sum(), params=fast)
    (grad,) = torch.autograd.grad(fast[0].sum(), start)
    assert torch.isfinite(grad).all() and grad[1] == 1


@pytest.mark.parametrize("kind", [np.float32, np.float64, int])
def test_rates_of_other_types_of_numbers(kind: type[Any]) -> None:
    model = nn.Linear(3, 2).double()
    x, rate = torch.randn(4, 3, dtype=torch.float64), kind(1)
    parameters = list(model.parameters())
    with higher.innerloop_ctx(model, O.SGD(parameters, lr=rate), copy_initial_weights=False) as (fast, step):
        step.step(fast(x).square().mean())
        found = torch.autograd.grad(fast(x).square().mean(), parameters)
    grads = torch.autograd.grad(model(x).square().mean(), parameters, create_graph=True)
    moved = [p - float(rate) * g for p, g in zip(parameters, grads, strict=True)]
    expected = torch.autograd.grad(nn.functional.linear(x, *moved).square().mean(), parameters)
    assert_close(found, expected)


def test_groups_overrides_and_unused_parameters() -> None:
    a, b, unused = (p.requires_grad_() for p in parameters())
    opt = O.SGD([{"params": [b], "lr": 0.2}, {"params": [a, unused]}], lr=0.1)
    rates = [torch.tensor(r, dtype=torch.float64, requires_grad=True) for r in (0.3, 0.4)]
    diffopt = optim.get_diff_optim(opt, [a, b, unused])
    loss = a.sum() + (3 * b).sum()
    new = diffopt.step(loss, params=[a, b, unused], override={"lr": rates})
    assert_close(new, [a - 0.4, b - 0.3 * 3, unused])
    assert new[2] is unused
    grads = torch.autograd.grad(sum(p.sum() for p in new), rates)
    assert_close(grads, (torch.tensor(-12.0).double(), torch.tensor(-6.0).double()))
    # A step's override stays in force.
    again = diffopt.step(new[0].sum() + new[1].sum(), params=new)
    assert_close(again[1], new[1] - 0.3)
    with pytest.raises(ValueError, match=r"expected 1 or 2 values of 'lr'.* got 3"):
        diffopt.step(loss, params=new, override={"lr": [0.1, 0.2, 0.3]})
    with pytest.raises(ValueError, match="params: expected the parameters to update"):
        diffopt.step(loss)
    with pytest.raises(ValueError, match="reference_params: expected all parameters"):
        optim.get_diff_optim(opt, [a, b])


def test_gradient_callbacks_see_every_gradient() -> None:
    model = nn.Linear(2, 2).double()
    fmodel = higher.monkeypatch(model)
    seen: list[int] = []

    def doubled(grads: Any) -> list[Tensor | None]:
        seen.append(len(grads))
        return [None if g is None else 2 * g for g in grads]

    before = list(fmodel.parameters())
    diffopt = optim.get_diff_optim(
        O.SGD([model.weight], lr=0.1), model.parameters(), fmodel=fmodel, grad_callback=doubled
    )
    weight, bias = diffopt.step(fmodel(torch.ones(1, 2).double()).sum())
    assert_close(weight, before[0] - 0.2)
    assert bias is before[1]
    weight, _ = diffopt.step(
        weight.sum(), grad_callback=lambda grads: [0 * g if g is not None else g for g in grads]
    )
    assert_close(weight, before[0] - 0.2)
    assert seen == [2]


def test_settings_become_tensors_and_go_back() -> None:
    opt = O.Adam([{"params": [torch.zeros(2)]}, {"params": [torch.zeros(1)], "lr": 0.5}], lr=0.1)
    settings = optim.get_trainable_opt_params(opt)
    assert [v.item() for v in settings["lr"]] == pytest.approx([0.1, 0.5])
    assert all(isinstance(beta, Tensor) and beta.requires_grad for beta in settings["betas"][1])
    assert "params" not in settings and "foreach" not in settings
    optim.apply_trainable_opt_params(opt, {"lr": [torch.tensor(0.25)], "betas": settings["betas"]})
    assert [group["lr"] for group in opt.param_groups] == [0.25, 0.25]
    assert opt.param_groups[0]["betas"] == pytest.approx((0.9, 0.999))
    assert isinstance(opt.param_groups[0]["betas"][0], float)
    with pytest.raises(ValueError, match="what can replace"):
        optim.apply_trainable_opt_params(opt, {"betas": [torch.tensor(0.1)]})
    with pytest.raises(ValueError, match="expected 1 or 2 values of 'lr'"):
        optim.apply_trainable_opt_params(opt, {"lr": [torch.tensor(0.1)] * 3})


class Halving(O.SGD):
    pass


class DifferentiableHalving(optim.DifferentiableOptimizer):
    """As written for higher: it replaces the entries of each group."""

    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        for index, (group, grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
            for i, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                self.state[index][i]["steps"] = self.state[index][i].get("steps", 0) + 1
                group["params"][i] = p / 2 - group["lr"] * g


def test_optimizers_of_one_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="registered optimizer, got Halving"):
        higher.get_diff_optim(Halving([p], lr=0.1), [p])
    monkeypatch.setattr(optim, "_KINDS", dict(optim._KINDS))
    higher.register_optim(Halving, DifferentiableHalving)
    diffopt = higher.get_diff_optim(Halving([p], lr=0.1), [p])
    (new,) = diffopt.step(p.sum(), params=[p])
    assert_close(new, p / 2 - 0.1)
    assert diffopt.state[0][0]["steps"] == 1


def test_created_without_an_optimizer() -> None:
    fmodel = higher.monkeypatch(nn.Linear(2, 2))
    for diffopt in (
        higher.create_diff_optim(O.SGD, {"lr": 0.1}, fmodel=fmodel),
        higher.create_diff_optim(
            O.SGD, {"lr": 0.1}, params=[{"params": list(fmodel.parameters())}], fmodel=fmodel
        ),
    ):
        before = list(fmodel.parameters())
        after = diffopt.step(sum(p.sum() for p in before))
        assert_close(after, [p - 0.1 for p in before])
    with pytest.raises(ValueError, match="params, fmodel: expected one of them"):
        higher.create_diff_optim(O.SGD, {"lr": 0.1})


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(3, 2, sparse=True)
    diffopt = higher.get_diff_optim(O.Adam(table.parameters()), table.parameters(), track_higher_grads=False)
    with pytest.raises(RuntimeError, match="expected dense gradients"):
        diffopt.step(table(torch.tensor([0])).sum(), params=table.parameters())
