"""Smooth functions with two derivatives: every backend and instruction set against PyTorch and its autograd."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_equal_on_any_threads, run_elsewhere
from op_helpers import backend_fixture, opcheck, pointwise_functions
from torch import Tensor

from mamlpp_fast.ops.pointwise import FUNCTIONS
from mamlpp_fast.testing import backends

ops = torch.ops.mamlpp_fast
A = 1.7
THEIRS = pointwise_functions(A)
NATIVE = "native" in backends("pointwise")


backend = backend_fixture("pointwise", poisoned=True)


def found(name: str, x: Tensor, g_dot: Tensor, g: Tensor, u: Tensor) -> list[Tensor]:
    """f(x), g f'(x) and the tangent of that."""
    outs = [torch.full_like(x, torch.nan) for _ in range(3)]
    number = FUNCTIONS.index(name)
    ops.pointwise(x, number, A, outs[0])
    ops.pointwise_slope(x, g, number, A, outs[1])
    ops.pointwise_bend(x, g_dot, g, u, number, A, outs[2])
    return outs


def expected(name: str, x: Tensor, g_dot: Tensor, g: Tensor, u: Tensor) -> list[Tensor]:
    x, g = x.clone().requires_grad_(), g.clone().requires_grad_()
    y = THEIRS[name](x)
    (gx,) = torch.autograd.grad(y, x, g, create_graph=True)
    bend, slope = torch.autograd.grad(gx, (x, g), u)
    return [y.detach(), gx.detach(), bend + g_dot * slope / u]


def inputs(size: int, dtype: torch.dtype, scale: float = 2.0) -> list[Tensor]:
    x, *others = (torch.randn(size, dtype=dtype) for _ in range(4))
    return [x * scale, *others]


def test_every_function_is_compared() -> None:
    assert tuple(THEIRS) == FUNCTIONS


@pytest.mark.parametrize("size", [1, 7, 64, 20001])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_float64(backend: str, name: str, size: int) -> None:
    given = inputs(size, torch.float64)
    for result, exact in zip(found(name, *given), expected(name, *given), strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0, 40.0])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_rounds_a_few_times(backend: str, name: str, scale: float) -> None:
    """Of each order at most 8 units in the last place of the numbers that it is a sum of."""
    given = inputs(5003, torch.float32, scale)
    wide = [t.double() for t in given]
    x, g_dot, g, u = wide
    a = A if name in ("elu", "sine", "cosine") else 1.0
    # Arguments of sines and exponentials are rounded themselves; far out the exponential is zero.
    inner = (a * x).abs() if name in ("sine", "cosine") else (x * x).clamp(max=16)
    turns = 1 + (inner if name in ("sine", "cosine", "gelu", "gelu_tanh") else 0 * x)
    sizes = [1 + x.abs(), a * g.abs(), 2 * a * g_dot.abs() + 4 * a * a * (g * u).abs()]
    for result, exact, size in zip(found(name, *given), expected(name, *wide), sizes, strict=True):
        assert bool(((result.double() - exact).abs() <= 2**-21 * turns * size).all())


@pytest.mark.parametrize("name", ["tanh", "elu", "sine", "gelu", "silu"])
def test_small_numbers_keep_their_digits(backend: str, name: str) -> None:
    x = torch.randn(999) * 1e-4
    one = torch.ones_like(x)
    exact = expected(name, *(t.double() for t in (x, one, one, one)))[0]
    torch.testing.assert_close(found(name, x, one, one, one)[0].double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_large_numbers_and_nan(backend: str, name: str, dtype: torch.dtype) -> None:
    x = torch.tensor([-1e30, -3e3, -95.0, -88.0, 88.0, 88.9, 95.0, 3e3, 1e4, 1e30, torch.nan], dtype=dtype)
    one = torch.ones_like(x)
    results = found(name, x, one, one, one)
    assert all(r[-1].isnan() for r in results)
    assert all(r[:-1].isfinite().all() for r in results)
    if name not in ("sine", "cosine"):
        wide = expected(name, *(t.double() for t in (x, one, one, one)))  # 1e30 cubed is no float32
        for result, exact in zip(results[:2], wide[:2], strict=True):
            torch.testing.assert_close(result[:-1], exact[:-1].to(dtype), rtol=1e-5, atol=1e-30)
    else:
        small = x[1:9] if dtype is torch.float32 else x[:9]
        value = torch.sin(A * small) if name == "sine" else torch.cos(A * small)
        torch.testing.assert_close(results[0][1:9], value[-8:], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not NATIVE, reason="no native library")
def test_results_do_not_depend_on_threads() -> None:
    given = inputs(70001, torch.float32)
    assert_equal_on_any_threads(lambda: [found(name, *given) for name in FUNCTIONS])


def test_wrong_arguments_are_refused(backend: str) -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="pointwise: expected"):
        ops.pointwise(x, 0, 1.0, torch.zeros(4))


def test_opcheck() -> None:
    x, g, u, out = torch.randn(4, 6)
    samples = {
        "pointwise": (x, 4, 1.0, out),
        "pointwise_slope": (x, g, 4, 1.0, out),
        "pointwise_bend": (x, g, g.clone(), u, 4, 1.0, out),
    }
    opcheck(samples)


@pytest.mark.skipif(not NATIVE, reason="native library not loaded")
@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_other_instruction_sets(level: str) -> None:
    """In a process of its own."""
    run_elsewhere(__file__, MAMLPP_FAST_ISA=level)


def main() -> None:
    torch.set_num_threads(1)
    for name in FUNCTIONS:
        test_float64("native", name, 1003)
        test_float32_rounds_a_few_times("native", name, 5.0)
        test_large_numbers_and_nan("native", name, torch.float32)


if __name__ == "__main__":
    main()
