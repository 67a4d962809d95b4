"""Maxima and means over windows: every backend against PyTorch's pools and their autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal_on_any_threads
from op_helpers import backend_fixture, opcheck
from torch import Tensor

from mamlpp_fast.ops.window_pool import output_shape
from mamlpp_fast.testing import backends

ops = torch.ops.mamlpp_fast
Window = tuple[int, int, int, int, int, int]
# Shape [T, N, H, W, C]; height and width of windows, steps, padding.
CASES: dict[str, tuple[tuple[int, ...], Window]] = {
    "halves": ((2, 3, 6, 4, 8), (2, 2, 2, 2, 0, 0)),
    "halves-odd": ((1, 2, 7, 5, 35), (2, 2, 2, 2, 0, 0)),
    "overlapping": ((2, 2, 7, 6, 17), (3, 3, 2, 2, 1, 1)),
    "dense": ((1, 2, 5, 4, 3), (3, 3, 1, 1, 1, 1)),
    "apart": ((1, 3, 9, 8, 5), (2, 1, 3, 2, 0, 0)),
    "apart-padded": ((2, 1, 6, 7, 4), (2, 3, 2, 3, 1, 1)),
    "sequence": ((2, 2, 9, 1, 33), (2, 1, 2, 1, 0, 0)),
    "whole": ((2, 2, 5, 3, 7), (5, 3, 5, 3, 0, 0)),
    "single-pixel": ((1, 1, 1, 1, 1), (1, 1, 1, 1, 0, 0)),
    "wide-window": ((1, 1, 16, 17, 2), (16, 16, 1, 1, 0, 0)),
}


backend = backend_fixture("window_max", poisoned=True)


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.full(shape, torch.nan, dtype=like.dtype)


def maxima(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    y = empty(output_shape(x.shape, window), x)
    index = torch.full(y.shape, 255, dtype=torch.uint8)
    ops.window_max(x, window, y, index)
    return y, index


def theirs(x: Tensor, window: Window, kind: str) -> Tensor:
    images = x.flatten(0, 1).permute(0, 3, 1, 2)
    pool = F.max_pool2d if kind == "max" else F.avg_pool2d
    return pool(images, window[:2], window[2:4], window[4:]).permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def same_images(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_maxima_and_their_rules(backend: str, name: str, dtype: torch.dtype) -> None:
    shape, window = CASES[name]
    x, u = same_images(shape, dtype)
    x[..., 0].round_()  # equal ones
    x.requires_grad_()
    expected = theirs(x, window, "max")
    gy = torch.randn_like(expected)
    (gx,) = torch.autograd.grad(expected, x, gy)
    y, index = maxima(x.detach(), window)
    torch.testing.assert_close(y, expected.detach(), rtol=0, atol=0)
    found = empty(shape, x)
    ops.window_max_place(gy, index, window, found)
    torch.testing.assert_close(found, gx)
    # The transpose of placing is picking.
    picked = empty(tuple(y.shape), x)
    ops.window_max_pick(u, index, window, picked)
    linear = gy.clone().requires_grad_()
    (expected_pick,) = torch.autograd.grad(_placed(linear, x.detach(), window), linear, u)
    torch.testing.assert_close(picked, expected_pick)


def _placed(gy: Tensor, x: Tensor, window: Window) -> Tensor:
    x = x.clone().requires_grad_()
    (gx,) = torch.autograd.grad(theirs(x, window, "max"), x, gy, create_graph=True)
    return gx


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", [*CASES, "large"])
def test_means_and_their_transpose(backend: str, name: str, dtype: torch.dtype) -> None:
    shape, window = CASES.get(name, ((1, 2, 40, 21, 5), (40, 21, 40, 21, 0, 0)))
    x, _ = same_images(shape, dtype)
    x.requires_grad_()
    expected = theirs(x, window, "mean")
    gy = torch.randn_like(expected)
    (gx,) = torch.autograd.grad(expected, x, gy)
    y, found = empty(tuple(expected.shape), x), empty(shape, x)
    ops.window_mean(x.detach(), window, y)
    torch.testing.assert_close(y, expected.detach())
    ops.window_mean_place(gy, window, found)
    torch.testing.assert_close(found, gx)


def test_a_nan_is_passed_on_and_infinity_is_above_the_padding(backend: str) -> None:
    window = (3, 3, 2, 2, 1, 1)
    x = torch.randn(1, 1, 5, 5, 20, dtype=torch.float64)
    x[0, 0, 2, 2, 3], x[..., 4] = torch.nan, -torch.inf
    y, index = maxima(x, window)
    expected = theirs(x, window, "max")
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert y[..., 3].isnan().any() and (y[..., 4] == -torch.inf).all()
    gx = empty(tuple(x.shape), x)
    ops.window_max_place(torch.ones_like(y), index, window, gx)
    assert float(gx.sum()) == y.numel()  # nothing went to the padding


@pytest.mark.skipif("native" not in backends("window_max"), reason="no native library")
def test_results_do_not_depend_on_threads() -> None:
    x = torch.randn(3, 5, 9, 8, 21)

    def run() -> list[Tensor]:
        window = (3, 2, 2, 1, 1, 1)
        y, index = maxima(x, window)
        gx, means = torch.empty_like(x), torch.empty_like(y)
        ops.window_max_place(y, index, window, gx)
        ops.window_mean(x, window, means)
        return [y, index, gx, means]

    assert_equal_on_any_threads(run)


@pytest.mark.parametrize(
    ("window", "shape", "message"),
    [
        ((2, 2, 2, 2, 2, 0), (1, 1, 4, 2, 3), "window: expected"),
        ((5, 2, 2, 2, 0, 0), (1, 1, 1, 2, 3), "window: expected"),
        ((2, 2, 0, 2, 0, 0), (1, 1, 2, 2, 3), "window: expected"),
        ((2, 2, 2, 2, 0, 0), (1, 1, 2, 1, 3), "window pool: expected"),
        ((2, 2, 2, 2, 0), (1, 1, 2, 2, 3), "window of six"),
    ],
)
def test_wrong_windows_are_refused(
    backend: str, window: tuple[int, ...], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ops.window_max(torch.zeros(1, 1, 4, 4, 3), window, torch.zeros(shape), torch.zeros(shape).byte())


def test_a_maximum_has_at_most_256_places(backend: str) -> None:
    x = torch.zeros(1, 1, 17, 16, 1)
    with pytest.raises(ValueError, match="256 pixels"):
        maxima(x, (17, 16, 1, 1, 0, 0))


def test_opcheck() -> None:
    window = [2, 2, 2, 2, 0, 0]
    x, y = torch.randn(1, 2, 4, 4, 3), torch.empty(1, 2, 2, 2, 3)
    index = torch.zeros(y.shape, dtype=torch.uint8)
    samples = {
        "window_max": (x, window, y, index),
        "window_max_pick": (x, index, window, y),
        "window_max_place": (y.zero_(), index, window, x.clone()),
        "window_mean": (x, window, y.clone()),
        "window_mean_place": (y, window, x.clone()),
    }
    opcheck(samples)
