"""Batch norm with training statistics and a fused leaky ReLU: three orders, on a GPU.

Tensors of images are [T, N, C, H, W] or [N, C, H, W], contiguous or channels-last; every (task, channel) is normalised
over its M = N·H·W elements. The formulas are those of ``docs/derivations/per_step_batch_norm.md``.

Each order is a reduction and then an elementwise pass. With enough channels one program does both for its channel
(`_*_whole`); with few, or channels-last, where one program holds 32 neighbouring channels, the rows are cut into at
most 32 pieces: `_*_sums` leaves one partial sum of each piece and `_*_apply` adds them up in a fixed order. No atomics,
so a result does not depend on scheduling. Sums are float32 (float64 of float64); the variance is Welford's.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamlpp_fast.ops import _batch_norm_closed_form as closed_form

from ._batch_norm_passes import (
    backward_reduce,
    backward_write,
    combine,
    double_reduce,
    double_write,
    keep,
    moments,
    normalise,
    origin,
    program,
    row,
    rows,
    total,
)  # fmt: skip
from ._launch import TYPE_NAMES, Configuration, accumulator, aligned, argument_types, launch_options, split

_PIECES = 32
_WHOLE_PROGRAMS = 96
"""Channels of all tasks from which one program each is enough for a contiguous tensor."""

_SIZES = ["C", "P", "M", "T", "S", "piece", "row_stride"]


@triton.jit(do_not_specialize=_SIZES)
def _forward_whole(x_ptr, gamma_ptr, beta_ptr, y_ptr, mean_ptr, rstd_ptr, var_ptr, eps: tl.float64,
                   slope: tl.float64, C, P, M, row_stride, CL: tl.constexpr, CA: tl.constexpr, ACC: tl.constexpr,
                   BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    c, t, _ = program(0, 1, BC)
    base = t.to(tl.int64) * M * C
    centre, squares = moments(x_ptr + base, 0, M, c, C, P, CL, CA, ACC, BM, BC)
    mean = origin(x_ptr + base, c, C, P, CL, ACC) + centre
    var = squares / M.to(ACC)
    rstd = 1.0 / tl.sqrt(var + tl.full([1], eps, ACC))
    tl.store(mean_ptr + t * C + c, mean, mask=c < C)
    tl.store(rstd_ptr + t * C + c, rstd, mask=c < C)
    tl.store(var_ptr + t * C + c, var, mask=c < C)
    gamma = row(gamma_ptr + t * row_stride, c, C, ACC)
    beta = row(beta_ptr + t * row_stride, c, C, ACC)
    normalise(x_ptr + base, y_ptr + base, mean, rstd, gamma, beta, tl.full([1, 1], slope, ACC), 0, M, c, C, P, CL,
               CA, ACC, BM)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _forward_sums(x_ptr, part_ptr, C, P, M, T, S, piece, CL: tl.constexpr, CA: tl.constexpr, ACC: tl.constexpr,
                  BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    c, t, s = program(0, 1, BC)
    stop = tl.minimum(M, (s + 1) * piece)
    mean, squares = moments(x_ptr + t.to(tl.int64) * M * C, s * piece, stop, c, C, P, CL, CA, ACC, BM, BC)
    keep(part_ptr, 0, mean, t, c, s, C, T, S)
    keep(part_ptr, 1, squares, t, c, s, C, T, S)


@triton.jit(do_not_specialize=_SIZES)
def _forward_apply(x_ptr, gamma_ptr, beta_ptr, part_ptr, y_ptr, mean_ptr, rstd_ptr, var_ptr, eps: tl.float64,
                   slope: tl.float64, C, P, M, T, S, piece, row_stride, CL: tl.constexpr, CA: tl.constexpr,
                   ACC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    c, t, s = program(0, 1, BC)
    base = t.to(tl.int64) * M * C
    shift = origin(x_ptr + base, c, C, P, CL, ACC)
    mean, var, rstd = combine(part_ptr, shift, eps, t, c, C, M, T, S, piece, ACC, BS)
    if s == 0:
        tl.store(mean_ptr + t * C + c, mean, mask=c < C)
        tl.store(rstd_ptr + t * C + c, rstd, mask=c < C)
        tl.store(var_ptr + t * C + c, var, mask=c < C)
    gamma = row(gamma_ptr + t * row_stride, c, C, ACC)
    beta = row(beta_ptr + t * row_stride, c, C, ACC)
    normalise(x_ptr + base, y_ptr + base, mean, rstd, gamma, beta, tl.full([1, 1], slope, ACC), s * piece,
               tl.minimum(M, (s + 1) * piece), c, C, P, CL, CA, ACC, BM)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _backward_whole(x_ptr, gy_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, gx_ptr, ggamma_ptr, gbeta_ptr,
                    slope: tl.float64, C, P, M, row_stride, CL: tl.constexpr, CA: tl.constexpr, ACC: tl.constexpr,
                    BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    c, t, _ = program(0, 1, BC)
    base = t.to(tl.int64) * M * C
    mean, rstd, gamma, beta, leak = rows(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, slope, t * C, t * row_stride, c, C,
                                         ACC)  # fmt: skip
    g, gx = backward_reduce(x_ptr + base, gy_ptr + base, mean, rstd, gamma, beta, leak, 0, M, c, C, P, CL, CA, ACC,
                             BM, BC)  # fmt: skip
    tl.store(ggamma_ptr + t * C + c, gx, mask=c < C)
    tl.store(gbeta_ptr + t * C + c, g, mask=c < C)
    count = M.to(ACC)
    backward_write(x_ptr + base, gy_ptr + base, gx_ptr + base, mean, rstd, gamma, beta, g / count, gx / count, leak,
                    0, M, c, C, P, CL, CA, ACC, BM)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _backward_sums(x_ptr, gy_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, part_ptr, slope: tl.float64, C, P, M, T,
                   S, piece, row_stride, CL: tl.constexpr, CA: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr,
                   BC: tl.constexpr):  # fmt: skip
    c, t, s = program(0, 1, BC)
    base = t.to(tl.int64) * M * C
    mean, rstd, gamma, beta, leak = rows(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, slope, t * C, t * row_stride, c, C,
                                         ACC)  # fmt: skip
    g, gx = backward_reduce(x_ptr + base, gy_ptr + base, mean, rstd, gamma, beta, leak, s * piece,
                             tl.minimum(M, (s + 1) * piece), c, C, P, CL, CA, ACC, BM, BC)  # fmt: skip
    keep(part_ptr, 0, g, t, c, s, C, T, S)
    keep(part_ptr, 1, gx, t, c, s, C, T, S)


@triton.jit(do_not_specialize=_SIZES)
def _backward_apply(x_ptr, gy_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, part_ptr, gx_ptr, ggamma_ptr, gbeta_ptr,
                    slope: tl.float64, C, P, M, T, S, piece, row_stride, CL: tl.constexpr, CA: tl.constexpr,
                    ACC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    c, t, s = program(0, 1, BC)
    g = total(part_ptr, 0, t, c, C, T, S, ACC, BS)
    gx = total(part_ptr, 1, t, c, C, T, S, ACC, BS)
    if s == 0:
        tl.store(ggamma_ptr + t * C + c, gx, mask=c < C)
        tl.store(gbeta_ptr + t * C + c, g, mask=c < C)
    base = t.to(tl.int64) * M * C
    count = M.to(ACC)
    mean, rstd, gamma, beta, leak = rows(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, slope, t * C, t * row_stride, c, C,
                                         ACC)  # fmt: skip
    backward_write(x_ptr + base, gy_ptr + base, gx_ptr + base, mean, rstd, gamma, beta, g / count, gx / count, leak,
                    s * piece, tl.minimum(M, (s + 1) * piece), c, C, P, CL, CA, ACC, BM)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _double_whole(x_ptr, gy_ptr, u_ptr, a_ptr, b_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, cx_ptr, cgy_ptr,
                  cgamma_ptr, slope: tl.float64, C, P, M, row_stride, CL: tl.constexpr, CA: tl.constexpr,
                  ACC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    c, t, _ = program(0, 1, BC)
    base = t.to(tl.int64) * M * C
    mean, rstd, gamma, beta, leak = rows(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, slope, t * C, t * row_stride, c, C,
                                         ACC)  # fmt: skip
    a = row(a_ptr + t * row_stride, c, C, ACC)
    b = row(b_ptr + t * row_stride, c, C, ACC)
    p, q, r, k, w = double_reduce(x_ptr + base, gy_ptr + base, u_ptr + base, mean, rstd, gamma, beta, leak, 0, M, c,
                                   C, P, CL, CA, ACC, BM, BC)  # fmt: skip
    count = M.to(ACC)
    p /= count
    q /= count
    r /= count
    k /= count
    w /= count
    tl.store(cgamma_ptr + t * C + c, count * rstd * (w - r * p - k * q), mask=c < C)
    double_write(x_ptr + base, gy_ptr + base, u_ptr + base, cx_ptr + base, cgy_ptr + base, mean, rstd, gamma, beta,
                  a, b, p, q, r, k, w, leak, 0, M, c, C, P, CL, CA, ACC, BM)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _double_sums(x_ptr, gy_ptr, u_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, part_ptr, slope: tl.float64, C, P, M,
                 T, S, piece, row_stride, CL: tl.constexpr, CA: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr,
                 BC: tl.constexpr):  # fmt: skip
    c, t, s = program(0, 1, BC)
    base = t.to(tl.int64) * M * C
    mean, rstd, gamma, beta, leak = rows(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, slope, t * C, t * row_stride, c, C,
                                         ACC)  # fmt: skip
    p, q, r, k, w = double_reduce(x_ptr + base, gy_ptr + base, u_ptr + base, mean, rstd, gamma, beta, leak, s * piece,
                                   tl.minimum(M, (s + 1) * piece), c, C, P, CL, CA, ACC, BM, BC)  # fmt: skip
    keep(part_ptr, 0, p, t, c, s, C, T, S)
    keep(part_ptr, 1, q, t, c, s, C, T, S)
    keep(part_ptr, 2, r, t, c, s, C, T, S)
    keep(part_ptr, 3, k, t, c, s, C, T, S)
    keep(part_ptr, 4, w, t, c, s, C, T, S)


@triton.jit(do_not_specialize=_SIZES)
def _double_apply(x_ptr, gy_ptr, u_ptr, a_ptr, b_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, part_ptr, cx_ptr,
                  cgy_ptr, cgamma_ptr, slope: tl.float64, C, P, M, T, S, piece, row_stride, CL: tl.constexpr,
                  CA: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
                  BS: tl.constexpr):  # fmt: skip
    c, t, s = program(0, 1, BC)
    count = M.to(ACC)
    p = total(part_ptr, 0, t, c, C, T, S, ACC, BS) / count
    q = total(part_ptr, 1, t, c, C, T, S, ACC, BS) / count
    r = total(part_ptr, 2, t, c, C, T, S, ACC, BS) / count
    k = total(part_ptr, 3, t, c, C, T, S, ACC, BS) / count
    w = total(part_ptr, 4, t, c, C, T, S, ACC, BS) / count
    rstd = row(rstd_ptr + t * C, c, C, ACC)
    if s == 0:
        tl.store(cgamma_ptr + t * C + c, count * rstd * (w - r * p - k * q), mask=c < C)
    base = t.to(tl.int64) * M * C
    double_write(x_ptr + base, gy_ptr + base, u_ptr + base, cx_ptr + base, cgy_ptr + base,
                  row(mean_ptr + t * C, c, C, ACC), rstd, row(gamma_ptr + t * row_stride, c, C, ACC),
                  row(beta_ptr + t * row_stride, c, C, ACC), row(a_ptr + t * row_stride, c, C, ACC),
                  row(b_ptr + t * row_stride, c, C, ACC), p, q, r, k, w, tl.full([1, 1], slope, ACC), s * piece,
                  tl.minimum(M, (s + 1) * piece), c, C, P, CL, CA, ACC, BM)  # fmt: skip


class _View(NamedTuple):
    """How a tensor of images lies in memory."""

    tasks: int
    rows: int
    channels: int
    pixels: int
    channels_last: bool


def _channel_axis(x: Tensor) -> int:
    return x.dim() - 3


def _view(x: Tensor) -> _View:
    tasks = x.shape[0] if x.dim() == 5 else 1
    images, channels, height, width = x.shape[-4:]
    last = height * width == 1 or (not x.is_contiguous() and x.movedim(_channel_axis(x), -1).is_contiguous())
    if images * channels * height * width >= 2**31:
        raise ValueError(f"x: expected fewer than 2**31 elements a task, got shape {tuple(x.shape)}")
    return _View(tasks, images * height * width, channels, height * width, last)


def _like(x: Tensor, view: _View) -> Tensor:
    """x itself or a copy of it, dense in the memory order of `view`."""
    if not view.channels_last or view.pixels == 1:
        return x.contiguous()
    axis = _channel_axis(x)
    return x.movedim(axis, -1).contiguous().movedim(-1, axis)


def _constants(dtype: torch.dtype, view: _View) -> dict[str, Any]:
    """Launch configuration: constexprs of a kernel for this type and memory order; always four warps.

    A program reads 1024 elements at a time: 1024 rows of one channel, or 32 rows of 32 neighbouring channels. Those
    are a full 128-byte line a warp in float32; two-byte types need wide loads for that, and so aligned channels.
    """
    last = view.channels_last
    return {
        "CL": last,
        "CA": last and view.channels % 16 == 0 and dtype.itemsize == 2,
        "ACC": accumulator(dtype)[1],
        "BM": 32 if last else 1024,
        "BC": 32 if last else 1,
    }


_WARPS = 4
_KERNELS = {
    "forward": (_forward_whole, _forward_sums, _forward_apply),
    "backward": (_backward_whole, _backward_sums, _backward_apply),
    "double_backward": (_double_whole, _double_sums, _double_apply),
}
_QUANTITIES = {"forward": 2, "backward": 2, "double_backward": 5}


def _run(
    order: str, view: _View, images: list[Tensor], reduce_rows: list[Tensor], apply_rows: list[Tensor],
    outputs: list[Tensor], scalars: list[float], row_stride: int,
) -> None:  # fmt: skip
    """Launches one order: one kernel, or a reduction and an elementwise one.

    Args:
        images: tensors read by both halves.
        reduce_rows: [T, C] tensors the reduction reads.
        apply_rows: tensors the elementwise half reads beyond `images`, in the kernel's order.
        outputs: written by the elementwise half.
        scalars: ε and slope, or slope alone.
    """
    whole, sums, apply = _KERNELS[order]
    constants = _constants(images[0].dtype, view)
    options = launch_options(_WARPS)
    blocks = triton.cdiv(view.channels, constants["BC"])
    size = (view.channels, view.pixels, view.rows)
    if not view.channels_last and blocks * view.tasks >= _WHOLE_PROGRAMS:
        whole[blocks, view.tasks](
            *images, *apply_rows, *outputs, *scalars, *size, row_stride, **constants, **options
        )
        return
    piece, pieces = split(view.rows, blocks * view.tasks, constants["BM"], limit=_PIECES)
    parts = outputs[-1].new_empty(_QUANTITIES[order], pieces, view.tasks, view.channels)
    grid = (blocks, view.tasks, pieces)
    cut = (*size, view.tasks, pieces, piece)
    if order == "forward":
        sums[grid](*images, parts, *cut, **constants, **options)
    else:
        sums[grid](*images, *reduce_rows, parts, *scalars, *cut, row_stride, **constants, **options)
    apply[grid](
        *images, *apply_rows, parts, *outputs, *scalars, *cut, row_stride, **constants, BS=_PIECES, **options,
    )  # fmt: skip


def _affine(view: _View, dtype: torch.dtype, *rows: Tensor) -> tuple[list[Tensor], int]:
    """Rows [C] or [T, C] as the kernels take them, and the stride from one task's row to the next."""
    per_task = any(r.dim() == 2 for r in rows)
    shape = (view.tasks, view.channels) if per_task else (view.channels,)
    kind = accumulator(dtype)[0]
    return aligned(r.to(kind).expand(shape).contiguous() for r in rows), view.channels if per_task else 0


