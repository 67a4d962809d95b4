"""Maxima and means over windows of channels-last images, with what their derivatives need.

Images are [T, N, H, W, C], contiguous; `window` is six numbers: height and width of a window, steps of both axes,
padding of both, half a window at most. The result is [T, N, Ho, Wo, C] with Ho = (H + 2·padding − height) // step + 1.
Pixels of the padding are never a maximum, and count as zeros of a mean. All ops are linear but `window_max`, whose
derivatives are `window_max_pick` (along a tangent) and `window_max_place` (of a gradient). Every op writes into the
tensors that its schema marks and returns nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlpp_fast.ops._library import define

__all__ = ["output_shape"]

# uint8 says where a maximum is.
MOST_PIXELS = 256


def output_shape(shape: Sequence[int], window: Sequence[int]) -> tuple[int, ...]:
    """Shape [T, N, Ho, Wo, C] of what is pooled of [T, N, H, W, C]."""
    kh, kw, step_y, step_x, pad_y, pad_x = window
    rows, columns = (
        (size + 2 * pad - kernel) // step + 1
        for size, kernel, step, pad in ((shape[2], kh, step_y, pad_y), (shape[3], kw, step_x, pad_x))
    )
    return (*shape[:2], rows, columns, shape[4])


def _check(dense: Tensor, window: Sequence[int], pooled: Tensor, most: float = MOST_PIXELS) -> None:
    if dense.dim() != 5 or len(window) != 6:
        raise ValueError(
            f"window pool: expected [T, N, H, W, C] and a window of six, got {tuple(dense.shape)} and {window}"
        )
    kernel, steps, pads = window[:2], window[2:4], window[4:]
    fits = all(2 * p <= k <= size + 2 * p for p, k, size in zip(pads, kernel, dense.shape[2:4], strict=True))
    if min(*kernel, *steps) < 1 or min(pads) < 0 or kernel[0] * kernel[1] > most or not fits:
        raise ValueError(
            f"window: expected a window within the image, of {MOST_PIXELS} pixels at most for a maximum, "
            "padding of half at most, "
            f"got {list(window)} of {tuple(dense.shape)}"
        )
    expected = output_shape(dense.shape, window)
    if tuple(pooled.shape) != expected:
        raise ValueError(f"window pool: expected {expected}, got {tuple(pooled.shape)}")


def _windows(x: Tensor, window: Sequence[int], beside: float) -> Tensor:
    """The windows [T, N, Ho, Wo, C, pixels] of images, copied."""
    kh, kw, step_y, step_x, pad_y, pad_x = window
    padded = F.pad(x, (0, 0, pad_x, pad_x, pad_y, pad_y), value=beside)
    return padded.unfold(2, kh, step_y).unfold(3, kw, step_x).flatten(-2)


def _sum_windows(parts: Tensor, window: Sequence[int], out: Tensor) -> None:
    """Transpose of :func:`_windows`."""
    kh, kw, step_y, step_x, pad_y, pad_x = window
    tasks, images, rows, columns, channels, pixels = parts.shape
    unfolded = parts.permute(0, 1, 4, 5, 2, 3).reshape(tasks * images, channels * pixels, rows * columns)
    sums = F.fold(unfolded, tuple(out.shape[2:4]), (kh, kw), padding=(pad_y, pad_x), stride=(step_y, step_x))
    out.copy_(sums.view(tasks, images, channels, *out.shape[2:4]).permute(0, 1, 3, 4, 2))


def _max(x: Tensor, window: Sequence[int], y: Tensor, index: Tensor) -> None:
    _check(x, window, y)
    windows = _windows(x, window, -torch.inf)
    # What is -inf itself comes before the padding.
    inside = _windows(torch.ones_like(x), window, 0.0) > 0
    value = windows.amax(-1, keepdim=True)
    found = (windows == value) | windows.isnan()
    index.copy_((found & inside).to(torch.uint8).argmax(-1))
    y.copy_(value[..., 0])


def _max_pick(u: Tensor, index: Tensor, window: Sequence[int], uy: Tensor) -> None:
    _check(u, window, uy)
    uy.copy_(_windows(u, window, 0.0).gather(-1, index[..., None].long())[..., 0])


def _max_place(gy: Tensor, index: Tensor, window: Sequence[int], gx: Tensor) -> None:
    _check(gx, window, gy)
    parts = gy.new_zeros(*gy.shape, window[0] * window[1])
    parts.scatter_(-1, index[..., None].long(), gy[..., None])
    _sum_windows(parts, window, gx)


def _mean(x: Tensor, window: Sequence[int], y: Tensor) -> None:
    _check(x, window, y, torch.inf)
    y.copy_(_windows(x, window, 0.0).mean(-1))


def _mean_place(gy: Tensor, window: Sequence[int], gx: Tensor) -> None:
    _check(gx, window, gy, torch.inf)
    pixels = window[0] * window[1]
    _sum_windows((gy / pixels)[..., None].expand(*gy.shape, pixels), window, gx)


for _schema, _closed in (
    ("window_max(Tensor x, int[] window, Tensor(a!) y, Tensor(b!) index) -> ()", _max),
    ("window_max_pick(Tensor u, Tensor index, int[] window, Tensor(a!) uy) -> ()", _max_pick),
    ("window_max_place(Tensor gy, Tensor index, int[] window, Tensor(a!) gx) -> ()", _max_place),
    ("window_mean(Tensor x, int[] window, Tensor(a!) y) -> ()", _mean),
    ("window_mean_place(Tensor gy, int[] window, Tensor(a!) gx) -> ()", _mean_place),
):
    define(_schema, fallback=_closed)
