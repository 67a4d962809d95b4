"""What runs on the differentiable network underneath: `mf.adapt`, `autograd`, `compat.higher`; per-step norms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from front_end_helpers import Calls
from test_accelerate import CLOSE, WAYS, Scaled, conv_net, data, mlp
from torch import Tensor, nn

import mamlpp_fast as mf
from mamlpp_fast import reference
from mamlpp_fast import routes as module
from mamlpp_fast._modes import plainly
from mamlpp_fast.compat import higher
from mamlpp_fast.engine.fused.differentiable import DifferentiableNetwork
from mamlpp_fast.nn import plain_batch_norm

STEPS = 3


pytestmark = pytest.mark.usefixtures("nothing_accelerated")


def served() -> bool:
    """Whether there were calls, and all were served."""
    routes = list(module.kept.values())
    return bool(routes) and all(isinstance(r, DifferentiableNetwork) for r in routes)


def own_loss(prediction: Tensor, y: Tensor) -> Tensor:
    """One that the fused engine does not take."""
    return F.cross_entropy(prediction, y) + 0.1 * prediction.square().mean().sqrt()


def converted(rows: bool = True, statistics: bool = True) -> Callable[[], nn.Module]:
    return lambda: mf.convert_batch_norm(
        conv_net(slope=0.1), STEPS, per_step_affine=rows, per_step_stats=statistics
    )


NETS: dict[str, Callable[[], nn.Module]] = {
    "per step": converted(),
    "weights of all steps": converted(rows=False),
    "statistics of all steps": converted(statistics=False),
    "neither": converted(False, False),
    "PyTorch's norms": conv_net,
    "Conv4": lambda: mf.Conv4(1, WAYS, image_size=8, filters=4, stages=2, num_steps=STEPS),
    "own parameters": Scaled,
    "generic": lambda: mlp(nn.GELU),
}


def loop(
    model: nn.Module, adapt_norm: bool, first_order: bool, steps: int | None = None
) -> dict[str, Tensor]:
    """Meta-gradients and buffers of `mf.adapt`; in plain PyTorch where it is called so."""
    norms = {n for n, m in model.named_modules() if isinstance(m, reference.NORMS)}
    names = [(n, p) for n, p in model.named_parameters() if adapt_norm or n.rpartition(".")[0] not in norms]
    rates = mf.LSLR(names, STEPS, 0.2).double()
    total = torch.zeros((), dtype=torch.float64)
    for x, y, target_x, target_y in data():
        fast = mf.adapt(model, x, y, rates, loss_fn=own_loss, first_order=first_order, steps=steps)
        total = total + own_loss(mf.functional_call(model, fast, target_x), target_y)
    total.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert rates.rates.grad is not None
    return {**found, "rates": rates.rates.grad, **{f"buffer {n}": b for n, b in model.named_buffers()}}


def both(make: Callable[[], nn.Module], use: Callable[[nn.Module], dict[str, Tensor]]) -> None:
    torch.manual_seed(0)
    model = make().double()
    plain = copy.deepcopy(model)
    with plainly(), plain_batch_norm(plain):
        expected = use(plain)
    assert not module.kept
    found = use(model)
    assert served()
    same(found, expected, 1e-12, **CLOSE)


def same(found: dict[str, Tensor], expected: dict[str, Tensor], noise: float, **close: float) -> None:
    # A bias in front of batch norm has zeros for a gradient, or none, and rounding noise in plain PyTorch.
    left = [n for n, g in expected.items() if not n.startswith("buffer") and float(g.abs().max()) < noise]
    ours, theirs = ({n: g for n, g in side.items() if n not in left} for side in (found, expected))
    torch.testing.assert_close(ours, theirs, **close)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("adapt_norm", [False, True])
def test_adapt(name: str, adapt_norm: bool) -> None:
    both(NETS[name], lambda model: loop(model, adapt_norm, first_order=False))


def test_a_functional_call_is_of_the_kernels_where_they_serve_it() -> None:
    """And PyTorch's where they do not: with hooks, and under :func:`plainly`."""
    torch.manual_seed(0)
    model = NETS["per step"]().double()
    x = data(1)[0][0]
    given = {n: (p * 1.5).detach().requires_grad_() for n, p in model.named_parameters()}
    found = mf.functional_call(model, given, x)
    assert found.grad_fn.name() == "ForwardBackward"
    for other in (
        lambda: mf.functional_call(model, given, (), {"input": x}),
        lambda: plainly_called(model, given, x),
    ):
        torch.testing.assert_close(other(), found, **CLOSE)
    calls: list[Tensor] = []
    handle = model.register_forward_hook(lambda _, __, made: calls.append(made))
    made = mf.functional_call(model, given, (x,))
    handle.remove()
    assert calls == [made] and made.grad_fn.name() != "ForwardBackward"
    assert all(p is not given[n] for n, p in model.named_parameters())
    with pytest.raises(KeyError, match="expected names"):
        mf.functional_call(model, {"none": x}, x)


