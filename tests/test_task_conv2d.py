"""Task-batched convolutions: every backend and form against float64 ``F.conv2d`` and its autograd."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal_on_any_threads, run_elsewhere
from op_helpers import backend_fixture
from torch import Tensor

from mamlpp_fast import _native
from mamlpp_fast.ops.task_conv2d import output_size
from mamlpp_fast.testing import backends, use_backend

ops = torch.ops.mamlpp_fast

# tasks, images, height, width, channels in, channels out, kernel, stride, padding
SHAPES: dict[str, tuple[Any, ...]] = {
    "omniglot-first": (2, 3, 28, 28, 1, 64, 3, 1, 1),
    "omniglot-14": (2, 3, 14, 14, 64, 64, 3, 1, 1),
    "omniglot-7": (3, 5, 7, 7, 64, 64, 3, 1, 1),
    "omniglot-3": (1, 7, 3, 3, 64, 64, 3, 1, 1),
    "imagenet-first": (1, 2, 20, 21, 3, 48, 3, 1, 1),
    "imagenet-wide": (1, 2, 13, 42, 48, 48, 3, 1, 1),
    "no-padding": (2, 2, 15, 14, 32, 48, 3, 1, 0),
    "one-more-than-tiles": (2, 3, 9, 13, 48, 32, 3, 1, 1),
    "other-remainders": (1, 2, 10, 7, 32, 32, 3, 1, 1),
    "row-of-tiles": (1, 3, 2, 20, 16, 64, 3, 1, 1),
    "column-of-tiles": (2, 2, 11, 3, 48, 16, 3, 1, 1),
    "short-tile-alone": (1, 9, 2, 2, 32, 16, 3, 1, 1),
    "few-channels": (2, 3, 7, 6, 3, 5, 3, 1, 1),
    "odd-channels": (5, 1, 9, 5, 17, 33, 3, 1, 1),
    "narrow": (1, 4, 12, 1, 6, 8, 3, 1, 1),
    "single-pixel": (4, 2, 1, 1, 8, 5, 3, 1, 1),
    "stride-2": (3, 2, 9, 6, 5, 7, 3, 2, 1),
    "stride-2-even": (2, 3, 8, 8, 16, 40, 3, 2, 1),
    "stride-2-first": (1, 3, 8, 7, 1, 20, 3, 2, 1),
    "stride-2-no-padding": (1, 2, 8, 9, 7, 6, 3, 2, 0),
    "stride-2-full-panel": (1, 5, 8, 7, 64, 64, 3, 2, 1),
    "stride-2-panel-of-two": (2, 3, 7, 6, 40, 32, 3, 2, 1),
    "pointwise": (2, 3, 6, 5, 24, 17, 1, 1, 0),
    "pointwise-stride-2": (2, 2, 7, 8, 6, 16, 1, 2, 0),
    "many-channels": (1, 1, 5, 4, 320, 160, 3, 1, 1),
    "few-outputs": (2, 3, 8, 9, 32, 5, 3, 1, 1),
    "few-outputs-5x3": (1, 2, 9, 8, 40, 3, (5, 3), 1, 1),
    "few-outputs-no-padding": (2, 2, 7, 9, 20, 6, 3, 1, 0),
    "5x5": (2, 2, 9, 7, 17, 32, 5, 1, 2),
    "5x5-first-stride-2": (1, 2, 11, 12, 3, 20, 5, 2, 2),
    "7x7": (2, 2, 8, 9, 16, 33, 7, 1, 3),
    "7x7-larger-than-the-image": (1, 3, 4, 3, 5, 6, 7, 1, 3),
    "4x4-stride-3": (1, 2, 11, 10, 6, 16, 4, 3, 1),
    "2x2-stride-2": (2, 3, 6, 8, 16, 8, 2, 2, 0),
    "sequence": (2, 3, 31, 1, 16, 32, (5, 1), 1, 2),
    "sequence-first": (2, 2, 40, 1, 1, 32, (5, 1), 2, 2),
    "flat-kernel": (1, 2, 5, 13, 8, 7, (1, 7), 1, 3),
    "tall-kernel": (1, 2, 13, 9, 3, 7, (7, 3), 1, 2),
}
# Odd images, one image, channels of every remainder, few channels in pairs, rows cut into chunks.
BFLOAT16_SHAPES = SHAPES | {
    "pairs-one-image": (1, 1, 5, 6, 4, 16, 3, 2, 1),
    "pairs-few-channels": (2, 3, 9, 7, 2, 34, 3, 1, 1),
    "pairs-remainder": (2, 5, 8, 9, 18, 70, 3, 2, 1),
    "pairs-pointwise": (1, 3, 7, 7, 64, 130, 1, 2, 0),
    "pairs-chunks": (1, 3, 20, 30, 22, 64, 3, 1, 1),
    "pairs-first": (1, 7, 31, 15, 4, 66, 3, 1, 0),
}
# What AMX takes: rows of a tile over pixels or over images, 16 or less; one, two and three tiles of channels; groups of
# images and chunks of positions to-weight; channels of several equal products, stride 2, no padding.
TILE_SHAPES = {
    "tiles-one-image": (2, 1, 3, 3, 64, 64, 3, 1, 1),
    "tiles-two-images": (1, 2, 17, 5, 48, 64, 3, 1, 1),
    "tiles-odd-width": (2, 3, 10, 21, 48, 48, 3, 1, 1),
    "tiles-four-images": (1, 4, 35, 33, 32, 16, 3, 1, 1),
    "tiles-smallest": (2, 5, 3, 3, 48, 64, 3, 1, 0),
    "tiles-many-images": (2, 37, 3, 5, 64, 48, 3, 1, 1),
    "tiles-groups": (1, 41, 7, 7, 48, 48, 3, 1, 1),
    "tiles-no-padding": (1, 5, 9, 11, 64, 80, 3, 1, 0),
    "tiles-small-kernel": (2, 3, 6, 9, 96, 32, 2, 1, 1),
    "tiles-pointwise": (1, 3, 7, 6, 16, 80, 1, 1, 0),
    "tiles-stride-2": (2, 5, 9, 12, 64, 48, 3, 2, 1),
    "tiles-pointwise-stride-3": (1, 4, 8, 7, 32, 32, 1, 3, 0),
    "tiles-single-pixel": (3, 2, 1, 1, 64, 16, 3, 1, 1),
    "tiles-column": (1, 3, 40, 1, 32, 48, 3, 1, 1),
}
BFLOAT16_SHAPES |= TILE_SHAPES
# What Triton's interpreter takes in time.
INTERPRETED = {
    "odd-3x3": (2, 2, 5, 7, 3, 5, 3, 1, 1),
    "dense-stride-2": (2, 1, 5, 6, 16, 32, 3, 2, 1),
    "one-channel-stride-2": (1, 2, 6, 5, 1, 17, 3, 2, 1),
    "dense-1x1-stride-2": (1, 2, 5, 5, 48, 16, 1, 2, 0),
    "1x1": (1, 4, 9, 8, 2, 3, 1, 1, 0),
    "dense-sequence": (1, 2, 9, 1, 16, 16, (5, 1), 1, 2),
    "5x5": (1, 2, 6, 7, 2, 3, (5, 5), 1, 2),
}
FEW = ("omniglot-14", "omniglot-7", "imagenet-first", "stride-2", "odd-channels")
native = pytest.mark.skipif("native" not in backends("task_conv2d"), reason="native library not loaded")
interpreted = pytest.mark.skipif("triton" not in backends("task_conv2d"), reason="no Triton interpreter")
ISA = _native.status().isa
backend = backend_fixture("task_conv2d", but="triton")


class Case:
    """Two operand triples of one shape and their float64 products."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        tasks, images, height, width, ci, co, kernel, self.stride, self.padding = shape
        kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        self.pads = tuple(self.padding if k > 1 else 0 for k in kernel)
        out = [
            output_size(size, k, self.stride, p)
            for size, k, p in zip((height, width), kernel, self.pads, strict=True)
        ]

        def pair(*size: int) -> list[Tensor]:
            return [torch.randn(size, dtype=dtype) for _ in range(2)]

        self.x = pair(tasks, images, height, width, ci)
        self.w = pair(tasks, *kernel, ci, co)
        self.g = pair(tasks, images, *out, co)

    def _exact(self, i: int) -> list[Tensor]:
        x, w, g = (t[i].double() for t in (self.x, self.w, self.g))
        x.requires_grad_()
        w.requires_grad_()
        y = torch.stack(
            [
                F.conv2d(a.permute(0, 3, 1, 2), b.permute(3, 2, 0, 1), None, self.stride, self.pads).permute(
                    0, 2, 3, 1
                )
                for a, b in zip(x, w, strict=True)
            ]
        )
        return [y.detach(), *torch.autograd.grad(y, (x, w), g)]

    def compare(self, check: Callable[[Tensor, Tensor], None], out: torch.dtype | None = None) -> None:
        """Calls check(result, float64 result) for the three products, without and with the second pair."""
        first, second = self._exact(0), self._exact(1)
        jobs = [(ops.task_conv2d, self.x, self.w), (ops.task_conv2d_to_input, self.g, self.w)]
        dtype = out or torch.promote_types(self.x[0].dtype, torch.float32)
        for k, (op, a, b) in enumerate([*jobs, (ops.task_conv2d_to_weight, self.x, self.g)]):
            for pair, exact in (((None, None), first[k]), ((a[1], b[1]), first[k] + second[k])):
                result = torch.full(first[k].shape, float("nan"), dtype=dtype)
                op(a[0], b[0], *pair, self.stride, self.padding, result)
                check(result, exact)


