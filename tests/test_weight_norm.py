"""Weight norm in the inner loop, held to its formula: the second derivative of PyTorch's own operation is wrong."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import moved, noise
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import mamlpp_fast as mf

STEPS, RATE = 2, 0.1


def _old(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: nn.Module = nn.utils.weight_norm(module)
    return made


NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "parametrization": parametrizations.weight_norm,
    "hook": _old,
}


def model_of(norm: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(NORMS[norm](nn.Linear(6, 5)), nn.Tanh(), NORMS[norm](nn.Linear(5, 3))).double()


def written_out(held: dict[str, Tensor], x: Tensor) -> Tensor:
    """The model's formula, by its parameters' names in either form."""
    for layer in ("0", "2"):
        parts = {n.removeprefix(f"{layer}."): t for n, t in held.items() if n.startswith(layer)}
        g = parts.get("weight_g", parts.get("parametrizations.weight.original0"))
        v = parts.get("weight_v", parts.get("parametrizations.weight.original1"))
        assert g is not None and v is not None
        x = x @ (g * v / v.norm(dim=1, keepdim=True)).T + parts["bias"]
        x = x.tanh() if layer == "0" else x
    return x


def expected(
    model: nn.Module,
    batch: mf.EpisodeBatch,
    call: Callable[[dict[str, Tensor], Tensor], Tensor] = written_out,
) -> dict[str, Tensor]:
    own = dict(model.named_parameters())
    total = torch.zeros((), dtype=torch.float64)
    for task in batch:
        fast = dict(own)
        for _ in range(STEPS):
            fast = moved(F.cross_entropy(call(fast, task.support_x), task.support_y), fast, RATE)
        total = total + F.cross_entropy(call(fast, task.target_x), task.target_y)
    grads = torch.autograd.grad(total / batch.num_tasks, list(own.values()))
    return dict(zip(own, grads, strict=True))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("engine", ["reference", "autograd", "auto"])
def test_engines(norm: str, engine: str) -> None:
    model, batch = model_of(norm), noise(6)
    config = mf.MAMLConfig(steps=STEPS, inner_lr=RATE, msl=False, lslr=False)
    own = mf.MAMLPlusPlus(model_of(norm), config, engine=engine, precision="float64", device="cpu")  # type: ignore[arg-type]
    own.meta_gradient(batch)
    found = {n: p.grad for n, p in own.model.named_parameters()}
    torch.testing.assert_close(found, expected(model, batch), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_adapt(norm: str) -> None:
    model, batch = model_of(norm), noise(6)
    for task in batch:
        fast = mf.adapt(model, task.support_x, task.support_y, RATE, steps=STEPS)
        loss = F.cross_entropy(mf.reference.functional_call(model, fast, (task.target_x,)), task.target_y)
        (loss / batch.num_tasks).backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    torch.testing.assert_close(found, expected(model, batch), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("call", [mf.functional_call, mf.reference.functional_call, mf.reference.predicted])
def test_loops_of_ones_own(norm: str, call: Callable[..., Tensor]) -> None:
    """Of a model that the kernels leave to PyTorch: two linear layers."""
    model, batch = model_of(norm), noise(6)
    found = expected(model, batch, lambda held, x: call(model, held, (x,)))
    torch.testing.assert_close(found, expected(model, batch), rtol=1e-9, atol=1e-12)


def test_accelerate() -> None:
    model, batch = model_of("parametrization"), noise(6)
    fast = mf.accelerate(copy.deepcopy(model))
    found = expected(fast, batch, lambda held, x: mf.reference.functional_call(fast, held, (x,)))
    assert "one operation" in mf.acceleration(fast), mf.acceleration(fast)
    torch.testing.assert_close(found, expected(model, batch), rtol=1e-9, atol=1e-12)