@pytest.mark.parametrize("call", [mf.functional_call, mf.reference.functional_call])
def test_parameters_and_buffers_may_be_given_apart(call: Any) -> None:
    """As to PyTorch's ``functional_call``."""
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 4)).double().eval()
    )
    x = data(1)[0][0]
    weights = {n: (p * 1.5).detach() for n, p in model.named_parameters()}
    buffers = {n: b + 1 for n, b in model.named_buffers()}
    expected = torch.func.functional_call(model, (weights, buffers), (x,))
    for given in ((weights, buffers), [buffers, weights], weights | buffers):
        torch.testing.assert_close(call(model, given, x), expected, **CLOSE)
    with pytest.raises(ValueError, match=r"each name in one mapping, got '0\.bias' in two"):
        call(model, (weights, weights), x)
    with pytest.raises(TypeError, match="expected tensors by name, got a Tensor"):
        call(model, list(weights.values()), x)


def plainly_called(model: nn.Module, given: dict[str, Tensor], x: Tensor) -> Tensor:
    with plainly():
        made: Tensor = mf.functional_call(model, given, x)
    assert made.grad_fn is not None and made.grad_fn.name() != "ForwardBackward"
    return made


@pytest.mark.parametrize("name", ["per step", "generic"])
def test_adapt_of_first_order_and_more_steps_than_rows(name: str) -> None:
    both(NETS[name], lambda model: loop(model, True, first_order=True, steps=STEPS + 2))


def test_rows_are_told_apart() -> None:
    """One program for all steps; each step's row has a gradient and statistics of its own."""
    torch.manual_seed(0)
    model = NETS["per step"]().double()
    found = loop(model, False, first_order=False)
    (route,) = module.kept.values()
    assert isinstance(route, DifferentiableNetwork)
    rows = found["1.weight"]
    assert len(rows) == STEPS and all(float(row.abs().max()) > 1e-6 for row in rows)
    assert not torch.equal(found["buffer 1.running_mean"][0], found["buffer 1.running_mean"][1])


@pytest.mark.parametrize("stats", ["batch", "running"])
def test_evaluation(stats: str) -> None:
    results = []
    torch.manual_seed(0)
    first = NETS["per step"]().double()
    for plain in (True, False):
        model = copy.deepcopy(first).eval()
        mf.set_eval_stats(model, stats)  # type: ignore[arg-type]
        x, y, _, _ = data(1)[0]
        made = mf.adapt(model, x, y, 0.1, steps=2) if not plain else None
        if made is None:
            with plainly():
                made = mf.adapt(model, x, y, 0.1, steps=2)
        results.append(made)
    torch.testing.assert_close(*results, **CLOSE)
    assert served() == (stats == "batch")


def test_the_statistics_of_evaluation_are_part_of_the_form() -> None:
    torch.manual_seed(0)
    model = mf.accelerate(NETS["per step"]().double()).eval()
    x = data(1)[0][0]
    by_batch = model(x)
    mf.set_eval_stats(model, "running")
    assert not torch.allclose(model(x), by_batch)
    assert "normalises with running statistics" in mf.acceleration(model)
    mf.set_eval_stats(model, "batch")
    torch.testing.assert_close(model(x), by_batch, **CLOSE)


