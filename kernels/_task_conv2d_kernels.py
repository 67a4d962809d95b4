"""What a program of a convolution or of its gradients does; the launches are those of ``task_conv2d``."""

import triton
import triton.language as tl

from ._launch import last_piece

_SIZES = ["pairs", "M", "OH", "OW", "IH", "IW", "taps", "TW"]
"""Not specialised: the sizes of images. Channels, kernel, step and padding are constants of the compiled program.

TW tasks have weights of their own: task t has those of t % TW. A gradient of weights lies `gap` elements further for
every TW tasks.
"""


@triton.jit
def _source(i, tap, padding, stride, size, TRANSPOSED: tl.constexpr):
    """Where along one axis output position i finds its operand for this tap, and whether that is inside."""
    if TRANSPOSED:
        shifted = i + padding - tap
        position = shifted // stride
        inside = (position * stride == shifted) & (position.to(tl.uint32) < size)
    else:
        position = i * stride - padding + tap
        inside = position.to(tl.uint32) < size
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
    of its own for each step (`_begun`), which an ordinary addition takes up (`_taken_up`). Triton's own "tf32x3" also
    looks for NaN in each number and each sum: 1.7 times the instructions.
    """
    if PRECISION == "tf32x3":
        large_a, rest_a = _parts(a)
        large_b, rest_b = _parts(b)
        # large_a once more, in other words: of an operand that comes twice, or first as part of another, Triton 3.8
        # finds both forms, in registers as they are loaded and as they are multiplied. In machine code it is one.
        again = ((a.to(tl.int32, bitcast=True) + 0x1000) >> 13 << 13).to(tl.float32, bitcast=True)
        accumulator = tl.dot(large_a, rest_b, accumulator, input_precision="tf32", out_dtype=ACC)
        accumulator = tl.dot(rest_a, large_b, accumulator, input_precision="tf32", out_dtype=ACC)
        total = tl.dot(again, large_b, accumulator, input_precision="tf32", out_dtype=ACC)
    else:
        total = tl.dot(a, b, accumulator, input_precision=PRECISION, out_dtype=ACC)
    return total


@triton.jit
def _begun(total, PRECISION: tl.constexpr):
    """What the products of a step are added to."""
    return tl.zeros_like(total) if PRECISION == "tf32x3" else total


@triton.jit
def _taken_up(total, step, PRECISION: tl.constexpr):
    """The sum with a step's products."""
    return total + step if PRECISION == "tf32x3" else step


@triton.jit
def _wrapped(x, size):
    """unsigned x < 2 size, modulo size: of x and x - size, which is huge where x is smaller, the smaller one."""
    return tl.minimum(x, x - size)


