"""The Triton kernels of the task-batched convolutions, interpreted on the CPU, against the closed forms."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mamlpp_fast import testing
from mamlpp_fast.ops import task_conv2d as op

if "triton" not in testing.backends("task_conv2d"):
    pytest.skip(
        "no Triton interpreter: TRITON_INTERPRET is not 1 or triton is absent", allow_module_level=True
    )

# tasks, images, height, width, channels in and out, kernel, stride
CASES = [
    pytest.param((2, 2, 5, 7, 3, 5, 3, 1), id="odd-3x3"),
    pytest.param((2, 1, 5, 6, 16, 32, 3, 2), id="dense-stride-2"),
    pytest.param((1, 2, 6, 5, 1, 17, 3, 2), id="one-channel-stride-2"),
    pytest.param((1, 2, 5, 5, 48, 16, 1, 2), id="dense-1x1-stride-2"),
    pytest.param((1, 4, 9, 8, 2, 3, 1, 1), id="1x1"),
    pytest.param((1, 2, 9, 1, 16, 16, (5, 1), 1), id="dense-sequence"),
    pytest.param((1, 2, 6, 7, 2, 3, (5, 5), 1), id="5x5"),
]


def _products(
    case: tuple[Any, ...], *, pair: bool, dtype: torch.dtype, out: torch.dtype | None = None
) -> dict[str, Tensor]:
    torch.manual_seed(5)
    tasks, images, height, width, ci, co, kernel, stride = case
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    padding = kernel[0] // 2
    oh, ow = (
        op.output_size(s, k, stride, padding if k > 1 else 0)
        for s, k in zip((height, width), kernel, strict=True)
    )
    x, u = (torch.randn(tasks, images, height, width, ci, dtype=torch.float64).to(dtype) for _ in range(2))
    w, v = (torch.randn(tasks, *kernel, ci, co, dtype=torch.float64).to(dtype) for _ in range(2))
    g, c = (torch.randn(tasks, images, oh, ow, co, dtype=torch.float64).to(dtype) for _ in range(2))
    kind = out or dtype
    y, gx, gw = (torch.full(t.shape, torch.nan, dtype=kind) for t in (g, x, w))
    options = {"stride": stride, "padding": padding}
    op.task_conv2d(x, w, y, second=(u, v) if pair else None, **options)
    op.task_conv2d_to_input(g, w, gx, second=(c, v) if pair else None, **options)
    op.task_conv2d_to_weight(x, g, gw, second=(u, c) if pair else None, **options)
    return {"forward": y, "to_input": gx, "to_weight": gw}


@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
@pytest.mark.parametrize("case", CASES)
def test_products_equal_closed_form_in_float64(case: tuple[Any, ...], pair: bool) -> None:
    with testing.use_backend("python"):
        expected = _products(case, pair=pair, dtype=torch.float64)
    with testing.use_backend("triton"):
        actual = _products(case, pair=pair, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES[:2])
def test_float32_is_near_float64(case: tuple[Any, ...]) -> None:
    with testing.use_backend("triton"):
        actual = _products(case, pair=True, dtype=torch.float32)
    with testing.use_backend("python"):
        expected = _products(case, pair=True, dtype=torch.float32)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=["to-float32", "to-bfloat16"])
def test_bfloat16_operands_are_summed_in_float32(out: torch.dtype) -> None:
    with testing.use_backend("triton"):
        actual = _products((2, 1, 5, 6, 16, 32, 3, 1), pair=True, dtype=torch.bfloat16, out=out)
    with testing.use_backend("python"):
        expected = _products((2, 1, 5, 6, 16, 32, 3, 1), pair=True, dtype=torch.bfloat16, out=torch.float32)
    tolerance = 1e-5 if out == torch.float32 else 1e-2
    torch.testing.assert_close(
        {k: v.float() for k, v in actual.items()}, expected, rtol=tolerance, atol=10 * tolerance
    )


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    x, w, out = torch.zeros(1, 2, 4, 4, 3), torch.zeros(1, 3, 3, 3, 5), torch.zeros(1, 2, 4, 3, 5)
    with testing.use_backend("triton"), pytest.raises(ValueError, match="expected output"):
        op.task_conv2d(x, w, out)


def test_other_memory_order_is_refused() -> None:
    x, w, out = torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 3, 3, 3, 5), torch.zeros(1, 2, 4, 4, 5)
    with testing.use_backend("triton"), pytest.raises(ValueError, match="expected contiguous tensors"):
        op.task_conv2d(x.permute(0, 1, 3, 4, 2), w, out)


def test_pieces_are_counted_anew_in_every_launch() -> None:
    """The last piece of a tile adds up all, and leaves its counter at zero: a replay is a launch like the first."""
    from mamlpp_fast.kernels import _launch

    torch.manual_seed(0)
    x, g = (torch.randn(1, 3, 6, 6, c, dtype=torch.float64) for c in (5, 7))
    expected, gw = torch.empty(1, 3, 3, 5, 7).double(), torch.full((1, 3, 3, 5, 7), torch.nan).double()
    with testing.use_backend("python"):
        op.task_conv2d_to_weight(x, g, expected)
    for _ in range(2):
        gw.fill_(torch.nan)
        with testing.use_backend("triton"):
            op.task_conv2d_to_weight(x, g, gw)
        torch.testing.assert_close(gw, expected, rtol=1e-12, atol=1e-12)
    (counts,) = (c for (_, address, _), c in _launch._counters.items() if address == gw.data_ptr())
    assert not counts.any()