def _operands(
    x: Tensor, weight: Tensor, bias: Tensor, step: int | None, *others: Tensor
) -> tuple[_View, list[Tensor], list[Tensor]]:
    """x and what is of its shape as the kernels take them, [T, N, C, H, W] or [N, C, H, W], and the step's rows."""
    dense = closed_form.dense(x, closed_form.is_channels_last(x))
    images = [t.to(x.dtype) for t in (dense, *others)]
    images = [t[..., None, None] if x.dim() == 2 else t for t in images]
    view = _view(images[0])
    rows = [closed_form.row(weight, step), closed_form.row(bias, step)]
    return view, aligned(_like(t, view) for t in images), rows


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, step: int | None, eps: float, slope: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``per_step_batch_norm`` of ``mamlpp_fast.ops``, as are the two below."""
    closed_form.check(x, weight, bias, step)
    view, (images,), affine = _operands(x, weight, bias, step)
    rows, stride = _affine(view, x.dtype, *affine)
    y = torch.empty_like(images)
    mean = x.new_empty(closed_form.statistics_shape(x), dtype=accumulator(x.dtype)[0])
    rstd, var = torch.empty_like(mean), torch.empty_like(mean)
    _run("forward", view, [images], [], rows, [y, mean, rstd, var], [eps, slope], stride)
    return y.reshape(x.shape), mean, rstd, var


def backward(
    gy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, step: int | None, slope: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``per_step_batch_norm_backward``."""
    view, images, affine = _operands(x, weight, bias, step, gy)
    rows, stride = _affine(view, x.dtype, *affine)
    rows = [*aligned([mean.contiguous(), rstd.contiguous()]), *rows]
    gx = torch.empty_like(images[0])
    ggamma = mean.new_empty(view.tasks, view.channels)
    gbeta = torch.empty_like(ggamma)
    _run("backward", view, images, rows, rows, [gx, ggamma, gbeta], [slope], stride)
    rows_of = closed_form.to_affine
    return gx.reshape(x.shape), rows_of(ggamma, weight, step), rows_of(gbeta, bias, step)