def relative(result: Tensor, exact: Tensor) -> float:
    """Largest error relative to the largest value; NaN counts as infinite."""
    error = ((result.double() - exact).abs().max() / exact.abs().max()).item()
    return error if error == error else float("inf")


def within_rounding(result: Tensor, exact: Tensor) -> None:
    assert relative(result, exact) < 3e-6


def exactly(result: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(result, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SHAPES)
def test_float64_is_exact(backend: str, name: str) -> None:
    def check(result: Tensor, exact: Tensor) -> None:
        torch.testing.assert_close(result, exact, rtol=1e-12, atol=1e-11)

    Case(SHAPES[name], torch.float64).compare(check)


@pytest.mark.parametrize("name", SHAPES)
def test_float32_error_is_rounding(backend: str, name: str) -> None:
    Case(SHAPES[name], torch.float32).compare(within_rounding)


@pytest.mark.parametrize("name", BFLOAT16_SHAPES)
def test_bfloat16_operands_are_summed_in_float32(backend: str, name: str) -> None:
    Case(BFLOAT16_SHAPES[name], torch.bfloat16).compare(within_rounding)


@native
@pytest.mark.parametrize("name", ["omniglot-14", "omniglot-7", "imagenet-wide"])
def test_winograd_rounds_twice_as_much_as_the_direct_form_at_most(name: str) -> None:
    """Root-mean-square errors: the largest one of a tensor is half luck.

    The direct form's are 2.4e-7 to 4.2e-7 (docs/derivations/task_conv2d.md), these 4.7e-7 to 5.6e-7; points 0, ±1, ±2
    and infinity would give 9e-7. PyTorch's are no yardstick: 1.2e-7 to 4e-7, by machine and product.
    """

    def check(result: Tensor, exact: Tensor) -> None:
        assert float((result.double() - exact).norm() / exact.norm()) <= 8e-7

    with use_backend("native"):
        Case(SHAPES[name], torch.float32).compare(check)


@interpreted
@pytest.mark.parametrize("name", INTERPRETED)
def test_gpu_kernels_are_exact_in_float64(name: str) -> None:
    with use_backend("triton"):
        Case(INTERPRETED[name], torch.float64).compare(exactly)


@interpreted
@pytest.mark.parametrize("name", ["odd-3x3", "dense-stride-2"])
def test_gpu_kernels_round_in_float32(name: str) -> None:
    with use_backend("triton"):
        Case(INTERPRETED[name], torch.float32).compare(
            lambda result, exact: torch.testing.assert_close(result, exact.float(), rtol=1e-5, atol=2e-5)
        )


# Rows that wrap around images smaller and larger than a step, of one row, column or pixel, smaller than their kernel.
MANY_STEPS = {
    "small-images": (2, 9, 3, 3, 3, 5, 3, 1, 1),
    "odd-images": (1, 3, 4, 7, 3, 5, 3, 1, 1),
    "dense-48": (1, 3, 5, 6, 48, 16, 3, 1, 1),
    "dense-column": (1, 5, 9, 1, 16, 16, (5, 1), 1, 2),
    "row": (1, 3, 1, 13, 2, 3, (1, 7), 1, 3),
    "single-pixel": (1, 40, 1, 1, 3, 5, 3, 1, 1),
    "7x7-larger-than-the-image": (1, 6, 4, 3, 2, 6, 7, 1, 3),
    "stride-2": (1, 6, 5, 6, 3, 5, 3, 2, 1),
}


@pytest.fixture
def fence(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], Tensor]:
    """Copies a tensor to between two stretches of NaN, which no kernel may so much as load from."""
    from triton.runtime import interpreter

    load, stretch = interpreter.InterpreterBuilder.create_masked_load, 4096
    fenced: list[tuple[int, int, int]] = []

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        at = pointers.data[mask.data]
        for begin, end, size in fenced:
            near = at[(at >= begin - stretch * size) & (at < end + stretch * size)]
            assert ((near >= begin) & (near < end)).all(), "a load beyond an operand"
        return load(self, pointers, mask, *rest)

    def copied(tensor: Tensor) -> Tensor:
        between = torch.full([tensor.numel() + 2 * stretch], torch.nan, dtype=tensor.dtype)[stretch:-stretch]
        fenced.append((between.data_ptr(), between.data_ptr() + tensor.nbytes, tensor.element_size()))
        return between.view(tensor.shape).copy_(tensor)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", create_masked_load)
    return copied