@triton.jit
def _product_tile(a_ptr, w_ptr, a2_ptr, w2_ptr, out_ptr, pairs, M, OH, OW, IH, IW, taps, TW, row, column, task,
                  CA: tl.constexpr, CB: tl.constexpr, KW: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr,
                  PAD_Y: tl.constexpr, PAD_X: tl.constexpr, TRANSPOSED: tl.constexpr, DENSE: tl.constexpr,
                  PRECISION: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                  UNROLL: tl.constexpr, ROLLED: tl.constexpr):  # fmt: skip
    """A tile of a [T, images, IH, IW, CA] convolved with w, or (TRANSPOSED) the adjoint; out [T, images, OH, OW, CB].

    DENSE takes one tap at a time, UNROLL blocks of channels for the one address and mask of its pixels, and needs
    channels in multiples of BK UNROLL; otherwise taps and channels are one axis. Rows past the last are the last one
    again, columns those of the beginning, which needs no mask: what they give is not written.
    """
    m = row * BM + tl.arange(0, BM)
    cb = column * BN + tl.arange(0, BN)
    t = task.to(tl.int64)
    real_row = tl.minimum(m, M - 1)
    n = (real_row // (OH * OW))[:, None]
    i = (real_row % (OH * OW) // OW)[:, None]
    j = (real_row % OW)[:, None]
    b = (cb % CB)[None, :]
    task_a = t * (M // (OH * OW)) * IH * IW * CA
    task_w = (task % TW).to(tl.int64) * TAPS * CA * CB
    # Where a pixel's operand for the first tap would be; that for another is then as far away for all pixels.
    shifted: tl.constexpr = not TRANSPOSED or STRIDE == 1
    sign: tl.constexpr = -1 if TRANSPOSED else 1
    corner = ((n * IH + i * STRIDE - sign * PAD_Y) * IW + j * STRIDE - sign * PAD_X).to(tl.int64) * CA
    rounds: tl.constexpr = CA // (BK * UNROLL)
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
                if shifted:
                    left_row = a + corner + sign * (tap // KW * IW + tap % KW) * CA
                else:
                    left_row = a + ((n * IH + y) * IW + x) * CA
                step = _begun(result, PRECISION)
                for block in tl.static_range(UNROLL):
                    c = (tile % rounds * UNROLL + block) * BK + tl.arange(0, BK)
                    left = tl.load(left_row + c[None, :], mask=row_inside & column_inside, other=0.0)
                    weight = (
                        (tap * CB + b) * CA + c[:, None] if TRANSPOSED else (tap * CA + c)[:, None] * CB + b
                    )
                    step = _dot(left, tl.load(w + weight), step, ACC, PRECISION)
                result = _taken_up(result, step, PRECISION)
            else:
                k = tile * BK + tl.arange(0, BK)
                tap = k // CA
                c = k % CA
                real = tap < TAPS
                y, row_inside = _source(i, (tap // KW)[None, :], PAD_Y, STRIDE, IH, TRANSPOSED)
                x, column_inside = _source(j, (tap % KW)[None, :], PAD_X, STRIDE, IW, TRANSPOSED)
                pixel = (n * IH + y) * IW + x
                inside = row_inside & column_inside & real[None, :]
                left = tl.load(a + pixel * CA + c[None, :], mask=inside, other=0.0)
                weight = (
                    (tap[:, None] * CB + b) * CA + c[:, None]
                    if TRANSPOSED
                    else (tap * CA + c)[:, None] * CB + b
                )
                right = tl.load(w + weight, mask=real[:, None], other=0.0)
                result = _dot(left, right, result, ACC, PRECISION)
    written = (m < M)[:, None] & (cb < CB)[None, :]
    tl.store(out_ptr + t * M * CB + m[:, None] * CB + cb[None, :], result, mask=written)


@triton.jit(do_not_specialize=_SIZES)
def _product(a_ptr, w_ptr, a2_ptr, w2_ptr, out_ptr, pairs, M, OH, OW, IH, IW, taps, TW, CA: tl.constexpr,
             CB: tl.constexpr, KW: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, PAD_Y: tl.constexpr,
             PAD_X: tl.constexpr, TRANSPOSED: tl.constexpr, DENSE: tl.constexpr, PRECISION: tl.constexpr,
             ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr,
             ROLLED: tl.constexpr):  # fmt: skip
    _product_tile(
        a_ptr, w_ptr, a2_ptr, w2_ptr, out_ptr, pairs, M, OH, OW, IH, IW, taps, TW, tl.program_id(0), tl.program_id(1),
        tl.program_id(2), CA, CB, KW, TAPS, STRIDE, PAD_Y, PAD_X, TRANSPOSED, DENSE, PRECISION, ACC, BM, BN, BK, UNROLL,
        ROLLED,
    )  # fmt: skip


@triton.jit
def _weight_tile(x_ptr, g_ptr, x2_ptr, g2_ptr, part_ptr, counter_ptr, out_ptr, pairs, M, block, column, task_and_piece,
                 OH: tl.constexpr, OW: tl.constexpr, IH: tl.constexpr, IW: tl.constexpr, CA: tl.constexpr,
                 CB: tl.constexpr, KW: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, PAD_Y: tl.constexpr,
                 PAD_X: tl.constexpr, T, S, piece, TW, gap, DENSE: tl.constexpr, PRECISION: tl.constexpr,
                 ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """A tile of the sum of g [T, images, OH, OW, CB] against x [T, images, IH, IW, CA]; out [T, TAPS, CA, CB].

    Where there are several pieces (of `piece` rows), part [S, T, TAPS, CA, CB] takes the sum of each, and the last one
    of a tile adds them up. DENSE: a block is one of a tap and of channels; otherwise taps and channels are one axis.
    The images' sizes are constants too: where g's pixels are those of x, a row's place in its image goes on from step
    to step, without a division.

    x is loaded as it is multiplied, channels by pixels: what is transposed after a load, and cut in two for three
    products, Triton copies by 4 bytes, with an address and a mask for each. Channels past the last are those of the
    beginning again, which needs no mask: what they give is not written.
    """
    cb = column * BN + tl.arange(0, BN)
    t = task_and_piece % T
    s = task_and_piece // T
    if DENSE:
        blocks: tl.constexpr = (CA + BM - 1) // BM
        tap = block // blocks
        c = block % blocks * BM + tl.arange(0, BM)
        real = c < CA
        tap_row = tap // KW
        tap_column = tap % KW
    else:
        k = block * BM + tl.arange(0, BM)
        tap = k // CA
        c = k % CA
        real = tap < TAPS
        tap_row = (tap // KW)[:, None]
        tap_column = (tap % KW)[:, None]
    same: tl.constexpr = STRIDE == 1 and OH == IH and OW == IW
    images = M // (OH * OW)
    task_x = t.to(tl.int64) * images * IH * IW * CA
    task_g = t.to(tl.int64) * M * CB
    stop = tl.minimum(M, (s + 1) * piece)
    result = tl.zeros([BM, BN], ACC)
    rows = tl.arange(0, BK)
    left_channel = c % CA
    right_channel = cb % CB
    for pair in range(pairs):
        x = tl.where(pair == 0, x_ptr, x2_ptr) + task_x
        g = tl.where(pair == 0, g_ptr, g2_ptr) + task_g
        place = (s * piece + rows).to(tl.uint32) % (OH * OW)
        across = place % OW * OH  # so that rows and columns have one limit, and one comparison does for both
        for first in range(s * piece, stop, BK):
            m = first + rows
            if same:
                down = place[None, :] + (tap_row - PAD_Y) * OW
                inside = tl.maximum(down, across[None, :] + (tap_column - PAD_X) * OH) < OH * OW
                shift = (tap_row - PAD_Y) * IW + tap_column - PAD_X
                left_at = x + shift * CA + left_channel[:, None] + m[None, :].to(tl.int64) * CA
                place = _wrapped(place + BK % (OH * OW), OH * OW)
                across = _wrapped(across + BK % OW * OH, OH * OW)
            else:
                line = m.to(tl.uint32) // OW
                i, row_inside = _source((line % OH).to(tl.int32)[None, :], tap_row, PAD_Y, STRIDE, IH, False)
                j, column_inside = _source(
                    (m - line.to(tl.int32) * OW)[None, :], tap_column, PAD_X, STRIDE, IW, False
                )
                inside = row_inside & column_inside
                left_at = x + (((m // (OH * OW))[None, :] * IH + i) * IW + j) * CA + left_channel[:, None]
            inside = inside & (m < stop)[None, :]
            if not DENSE:
                inside = inside & real[:, None]
            left = tl.load(left_at, mask=inside, other=0.0)
            row = tl.minimum(m, stop - 1)  # what comes after the last row is zero in x
            right = tl.load(g + right_channel[None, :] + row[:, None].to(tl.int64) * CB)
            step = _dot(left, right, _begun(result, PRECISION), ACC, PRECISION)
            result = _taken_up(result, step, PRECISION)
    at = t.to(tl.int64) * TAPS * CA * CB + ((tap * CA + c) * CB)[:, None] + cb[None, :]
    written = real[:, None] & (cb < CB)[None, :]
    out_ptr += (t // TW).to(tl.int64) * gap
    if S == 1:
        tl.store(out_ptr + at, result, mask=written)
    else:
        elements = T.to(tl.int64) * TAPS * CA * CB
        tl.store(part_ptr + s * elements + at, result, mask=written)
        tile_of_all = (block * ((CB + BN - 1) // BN) + column) * T + t
        if last_piece(counter_ptr + tile_of_all, S):
            total = tl.load(part_ptr + at, mask=written, other=0.0, cache_modifier=".cg")
            for other in range(1, S):
                total += tl.load(
                    part_ptr + other * elements + at, mask=written, other=0.0, cache_modifier=".cg"
                )
            tl.store(out_ptr + at, total, mask=written)


@triton.jit(do_not_specialize=["pairs", "M", "T", "S", "piece", "TW", "gap"])
def _weight_product(x_ptr, g_ptr, x2_ptr, g2_ptr, part_ptr, counter_ptr, out_ptr, pairs, M, OH: tl.constexpr,
                    OW: tl.constexpr, IH: tl.constexpr, IW: tl.constexpr, CA: tl.constexpr, CB: tl.constexpr,
                    KW: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, PAD_Y: tl.constexpr,
                    PAD_X: tl.constexpr, T, S, piece, TW, gap, DENSE: tl.constexpr, PRECISION: tl.constexpr,
                    ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    _weight_tile(
        x_ptr, g_ptr, x2_ptr, g2_ptr, part_ptr, counter_ptr, out_ptr, pairs, M, tl.program_id(0), tl.program_id(1),
        tl.program_id(2), OH, OW, IH, IW, CA, CB, KW, TAPS, STRIDE, PAD_Y, PAD_X, T, S, piece, TW, gap, DENSE,
        PRECISION, ACC, BM, BN, BK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["pairs", "images", "taps", "T", "S", "piece", "TW", "gap"])
def _gradient_products(x_ptr, w_ptr, g_ptr, x2_ptr, w2_ptr, g2_ptr, part_ptr, counter_ptr, gx_ptr, gw_ptr, pairs,
                       images, taps, T, S, piece, TW, gap, OH: tl.constexpr, OW: tl.constexpr, IH: tl.constexpr,
                       IW: tl.constexpr, CA: tl.constexpr, CB: tl.constexpr, KW: tl.constexpr, TAPS: tl.constexpr,
                       STRIDE: tl.constexpr,
                       PAD_Y: tl.constexpr, PAD_X: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
                       BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr,
                       ROLLED: tl.constexpr, WEIGHT_BM: tl.constexpr, WEIGHT_BK: tl.constexpr):  # fmt: skip
    """Both gradients of a convolution x [T, images, IH, IW, CA] * w [T, TAPS, CA, CB]: first gw's tiles, then gx's."""
    columns: tl.constexpr = (CB + BN - 1) // BN
    blocks: tl.constexpr = TAPS * ((CA + WEIGHT_BM - 1) // WEIGHT_BM)
    program = tl.program_id(0)
    tiles = blocks * columns * T * S
    if program < tiles:
        _weight_tile(
            x_ptr, g_ptr, x2_ptr, g2_ptr, part_ptr, counter_ptr, gw_ptr, pairs, images * (OH * OW), program % blocks,
            program // blocks % columns, program // (blocks * columns), OH, OW, IH, IW, CA, CB, KW, TAPS, STRIDE, PAD_Y,
            PAD_X, T, S, piece, TW, gap, True, PRECISION, ACC, WEIGHT_BM, BN, WEIGHT_BK,
        )  # fmt: skip
    else:
        tile = program - tiles
        rows = images * (IH * IW)
        along = tl.cdiv(rows, BM)
        across: tl.constexpr = (CA + BN - 1) // BN
        _product_tile(
            g_ptr, w_ptr, g2_ptr, w2_ptr, gx_ptr, pairs, rows, IH, IW, OH, OW, taps, TW, tile % along,
            tile // along % across, tile // (along * across), CB, CA, KW, TAPS, STRIDE, PAD_Y, PAD_X, True, True,
            PRECISION, ACC, BM, BN, BK, UNROLL, ROLLED,
        )  # fmt: skip