def double_backward(
    u: Tensor | None, a: Tensor | None, b: Tensor | None, gy: Tensor, x: Tensor, weight: Tensor, bias: Tensor,
    mean: Tensor, rstd: Tensor, step: int | None, slope: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``per_step_batch_norm_double_backward``."""
    view, images, affine = _operands(x, weight, bias, step, gy, torch.zeros_like(x) if u is None else u)
    given = (torch.zeros_like(affine[0]) if v is None else closed_form.row(v, step) for v in (a, b))
    (*along, gamma, beta), stride = _affine(view, x.dtype, *given, *affine)
    saved = [*aligned([mean.contiguous(), rstd.contiguous()]), gamma, beta]
    cx, cgy = torch.empty_like(images[0]), torch.empty_like(images[0])
    cgamma = mean.new_empty(view.tasks, view.channels)
    _run("double_backward", view, images, saved, [*along, *saved], [cx, cgy, cgamma], [slope], stride)
    return cgy.reshape(x.shape), cx.reshape(x.shape), closed_form.to_affine(cgamma, weight, step)


def launch_configurations() -> Iterator[Configuration]:
    """Everything `_run` can launch: three orders, three memory orders, four types."""
    for dtype, (channels_last, channels) in itertools.product(
        TYPE_NAMES, ((False, 64), (True, 64), (True, 5))
    ):
        if dtype.itemsize > 2 and channels_last and channels == 64:
            continue
        view = _View(1, 1, channels, 1, channels_last)
        constants = _constants(dtype, view)
        for whole, sums, apply in _KERNELS.values():
            kernels = [sums, apply] if channels_last else [whole, sums, apply]
            memory = (
                f"channels-last {'aligned' if constants['CA'] else 'odd'}" if channels_last else "contiguous"
            )
            for kernel in kernels:
                yield _configuration(
                    f"{kernel.__name__[1:]} {memory} {TYPE_NAMES[dtype]}",
                    kernel,
                    dtype,
                    {**constants, "BS": _PIECES} if kernel is apply else constants,
                )


def _configuration(label: str, kernel: Any, dtype: torch.dtype, constants: dict[str, Any]) -> Configuration:
    images = ("x_ptr", "y_ptr", "gy_ptr", "gx_ptr", "u_ptr", "cx_ptr", "cgy_ptr")
    types = argument_types(kernel, constants, accumulator(dtype)[0], dict.fromkeys(images, dtype))
    return Configuration(label, kernel, types, constants, _WARPS)
