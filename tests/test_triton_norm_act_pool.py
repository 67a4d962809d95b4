"""The Triton kernels of norm_act_pool, interpreted on the CPU, against the closed forms."""

import pytest
import torch
from torch import Tensor

from mamlpp_fast import testing
from mamlpp_fast.ops import norm_act_pool as op

if "triton" not in testing.backends("norm_act_pool"):
    pytest.skip(
        "no Triton interpreter: TRITON_INTERPRET is not 1 or triton is absent", allow_module_level=True
    )

from mamlpp_fast.kernels import norm_act_pool as kernels


@pytest.fixture(params=[0, 1024], ids=["two-passes", "whole"], autouse=True)
def whole(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows up to which one launch does both passes."""
    monkeypatch.setattr(kernels, "_WHOLE", request.param)


CASES = [
    pytest.param((2, 3, 5, 7, 3), True, False, 0.01, id="odd-pooled"),
    pytest.param((2, 2, 4, 5, 33), True, True, 0.01, id="two-channel-blocks"),
    pytest.param((1, 3, 5, 3, 2), False, True, 0.0, id="relu-unpooled"),
    pytest.param((1, 6, 14, 14, 1), True, False, 1.0, id="many-pieces"),
    pytest.param((2, 4, 9, 8, 9), True, True, 0.1, id="two-tiles-two-blocks-of-a-whole"),
]


def _orders(
    shape: tuple[int, ...], pool: bool, per_task: bool, slope: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Results of the four orders by name, every output poisoned before it is written."""
    torch.manual_seed(3)
    tasks, channels = shape[0], shape[-1]
    small = op.output_shape(shape, pool)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    z, u = (torch.randn(shape, dtype=kind).to(dtype) for _ in range(2))
    gy, gy_dot = (torch.randn(small, dtype=kind).to(dtype) for _ in range(2))
    gamma, beta = (torch.randn((tasks, channels) if per_task else (channels,), dtype=kind) for _ in range(2))
    result: dict[str, Tensor] = {}

    def new(name: str, size: tuple[int, ...], kind: torch.dtype) -> Tensor:
        result[name] = torch.full(size, 77 if kind == torch.uint8 else torch.nan, dtype=kind)
        return result[name]

    def rows(*names: str) -> list[Tensor]:
        return [new(name, (tasks, channels), kind) for name in names]

    index = new("index", small if pool else (0,), torch.uint8)
    mean, rstd = rows("mean", "rstd")
    op.norm_act_pool(
        z, gamma, beta, new("y", small, dtype), index, mean, rstd, eps=1e-5, slope=slope, pool=pool
    )
    saved = (z, index, mean, rstd, gamma, beta)
    op.norm_act_pool_backward(
        gy, *saved, new("gz", shape, dtype), *rows("ggamma", "gbeta"), slope=slope, pool=pool
    )
    r, t = rows("r", "t")
    op.norm_act_pool_tangent(u, *saved, new("uy", small, dtype), r, t, slope=slope, pool=pool)
    op.norm_act_pool_backward_tangent(
        gy_dot,
        gy,
        u,
        *saved,
        r,
        t,
        new("gz_dot", shape, dtype),
        *rows("ggamma_dot", "gbeta_dot"),
        slope=slope,
        pool=pool,
    )
    return result


@pytest.mark.parametrize(("shape", "pool", "per_task", "slope"), CASES)
def test_orders_equal_closed_form_in_float64(
    shape: tuple[int, ...], pool: bool, per_task: bool, slope: float
) -> None:
    with testing.use_backend("python"):
        expected = _orders(shape, pool, per_task, slope, torch.float64)
    with testing.use_backend("triton"):
        actual = _orders(shape, pool, per_task, slope, torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_low_precision_is_near_closed_form(dtype: torch.dtype) -> None:
    shape, pool, per_task, slope = CASES[0].values
    with testing.use_backend("python"):
        expected = _orders(shape, pool, per_task, slope, dtype)
    with testing.use_backend("triton"):
        actual = _orders(shape, pool, per_task, slope, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_nan_passes_through_the_pool() -> None:
    z = torch.zeros(1, 1, 2, 2, 1)
    z[0, 0, 1, 0] = torch.nan
    y, index = torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1, dtype=torch.uint8)
    mean, rstd = torch.zeros(1, 1), torch.zeros(1, 1)
    with testing.use_backend("triton"):
        op.norm_act_pool(
            z, torch.ones(1), torch.zeros(1), y, index, mean, rstd, eps=1e-5, slope=0.01, pool=True
        )
    assert y.isnan().all()


def test_other_memory_order_is_refused() -> None:
    z = torch.randn(1, 3, 4, 4, 2).transpose(2, 3)
    y, index = torch.zeros(1, 3, 2, 2, 2), torch.zeros(1, 3, 2, 2, 2, dtype=torch.uint8)
    mean, rstd = torch.zeros(1, 2), torch.zeros(1, 2)
    with testing.use_backend("triton"), pytest.raises(ValueError, match="z: expected a contiguous tensor"):
        op.norm_act_pool(
            z, torch.ones(2), torch.zeros(2), y, index, mean, rstd, eps=1e-5, slope=0.01, pool=True
        )
