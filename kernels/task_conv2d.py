"""Task-batched convolutions as implicit matrix products on tensor cores: forward, to input, to weight.

Arguments are those of ``mamlpp_fast.ops.task_conv2d``. One program makes a tile of one task's result and keeps it in
registers while it walks the reduction (taps and channels; for the weights, the pixels of all images), then the
second operand pair's: one accumulator for both. Nothing is unfolded in memory.

Weights may be those of fewer tasks (``task_conv2d_shared``): task t has those of t modulo their number.

Operands are float64, float32 or bfloat16; sums are float32 (float64 of float64). float32 operands are rounded to TF32
where ``torch.backends.cuda.matmul.fp32_precision`` is ``"tf32"``; elsewhere they are multiplied as they are: on tensor
cores that have room for it by three products of TF32, otherwise, or where ``MAMLPP_FAST_PRODUCTS`` is
``ieee``, by ordinary multiplications.
"""

import itertools
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import _task_conv2d_kernels as kernels
from ._launch import (
    TYPE_NAMES,
    Configuration,
    accumulator,
    argument_types,
    counters,
    first_role,
    launch_options,
    split,
)

_TYPES = (torch.float64, torch.float32, torch.bfloat16)


class _Tile(NamedTuple):
    """Launch configuration of a product."""

    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return launch_options(self.num_warps, self.num_stages)


def _matrix(dtype: torch.dtype, precision: str) -> bool:
    """Whether tensor cores multiply."""
    return dtype == torch.bfloat16 or precision != "ieee"


