"""float32 products as three of TF32: their error on tensor cores at their worst, modelled; where they are taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mamlpp_fast._modes import float32_products
from mamlpp_fast.testing import backends, use_backend

if "triton" not in backends("task_conv2d"):
    pytest.skip("no Triton interpreter", allow_module_level=True)

from mamlpp_fast.kernels import task_conv2d as kernels
from triton.runtime import interpreter

ops = torch.ops.mamlpp_fast
# Tasks, images, height, width, channels of input and of output, kernel, step, padding: all that Omniglot's and
# mini-ImageNet's layers sum over, sizes that fill no tile, several blocks of channels with and without a rest.
SHAPES = {
    "omniglot-3": (1, 6, 3, 3, 64, 64, 3, 1, 1),
    "48": (2, 2, 3, 5, 48, 48, 3, 1, 1),
    "stride-2": (2, 1, 5, 6, 16, 32, 3, 2, 1),
    "wide": (1, 2, 2, 3, 80, 96, 1, 1, 0),
    "sequence": (1, 2, 9, 1, 16, 16, (5, 1), 1, 2),
}
TF32_BITS = np.uint32(0xFFFFE000)


def cut(sums: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float64 to float32, towards zero."""
    near = sums.astype(np.float32)
    return np.where(np.abs(near) > np.abs(sums), np.nextafter(near, np.float32(0)), near)


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Products of TF32 as the least exact tensor cores take them; counts products by precision.

    13 bits are cut off operands, and every sum of eight products and what there was is cut to float32.
    """
    multiply = interpreter.InterpreterBuilder.create_dot
    found: Counter[str] = Counter()

    def create_dot(self: Any, a: Any, b: Any, total: Any, precision: Any, *rest: Any) -> Any:
        found[precision.name] += 1
        if precision.name != "TF32":
            return multiply(self, a, b, total, precision, *rest)
        left, right = (
            (t.data.view(np.uint32) & TF32_BITS).view(np.float32).astype(np.float64) for t in (a, b)
        )
        sums = total.data
        with np.errstate(invalid="ignore", over="ignore"):
            for k in range(0, left.shape[1], 8):
                sums = cut(sums + left[:, k : k + 8] @ right[k : k + 8])
        return interpreter.TensorHandle(sums, total.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    with use_backend("triton"):
        yield found


def orders(name: str) -> Iterator[tuple[Callable[..., None], list[Tensor], Tensor]]:
    """The three products of a shape: operation, both pairs of operands, room for the result."""
    tasks, images, height, width, ci, co, kernel, stride, padding = SHAPES[name]
    kh, kw = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    out = [
        (size + 2 * (padding if k > 1 else 0) - k) // stride + 1 for size, k in ((height, kh), (width, kw))
    ]

    def pair(*size: int) -> list[Tensor]:
        return [torch.randn(size) for _ in range(2)]

    x, w, g = (
        pair(tasks, images, height, width, ci),
        pair(tasks, kh, kw, ci, co),
        pair(tasks, images, *out, co),
    )
    for op, a, b, like in (
        (ops.task_conv2d, x, w, g),
        (ops.task_conv2d_to_input, g, w, x),
        (ops.task_conv2d_to_weight, x, g, w),
    ):
        yield op, [a[0], b[0], a[1], b[1]], torch.full_like(like[0], torch.nan)


def exact(op: Callable[..., None], operands: list[Tensor], like: Tensor, name: str) -> Tensor:
    out = torch.empty_like(like, dtype=torch.float64)
    with use_backend("python"):
        op(*(t.double() for t in operands), *SHAPES[name][-2:], out)
    return out


def worst(name: str) -> float:
    """Largest error of the three products, as a share of the sum of the absolute values of what is summed."""
    found = 0.0
    for op, operands, out in orders(name):
        op(*operands, *SHAPES[name][-2:], out)
        scale = exact(op, [t.abs() for t in operands], out, name)
        share = (out.double() - exact(op, operands, out, name)).abs() / scale
        assert not share.isnan().any()
        found = max(found, float(share.max()))
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_their_error_is_near_float32s(tensor_cores: Counter[str], name: str) -> None:
    assert worst(name) < 1e-6
    assert tensor_cores["TF32"] > 0
    assert tensor_cores["TF32"] % 3 == tensor_cores["IEEE"] == 0


def test_one_product_errs_a_hundred_times_as_much(tensor_cores: Counter[str]) -> None:
    """So the model does cut operands."""
    with float32_products(torch.device("cuda"), tf32=True):
        assert worst("48") > 1e-4


def test_exact_products_can_be_had(tensor_cores: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMLPP_FAST_PRODUCTS", "ieee")
    assert worst("stride-2") < 1e-6
    assert set(tensor_cores) == {"IEEE"}
    monkeypatch.setenv("MAMLPP_FAST_PRODUCTS", "exact")
    with pytest.raises(ValueError, match="MAMLPP_FAST_PRODUCTS: expected tf32x3 or ieee, got 'exact'"):
        worst("stride-2")


def test_where_they_are_taken() -> None:
    """Dense float32 where TF32's rate is more than three times float32's; not on a desktop's GPU."""
    taken = {
        arch: kernels._precision(torch.float32, True, arch) for arch in (75, 80, 86, 89, 90, 100, 103, 120)
    }
    assert [arch for arch, precision in taken.items() if precision == "tf32x3"] == [80, 90, 100, 103]
    assert kernels._precision(torch.float32, False, 90) == "ieee"
    for dtype in (torch.float64, torch.bfloat16):
        assert kernels._precision(dtype, True, 90) == "ieee"


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, torch.finfo(torch.float32).max])
def test_what_is_not_finite_stays_so(tensor_cores: Counter[str], value: float) -> None:
    """And nothing else becomes it: results that a bad operand has no part in are as exact as ever."""
    name = "stride-2"
    for op, operands, out in orders(name):
        for i in (0, 1):
            spoilt = [t.clone() for t in operands]
            spoilt[i].view(-1)[7] = value
            with np.errstate(invalid="ignore", over="ignore"):
                op(*spoilt, *SHAPES[name][-2:], out)
            expected = exact(op, operands, out, name)
            touched = exact(op, spoilt, out, name) != expected
            assert touched.any()
            assert not out[touched].isfinite().any()
            others = out.isfinite()
            assert_close(out[others].double(), expected[others], rtol=1e-5, atol=1e-5)
            assert others.any()


def test_the_largest_that_round_to_a_number_are_multiplied(tensor_cores: Counter[str]) -> None:
    name = "stride-2"
    for op, operands, out in orders(name):
        operands = [operands[0].clone(), operands[1] * 1e-3, *operands[2:]]
        operands[0].view(-1)[3] = torch.finfo(torch.float32).max * (1 - 2**-11)
        op(*operands, *SHAPES[name][-2:], out)
        expected = exact(op, operands, out, name)
        assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
