"""Device code of ``conv_norm_act_pool``.

T tasks; C channels of the result; K values of a patch, padded to KP with at least one to spare, whose place holds 1, so
that a product with patches brings the plain sum along; W, CI: row length and channels of a padded image, of PIXELS
pixels; KW: width of the kernel; M patches or windows of a task, in S pieces of `piece`. MOVES says that γ or β has a
tangent. per_row neighbouring tasks share a row of γ and β; TW tasks have weights of their own, task t those of t % TW,
and a gradient of weights lies `gap` elements further for every TW tasks. What happens once a channel is float64
throughout.
"""

import triton
import triton.language as tl

from ._launch import ROWS, last_piece

UNALIGNED = [*ROWS, "moments_ptr"]
_SIZES = [
    "C",
    "K",
    "M",
    "T",
    "S",
    "piece",
    "stretch",
    "H",
    "W",
    "CI",
    "KW",
    "OH",
    "OW",
    "N",
    "padding",
    "per_row",
    "TW",
    "gap",
]


@triton.jit(do_not_specialize=_SIZES)
def pixel_sums(image_ptr, part_ptr, M, CI, T, S, piece, BM: tl.constexpr, BC: tl.constexpr):
    """Sums [S, T, BC] of the pixels of one piece of a task's images, as they are."""
    s = tl.program_id(0)
    t = tl.program_id(1)
    c = tl.arange(0, BC)
    stop = tl.minimum(M, (s + 1) * piece)
    total = tl.zeros([BM, BC], tl.float64)
    image_ptr += t.to(tl.int64) * M * CI
    for first in range(s * piece, stop, BM):
        m = first + tl.arange(0, BM)
        valid = (m < stop)[:, None] & (c < CI)[None, :]
        total += tl.load(image_ptr + m[:, None] * CI + c[None, :], mask=valid, other=0.0).to(tl.float64)
    tl.store(part_ptr + (s * T + t) * BC + c, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=_SIZES)
def pad(image_ptr, part_ptr, padded_ptr, centre_ptr, H, W, CI, N, T, S, padding, BM: tl.constexpr, BC: tl.constexpr,
        BS: tl.constexpr):  # fmt: skip
    """Padded images less their mean, and that mean [T, BC] as it was rounded; H and W are those of the images."""
    t = tl.program_id(1)
    c = tl.arange(0, BC)
    s = tl.arange(0, BS)
    rows = ((s * T + t) * BC)[:, None] + c[None, :]
    total = tl.sum(tl.load(part_ptr + rows, mask=(s < S)[:, None], other=0.0), axis=0)
    kind = padded_ptr.dtype.element_ty
    centre = (total / (N * H * W).to(tl.float64)).to(kind)
    if tl.program_id(0) == 0:
        tl.store(centre_ptr + t * BC + c, centre.to(tl.float64))
    PH = H + 2 * padding
    PW = W + 2 * padding
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = m // (PH * PW)
    y = m % (PH * PW) // PW - padding
    x = m % PW - padding
    real = (n < N)[:, None] & (c < CI)[None, :]
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    source = ((t.to(tl.int64) * N + n) * H + y) * W + x
    value = tl.load(image_ptr + source[:, None] * CI + c[None, :], mask=real & inside[:, None], other=0.0)
    target = t.to(tl.int64) * N * PH * PW + m
    tl.store(padded_ptr + target[:, None] * CI + c[None, :], value - centre[None, :], mask=real)