def _tile(dtype: torch.dtype, dense: bool, precision: str, weight: bool, arch: int) -> _Tile:
    """The one tile (rows, columns, depth of a step) for operands of this type.

    Dense: 128 x 64 on tensor cores, 64 x 64 on the ordinary units and for weights, where the rows are channels of one
    tap, and a step has twice as many pixels: finding them is half of its instructions. Where taps and channels are
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
    _product(x, w, x2, w2, stride, _geometry(x, w, out, padding), out, transposed=False)


def to_input(
    g: Tensor, w: Tensor, g2: Tensor | None, w2: Tensor | None, stride: int, padding: int, out: Tensor
) -> None:
    """``task_conv2d_to_input``."""
    _product(g, w, g2, w2, stride, _geometry(out, w, g, padding), out, transposed=True)


def _product(
    a: Tensor, w: Tensor, a2: Tensor | None, w2: Tensor | None, stride: int, geometry: tuple[int, ...], out: Tensor, *,
    transposed: bool,
) -> None:  # fmt: skip
    """Images by weights: those in front of the convolution, or behind it and the weights ``transposed``."""
    tasks, images, *_, kw, taps, pad_y, pad_x = geometry
    tensors, pairs = _operands(a, w, a2, w2, out)
    (height, width, ci), (oh, ow, co) = a.shape[2:], out.shape[2:]
    rows, dense, dtype, arch = images * oh * ow, _dense(ci, co), tensors[0].dtype, _arch()
    tile = _tile(dtype, dense, _precision(dtype, dense, arch), weight=False, arch=arch)
    grid = (triton.cdiv(rows, tile.constants["BM"]), triton.cdiv(co, tile.constants["BN"]), tasks)
    kernels._product[grid](
        *tensors, out, pairs, rows, oh, ow, height, width, taps, len(w), ci, co, kw, taps, stride, pad_y, pad_x,
        TRANSPOSED=transposed, **_stepped(tile, ci, arch), **tile.options,
    )  # fmt: skip


def _stepped(tile: _Tile, channels: int, arch: int) -> dict[str, Any]:
    """A tile's constants. Over taps: blocks of channels without a rest, as many a step as shared memory has room for.

    On sm_80 one: there operands of tensor cores lie in registers, which do not suffice for more.
    """
    dense, precision, depth = (tile.constants[name] for name in ("DENSE", "PRECISION", "BK"))
    if not dense:
        return tile.constants | {"UNROLL": 1, "ROLLED": False}
    rolled = arch < 90 and (precision != "ieee" or depth == 64)
    block = math.gcd(channels, depth)
    blocks, most = channels // block, (3 if tile.num_stages == 3 else 4) * depth // block
    return tile.constants | {
        "BK": block,
        "UNROLL": 1 if rolled else max(n for n in range(1, most + 1) if blocks % n == 0),
        "ROLLED": rolled,
    }


def to_weight(
    x: Tensor, g: Tensor, x2: Tensor | None, g2: Tensor | None, stride: int, padding: int, out: Tensor
) -> None:
    """``task_conv2d_to_weight``; the pixels of a task are cut into at most 32 pieces where programs are few."""
    out, gap = first_role(out, 5)
    tasks, images, height, width, ci, oh, ow, co, kw, taps, *pads = _geometry(x, out, g, padding)
    tensors, pairs = _operands(x, g, x2, g2, out)
    dtype, rows, dense, arch = tensors[0].dtype, images * oh * ow, _dense(ci, co), _arch()
    tile = _tile(dtype, dense, _precision(dtype, dense, arch), weight=True, arch=arch)
    bm = tile.constants["BM"]
    blocks = taps * triton.cdiv(ci, bm) if tile.constants["DENSE"] else triton.cdiv(taps * ci, bm)
    columns = triton.cdiv(co, tile.constants["BN"])
    piece, pieces = split(rows, blocks * columns * tasks, tile.constants["BK"], target=264)
    # With one piece neither is used.
    parts = out.new_empty(pieces, tasks * out[0].numel() if pieces > 1 else 0, dtype=accumulator(dtype)[0])
    counts = counters(out, blocks * columns * tasks)
    sizes = (pairs, rows, oh, ow, height, width, ci, co, kw, taps, stride, *pads, tasks, pieces, piece)
    kernels._weight_product[blocks, columns, tasks * pieces](
        *tensors, parts, counts, out, *sizes, len(out), gap, **tile.constants, **tile.options
    )


def gradients(
    x: Tensor, w: Tensor, g: Tensor, x2: Tensor | None, w2: Tensor | None, g2: Tensor | None, stride: int, padding: int,
    gx: Tensor, gw: Tensor,
) -> None:  # fmt: skip
    """``task_conv2d_gradients``: on tensor cores one launch, whose programs make tiles of either; otherwise two."""
    tasks, images, height, width, ci, oh, ow, co, kw, taps, *pads = _geometry(x, w, g, padding)
    (g, w, *others), pairs = _operands(g, w, g2, w2, gx)
    first, gap = first_role(gw, 5)
    (x, _, x2, g2), _ = _operands(x, g, x2, g2, first)
    dtype, arch, dense = g.dtype, _arch(), _dense(ci, co)
    precision = _precision(dtype, dense, arch)
    if not dense or x.dtype != dtype or not _matrix(dtype, precision):
        two = pairs == 2
        to_input(g, w, g2 if two else None, others[1] if two else None, stride, padding, gx)
        to_weight(x, g, x2 if two else None, g2 if two else None, stride, padding, gw)
        return
    tile, other = (_tile(dtype, True, precision, weight=weight, arch=arch) for weight in (False, True))
    shared = tile.constants
    columns, rows = shared["BN"], images * oh * ow
    blocks = taps * triton.cdiv(ci, other.constants["BM"]) * triton.cdiv(co, columns)
    piece, pieces = split(rows, blocks * tasks, other.constants["BK"], target=264)
    parts = gw.new_empty(pieces, tasks * w[0].numel() if pieces > 1 else 0, dtype=accumulator(dtype)[0])
    counts = counters(gw, blocks * tasks)
    tiles = triton.cdiv(images * height * width, shared["BM"]) * triton.cdiv(ci, columns)
    kernels._gradient_products[((blocks * pieces + tiles) * tasks,)](
        x, w, g, x2, others[1], g2, parts, counts, gx, first, pairs, images, taps, tasks, pieces, piece, len(w),
        gap, oh, ow, height, width, ci, co, kw, taps, stride, *pads, **_both(tile, other, co, arch), **tile.options,
    )  # fmt: skip


def _both(tile: _Tile, weight: _Tile, channels: int, arch: int) -> dict[str, Any]:
    """Constants of one launch for both gradients, tiles of as many columns, by as many warps."""
    shared = {n: v for n, v in _stepped(tile, channels, arch).items() if n != "DENSE"}
    return shared | {"WEIGHT_BM": weight.constants["BM"], "WEIGHT_BK": weight.constants["BK"]}


_GEOMETRIES = {True: (48, 64, 6), False: (1, 64, 6)}
"""Channels of input and output and the side of an image, by layout: 3x3 taps, step and padding 1, compiled ahead.

