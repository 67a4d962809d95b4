"""Task-batched convolutions as implicit matrix products on tensor cores: forward, to input, to weight.

Arguments are those of ``mamlpp_fast.ops.task_conv2d``. One program makes a tile of one task's result and keeps it in
registers while it walks the reduction (taps and channels; for the weights, the pixels of all images), then the
second operand pair's: one accumulator for both. Nothing is unfolded in memory.

Operands are float64, float32 or bfloat16; sums are float32 (float64 of float64). float32 operands are rounded to TF32
where ``torch.backends.cuda.matmul.fp32_precision`` is ``"tf32"``; elsewhere they are multiplied as they are: on tensor
cores that have room for it by three products of TF32 (:func:`_dot`), otherwise, or where ``MAMLPP_FAST_PRODUCTS`` is
``ieee``, by ordinary multiplications.
"""

import itertools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import TYPE_NAMES, Configuration, accumulator, counters, last_piece, launch_options, split

_SIZES = ["pairs", "M", "OH", "OW", "IH", "IW", "taps"]
"""Not specialised: the sizes of images. Channels, kernel, step and padding are constants of the compiled program."""


@triton.jit
def _source(i, tap, padding, stride, size, TRANSPOSED: tl.constexpr):
    """Where along one axis output position i finds its operand for this tap, and whether that is inside."""
    if TRANSPOSED:
        shifted = i + padding - tap
        position = shifted // stride
        inside = (shifted >= 0) & (position * stride == shifted) & (position < size)
    else:
        position = i * stride - padding + tap
        inside = (position >= 0) & (position < size)
    return position, inside


@triton.jit
def _parts(x):
    """float32 x as the sum of x rounded to TF32 (10 bits of a fraction) and of what is left, exactly.

    A number that rounds to infinity, or is infinite, leaves NaN; NaN stays, if only in what is left.
    """
    large = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return large, x - large


