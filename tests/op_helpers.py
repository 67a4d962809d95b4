"""What the tests of the operations share: a backend to run on, tangents by autograd, comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mamlpp_fast.ops._library import OPERATIONS
from mamlpp_fast.testing import backends, use_backend

MOVING = {"gamma": ("gamma",), "beta": ("beta",), "both": ("gamma", "beta")}


def pointwise_functions(a: float) -> dict[str, Callable[[Tensor], Tensor]]:
    """PyTorch's own of ``mamlpp_fast.ops.pointwise.FUNCTIONS``, with the number that some of them take."""
    return {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "silu": F.silu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "elu": lambda x: F.elu(x, a),
        "sine": lambda x: torch.sin(a * x),
        "cosine": lambda x: torch.cos(a * x),
    }


def backend_fixture(operation: str, *, but: str = "", poisoned: bool = False) -> Any:
    """A fixture `backend`: once on every backend that serves the operation here; on memory full of NaN if asked."""

    @pytest.fixture(params=[b for b in backends(operation) if b != but], name="backend")
    def fixture(request: pytest.FixtureRequest) -> Iterator[str]:
        if poisoned:
            request.getfixturevalue("poisoned_memory")
        with use_backend(request.param):
            yield request.param

    return fixture


def opcheck(samples: Mapping[str, tuple[Any, ...]], moving: Sequence[Tensor] = ()) -> None:
    """torch's own check of operations, on arguments of each; with `moving`, rows of γ and β, of tangents again."""
    for name, sample in samples.items():
        torch.library.opcheck(OPERATIONS[name].overload, sample)
        if len(moving) and name.endswith("tangent"):
            rows = moving[:1] if name.endswith("backward_tangent") else moving  # γ's alone
            torch.library.opcheck(OPERATIONS[name].overload, (*sample, *rows))


def tangents(directions: Mapping[str, tuple[Tensor, Mapping[Tensor, Tensor]]]) -> dict[str, Tensor]:
    """Derivatives of values along directions of what they depend on: those of their gradients by their cotangent."""
    found = {}
    for name, (value, along) in directions.items():
        cotangent = torch.zeros_like(value).requires_grad_()
        pulled = torch.autograd.grad(value, list(along), cotangent, create_graph=True, allow_unused=True)
        product = sum((p * d).sum() for p, d in zip(pulled, along.values(), strict=True) if p is not None)
        (found[name],) = torch.autograd.grad(product, cotangent, retain_graph=True)  # type: ignore[arg-type]
    return found


def wide(case: Any) -> Any:
    """A copy of a case with its floating-point tensors in float64, those in dictionaries too."""

    def widened(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: widened(v) for key, v in value.items()}
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    exact = type(case).__new__(type(case))
    exact.__dict__ = widened(case.__dict__)
    exact.dtype = torch.float64
    return exact


def assert_orders(case: Any, tolerance: float, *, scaled: bool = True) -> None:
    """All results of a case by the operations are those by autograd.

    `scaled`: relative to the largest value of each result where that is above 1.
    """
    found, expected = case.run(), case.expected()
    for name, value in found.items():
        scale = max(1.0, float(expected[name].abs().max())) if scaled else 1.0
        torch.testing.assert_close(
            value,
            expected[name],
            rtol=tolerance,
            atol=tolerance * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_errs_at_most_twice_as_much_as_pytorch(case: Any, *, but: tuple[str, ...] = ()) -> None:
    """A case in float32 against float64, beside PyTorch's own operations in float32."""
    ours, theirs, exact = case.run(), case.expected(), wide(case).expected()
    for name in ours.keys() & exact.keys() - set(but):
        value = exact[name]
        limit = 2 * (theirs[name].double() - value).abs().max() + 1e-6 * value.abs().max()
        assert (ours[name].double() - value).abs().max() <= limit, name


def assert_double_backward(case: Any, weights: str, plain: Callable[..., Tensor]) -> None:
    """The tangents are the double backward, in every argument; nothing moves gy.

    Cotangents of the gradients of the weights (or z), γ and β in the places of the directions; `weights` names those.
    """
    case.gamma[:, 2], case.gy_dot[:] = 0, 0
    moving, tangent = (case.z, case.u) if weights == "z" else (case.w, case.v)
    inputs = [t.clone().requires_grad_() for t in (case.gy, moving, case.gamma, case.beta)]
    gradients = torch.autograd.grad(plain(*inputs[1:]), inputs[1:], inputs[0], create_graph=True)
    expected = torch.autograd.grad(gradients, inputs[:3], (tangent, case.gamma_dot, case.beta_dot))
    found = case.run()
    for name, value in zip(("uy", f"g{weights}_dot", "ggamma_dot"), expected, strict=True):
        tolerance = 1e-11 if weights == "z" else 1e-10 * max(1.0, float(value.abs().max()))
        torch.testing.assert_close(found[name], value, rtol=min(tolerance, 1e-10), atol=tolerance)
    assert torch.equal(found["gbeta_dot"], torch.zeros_like(found["gbeta_dot"]))


def assert_shared_directions(case: Any) -> None:
    """A direction [C] is the one of every task."""
    case.gamma_dot, case.beta_dot = case.gamma_dot[0], case.beta_dot[0]
    shared = case.run()
    case.gamma_dot, case.beta_dot = (row.expand(case.rows).clone() for row in (case.gamma_dot, case.beta_dot))
    for name, value in case.run().items():
        assert torch.equal(shared[name], value), name