@triton.jit
def _places(K, W, CI, KW, KP: tl.constexpr):
    """Offset of every value of a patch from its first [KP]."""
    k = tl.arange(0, KP)
    run = KW * CI
    return tl.where(k < K, k // run * W * CI + k % run, 0)


@triton.jit
def _patches(padded_ptr, at, valid, K, W, CI, KW, KP: tl.constexpr, ACC: tl.constexpr):
    """Patches [BM, KP] whose first values lie at offsets `at` [BM], and 1 in column K."""
    k = tl.arange(0, KP)
    places = _places(K, W, CI, KW, KP)
    real = valid[:, None] & (k < K)[None, :]
    values = tl.load(padded_ptr + at[:, None] + places[None, :], mask=real, other=0.0).to(ACC)
    return tl.where(valid[:, None] & (k == K)[None, :], 1.0, values)


@triton.jit(do_not_specialize=_SIZES)
def patch_products(padded_ptr, part_ptr, K, M, H, W, CI, KW, OH, OW, T, S, piece, KP: tl.constexpr,
                   BM: tl.constexpr):  # fmt: skip
    """Sums [S, T, KP, KP] of products of two values over the patches of one piece; H, W of the padded images."""
    s = tl.program_id(0)
    t = tl.program_id(1)
    padded_ptr += t.to(tl.int64) * (M // (OH * OW)) * H * W * CI
    stop = tl.minimum(M, (s + 1) * piece)
    total = tl.zeros([KP, KP], tl.float64)
    for first in range(s * piece, stop, BM):
        m = first + tl.arange(0, BM)
        at = ((m // (OH * OW) * H + m % (OH * OW) // OW) * W + m % OW) * CI
        patch = _patches(padded_ptr, at, m < stop, K, W, CI, KW, KP, tl.float64)
        total = tl.dot(tl.trans(patch), patch, total, input_precision="ieee", out_dtype=tl.float64)
    k = tl.arange(0, KP)
    rows = (s * T + t).to(tl.int64) * KP * KP + k[:, None] * KP + k[None, :]
    tl.store(part_ptr + rows, total)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=UNALIGNED)
def moments(part_ptr, centre_ptr, moments_ptr, K, CI, T, S, KP: tl.constexpr, BC: tl.constexpr):
    """Mean of the patches, of the centred ones and their covariance, [K + 2, K] a task."""
    t = tl.program_id(0)
    i = tl.arange(0, KP)[:, None]
    j = tl.arange(0, KP)[None, :]
    total = tl.zeros([KP, KP], tl.float64)
    for s in range(S):
        total += tl.load(part_ptr + (s * T + t).to(tl.int64) * KP * KP + i * KP + j)
    count = tl.sum(tl.sum(tl.where((i == K) & (j == K), total, 0.0), axis=0), axis=0)
    total /= count
    column = tl.sum(tl.where(j == K, total, 0.0), axis=1)
    row = tl.sum(tl.where(i == K, total, 0.0), axis=0)
    moments_ptr += t * (K + 2) * K
    k = tl.arange(0, KP)
    centre = tl.load(centre_ptr + t * BC + k % CI, mask=k < K, other=0.0)
    tl.store(moments_ptr + k, row + centre, mask=k < K)
    tl.store(moments_ptr + K + k, row, mask=k < K)
    covariance = total - column[:, None] * row[None, :]
    tl.store(moments_ptr + (i + 2) * K + j, covariance, mask=(i < K) & (j < K))


@triton.jit
def _matrix(ptr, t, c, C, K, KP: tl.constexpr):
    """Weights [KP, BC] of a task, zero beyond K."""
    k = tl.arange(0, KP)
    valid = (k < K)[:, None] & (c < C)[None, :]
    return tl.load(ptr + (t.to(tl.int64) * K + k[:, None]) * C + c[None, :], mask=valid, other=0.0).to(
        tl.float64
    )


@triton.jit
def _set_matrix(ptr, value, t, c, C, K, KP: tl.constexpr):
    k = tl.arange(0, KP)
    valid = (k < K)[:, None] & (c < C)[None, :]
    tl.store(ptr + (t.to(tl.int64) * K + k[:, None]) * C + c[None, :], value, mask=valid)


@triton.jit
def _row(ptr, c, C):
    return tl.load(ptr + c, mask=c < C, other=0.0).to(tl.float64)


@triton.jit
def _mean(moments_ptr, t, row, K, KP: tl.constexpr):
    k = tl.arange(0, KP)
    return tl.load(moments_ptr + (t * (K + 2) + row) * K + k, mask=k < K, other=0.0)


@triton.jit
def _covariance_times(moments_ptr, a, t, K, KP: tl.constexpr):
    i = tl.arange(0, KP)[:, None]
    j = tl.arange(0, KP)[None, :]
    matrix = tl.load(moments_ptr + (t * (K + 2) + 2 + i) * K + j, mask=(i < K) & (j < K), other=0.0)
    return tl.dot(matrix, a, input_precision="ieee", out_dtype=tl.float64)


@triton.jit
def _fold(folded_ptr, shift_ptr, matrix, level, moments_ptr, t, s, c, C, K, T, KP: tl.constexpr):
    """Where a program finds its weights from here on, and the shift that makes up for the mean patch: its own.

    Every piece makes them: that takes less time than a launch before.
    """
    place = s * T + t
    rounded = matrix.to(folded_ptr.dtype.element_ty)
    _set_matrix(folded_ptr, rounded, place, c, C, K, KP)
    mean = _mean(moments_ptr, t, 1, K, KP)
    away = tl.sum(mean[:, None] * rounded.to(tl.float64), axis=0)
    tl.store(shift_ptr + place * C + c, level - away, mask=c < C)
    tl.debug_barrier()  # threads read what others of the program have stored
    return folded_ptr + place.to(tl.int64) * K * C, tl.load(shift_ptr + place * C + c, mask=c < C, other=0.0)


@triton.jit
def _window(m, H, W, CI, OH, OW):
    """Offset of the first value of windows m [BM] of a task's images; OH and OW count pooled rows and columns."""
    return ((m // (OH * OW) * H + m % (OH * OW) // OW * 2) * W + m % OW * 2) * CI


@triton.jit
def _product(padded_ptr, folded_ptr, shift, at, valid, c, C, K, W, CI, KW, ACC: tl.constexpr, BM: tl.constexpr,
             BC: tl.constexpr):  # fmt: skip
    """Shift plus folded weights times the patches at offsets `at` [BM] or [BM, BC]: [BM, BC]."""
    z = tl.zeros([BM, BC], ACC) + shift[None, :]
    run = KW * CI
    for k in range(K):
        x = tl.load(padded_ptr + at + (k // run * W * CI + k % run), mask=valid, other=0.0).to(ACC)
        z += x * tl.load(folded_ptr + k * C + c, mask=c < C, other=0.0)[None, :]
    return z


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=UNALIGNED)
def forward(padded_ptr, moments_ptr, w_ptr, gamma_ptr, beta_ptr, folded_ptr, shift_ptr, y_ptr, index_ptr, mean_ptr,
            rstd_ptr, eps: tl.float64, slope: tl.float64, C, K, M, H, W, CI, KW, OH, OW, T, piece, TW, per_row,
            KP: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    t = tl.program_id(1)
    s = tl.program_id(2)
    w = _matrix(w_ptr, t % TW, c, C, K, KP)
    variance = tl.sum(w * _covariance_times(moments_ptr, w, t, K, KP), axis=0)
    rstd = 1.0 / tl.sqrt(tl.maximum(variance, 0.0) + eps)
    if s == 0:
        mean = tl.sum(_mean(moments_ptr, t, 0, K, KP)[:, None] * w, axis=0)
        tl.store(mean_ptr + t * C + c, mean, mask=c < C)
        tl.store(rstd_ptr + t * C + c, rstd, mask=c < C)
    scale = _row(gamma_ptr + t // per_row * C, c, C) * rstd
    beta = _row(beta_ptr + t // per_row * C, c, C)
    folded_ptr, shift = _fold(
        folded_ptr, shift_ptr, w * scale[None, :], beta, moments_ptr, t, s, c, C, K, T, KP
    )
    padded_ptr += t.to(tl.int64) * (M // (OH * OW)) * H * W * CI
    leak = tl.full([1, 1], slope, ACC)
    stop = tl.minimum(M, (s + 1) * piece)
    for first in range(s * piece, stop, BM):
        m = first + tl.arange(0, BM)
        at = _window(m, H, W, CI, OH, OW)[:, None]
        valid = (m < stop)[:, None]
        best = _product(padded_ptr, folded_ptr, shift, at, valid, c, C, K, W, CI, KW, ACC, BM, BC)
        position = tl.zeros([BM, BC], tl.int32)
        for k in tl.static_range(1, 4):
            pixel = at + (k // 2 * W + k % 2) * CI
            z = _product(padded_ptr, folded_ptr, shift, pixel, valid, c, C, K, W, CI, KW, ACC, BM, BC)
            better = (z > best) | (z != z)  # a NaN is passed on
            best = tl.where(better, z, best)
            position = tl.where(better, k, position)
        out = (t.to(tl.int64) * M + m[:, None]) * C + c[None, :]
        written = valid & (c < C)[None, :]
        tl.store(y_ptr + out, tl.where(best > 0.0, best, best * leak), mask=written)
        tl.store(index_ptr + out, position.to(tl.uint8), mask=written)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=UNALIGNED)
def tangent(padded_ptr, v_ptr, moments_ptr, w_ptr, gamma_ptr, gamma_dot_ptr, beta_dot_ptr, rstd_ptr, folded_ptr,
            shift_ptr, y_ptr, index_ptr, uy_ptr, t_ptr, slope: tl.float64, C, K, M, H, W, CI, KW, OH, OW, T, piece,
            per_row, MOVES: tl.constexpr, KP: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr,
            BC: tl.constexpr):  # fmt: skip
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    t = tl.program_id(1)
    s = tl.program_id(2)
    w = _matrix(w_ptr, t, c, C, K, KP)
    v = _matrix(v_ptr, t, c, C, K, KP)
    rstd = _row(rstd_ptr + t * C, c, C)
    along = rstd * tl.sum(v * _covariance_times(moments_ptr, w, t, K, KP), axis=0)
    if s == 0:
        tl.store(t_ptr + t * C + c, along, mask=c < C)
    scale = _row(gamma_ptr + t // per_row * C, c, C) * rstd
    matrix = (v - (along * rstd)[None, :] * w) * scale[None, :]
    level = tl.zeros_like(scale)
    if MOVES:
        matrix += (_row(gamma_dot_ptr + t * C, c, C) * rstd)[None, :] * w
        level += _row(beta_dot_ptr + t * C, c, C)
    folded_ptr, shift = _fold(folded_ptr, shift_ptr, matrix, level, moments_ptr, t, s, c, C, K, T, KP)
    padded_ptr += t.to(tl.int64) * (M // (OH * OW)) * H * W * CI
    leak = tl.full([1, 1], slope, ACC)
    stop = tl.minimum(M, (s + 1) * piece)
    for first in range(s * piece, stop, BM):
        m = first + tl.arange(0, BM)
        valid = (m < stop)[:, None] & (c < C)[None, :]
        out = (t.to(tl.int64) * M + m[:, None]) * C + c[None, :]
        position = tl.load(index_ptr + out, mask=valid, other=0).to(tl.int32)
        at = _window(m, H, W, CI, OH, OW)[:, None] + (position // 2 * W + position % 2) * CI
        u = _product(padded_ptr, folded_ptr, shift, at, valid, c, C, K, W, CI, KW, ACC, BM, BC)
        open = tl.load(y_ptr + out, mask=valid, other=0.0) > 0.0
        tl.store(uy_ptr + out, tl.where(open, u, u * leak), mask=valid)


@triton.jit
def _chosen_sums(padded_ptr, gy_ptr, y_ptr, index_ptr, part_ptr, counter_ptr, slope, C, K, M, H, W, CI, KW, OH, OW, T,
                 S, piece, KP: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Sums [S, T, KP, C] over the windows of one piece of g times the chosen patch, and of g in row K.

    Returns whether this piece is the last of its channels and task: then all are in memory.
    """
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    t = tl.program_id(1)
    s = tl.program_id(2)
    padded_ptr += t.to(tl.int64) * (M // (OH * OW)) * H * W * CI
    stop = tl.minimum(M, (s + 1) * piece)
    leak = tl.full([1, 1], slope, ACC)
    total = tl.zeros([BC, KP], ACC)
    for first in range(s * piece * 4, stop * 4, BM):
        # A row is one pixel of a window; three of four have no gradient.
        pixel = first + tl.arange(0, BM)
        m = pixel // 4
        k = pixel % 4
        valid = (m < stop)[:, None] & (c < C)[None, :]
        out = (t.to(tl.int64) * M + m[:, None]) * C + c[None, :]
        g = tl.load(gy_ptr + out, mask=valid, other=0.0).to(ACC)
        g = tl.where(tl.load(y_ptr + out, mask=valid, other=0.0) > 0.0, g, g * leak)
        position = tl.load(index_ptr + out, mask=valid, other=4).to(tl.int32)
        g = tl.where(position == k[:, None], g, 0.0)
        at = _window(m, H, W, CI, OH, OW) + (k // 2 * W + k % 2) * CI
        patch = _patches(padded_ptr, at, m < stop, K, W, CI, KW, KP, ACC)
        if total.dtype == tl.float64:
            # What is selected by a byte cannot be an operand of a float64 product (Triton 3.7).
            total += tl.sum(g[:, :, None] * patch[:, None, :], axis=0)
        else:
            total = tl.dot(tl.trans(g), patch, total, input_precision="ieee", out_dtype=ACC)
    k = tl.arange(0, KP)
    rows = ((s * T + t).to(tl.int64) * KP + k[None, :]) * C + c[:, None]
    tl.store(part_ptr + rows, total, mask=(c < C)[:, None])
    return last_piece(counter_ptr + tl.program_id(0) * T + t, S)


@triton.jit
def _centred(part_ptr, moments_ptr, t, c, C, K, T, S, KP: tl.constexpr, BC: tl.constexpr):
    """B = Σ g (patch − mean) [KP, BC], zero beyond K, and Σ g [BC]."""
    k = tl.arange(0, KP)
    total = tl.zeros([KP, BC], tl.float64)
    for s in range(S):
        rows = ((s * T + t).to(tl.int64) * KP + k[:, None]) * C + c[None, :]
        total += tl.load(part_ptr + rows, mask=(c < C)[None, :], other=0.0, cache_modifier=".cg").to(
            tl.float64
        )
    plain = tl.sum(tl.where((k == K)[:, None], total, 0.0), axis=0)
    mean = _mean(moments_ptr, t, 1, K, KP)
    return tl.where((k < K)[:, None], total - mean[:, None] * plain[None, :], 0.0), plain


@triton.jit
def _backward(part_ptr, moments_ptr, w_ptr, gamma_ptr, rstd_ptr, gw_ptr, sums_ptr, ggamma_ptr, gbeta_ptr, C, K, T, S,
              TW, gap, per_row, KP: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    t = tl.program_id(1)
    b, plain = _centred(part_ptr, moments_ptr, t, c, C, K, T, S, KP, BC)
    _set_matrix(sums_ptr, b, t, c, C, K, KP)
    w = _matrix(w_ptr, t % TW, c, C, K, KP)
    rstd = _row(rstd_ptr + t * C, c, C)
    wb = tl.sum(w * b, axis=0)
    scale = _row(gamma_ptr + t // per_row * C, c, C) * rstd
    along = (rstd * rstd * wb)[None, :] * _covariance_times(moments_ptr, w, t, K, KP)
    gw_ptr += (t // TW).to(tl.int64) * gap
    _set_matrix(gw_ptr, scale[None, :] * (b - along), t, c, C, K, KP)
    tl.store(ggamma_ptr + t * C + c, rstd * wb, mask=c < C)
    tl.store(gbeta_ptr + t * C + c, plain, mask=c < C)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=UNALIGNED)
def backward(padded_ptr, gy_ptr, y_ptr, index_ptr, part_ptr, counter_ptr, moments_ptr, w_ptr, gamma_ptr, rstd_ptr,
             gw_ptr, sums_ptr, ggamma_ptr, gbeta_ptr, slope: tl.float64, C, K, M, H, W, CI, KW, OH, OW, T, S, piece,
             TW, gap, per_row, KP: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    if _chosen_sums(
        padded_ptr, gy_ptr, y_ptr, index_ptr, part_ptr, counter_ptr, slope, C, K, M, H, W, CI, KW, OH, OW, T, S, piece,
        KP, ACC, BM, BC,
    ):  # fmt: skip
        _backward(
            part_ptr, moments_ptr, w_ptr, gamma_ptr, rstd_ptr, gw_ptr, sums_ptr, ggamma_ptr, gbeta_ptr, C, K, T, S,
            TW, gap, per_row, KP, BC,
        )  # fmt: skip


@triton.jit
def _backward_tangent(part_ptr, v_ptr, moments_ptr, w_ptr, gamma_ptr, gamma_dot_ptr, rstd_ptr, sums_ptr, t_ptr, gw_ptr,
                      ggamma_ptr, gbeta_ptr, C, K, M, T, S, per_row, MOVES: tl.constexpr, KP: tl.constexpr,
                      BC: tl.constexpr):  # fmt: skip
    """M: patches of a task, all that the statistics are taken over."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    t = tl.program_id(1)
    b_dot, plain = _centred(part_ptr, moments_ptr, t, c, C, K, T, S, KP, BC)
    b = _matrix(sums_ptr, t, c, C, K, KP)
    w = _matrix(w_ptr, t, c, C, K, KP)
    v = _matrix(v_ptr, t, c, C, K, KP)
    rstd = _row(rstd_ptr + t * C, c, C)
    along = _row(t_ptr + t * C, c, C)
    m = M.to(tl.float64)
    q = rstd * tl.sum(w * b, axis=0) / m
    q_dot = rstd * tl.sum(w * b_dot + v * b, axis=0) / m - rstd * along * q
    scale = _row(gamma_ptr + t // per_row * C, c, C) * rstd
    # One product: the covariance is linear.
    if MOVES:
        scale_dot = _row(gamma_dot_ptr + t * C, c, C) * rstd
        of_w = scale * (2.0 * rstd * q * along - q_dot) - scale_dot * q
        dense = _covariance_times(moments_ptr, of_w[None, :] * w - (scale * q)[None, :] * v, t, K, KP)
        product = scale[None, :] * b_dot + (scale_dot - scale * rstd * along)[None, :] * b
        product += (rstd * m)[None, :] * dense
    else:
        dense = _covariance_times(
            moments_ptr, (2.0 * rstd * q * along - q_dot)[None, :] * w - q[None, :] * v, t, K, KP
        )
        product = scale[None, :] * (b_dot - (rstd * along)[None, :] * b + (rstd * m)[None, :] * dense)
    _set_matrix(gw_ptr, product, t, c, C, K, KP)
    tl.store(ggamma_ptr + t * C + c, q_dot * m, mask=c < C)
    tl.store(gbeta_ptr + t * C + c, plain, mask=c < C)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=UNALIGNED)
def backward_tangent(padded_ptr, gy_ptr, y_ptr, index_ptr, part_ptr, counter_ptr, v_ptr, moments_ptr, w_ptr, gamma_ptr,
                     gamma_dot_ptr, rstd_ptr, sums_ptr, t_ptr, gw_ptr, ggamma_ptr, gbeta_ptr, slope: tl.float64, C, K,
                     M, H, W, CI, KW, OH, OW, T, S, piece, stretch, per_row, MOVES: tl.constexpr, KP: tl.constexpr,
                     ACC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """stretch: patches of a task, of which M windows are made of four each, and some at the edge of none."""
    if _chosen_sums(
        padded_ptr, gy_ptr, y_ptr, index_ptr, part_ptr, counter_ptr, slope, C, K, M, H, W, CI, KW, OH, OW, T, S, piece,
        KP, ACC, BM, BC,
    ):  # fmt: skip
        _backward_tangent(
            part_ptr, v_ptr, moments_ptr, w_ptr, gamma_ptr, gamma_dot_ptr, rstd_ptr, sums_ptr, t_ptr, gw_ptr,
            ggamma_ptr, gbeta_ptr, C, K, stretch, T, S, per_row, MOVES, KP, BC,
        )  # fmt: skip