@triton.jit
def _dot(a, b, accumulator, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """accumulator + a b. By "tf32x3" the operands are cut in two, and the product of both rests, 2^-22 of ab, left out.

    Tensor cores cut 13 bits off a rest (2^-21 of ab for both) and cut their sums off where others round: hence a sum
    of its own for each block, which an ordinary addition takes up. Triton's own "tf32x3" also looks for NaN in each
    number and each sum: 1.7 times the instructions.
    """
    if PRECISION == "tf32x3":
        large_a, rest_a = _parts(a)
        large_b, rest_b = _parts(b)
        part = tl.zeros([a.shape[0], b.shape[1]], ACC)
        part = tl.dot(rest_a, large_b, part, input_precision="tf32", out_dtype=ACC)
        part = tl.dot(large_a, rest_b, part, input_precision="tf32", out_dtype=ACC)
        part = tl.dot(large_a, large_b, part, input_precision="tf32", out_dtype=ACC)
        total = accumulator + part
    else:
        total = tl.dot(a, b, accumulator, input_precision=PRECISION, out_dtype=ACC)
    return total


@triton.jit(do_not_specialize=_SIZES)
def _product(a_ptr, w_ptr, a2_ptr, w2_ptr, out_ptr, pairs, M, OH, OW, IH, IW, taps, CA: tl.constexpr, CB: tl.constexpr,
             KW: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, PAD_Y: tl.constexpr, PAD_X: tl.constexpr,
             TRANSPOSED: tl.constexpr, DENSE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
             BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr,
             ROLLED: tl.constexpr):  # fmt: skip
    """Convolution of a [T, images, IH, IW, CA] with w, or (TRANSPOSED) its adjoint; out is [T, images, OH, OW, CB].

    DENSE takes one tap at a time, UNROLL blocks of channels for the one address and mask of its pixels, and needs
    channels in multiples of 16; otherwise taps and channels are one axis.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    cb = tl.program_id(1) * BN + tl.arange(0, BN)
    t = tl.program_id(2).to(tl.int64)
    n = m // (OH * OW)
    i = (m % (OH * OW) // OW)[:, None]
    j = (m % OW)[:, None]
    task_a = t * (M // (OH * OW)) * IH * IW * CA
    task_w = t * TAPS * CA * CB
    rounds: tl.constexpr = (CA + BK * UNROLL - 1) // (BK * UNROLL)
    constant: tl.constexpr = TAPS * rounds if DENSE else (TAPS * CA + BK - 1) // BK
    tiles = constant
    if ROLLED:  # a number that the compiler does not know, lest it unrolls the loop
        tiles = taps * rounds
    result = tl.zeros([BM, BN], ACC)
    for pair in range(pairs):
        a = tl.where(pair == 0, a_ptr, a2_ptr) + task_a
        w = tl.where(pair == 0, w_ptr, w2_ptr) + task_w
        for tile in range(tiles):
            if DENSE:
                tap = tile // rounds
                y, row_inside = _source(i, tap // KW, PAD_Y, STRIDE, IH, TRANSPOSED)
                x, column_inside = _source(j, tap % KW, PAD_X, STRIDE, IW, TRANSPOSED)
                left_row = a + ((n[:, None] * IH + y) * IW + x) * CA
                inside = row_inside & column_inside & (m < M)[:, None]
                for block in tl.static_range(UNROLL):
                    c = (tile % rounds * UNROLL + block) * BK + tl.arange(0, BK)
                    if CA % (BK * UNROLL) == 0:
                        left = tl.load(left_row + c[None, :], mask=inside, other=0.0)
                    else:
                        left = tl.load(left_row + c[None, :], mask=inside & (c < CA)[None, :], other=0.0)
                    if TRANSPOSED:
                        weight = (tap * CB + cb)[None, :] * CA + c[:, None]
                    else:
                        weight = (tap * CA + c)[:, None] * CB + cb[None, :]
                    if CA % (BK * UNROLL) == 0 and CB % BN == 0:
                        right = tl.load(w + weight)
                    else:
                        right = tl.load(w + weight, mask=(c < CA)[:, None] & (cb < CB)[None, :], other=0.0)
                    result = _dot(left, right, result, ACC, PRECISION)
            else:
                k = tile * BK + tl.arange(0, BK)
                tap = k // CA
                c = k % CA
                real = tap < TAPS
                y, row_inside = _source(i, (tap // KW)[None, :], PAD_Y, STRIDE, IH, TRANSPOSED)
                x, column_inside = _source(j, (tap % KW)[None, :], PAD_X, STRIDE, IW, TRANSPOSED)
                pixel = (n[:, None] * IH + y) * IW + x
                inside = row_inside & column_inside & (m < M)[:, None] & real[None, :]
                left = tl.load(a + pixel * CA + c[None, :], mask=inside, other=0.0)
                if TRANSPOSED:
                    weight = (tap * CB * CA + c)[:, None] + cb[None, :] * CA
                else:
                    weight = ((tap * CA + c) * CB)[:, None] + cb[None, :]
                right = tl.load(w + weight, mask=real[:, None] & (cb < CB)[None, :], other=0.0)
                result = _dot(left, right, result, ACC, PRECISION)
    written = (m < M)[:, None] & (cb < CB)[None, :]
    tl.store(out_ptr + t * M * CB + m[:, None] * CB + cb[None, :], result, mask=written)


@triton.jit(do_not_specialize=["pairs", "M", "T", "S", "piece"])
def _weight_product(x_ptr, g_ptr, x2_ptr, g2_ptr, part_ptr, counter_ptr, out_ptr, pairs, M, OH: tl.constexpr,
                    OW: tl.constexpr, IH: tl.constexpr, IW: tl.constexpr, CA: tl.constexpr, CB: tl.constexpr,
                    KW: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, PAD_Y: tl.constexpr,
                    PAD_X: tl.constexpr, T, S, piece, DENSE: tl.constexpr, PRECISION: tl.constexpr,
                    ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Sum over all rows of g [T, images, OH, OW, CB] against x [T, images, IH, IW, CA]; out [T, TAPS, CA, CB].

    Where there are several pieces (of `piece` rows), part [S, T, TAPS, CA, CB] takes the sum of each, and the last one
    of a tile adds them up. DENSE: program 0 is a tap and a block of channels; otherwise taps and channels are one axis.
    The images' sizes are constants too: every step finds the pixels of its rows.

    Three products of TF32 make the transposed tile: Triton copies the left operand of a product from memory by 4 bytes,
    with an address and a mask for each, and those of g are the cheaper ones; x comes by 16.
    """
    SWAPPED: tl.constexpr = PRECISION == "tf32x3"
    cb = tl.program_id(1) * BN + tl.arange(0, BN)
    t = tl.program_id(2) % T
    s = tl.program_id(2) // T
    if DENSE:
        blocks: tl.constexpr = (CA + BM - 1) // BM
        tap = tl.program_id(0) // blocks
        c = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
        real = c < CA
        tap_row = tap // KW
        tap_column = tap % KW
    else:
        k = tl.program_id(0) * BM + tl.arange(0, BM)
        tap = k // CA
        c = k % CA
        real = tap < TAPS
        tap_row = (tap // KW)[None, :]
        tap_column = (tap % KW)[None, :]
    same: tl.constexpr = STRIDE == 1 and OH == IH and OW == IW
    images = M // (OH * OW)
    task_x = t.to(tl.int64) * images * IH * IW * CA
    task_g = t.to(tl.int64) * M * CB
    stop = tl.minimum(M, (s + 1) * piece)
    result = tl.zeros([BN, BM] if SWAPPED else [BM, BN], ACC)
    for pair in range(pairs):
        x = tl.where(pair == 0, x_ptr, x2_ptr) + task_x
        g = tl.where(pair == 0, g_ptr, g2_ptr) + task_g
        for first in range(s * piece, stop, BK):
            m = first + tl.arange(0, BK)
            line = (
                m.to(tl.uint32) // OW
            )  # a division of what may be negative takes twice as many instructions
            i, row_inside = _source((line % OH).to(tl.int32)[:, None], tap_row, PAD_Y, STRIDE, IH, False)
            j, column_inside = _source(
                (m - line.to(tl.int32) * OW)[:, None], tap_column, PAD_X, STRIDE, IW, False
            )
            if same:  # a pixel of x lies as far from that of g for all of them
                pixel = m[:, None] + ((tap_row - PAD_Y) * IW + tap_column - PAD_X)
            else:
                pixel = ((m // (OH * OW))[:, None] * IH + i) * IW + j
            inside = row_inside & column_inside & (m < stop)[:, None]
            if not DENSE or CA % BM != 0:
                inside = inside & real[None, :]
            left = tl.load(x + pixel * CA + c[None, :], mask=inside, other=0.0)
            row = tl.minimum(m, stop - 1)  # what comes after the last row is zero in x
            if CB % BN == 0:
                right = tl.load(g + row[:, None] * CB + cb[None, :])
            else:
                right = tl.load(g + row[:, None] * CB + cb[None, :], mask=(cb < CB)[None, :], other=0.0)
            if SWAPPED:
                result = _dot(tl.trans(right), left, result, ACC, PRECISION)
            else:
                result = _dot(tl.trans(left), right, result, ACC, PRECISION)
    if SWAPPED:
        result = tl.trans(result)
    at = t.to(tl.int64) * TAPS * CA * CB + ((tap * CA + c) * CB)[:, None] + cb[None, :]
    written = real[:, None] & (cb < CB)[None, :]
    if S == 1:
        tl.store(out_ptr + at, result, mask=written)
    else:
        elements = T.to(tl.int64) * TAPS * CA * CB
        tl.store(part_ptr + s * elements + at, result, mask=written)
        tile_of_all = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * T + t
        if last_piece(counter_ptr + tile_of_all, S):
            total = tl.load(part_ptr + at, mask=written, other=0.0, cache_modifier=".cg")
            for other in range(1, S):
                total += tl.load(
                    part_ptr + other * elements + at, mask=written, other=0.0, cache_modifier=".cg"
                )
            tl.store(out_ptr + at, total, mask=written)


_TYPES = (torch.float64, torch.float32, torch.bfloat16)


class _Tile(NamedTuple):
    """Launch configuration of a product."""

    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return launch_options(self.num_warps, self.num_stages)


def _tile(dtype: torch.dtype, dense: bool, precision: str, weight: bool, arch: int) -> _Tile:
    """The one tile (rows, columns, depth of a step) for operands of this type.

    Dense: 128 x 64 on tensor cores, 64 x 64 on the ordinary units and for weights, where the rows are channels of one
    tap, and a step has twice as many pixels: finding them is a third of its instructions. Where taps and channels are
    one axis (the first layer's 9 to 27) every element finds its own address, so steps are short; for weights 32 rows
    take all of them. Three products for one have more time for loads, and keep both parts of operands in registers:
    64 x 64, of four warps, in steps of 32 (of 16 for weights on sm_80, whose tensor cores take registers). float64,
    for checks, gets what its registers hold.
    """
    matrix = dtype == torch.bfloat16 or precision == "tf32"
    three = precision == "tf32x3"
    if three:
        rows, columns, depth = 64, 64, 16 if weight and arch < 90 else 32
    elif dtype == torch.float64:
        rows, columns, depth = (32 if weight else 16), 32, 16
    elif dense:
        rows, columns = (128 if matrix and not weight else 64), 64
        depth = 64 if dtype == torch.bfloat16 else 32 if matrix else 16
        if weight:
            depth *= 2
    else:
        rows, columns, depth = (64 if matrix and not weight else 32), 64, 16
    constants = {
        "DENSE": dense,
        "PRECISION": precision,
        "ACC": accumulator(dtype)[1],
        "BM": rows,
        "BN": columns,
        "BK": depth,
    }
    # Four warps have fewer loads for as many products: eight spend a quarter of their instructions on loads.
    small = not weight if dtype == torch.float64 else dense and weight and not matrix
    staged = dense and matrix if not three else not weight
    return _Tile(constants, 4 if small or three else 8, 3 if staged else 2)


def _arch() -> int:
    """Of the current GPU, as 10 times its compute capability; the interpreter's is 90."""
    if triton.knobs.runtime.interpret:
        return 90
    found: int = triton.runtime.driver.active.get_current_target().arch
    return found


_THREE_PRODUCTS = (80, 90, 100, 103)
"""Architectures that multiply TF32 at more than three times the rate of float32; a desktop's GPU does not."""


def _precision(dtype: torch.dtype, dense: bool, arch: int) -> str:
    """How products are taken, by Triton's names; float32 by three products in dense tiles, where they are the faster.

    Raises:
        ValueError: ``MAMLPP_FAST_PRODUCTS`` is neither.
    """
    if dtype != torch.float32:
        return "ieee"
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    wanted = os.environ.get("MAMLPP_FAST_PRODUCTS", "tf32x3")
    if wanted not in ("tf32x3", "ieee"):
        raise ValueError(f"MAMLPP_FAST_PRODUCTS: expected tf32x3 or ieee, got {wanted!r}")
    return wanted if dense and arch in _THREE_PRODUCTS else "ieee"


def _operands(
    a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None, out: Tensor
) -> tuple[list[Tensor], int]:
    """Both pairs (the first again where there is no second) in one type, and how many there are."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    if (
        dtype not in _TYPES
        or (dtype == torch.float64) != (out.dtype == torch.float64)
        or out.dtype not in _TYPES
    ):
        raise TypeError(f"task_conv2d: expected float64, float32 or bfloat16, got {dtype} for {out.dtype}")
    tensors = [a, b] if a2 is None or b2 is None else [a, b, a2, b2]
    for tensor in (*tensors, out):
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise ValueError(
                "task_conv2d: expected contiguous tensors that start on 16 bytes, "
                f"got shape {tuple(tensor.shape)}, strides {tensor.stride()} at {tensor.data_ptr():#x}"
            )
    tensors = [tensor.to(dtype) for tensor in tensors]
    return tensors if len(tensors) == 4 else tensors * 2, len(tensors) // 2


def _geometry(x: Tensor, w: Tensor, y: Tensor, padding: int) -> tuple[int, ...]:
    """Tasks, images, H, W, Ci, Ho, Wo, Co, kw, taps, padding of rows and of columns of a convolution x * w = y.

    Raises:
        ValueError: a task has 2**31 elements or more.
    """
    tasks, images, height, width, ci = x.shape
    kh, kw = w.shape[1:3]
    pads = padding if kh > 1 else 0, padding if kw > 1 else 0
    if max(x[0].numel(), y[0].numel(), w[0].numel()) >= 2**31:
        raise ValueError(f"x: expected fewer than 2**31 elements a task, got {tuple(x.shape)}")
    return tasks, images, height, width, ci, *y.shape[2:], kw, kh * kw, *pads


def _dense(ci: int, co: int) -> bool:
    return ci % 16 == 0 and co % 16 == 0


def forward(
    x: Tensor, w: Tensor, x2: Tensor | None, w2: Tensor | None, stride: int, padding: int, out: Tensor
) -> None:
    """``task_conv2d`` of ``mamlpp_fast.ops``; all tensors contiguous."""
    tasks, images, height, width, ci, oh, ow, co, kw, taps, *pads = _geometry(x, w, out, padding)
    tensors, pairs = _operands(x, w, x2, w2, out)
    sizes = (pairs, images * oh * ow, oh, ow, height, width, ci, co, kw, taps, stride, *pads)
    _launch_product(tensors, out, sizes, tasks, transposed=False)


def to_input(
    g: Tensor, w: Tensor, g2: Tensor | None, w2: Tensor | None, stride: int, padding: int, out: Tensor
) -> None:
    """``task_conv2d_to_input``."""
    tasks, images, height, width, ci, oh, ow, co, kw, taps, *pads = _geometry(out, w, g, padding)
    tensors, pairs = _operands(g, w, g2, w2, out)
    sizes = (pairs, images * height * width, height, width, oh, ow, co, ci, kw, taps, stride, *pads)
    _launch_product(tensors, out, sizes, tasks, transposed=True)


def _launch_product(
    tensors: list[Tensor], out: Tensor, sizes: tuple[int, ...], tasks: int, *, transposed: bool
) -> None:
    dtype, arch = tensors[0].dtype, _arch()
    rows, channels = sizes[1], sizes[7]
    dense = _dense(sizes[6], channels)
    tile = _tile(dtype, dense, _precision(dtype, dense, arch), weight=False, arch=arch)
    grid = (triton.cdiv(rows, tile.constants["BM"]), triton.cdiv(channels, tile.constants["BN"]), tasks)
    _product[grid](
        *tensors, out, *sizes[:6], sizes[9], *sizes[6:], TRANSPOSED=transposed, **tile.constants,
        **_unrolling(tile, sizes[6], arch), **tile.options,
    )  # fmt: skip


def _unrolling(tile: _Tile, channels: int, arch: int) -> dict[str, Any]:
    """Blocks of channels that a step of the loop over taps takes: up to four, without a rest.

    On sm_80 one: there operands of tensor cores lie in registers, which do not suffice for more.
    """
    dense, precision = tile.constants["DENSE"], tile.constants["PRECISION"]
    blocks = triton.cdiv(channels, tile.constants["BK"])
    rolled = dense and arch < 90 and (precision != "ieee" or tile.constants["BK"] == 64)
    most = 2 if precision == "tf32x3" else 4
    unroll = max(n for n in range(1, most + 1) if blocks % n == 0) if dense and not rolled else 1
    return {"UNROLL": unroll, "ROLLED": rolled}


def to_weight(
    x: Tensor, g: Tensor, x2: Tensor | None, g2: Tensor | None, stride: int, padding: int, out: Tensor
) -> None:
    """``task_conv2d_to_weight``; the pixels of a task are cut into at most 32 pieces where programs are few."""
    tasks, images, height, width, ci, oh, ow, co, kw, taps, *pads = _geometry(x, out, g, padding)
    tensors, pairs = _operands(x, g, x2, g2, out)
    dtype, rows, dense, arch = tensors[0].dtype, images * oh * ow, _dense(ci, co), _arch()
    tile = _tile(dtype, dense, _precision(dtype, dense, arch), weight=True, arch=arch)
    bm = tile.constants["BM"]
    blocks = taps * triton.cdiv(ci, bm) if tile.constants["DENSE"] else triton.cdiv(taps * ci, bm)
    columns = triton.cdiv(co, tile.constants["BN"])
    piece, pieces = split(rows, blocks * columns * tasks, tile.constants["BK"], target=264)
    # With one piece neither is used.
    parts = out.new_empty(pieces, out.numel() if pieces > 1 else 0, dtype=accumulator(dtype)[0])
    counts = counters(out, blocks * columns * tasks)
    sizes = (pairs, rows, oh, ow, height, width, ci, co, kw, taps, stride, *pads, tasks, pieces, piece)
    _weight_product[blocks, columns, tasks * pieces](
        *tensors, parts, counts, out, *sizes, **tile.constants, **tile.options
    )


_GEOMETRIES = {True: (48, 64, 6), False: (1, 64, 6)}
"""Channels of input and output and the side of an image, by layout: 3x3 taps, step and padding 1, compiled ahead.

What is compiled in earnest has a network's own; the code is the same but for its constants.
"""


def _geometry_constants(order: str, ci: int, co: int, side: int) -> dict[str, int]:
    weight = order == "to_weight"
    sizes = {"OH": side, "OW": side, "IH": side, "IW": side} if weight else {}
    ca, cb = (co, ci) if order == "to_input" else (ci, co)
    return sizes | {"CA": ca, "CB": cb, "KW": 3, "TAPS": 9, "STRIDE": 1, "PAD_Y": 1, "PAD_X": 1}


def launch_configurations() -> Iterator[Configuration]:
    """Three products, two layouts of the reduction, five precisions, two results, each for one geometry."""
    modes = (
        (torch.float64, "ieee", torch.float64),
        (torch.float32, "ieee", torch.float32),
        (torch.float32, "tf32", torch.float32),
        (torch.float32, "tf32x3", torch.float32),
        (torch.bfloat16, "ieee", torch.float32),
        (torch.bfloat16, "ieee", torch.bfloat16),
    )
    orders = ("forward", "to_input", "to_weight")
    for (dtype, precision, out), dense, order in itertools.product(modes, (True, False), orders):
        if precision == "tf32x3" and not dense:
            continue
        weight = order == "to_weight"
        kernel = _weight_product if weight else _product
        tile, older = (_tile(dtype, dense, precision, weight, arch) for arch in (90, 80))
        constants = tile.constants | _geometry_constants(order, *_GEOMETRIES[dense])
        by_arch = {80: older.constants}
        if kernel is _product:
            constants |= {"TRANSPOSED": order == "to_input", **_unrolling(tile, constants["CA"], 90)}
            by_arch = {80: older.constants | _unrolling(older, constants["CA"], 80)}
        wide = TYPE_NAMES[accumulator(dtype)[0]]
        kinds = {"out_ptr": f"*{TYPE_NAMES[out]}", "part_ptr": f"*{wide}", "counter_ptr": "*i32"}
        operand = f"*{TYPE_NAMES[dtype]}"
        types = {
            n: kinds.get(n, operand if n.endswith("_ptr") else "i32")
            for n in kernel.arg_names
            if n not in constants
        }
        pointers = tuple(n for n in types if n.endswith("_ptr"))
        shown = TYPE_NAMES[dtype] if precision == "ieee" else precision
        yield Configuration(
            f"{order} {'dense' if dense else 'flat'} {shown} -> {TYPE_NAMES[out]}",
            kernel,
            types,
            constants,
            tile.num_warps,
            tile.num_stages,
            aligned=pointers,
            tensor_cores=dtype == torch.bfloat16 or precision != "ieee",
            by_arch=by_arch,
        )