What is compiled in earnest has a network's own; the code is the same but for its constants.
"""


def _geometry_constants(order: str, ci: int, co: int, side: int) -> dict[str, int]:
    weight = order == "to_weight"
    sizes = {"OH": side, "OW": side, "IH": side, "IW": side} if weight or order == "gradients" else {}
    ca, cb = (co, ci) if order == "to_input" else (ci, co)
    return sizes | {"CA": ca, "CB": cb, "KW": 3, "TAPS": 9, "STRIDE": 1, "PAD_Y": 1, "PAD_X": 1}


def _constants(
    order: str, dtype: torch.dtype, dense: bool, precision: str, channels: int, arch: int
) -> dict[str, Any]:
    """Of a launch but its geometry; `channels` are those that the first operand of a product is summed over."""
    tile, weight = (_tile(dtype, dense, precision, kind, arch) for kind in (False, True))
    if order == "to_weight":
        return weight.constants
    if order == "gradients":
        return _both(tile, weight, channels, arch)
    return _stepped(tile, channels, arch) | {"TRANSPOSED": order == "to_input"}


def launch_configurations() -> Iterator[Configuration]:
    """Three products and two in one, two layouts of the reduction, five precisions, two results; one geometry each."""
    modes = (
        (torch.float64, "ieee", torch.float64),
        (torch.float32, "ieee", torch.float32),
        (torch.float32, "tf32", torch.float32),
        (torch.float32, "tf32x3", torch.float32),
        (torch.bfloat16, "ieee", torch.float32),
        (torch.bfloat16, "ieee", torch.bfloat16),
    )
    orders = ("forward", "to_input", "to_weight", "gradients")
    for (dtype, precision, out), dense, order in itertools.product(modes, (True, False), orders):
        both, weight = order == "gradients", order == "to_weight"
        if (not dense and (both or precision == "tf32x3")) or (both and not _matrix(dtype, precision)):
            continue
        kernel = (
            kernels._weight_product if weight else kernels._gradient_products if both else kernels._product
        )
        geometry = _geometry_constants(order, *_GEOMETRIES[dense])
        channels = geometry["CB" if both else "CA"]
        constants, older = (_constants(order, dtype, dense, precision, channels, arch) for arch in (90, 80))
        constants |= geometry
        tile = _tile(dtype, dense, precision, weight, 90)
        results = dict.fromkeys(("out_ptr", "gx_ptr", "gw_ptr"), out) | {"part_ptr": accumulator(dtype)[0]}
        types = argument_types(kernel, constants, dtype, results)
        shown = TYPE_NAMES[dtype] if precision == "ieee" else precision
        yield Configuration(
            f"{order} {'dense' if dense else 'flat'} {shown} -> {TYPE_NAMES[out]}",
            kernel,
            types,
            constants,
            tile.num_warps,
            tile.num_stages,
            tensor_cores=_matrix(dtype, precision),
            by_arch={80: older},
        )
