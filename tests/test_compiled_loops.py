"""`torch.compile` over loops with an accelerated model: the second-order gradient of eager mode, or a refusal."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import maml_loss
from test_accelerate import CLOSE, Make, conv_net, data, mlp, pair
from torch import Tensor, func, nn

import mamlpp_fast as mf
from mamlpp_fast import routes as module
from mamlpp_fast.engine.executions import Executions

Grads = list[Tensor]
REFUSED = "does not currently support double backward"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    module.kept.clear()
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's, about itself
        yield
    torch._dynamo.reset()


def step(model: nn.Module, *task: Tensor) -> Tensor:
    return maml_loss(func.functional_call, model, task)


def meta(model: nn.Module, *task: Tensor) -> Grads:
    return list(torch.autograd.grad(step(model, *task), list(model.parameters())))


def by_func(model: nn.Module, x: Tensor, y: Tensor, target: Tensor, goal: Tensor) -> Grads:
    def loss(held: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(func.functional_call(model, held, (x,)), y)

    def total(held: dict[str, Tensor]) -> Tensor:
        fast = held
        for _ in range(2):
            grads = func.grad(loss)(fast, x, y)
            fast = {name: p - 0.1 * grads[name] for name, p in fast.items()}
        return loss(fast, target, goal)

    return list(func.grad(total)({n: p.detach() for n, p in model.named_parameters()}).values())


def compiled_loss(model: nn.Module, backend: str, *task: Tensor) -> Grads:
    loss = torch.compile(step, backend=backend)(model, *task)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def compiled_meta(model: nn.Module, backend: str, *task: Tensor) -> Grads:
    made: Grads = torch.compile(meta, backend=backend)(model, *task)
    return made


def compiled_model(model: nn.Module, backend: str, *task: Tensor) -> Grads:
    compiled: Any = torch.compile(model, backend=backend)
    return meta(compiled, *task)


def compiled_func(model: nn.Module, backend: str, *task: Tensor) -> Grads:
    made: Grads = torch.compile(by_func, backend=backend)(model, *task)
    return made


@pytest.mark.parametrize("use", [compiled_loss, compiled_meta, compiled_model, compiled_func])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("make", [mlp, lambda: conv_net(track_running_stats=False)], ids=["mlp", "conv"])
def test_second_order_is_eagers_or_refused(make: Make, backend: str, use: Callable[..., Grads]) -> None:
    plain, fast = pair(make)
    task = data(1)[0]
    expected = meta(plain, *task)
    refused = None
    try:
        found = use(fast, backend, *task)
    except RuntimeError as error:
        refused = str(error)
    if refused is None:
        torch.testing.assert_close(found, expected, **CLOSE)
    else:
        assert REFUSED in refused and backend != "eager" and use is not compiled_func


def test_eager_calls_are_served_beside_compiled_ones() -> None:
    plain, fast = pair(mlp)
    task = data(1)[0]
    torch.testing.assert_close(compiled_func(fast, "eager", *task), meta(plain, *task), **CLOSE)
    assert "one operation" not in mf.acceleration(fast)
    torch.testing.assert_close(meta(fast, *task), meta(plain, *task), **CLOSE)
    assert "one operation" in mf.acceleration(fast)


class _Gated(nn.Module):
    """Has a function compiled that a block of it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 12), nn.Linear(6, 3)
        self.gate = _gate

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gate(*self.body(x).chunk(2, 1)))


@torch.compile(backend="eager")
def _gate(x: Tensor, y: Tensor) -> Tensor:
    return F.silu(x) * y


def test_a_learner_is_not_compiled_with_its_models_functions() -> None:
    """What watches a forward was compiled anew for each operator, up to the compiler's limit."""
    torch.manual_seed(0)
    sides = ((torch.randn(2, 4, 4).double(), torch.randint(3, (2, 4))) for _ in range(2))
    batch = mf.EpisodeBatch(*(t for side in sides for t in side), by_class=False)
    losses = []
    for engine in ("auto", "reference"):
        torch.manual_seed(1)
        config = mf.MAMLConfig(steps=2)
        learner = mf.MAMLPlusPlus(_Gated(), config, engine=engine, precision="float64")  # type: ignore[arg-type]
        losses.append(learner.meta_gradient(batch).task_losses)
    torch.testing.assert_close(*losses, **CLOSE)
    watch = Executions.__torch_dispatch__.__code__
    frames: Any = torch._C._dynamo.eval_frame
    assert not frames._debug_get_cache_entry_list(watch)
