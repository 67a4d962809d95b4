"""Device code of ``norm_act_pool``: four orders, each a reduction (`*_sums`) and an elementwise pass (`*_apply`).

WHOLE: a program of the latter has all rows of its channels, and reduces them itself.

C channels; T tasks; M dense rows (image, pixel) of a task, Mo rows of the result; S pieces of `piece` dense rows and of
`stretch` rows of the result. CA says that C is a multiple of 16, per_row neighbouring tasks share a row of γ and
β; MOVES says that one of these has a tangent; BM, BC are the rows and channels of a tile.
"""

import triton
import triton.language as tl

from ._batch_norm_passes import (
    combine,
    gate,
    gradient,
    keep,
    moments,
    origin,
    program,
    read,
    row,
    rows,
    standard,
    sums,
    tile,
    total,
)  # fmt: skip
from ._launch import ROWS

_SIZES = ["C", "H", "W", "M", "Mo", "T", "S", "piece", "stretch", "per_row"]


@triton.jit
def _columns(c, C, CA: tl.constexpr):
    """Number of channels, marked a multiple of 16 when it is, so that loads along them are wide."""
    if CA:
        C = C // 16 * 16
    return C


@triton.jit
def _pooled(first, stop, c, C, H, W, CA: tl.constexpr, BM: tl.constexpr):
    """Offsets [BM, BC] of rows of the result, of the first element of their windows, and which of them count."""
    m = first + tl.arange(0, BM)
    Wo = W // 2
    window = Wo * (H // 2)
    pixel = m % window
    dense = m // window * (H * W) + pixel // Wo * 2 * W + pixel % Wo * 2
    valid = (m < stop)[:, None] & (c < C)[None, :]
    C = _columns(c, C, CA)
    return m[:, None] * C + c[None, :], dense[:, None] * C + c[None, :], valid


@triton.jit
def _chosen(index_ptr, first, stop, c, C, H, W, CA: tl.constexpr, POOL: tl.constexpr, BM: tl.constexpr):
    """Offsets [BM, BC] of rows of the result, of the element each of them came from, and which of them count."""
    if POOL:
        out, dense, valid = _pooled(first, stop, c, C, H, W, CA, BM)
        position = tl.load(index_ptr + out, mask=valid, other=0).to(tl.int32)
        dense += (position // 2 * W + position % 2) * C
    else:
        out, valid = tile(first, stop, c, C, 1, True, CA, BM)
        dense = out
    return out, dense, valid


@triton.jit
def _spread(g_ptr, index_ptr, first, stop, c, C, H, W, CA: tl.constexpr, POOL: tl.constexpr, ACC: tl.constexpr,
            BM: tl.constexpr):  # fmt: skip
    """Gradient [BM, BC] of dense rows: that of the window where the pool took this element, else zero."""
    if POOL:
        m = first + tl.arange(0, BM)
        pixel = m % (H * W)
        i = pixel // W
        j = pixel % W
        inside = (m < stop) & (i // 2 < H // 2) & (j // 2 < W // 2)
        out = (m // (H * W) * (H // 2) + i // 2) * (W // 2) + j // 2
        valid = inside[:, None] & (c < C)[None, :]
        offsets = out[:, None] * _columns(c, C, CA) + c[None, :]
        position = tl.load(index_ptr + offsets, mask=valid, other=4).to(tl.int32)
        mine = position == (i % 2 * 2 + j % 2)[:, None]
        # Not by `read`: with the mask made before the call `backward_apply` takes ten registers more on sm_90.
        g = tl.load(g_ptr + offsets, mask=valid & mine, other=0.0).to(ACC)
    else:
        offsets, valid = tile(first, stop, c, C, 1, True, CA, BM)
        g = read(g_ptr + offsets, valid, ACC)
    return g


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=ROWS)
def forward_sums(z_ptr, part_ptr, C, M, T, S, piece, CA: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr,
                  BC: tl.constexpr):  # fmt: skip
    c, t, s = program(1, 0, BC)
    stop = tl.minimum(M, (s + 1) * piece)
    mean, squares = moments(z_ptr + t.to(tl.int64) * M * C, s * piece, stop, c, C, 1, True, CA, ACC, BM, BC)
    keep(part_ptr, 0, mean, t, c, s, C, T, S)
    keep(part_ptr, 1, squares, t, c, s, C, T, S)


@triton.jit
def _activate(z, mean, rstd, gamma, beta, slope, ACC: tl.constexpr):
    before = (z.to(ACC) - mean[None, :]) * rstd[None, :] * gamma[None, :] + beta[None, :]
    return before * gate(before, slope, ACC)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=ROWS)
def forward_apply(z_ptr, gamma_ptr, beta_ptr, part_ptr, y_ptr, index_ptr, mean_ptr, rstd_ptr, eps: tl.float64,
                   slope: tl.float64, C, H, W, M, Mo, T, S, piece, stretch, per_row, CA: tl.constexpr,
                   POOL: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr,
                   BC: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    c, t, s = program(1, 0, BC)
    z_ptr += t.to(tl.int64) * M * C
    shift = origin(z_ptr, c, C, 1, True, ACC)
    if WHOLE:
        mean, squares = moments(z_ptr, 0, M, c, C, 1, True, CA, ACC, BM, BC)
        mean += shift
        rstd = 1.0 / tl.sqrt(squares / M.to(ACC) + tl.full([1], eps, ACC))
    else:
        mean, _, rstd = combine(part_ptr, shift, eps, t, c, C, M, T, S, piece, ACC, BS)
    if s == 0:
        tl.store(mean_ptr + t * C + c, mean, mask=c < C)
        tl.store(rstd_ptr + t * C + c, rstd, mask=c < C)
    gamma = row(gamma_ptr + t // per_row * C, c, C, ACC)
    beta = row(beta_ptr + t // per_row * C, c, C, ACC)
    leak = tl.full([1, 1], slope, ACC)
    y_ptr += t.to(tl.int64) * Mo * C
    stop = tl.minimum(Mo, (s + 1) * stretch)
    for first in range(s * stretch, stop, BM):
        if POOL:
            out, dense, valid = _pooled(first, stop, c, C, H, W, CA, BM)
            best = _activate(
                tl.load(z_ptr + dense, mask=valid, other=0.0), mean, rstd, gamma, beta, leak, ACC
            )
            position = tl.zeros([BM, BC], tl.int32)
            for k in tl.static_range(1, 4):
                z = tl.load(z_ptr + dense + (k // 2 * W + k % 2) * C, mask=valid, other=0.0)
                y = _activate(z, mean, rstd, gamma, beta, leak, ACC)
                better = (y > best) | (y != y)  # a NaN is passed on
                best = tl.where(better, y, best)
                position = tl.where(better, k, position)
            tl.store(index_ptr + t.to(tl.int64) * Mo * C + out, position.to(tl.uint8), mask=valid)
            tl.store(y_ptr + out, best, mask=valid)
        else:
            out, valid = tile(first, stop, c, C, 1, True, CA, BM)
            y = _activate(tl.load(z_ptr + out, mask=valid, other=0.0), mean, rstd, gamma, beta, leak, ACC)
            tl.store(y_ptr + out, y, mask=valid)


@triton.jit
def _backward_reduce(gy_ptr, z_ptr, index_ptr, mean, rstd, gamma, beta, leak, start, stop, c, C, H, W,
                     CA: tl.constexpr, POOL: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr,
                     BC: tl.constexpr):  # fmt: skip
    """Sums [BC] over rows start..stop of the result of g, the gradient before the activation, and of g·x̂."""
    g_sum = tl.zeros([BM, BC], ACC)
    gx_sum = tl.zeros([BM, BC], ACC)
    for first in range(start, stop, BM):
        out, dense, valid = _chosen(index_ptr, first, stop, c, C, H, W, CA, POOL, BM)
        normal, g = gradient(z_ptr + dense, gy_ptr + out, valid, mean, rstd, gamma, beta, leak, ACC)
        g_sum += g
        gx_sum += g * normal
    return tl.sum(g_sum, axis=0), tl.sum(gx_sum, axis=0)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=ROWS)
def backward_sums(gy_ptr, z_ptr, index_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, part_ptr, slope: tl.float64, C,
                   H, W, M, Mo, T, S, stretch, per_row, CA: tl.constexpr, POOL: tl.constexpr, ACC: tl.constexpr,
                   BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    c, t, s = program(1, 0, BC)
    mean, rstd, gamma, beta, leak = rows(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, slope, t * C, t // per_row * C, c, C,
                                         ACC)  # fmt: skip
    pooled, dense = t.to(tl.int64) * Mo * C, t.to(tl.int64) * M * C
    stop = tl.minimum(Mo, (s + 1) * stretch)
    g, gx = _backward_reduce(gy_ptr + pooled, z_ptr + dense, index_ptr + pooled, mean, rstd, gamma, beta, leak,
                             s * stretch, stop, c, C, H, W, CA, POOL, ACC, BM, BC)  # fmt: skip
    keep(part_ptr, 0, g, t, c, s, C, T, S)
    keep(part_ptr, 1, gx, t, c, s, C, T, S)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=ROWS)
def backward_apply(gy_ptr, z_ptr, index_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, part_ptr, gz_ptr, ggamma_ptr,
                    gbeta_ptr, slope: tl.float64, C, H, W, M, Mo, T, S, piece, per_row, CA: tl.constexpr,
                    POOL: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr,
                    BC: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    c, t, s = program(1, 0, BC)
    mean, rstd, gamma, beta, leak = rows(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, slope, t * C, t // per_row * C, c, C,
                                         ACC)  # fmt: skip
    pooled, dense = t.to(tl.int64) * Mo * C, t.to(tl.int64) * M * C
    if WHOLE:
        g_total, gx_total = _backward_reduce(
            gy_ptr + pooled, z_ptr + dense, index_ptr + pooled, mean, rstd, gamma, beta, leak, 0, Mo, c, C, H, W, CA,
            POOL, ACC, BM, BC,
        )  # fmt: skip
    else:
        g_total = total(part_ptr, 0, t, c, C, T, S, ACC, BS)
        gx_total = total(part_ptr, 1, t, c, C, T, S, ACC, BS)
    if s == 0:
        tl.store(gbeta_ptr + t * C + c, g_total, mask=c < C)
        tl.store(ggamma_ptr + t * C + c, gx_total, mask=c < C)
    p = g_total / M.to(ACC)
    q = gx_total / M.to(ACC)
    stop = tl.minimum(M, (s + 1) * piece)
    for first in range(s * piece, stop, BM):
        offsets, valid = tile(first, stop, c, C, 1, True, CA, BM)
        z = read(z_ptr + dense + offsets, valid, ACC)
        normal, slopes = standard(z, mean, rstd, gamma, beta, leak, ACC)
        g = _spread(gy_ptr + pooled, index_ptr + pooled, first, stop, c, C, H, W, CA, POOL, ACC, BM) * slopes
        gz = (gamma * rstd)[None, :] * (g - p[None, :] - normal * q[None, :])
        tl.store(gz_ptr + dense + offsets, gz, mask=valid)


@triton.jit
def _tangent_reduce(u_ptr, z_ptr, mean, rstd, start, stop, c, C, CA: tl.constexpr, ACC: tl.constexpr,
                    BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Sums [BC] over dense rows start..stop of the tangent u and of u·x̂."""
    u_sum = tl.zeros([BM, BC], ACC)
    ux_sum = tl.zeros([BM, BC], ACC)
    for first in range(start, stop, BM):
        offsets, valid = tile(first, stop, c, C, 1, True, CA, BM)
        z = read(z_ptr + offsets, valid, ACC)
        u = read(u_ptr + offsets, valid, ACC)
        u_sum += u
        ux_sum += u * ((z - mean[None, :]) * rstd[None, :])
    return tl.sum(u_sum, axis=0), tl.sum(ux_sum, axis=0)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=ROWS)
def tangent_sums(u_ptr, z_ptr, mean_ptr, rstd_ptr, part_ptr, C, M, T, S, piece, CA: tl.constexpr,
                  ACC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    c, t, s = program(1, 0, BC)
    mean = row(mean_ptr + t * C, c, C, ACC)
    rstd = row(rstd_ptr + t * C, c, C, ACC)
    dense = t.to(tl.int64) * M * C
    stop = tl.minimum(M, (s + 1) * piece)
    u, ux = _tangent_reduce(u_ptr + dense, z_ptr + dense, mean, rstd, s * piece, stop, c, C, CA, ACC, BM, BC)
    keep(part_ptr, 0, u, t, c, s, C, T, S)
    keep(part_ptr, 1, ux, t, c, s, C, T, S)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=ROWS)
def tangent_apply(u_ptr, z_ptr, index_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, gamma_dot_ptr, beta_dot_ptr,
                   part_ptr, uy_ptr, r_ptr, t_ptr, slope: tl.float64, C, H, W, M, Mo, T, S, stretch, per_row,
                   CA: tl.constexpr, POOL: tl.constexpr, MOVES: tl.constexpr, WHOLE: tl.constexpr,
                   ACC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    c, t, s = program(1, 0, BC)
    mean = row(mean_ptr + t * C, c, C, ACC)
    rstd = row(rstd_ptr + t * C, c, C, ACC)
    dense = t.to(tl.int64) * M * C
    if WHOLE:
        along, across = _tangent_reduce(u_ptr + dense, z_ptr + dense, mean, rstd, 0, M, c, C, CA, ACC, BM, BC)
    else:
        along = total(part_ptr, 0, t, c, C, T, S, ACC, BS)
        across = total(part_ptr, 1, t, c, C, T, S, ACC, BS)
    along /= M.to(ACC)
    across /= M.to(ACC)
    if s == 0:
        tl.store(r_ptr + t * C + c, along, mask=c < C)
        tl.store(t_ptr + t * C + c, across, mask=c < C)
    if MOVES:
        gamma_dot = row(gamma_dot_ptr + t * C, c, C, ACC)
        beta_dot = row(beta_dot_ptr + t * C, c, C, ACC)
    gamma = row(gamma_ptr + t // per_row * C, c, C, ACC)
    beta = row(beta_ptr + t // per_row * C, c, C, ACC)
    leak = tl.full([1, 1], slope, ACC)
    pooled = t.to(tl.int64) * Mo * C
    stop = tl.minimum(Mo, (s + 1) * stretch)
    for first in range(s * stretch, stop, BM):
        out, source, valid = _chosen(index_ptr + pooled, first, stop, c, C, H, W, CA, POOL, BM)
        z = read(z_ptr + dense + source, valid, ACC)
        u = read(u_ptr + dense + source, valid, ACC)
        normal, slopes = standard(z, mean, rstd, gamma, beta, leak, ACC)
        before = (gamma * rstd)[None, :] * (u - along[None, :] - normal * across[None, :])
        if MOVES:
            before += gamma_dot[None, :] * normal + beta_dot[None, :]
        tl.store(uy_ptr + pooled + out, before * slopes, mask=valid)


@triton.jit
def _backward_tangent_reduce(gy_dot_ptr, gy_ptr, u_ptr, z_ptr, index_ptr, mean, rstd, gamma, beta, leak, start, stop, c,
                             C, H, W, CA: tl.constexpr, POOL: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr,
                             BC: tl.constexpr):  # fmt: skip
    """Sums [BC] over rows start..stop of the result of g, g·x̂ and g·u, and with g's tangent d of d and d·x̂."""
    g_sum = tl.zeros([BM, BC], ACC)
    gx_sum = tl.zeros([BM, BC], ACC)
    gu_sum = tl.zeros([BM, BC], ACC)
    d_sum = tl.zeros([BM, BC], ACC)
    dx_sum = tl.zeros([BM, BC], ACC)
    for first in range(start, stop, BM):
        out, source, valid = _chosen(index_ptr, first, stop, c, C, H, W, CA, POOL, BM)
        z = read(z_ptr + source, valid, ACC)
        u = read(u_ptr + source, valid, ACC)
        normal, slopes = standard(z, mean, rstd, gamma, beta, leak, ACC)
        g = read(gy_ptr + out, valid, ACC) * slopes
        d = read(gy_dot_ptr + out, valid, ACC) * slopes
        g_sum += g
        gx_sum += g * normal
        gu_sum += g * u
        d_sum += d
        dx_sum += d * normal
    return sums(g_sum, gx_sum, gu_sum, d_sum, dx_sum)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=ROWS)
def backward_tangent_sums(gy_dot_ptr, gy_ptr, u_ptr, z_ptr, index_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr,
                           part_ptr, slope: tl.float64, C, H, W, M, Mo, T, S, stretch, per_row, CA: tl.constexpr,
                           POOL: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr,
                           BC: tl.constexpr):  # fmt: skip
    c, t, s = program(1, 0, BC)
    mean, rstd, gamma, beta, leak = rows(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, slope, t * C, t // per_row * C, c, C,
                                         ACC)  # fmt: skip
    pooled, dense = t.to(tl.int64) * Mo * C, t.to(tl.int64) * M * C
    stop = tl.minimum(Mo, (s + 1) * stretch)
    g, gx, gu, d, dx = _backward_tangent_reduce(
        gy_dot_ptr + pooled, gy_ptr + pooled, u_ptr + dense, z_ptr + dense, index_ptr + pooled, mean, rstd, gamma, beta,
        leak, s * stretch, stop, c, C, H, W, CA, POOL, ACC, BM, BC,
    )  # fmt: skip
    keep(part_ptr, 0, g, t, c, s, C, T, S)
    keep(part_ptr, 1, gx, t, c, s, C, T, S)
    keep(part_ptr, 2, gu, t, c, s, C, T, S)
    keep(part_ptr, 3, d, t, c, s, C, T, S)
    keep(part_ptr, 4, dx, t, c, s, C, T, S)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=ROWS)
def backward_tangent_apply(gy_dot_ptr, gy_ptr, u_ptr, z_ptr, index_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr,
                            gamma_dot_ptr, r_ptr, t_ptr, part_ptr, gz_ptr, ggamma_ptr, gbeta_ptr, slope: tl.float64,
                            C, H, W, M, Mo, T, S, piece, per_row, CA: tl.constexpr, POOL: tl.constexpr,
                            MOVES: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr,
                            BC: tl.constexpr, BS: tl.constexpr):  # fmt: skip
    c, t, s = program(1, 0, BC)
    count = M.to(ACC)
    mean, rstd, gamma, beta, leak = rows(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, slope, t * C, t // per_row * C, c, C,
                                         ACC)  # fmt: skip
    along = row(r_ptr + t * C, c, C, ACC)
    across = row(t_ptr + t * C, c, C, ACC)
    pooled, dense = t.to(tl.int64) * Mo * C, t.to(tl.int64) * M * C
    if WHOLE:
        p, q, w, p_dot, q_dot = _backward_tangent_reduce(
            gy_dot_ptr + pooled, gy_ptr + pooled, u_ptr + dense, z_ptr + dense, index_ptr + pooled, mean, rstd, gamma,
            beta, leak, 0, Mo, c, C, H, W, CA, POOL, ACC, BM, BC,
        )  # fmt: skip
    else:
        p = total(part_ptr, 0, t, c, C, T, S, ACC, BS)
        q = total(part_ptr, 1, t, c, C, T, S, ACC, BS)
        w = total(part_ptr, 2, t, c, C, T, S, ACC, BS)
        p_dot = total(part_ptr, 3, t, c, C, T, S, ACC, BS)
        q_dot = total(part_ptr, 4, t, c, C, T, S, ACC, BS)
    p /= count
    q /= count
    w /= count
    p_dot /= count
    q_dot /= count
    q_dot += rstd * (w - along * p - across * q)
    if s == 0:
        tl.store(gbeta_ptr + t * C + c, count * p_dot, mask=c < C)
        tl.store(ggamma_ptr + t * C + c, count * q_dot, mask=c < C)
    scale = gamma * rstd
    of_normal = scale * (2.0 * rstd * q * across - q_dot)
    of_u = scale * rstd * q
    constant = scale * (rstd * (q * along + across * p) - p_dot)
    shrink = rstd * across
    if MOVES:
        scale_dot = row(gamma_dot_ptr + t * C, c, C, ACC) * rstd
        of_normal -= scale_dot * q
        constant -= scale_dot * p
    stop = tl.minimum(M, (s + 1) * piece)
    for first in range(s * piece, stop, BM):
        offsets, valid = tile(first, stop, c, C, 1, True, CA, BM)
        z = read(z_ptr + dense + offsets, valid, ACC)
        u = read(u_ptr + dense + offsets, valid, ACC)
        normal, slopes = standard(z, mean, rstd, gamma, beta, leak, ACC)
        g = _spread(gy_ptr + pooled, index_ptr + pooled, first, stop, c, C, H, W, CA, POOL, ACC, BM)
        d = _spread(gy_dot_ptr + pooled, index_ptr + pooled, first, stop, c, C, H, W, CA, POOL, ACC, BM)
        gradients = scale[None, :] * slopes * (d - shrink[None, :] * g)
        if MOVES:
            gradients += scale_dot[None, :] * slopes * g
        gz = gradients + of_normal[None, :] * normal - of_u[None, :] * u + constant[None, :]
        tl.store(gz_ptr + dense + offsets, gz, mask=valid)