def test_plain_batch_norm_is_plain() -> None:
    torch.manual_seed(0)
    model = mf.accelerate(NETS["per step"]().double())
    with plain_batch_norm(model):
        model(data(1)[0][0])
    assert "PyTorch's own operations" in mf.acceleration(model)
    model(data(1)[0][0])
    assert "one operation" in mf.acceleration(model)


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, own_loss])
@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("msl", [True, False])
def test_the_autograd_engine(
    loss_fn: Callable[[Tensor, Tensor], Tensor], second_order: bool, msl: bool
) -> None:
    config = mf.MAMLConfig(steps=STEPS, msl=msl, second_order=second_order, da_epoch=-1)
    batch = mf.EpisodeBatch(*(torch.stack(parts) for parts in zip(*data(), strict=True)))
    results = []
    for engine in ("reference", "autograd"):
        torch.manual_seed(0)
        model = NETS["Conv4"]()
        learner = mf.MAMLPlusPlus(model, config, engine=engine, precision="float64", loss_fn=loss_fn)  # type: ignore[arg-type]
        metrics = learner.meta_gradient(batch)
        grads = {n: p.grad for n, p in learner.model.named_parameters()}
        state = dict(learner.model.named_buffers()) | {"rates": learner.rates.rates.grad}
        results.append((metrics.task_losses, grads | state, learner.evaluate(batch).logits))
    torch.testing.assert_close(results[1], results[0], **CLOSE)
    assert served()


def script(model: nn.Module, fused: bool, kind: str, again: bool = False) -> dict[str, Tensor]:
    """higher's loop; ``again``: the fast weights are given with each call."""
    opt = getattr(torch.optim, kind)(model.parameters(), lr=0.05)
    for x, y, target_x, target_y in data():
        with higher.innerloop_ctx(model, opt, copy_initial_weights=False, fused=fused) as (fmodel, diffopt):
            for _ in range(STEPS):
                given = {"params": list(fmodel.parameters())} if again else {}
                diffopt.step(own_loss(fmodel(x, **given), y))
            own_loss(fmodel(target_x), target_y).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {f"buffer {n}": b for n, b in model.named_buffers()}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.last = nn.Linear(64, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.last(torch.tanh(self.second(torch.tanh(self.first(x.flatten(1))))))
        return made


SCRIPTS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64, WAYS),
    ),
    "per step": converted(),
    "own parameters": Scaled,
    "recurrent": lambda: Calls(
        lambda m, x: m.last(m.rows(x.squeeze(1))[0][:, -1]),
        rows=nn.GRU(8, 5, batch_first=True),
        last=nn.Linear(5, WAYS),
    ),
    "tied": Tied,
    "accelerated": lambda: mf.accelerate(mlp(nn.GELU)),
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("kind", ["SGD", "Adam"])
@pytest.mark.parametrize("again", [False, True])
def test_higher(name: str, kind: str, again: bool) -> None:
    torch.manual_seed(0)
    model = SCRIPTS[name]().double()
    plain = copy.deepcopy(model)
    with plainly():
        expected = script(plain, False, kind)
    assert not module.kept
    found = script(model, True, kind, again)
    assert served()
    close = {"rtol": 1e-7, "atol": 1e-9} if kind == "Adam" else CLOSE  # Adam divides by small gradients
    same(found, expected, 1e-9, **close)


def test_higher_has_one_program_for_all_tasks_and_steps_and_none_unfused() -> None:
    torch.manual_seed(0)
    model = SCRIPTS["conv"]().double()
    script(model, False, "SGD")
    assert not module.kept
    for _ in range(2):
        script(model, True, "SGD")
    assert len(module.kept) == 1


def test_a_functional_module_whose_attributes_change() -> None:
    torch.manual_seed(0)
    fmodel = higher.monkeypatch(Scaled().double())
    x = data(1)[0][0]
    before = fmodel(x)
    fmodel.power = 3.0  # type: ignore[assignment]
    assert not torch.allclose(fmodel(x), before)
    assert len(module.kept) == 2 and served()