@interpreted
@pytest.mark.parametrize("name", MANY_STEPS)
def test_weights_gradients_are_exact_where_a_program_takes_many_steps(
    name: str, fence: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes as small as these are cut into pieces of one step each: here one program has all of them."""
    from mamlpp_fast.kernels import task_conv2d as kernels

    steps = []

    def whole(rows: int, programs: int, block: int, **_: int) -> tuple[int, int]:
        steps.append(-(-rows // block))
        return steps[-1] * block, 1

    monkeypatch.setattr(kernels, "split", whole)
    case = Case(MANY_STEPS[name], torch.float64)
    for operands in (case.x, case.w, case.g):
        operands[:] = map(fence, operands)
    with use_backend("triton"):
        case.compare(exactly)
    assert min(steps) >= 3


@interpreted
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=["to-float32", "to-bfloat16"])
def test_gpu_kernels_sum_bfloat16_operands_in_float32(out: torch.dtype) -> None:
    tolerance = 1e-5 if out == torch.float32 else 1e-2

    def check(result: Tensor, exact: Tensor) -> None:
        torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=10 * tolerance)

    with use_backend("triton"):
        Case((2, 1, 5, 6, 16, 32, 3, 1, 1), torch.bfloat16).compare(check, out)


@native
@pytest.mark.parametrize("tasks", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", [*FEW, "tiles-groups", "tiles-four-images", "stride-2-full-panel", "stride-2-panel-of-two"]
)
def test_any_number_of_threads_gives_the_same_bits(
    name: str, dtype: torch.dtype, tasks: int, own_threads: None
) -> None:
    case = Case((tasks, *BFLOAT16_SHAPES[name][1:]), dtype)
    results: list[list[Tensor]] = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append([])
        with use_backend("native"):
            case.compare(lambda result, exact: results[-1].append(result.clone()))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@native
def test_bfloat16_operands_at_any_address() -> None:
    """Half an element off, operands cannot be read in pairs."""
    x = torch.randn(1 + 2 * 3 * 7 * 7 * 16).bfloat16()[1:].view(2, 3, 7, 7, 16)
    w = torch.randn(2, 3, 3, 16, 8).bfloat16()
    out, same, wide = torch.empty(3, 2, 3, 7, 7, 8)
    with use_backend("native"):
        for a, b, result in ((x, w, out), (x.clone(), w, same), (x.float(), w.float(), wide)):
            ops.task_conv2d(a, b, None, None, 1, 1, result)
    assert torch.equal(out, wide)
    torch.testing.assert_close(out, same, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "w", "out", "options", "message"),
    [
        ((1, 2, 5, 5, 3), (1, 3, 3, 3, 4), (1, 2, 5, 4, 4), {}, "expected output"),
        ((1, 2, 5, 5, 3), (1, 3, 3, 2, 4), (1, 2, 5, 5, 4), {}, "expected output"),
        ((1, 2, 5, 5, 3), (1, 3, 3, 3, 4), (1, 2, 5, 5, 4), {"stride": 0}, "stride"),
        ((1, 2, 5, 5, 3), (1, 3, 3, 3, 4), (1, 2, 5, 5, 4), {"padding": 3}, "padding"),
        ((1, 2, 5, 5, 3), (1, 1, 1, 3, 4), (1, 2, 5, 5, 4), {"padding": 1}, "padding"),
        ((1, 2, 5, 5, 3), (1, 5, 2, 3, 4), (1, 2, 5, 5, 4), {"padding": 2}, "padding"),
        ((2, 5, 5, 3), (1, 3, 3, 3, 4), (1, 2, 5, 5, 4), {}, "expected activations"),
    ],
    ids=["output", "channels", "stride", "padding", "padding-1x1", "padding-of-one-axis", "dimensions"],
)
@pytest.mark.parametrize("name", backends("task_conv2d"))
def test_wrong_shapes_are_refused(
    name: str,
    x: tuple[int, ...],
    w: tuple[int, ...],
    out: tuple[int, ...],
    options: dict[str, int],
    message: str,
) -> None:
    operands = (torch.zeros(x), torch.zeros(w))
    form = (options.get("stride", 1), options.get("padding", 1))
    with use_backend(name), pytest.raises(ValueError, match=message):
        ops.task_conv2d(*operands, None, None, *form, torch.zeros(out))


@pytest.mark.parametrize("name", backends("task_conv2d"))
def test_a_second_pair_of_another_shape_is_refused(name: str) -> None:
    x, w, out = torch.zeros(1, 2, 4, 4, 3), torch.zeros(1, 3, 3, 3, 5), torch.zeros(1, 2, 4, 4, 5)
    with use_backend(name):
        with pytest.raises(ValueError, match="second operand pair: expected both tensors or neither"):
            ops.task_conv2d(x, w, x, None, 1, 1, out)
        with pytest.raises(ValueError, match="second operand pair: expected"):
            ops.task_conv2d(x, w, x[:, :1], w, 1, 1, out)


def gradients(case: Case, second: bool, *, both: bool) -> list[Tensor]:
    """Of input and weights, by one call or by two."""
    pairs = [(t[0], t[1] if second else None) for t in (case.x, case.w, case.g)]
    (x, u), (w, v), (g, h) = pairs
    dtype = torch.promote_types(x.dtype, torch.float32)
    gx, gw = (torch.full_like(t, torch.nan, dtype=dtype) for t in (x, w))
    rest = case.stride, case.padding
    if both:
        ops.task_conv2d_gradients(x, w, g, u, v, h, *rest, gx, gw)
    else:
        ops.task_conv2d_to_input(g, w, h, v, *rest, gx)
        ops.task_conv2d_to_weight(x, g, u, h, *rest, gw)
    return [gx, gw]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["odd-3x3", "dense-stride-2", "dense-1x1-stride-2", "dense-sequence"])
@pytest.mark.parametrize("by", [b for b in ("python", "triton") if b in backends("task_conv2d")])
def test_both_gradients_at_once_are_those_of_two_calls(by: str, name: str, dtype: torch.dtype) -> None:
    """In every bit: the products have been held against float64 above."""
    case = Case(INTERPRETED[name], dtype)
    with use_backend(by):
        for second in (False, True):
            one, two = (gradients(case, second, both=both) for both in (True, False))
            for a, b in zip(one, two, strict=True):
                assert not b.isnan().any()
                assert torch.equal(a, b)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["omniglot-14", "omniglot-3", "stride-2-full-panel", "sequence", "many-channels"]
)
def test_both_gradients_at_once_are_those_of_two_calls_on_any_number_of_threads(
    name: str, dtype: torch.dtype
) -> None:
    """Of one task on two threads each makes one of them, or both make either where the products are many."""
    tasks = (1, 40) if name == "omniglot-14" else SHAPES[name][:2]
    case = Case((*tasks, *SHAPES[name][2:]), dtype)
    with use_backend("native"):
        for second in (False, True):
            two = gradients(case, second, both=False)
            assert not any(t.isnan().any() for t in two)
            assert_equal_on_any_threads(lambda second=second: gradients(case, second, both=True))  # type: ignore[misc]
            torch.testing.assert_close(gradients(case, second, both=True), two, rtol=0, atol=0)


@pytest.mark.parametrize("by", [b for b in ("python", "native") if b in backends("task_conv2d")])
def test_gradients_that_do_not_belong_together_are_refused(by: str) -> None:
    case = Case(INTERPRETED["odd-3x3"], torch.float32)
    (x, u), (w, v), (g, h) = case.x, case.w, case.g
    rest = case.stride, case.padding
    gx, gw = torch.empty_like(x), torch.empty_like(w)
    alone = (x, w, g, None, None, None, *rest)
    with use_backend(by):
        for given in ((u, v, None), (u, None, h), (None, v, h), (None, None, h)):
            with pytest.raises(ValueError, match="second operand"):
                ops.task_conv2d_gradients(x, w, g, *given, *rest, gx, gw)
        for results in ((gx, w[:1]), (gx, w[..., :1]), (gx[:, :1], gw)):
            with pytest.raises(ValueError, match=r"expected (the shape|output)"):
                ops.task_conv2d_gradients(*alone, *results)
        with pytest.raises(ValueError, match="task_conv2d: expected output"):
            ops.task_conv2d_gradients(x, w, g[:, :1], None, None, None, *rest, gx, gw)


@interpreted
def test_pieces_are_counted_anew_in_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last piece of a tile adds up all, and leaves its counter at zero: a replay is a launch like the first."""
    from mamlpp_fast.kernels import _launch

    monkeypatch.setattr(_launch, "_counters", {})  # without those of earlier results at the same address
    x, g = (torch.randn(1, 3, 6, 6, c, dtype=torch.float64) for c in (5, 7))
    expected, gw = (torch.empty(1, 3, 3, 5, 7, dtype=torch.float64) for _ in range(2))
    with use_backend("python"):
        ops.task_conv2d_to_weight(x, g, None, None, 1, 1, expected)
    for _ in range(2):
        gw.fill_(torch.nan)
        with use_backend("triton"):
            ops.task_conv2d_to_weight(x, g, None, None, 1, 1, gw)
        torch.testing.assert_close(gw, expected, rtol=1e-12, atol=1e-12)
    (counts,) = (c for (_, address, _), c in _launch._counters.items() if address == gw.data_ptr())
    assert not counts.any()


@interpreted
def test_gpu_kernels_refuse_another_memory_order() -> None:
    x, w, out = torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 3, 3, 3, 5), torch.zeros(1, 2, 4, 4, 5)
    with use_backend("triton"), pytest.raises(ValueError, match="expected contiguous tensors"):
        ops.task_conv2d(x.permute(0, 1, 3, 4, 2), w, None, None, 1, 1, out)


