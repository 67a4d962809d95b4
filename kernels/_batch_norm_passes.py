"""The two passes of every order of batch norm, over a range of rows: device code of ``per_step_batch_norm``.

A tile is BM rows (image, pixel) of BC channels; CL says channels-last, CA that the channels are a multiple of 16.
"""

import triton
import triton.language as tl


@triton.jit
def program(CHANNELS: tl.constexpr, TASKS: tl.constexpr, BC: tl.constexpr):
    """Channels [BC], task and piece of this program, of a grid with channels and tasks along these axes."""
    return tl.program_id(CHANNELS) * BC + tl.arange(0, BC), tl.program_id(TASKS), tl.program_id(2)


@triton.jit
def offsets(m, c, C, P, CL: tl.constexpr, CA: tl.constexpr):
    """Element offsets [BM, BC] inside one task of rows m (image, pixel) and channels c."""
    if CL:
        if CA:
            C = C // 16 * 16
        offsets = m[:, None] * C + c[None, :]
    else:
        offsets = (m // P * C * P + m % P)[:, None] + c[None, :] * P
    return offsets


@triton.jit
def tile(first, stop, c, C, P, CL: tl.constexpr, CA: tl.constexpr, BM: tl.constexpr):
    m = first + tl.arange(0, BM)
    valid = (m < stop)[:, None] & (c < C)[None, :]
    return offsets(m, c, C, P, CL, CA), valid


@triton.jit
def origin(x_ptr, c, C, P, CL: tl.constexpr, ACC: tl.constexpr):
    """First row [BC] of a task: what its statistics are taken relative to."""
    offset = c
    if not CL:
        offset = c * P
    return tl.load(x_ptr + offset, mask=c < C, other=0.0).to(ACC)


@triton.jit
def moments(x_ptr, start, stop, c, C, P, CL: tl.constexpr, CA: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr,
             BC: tl.constexpr):  # fmt: skip
    """Mean less `origin` and sum of squared deviations [BC] of rows start..stop, by Welford's update in every lane.

    One origin for all pieces of a task: a mean far from zero rounds neither the deviations nor the pieces' means.
    """
    shift = origin(x_ptr, c, C, P, CL, ACC)
    mean = tl.zeros([BM, BC], ACC)
    squares = tl.zeros([BM, BC], ACC)
    count = tl.zeros([BM, 1], ACC)
    for first in range(start, stop, BM):
        offsets, valid = tile(first, stop, c, C, P, CL, CA, BM)
        x = read(x_ptr + offsets, valid, ACC)
        count += tl.where(first + tl.arange(0, BM) < stop, 1.0, 0.0).to(ACC)[:, None]
        x -= shift[None, :]
        delta = tl.where(valid, x - mean, 0.0)
        mean += delta / tl.maximum(count, 1.0)
        squares += tl.where(valid, delta * (x - mean), 0.0)
    elements = (stop - start).to(ACC)
    centre = tl.sum(mean * count, axis=0) / elements
    centre += tl.sum((mean - centre[None, :]) * count, axis=0) / elements
    deviation = mean - centre[None, :]
    return centre, tl.sum(squares + deviation * deviation * count, axis=0)


@triton.jit
def read(ptr, valid, ACC: tl.constexpr):
    """What lies there, zero where it does not count."""
    return tl.load(ptr, mask=valid, other=0.0).to(ACC)


@triton.jit
def row(row_ptr, c, C, ACC: tl.constexpr):
    return read(row_ptr + c, c < C, ACC)


@triton.jit
def rows(mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, slope, at, affine_at, c, C, ACC: tl.constexpr):
    """Mean, 1/σ, γ and β [BC] of a task, and the slope: its statistics begin at `at`, its γ and β at `affine_at`."""
    mean = row(mean_ptr + at, c, C, ACC)
    rstd = row(rstd_ptr + at, c, C, ACC)
    gamma = row(gamma_ptr + affine_at, c, C, ACC)
    beta = row(beta_ptr + affine_at, c, C, ACC)
    return mean, rstd, gamma, beta, tl.full([1, 1], slope, ACC)


@triton.jit
def gate(z, slope, ACC: tl.constexpr):
    """Derivative of the leaky ReLU at z."""
    return tl.where(z > 0.0, 1.0, slope).to(ACC)


@triton.jit
def standard(x, mean, rstd, gamma, beta, slope, ACC: tl.constexpr):
    """x̂ [BM, BC], and the derivative of the leaky ReLU at γ·x̂ + β."""
    normal = (x - mean[None, :]) * rstd[None, :]
    return normal, gate(normal * gamma[None, :] + beta[None, :], slope, ACC)


@triton.jit
def gradient(x_ptr, gy_ptr, valid, mean, rstd, gamma, beta, slope, ACC: tl.constexpr):
    """x̂ and the gradient [BM, BC] before the leaky ReLU."""
    x = read(x_ptr, valid, ACC)
    gy = read(gy_ptr, valid, ACC)
    normal, slopes = standard(x, mean, rstd, gamma, beta, slope, ACC)
    return normal, gy * slopes


@triton.jit
def sums(a, b, c, d, e):
    """Of each [BM, BC], over its rows."""
    return tl.sum(a, axis=0), tl.sum(b, axis=0), tl.sum(c, axis=0), tl.sum(d, axis=0), tl.sum(e, axis=0)


@triton.jit
def total(part_ptr, quantity, t, c, C, T, S, ACC: tl.constexpr, BS: tl.constexpr):
    """Sum over the pieces of one partial quantity [BC]; partials are [quantity, S, T, C]."""
    s = tl.arange(0, BS)
    rows = ((quantity * S + s) * T + t).to(tl.int64) * C
    valid = (s < S)[:, None] & (c < C)[None, :]
    return tl.sum(tl.load(part_ptr + rows[:, None] + c[None, :], mask=valid, other=0.0), axis=0)


@triton.jit
def keep(part_ptr, quantity, value, t, c, s, C, T, S):
    tl.store(part_ptr + ((quantity * S + s) * T + t).to(tl.int64) * C + c, value, mask=c < C)


@triton.jit
def normalise(x_ptr, y_ptr, mean, rstd, gamma, beta, slope, start, stop, c, C, P, CL: tl.constexpr, CA: tl.constexpr,
               ACC: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    for first in range(start, stop, BM):
        offsets, valid = tile(first, stop, c, C, P, CL, CA, BM)
        x = read(x_ptr + offsets, valid, ACC)
        z = (x - mean[None, :]) * rstd[None, :] * gamma[None, :] + beta[None, :]
        tl.store(y_ptr + offsets, z * gate(z, slope, ACC), mask=valid)


@triton.jit
def backward_reduce(x_ptr, gy_ptr, mean, rstd, gamma, beta, slope, start, stop, c, C, P, CL: tl.constexpr,
                     CA: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Sums [BC] of gz and gz·x̂, gz being the gradient before the leaky ReLU."""
    g_sum = tl.zeros([BM, BC], ACC)
    gx_sum = tl.zeros([BM, BC], ACC)
    for first in range(start, stop, BM):
        offsets, valid = tile(first, stop, c, C, P, CL, CA, BM)
        normal, gz = gradient(x_ptr + offsets, gy_ptr + offsets, valid, mean, rstd, gamma, beta, slope, ACC)
        g_sum += gz
        gx_sum += gz * normal
    return tl.sum(g_sum, axis=0), tl.sum(gx_sum, axis=0)


@triton.jit
def backward_write(x_ptr, gy_ptr, gx_ptr, mean, rstd, gamma, beta, p, q, slope, start, stop, c, C, P,
                    CL: tl.constexpr, CA: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    scale = gamma * rstd
    for first in range(start, stop, BM):
        offsets, valid = tile(first, stop, c, C, P, CL, CA, BM)
        normal, gz = gradient(x_ptr + offsets, gy_ptr + offsets, valid, mean, rstd, gamma, beta, slope, ACC)
        tl.store(gx_ptr + offsets, scale[None, :] * (gz - p[None, :] - normal * q[None, :]), mask=valid)


@triton.jit
def double_reduce(x_ptr, gy_ptr, u_ptr, mean, rstd, gamma, beta, slope, start, stop, c, C, P, CL: tl.constexpr,
                   CA: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Sums [BC] of gz, gz·x̂, u, u·x̂ and u·gz."""
    g_sum = tl.zeros([BM, BC], ACC)
    gx_sum = tl.zeros([BM, BC], ACC)
    u_sum = tl.zeros([BM, BC], ACC)
    ux_sum = tl.zeros([BM, BC], ACC)
    ug_sum = tl.zeros([BM, BC], ACC)
    for first in range(start, stop, BM):
        offsets, valid = tile(first, stop, c, C, P, CL, CA, BM)
        u = read(u_ptr + offsets, valid, ACC)
        normal, gz = gradient(x_ptr + offsets, gy_ptr + offsets, valid, mean, rstd, gamma, beta, slope, ACC)
        g_sum += gz
        gx_sum += gz * normal
        u_sum += u
        ux_sum += u * normal
        ug_sum += u * gz
    return sums(g_sum, gx_sum, u_sum, ux_sum, ug_sum)


@triton.jit
def double_write(x_ptr, gy_ptr, u_ptr, cx_ptr, cgy_ptr, mean, rstd, gamma, beta, a, b, p, q, r, t, w, slope, start,
                  stop, c, C, P, CL: tl.constexpr, CA: tl.constexpr, ACC: tl.constexpr,
                  BM: tl.constexpr):  # fmt: skip
    scale = gamma * rstd
    along = w - r * p - 3.0 * t * q
    for first in range(start, stop, BM):
        offsets, valid = tile(first, stop, c, C, P, CL, CA, BM)
        x = read(x_ptr + offsets, valid, ACC)
        gy = read(gy_ptr + offsets, valid, ACC)
        u = read(u_ptr + offsets, valid, ACC)
        normal, slopes = standard(x, mean, rstd, gamma, beta, slope, ACC)
        g = gy * slopes - p[None, :]
        u -= r[None, :]
        cgz = scale[None, :] * (u - normal * t[None, :]) + a[None, :] * normal + b[None, :]
        tl.store(cgy_ptr + offsets, cgz * slopes, mask=valid)
        bracket = along[None, :] * normal + t[None, :] * g + q[None, :] * u
        cx = a[None, :] * rstd[None, :] * (g - normal * q[None, :]) - scale[None, :] * rstd[None, :] * bracket
        tl.store(cx_ptr + offsets, cx, mask=valid)


@triton.jit
def combine(part_ptr, shift, eps, t, c, C, M, T, S, piece, ACC: tl.constexpr, BS: tl.constexpr):
    """Mean, biased variance and 1/σ [BC] of the pieces' means less `shift` (quantity 0) and squared deviations (1)."""
    s = tl.arange(0, BS)
    rows = (s * T + t).to(tl.int64) * C
    valid = (s < S)[:, None] & (c < C)[None, :]
    means = tl.load(part_ptr + rows[:, None] + c[None, :], mask=valid, other=0.0)
    count = tl.minimum(tl.maximum(M - s * piece, 0), piece).to(ACC)[:, None]
    elements = M.to(ACC)
    mean = tl.sum(means * count, axis=0) / elements
    mean += tl.sum(tl.where(valid, means - mean[None, :], 0.0) * count, axis=0) / elements
    deviation = tl.where(valid, means - mean[None, :], 0.0)
    squares = total(part_ptr, 1, t, c, C, T, S, ACC, BS) + tl.sum(deviation * deviation * count, axis=0)
    var = squares / elements
    return shift + mean, var, 1.0 / tl.sqrt(var + tl.full([1], eps, ACC))