@native
@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MAMLPP_FAST_ISA", "portable"),
        ("MAMLPP_FAST_ISA", "avx512"),
        ("MAMLPP_FAST_ISA", "avx512bf16"),
        ("MAMLPP_FAST_WINOGRAD", "0"),
        ("MAMLPP_FAST_WINOGRAD", "4"),
    ],
    ids=["portable", "avx512", "avx512bf16", "direct", "winograd4"],
)
def test_forms_chosen_by_environment(variable: str, value: str) -> None:
    """The other instruction sets, and every form at every shape it can take, in a process of its own."""
    run_elsewhere(__file__, **{variable: value})


def bfloat16_results() -> dict[str, list[tuple[Tensor, Tensor]]]:
    """(result, float64 result) of every product of every shape for tiles, from fixed seeds."""
    results: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name in ("omniglot-14", "omniglot-7", "omniglot-3", "imagenet-wide", "many-channels", *TILE_SHAPES):
        torch.manual_seed(0)
        results[name] = []
        Case(BFLOAT16_SHAPES[name], torch.bfloat16).compare(
            lambda result, exact, to=results[name]: to.append((result.clone(), exact))
        )
    return results


@pytest.mark.skipif(ISA != "amxbf16", reason=f"AMX not run: the native library's instruction set is {ISA}")
def test_tiles_are_as_exact_as_pairs(tmp_path: Path) -> None:
    """AMX here against vdpbf16ps in a process of its own."""
    saved = tmp_path / "pairs.pt"
    run_elsewhere(__file__, str(saved), MAMLPP_FAST_ISA="avx512bf16")
    pairs = torch.load(saved)
    with use_backend("native"):
        tiles = bfloat16_results()
    differ = False
    for name, results in tiles.items():
        for (ours, exact), (theirs, same) in zip(results, pairs[name], strict=True):
            assert torch.equal(exact, same)
            scale = exact.abs().max().item()
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * scale)
            own, other = ((t.double() - exact).square().mean().sqrt().item() for t in (ours, theirs))
            # Both pairs of operands are one chain here: longer than theirs where channels are many.
            assert own <= 1.5 * other, name
            differ |= not torch.equal(ours, theirs)
    assert differ, "both processes ran the same kernels"


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        torch.save(bfloat16_results(), sys.argv[1])
        return
    for name, shape in BFLOAT16_SHAPES.items():
        for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 2e-5), (torch.bfloat16, 2e-5)):
            errors: list[float] = []
            Case(shape, dtype).compare(
                lambda result, exact, errors=errors: errors.append(relative(result, exact))
            )
            if max(errors) > bound:
                raise SystemExit(f"{name} {dtype}: error {max(errors):.1e}, expected at most {bound:.0e}")


if __name__ == "__main__":
    main()
