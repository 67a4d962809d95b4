"""``running_blend`` of ``mamlpp_fast.ops`` on a GPU: one launch for both statistics of a batch norm."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import TYPE_NAMES, Configuration, argument_types, launch_options

_TYPES = (torch.float64, torch.float32)
_SIZES = ["C", "J", "TASKS", "T", "pass_stride", "group_stride"]
_POINTERS = [f"{n}_ptr" for n in ("mean", "var", "means", "rstds", "decay", "share", "unbiased", "bias")]
_CONSTANTS = {"BJ": 32, "BC": 32}
_WARPS = 4


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_POINTERS)
def _blend(mean_ptr, var_ptr, means_ptr, rstds_ptr, decay_ptr, share_ptr, unbiased_ptr, bias_ptr, eps: tl.float64, C, J,
           TASKS, T, pass_stride, group_stride, BIAS: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Program (r, block of channels): J passes and tasks, TASKS of a pass in groups of T that lie apart."""
    r = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mean = tl.zeros([BC], tl.float64)
    var = tl.zeros([BC], tl.float64)
    for first in range(0, J, BJ):
        j = first + tl.arange(0, BJ)
        at = (
            (j // TASKS).to(tl.int64) * pass_stride
            + (j % TASKS // T).to(tl.int64) * group_stride
            + (j % T) * C
        )
        valid = (j < J)[:, None] & (c < C)[None, :]
        share = tl.load(share_ptr + r * J + j, mask=j < J, other=0.0)
        unbiased = tl.load(unbiased_ptr + r * J + j, mask=j < J, other=0.0)
        one = tl.load(means_ptr + at[:, None] + c[None, :], mask=valid, other=0.0).to(tl.float64)
        rstd = tl.load(rstds_ptr + at[:, None] + c[None, :], mask=valid, other=1.0).to(tl.float64)
        mean += tl.sum(share[:, None] * one, axis=0)
        var += tl.sum(unbiased[:, None] * (1.0 / (rstd * rstd) - eps), axis=0)
    decay = tl.load(decay_ptr + r)
    place = r * C + c
    mean += decay * tl.load(mean_ptr + place, mask=c < C, other=0.0).to(tl.float64)
    var += decay * tl.load(var_ptr + place, mask=c < C, other=0.0).to(tl.float64)
    if BIAS:
        mean += (1.0 - decay) * tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float64)
    tl.store(mean_ptr + place, mean.to(mean_ptr.dtype.element_ty), mask=c < C)
    tl.store(var_ptr + place, var.to(var_ptr.dtype.element_ty), mask=c < C)


def blend(
    running_mean: Tensor, running_var: Tensor, means: Tensor, rstds: Tensor, decay: Tensor, share: Tensor,
    unbiased: Tensor, bias: Tensor | None, eps: float,
) -> None:  # fmt: skip
    """``running_blend``.

    Raises:
        ValueError: strides are not the engine's.
        TypeError: a type is neither float32 nor float64, or weights are not float64.
    """
    rows, channels = running_mean.shape
    steps, sides, groups, tasks, _ = means.shape
    pass_stride, group_stride = tasks * channels, means.stride(2)
    strides = (sides * pass_stride, pass_stride, group_stride, channels, 1)
    for name, t, expected in (
        *(("means", means, strides), ("rstds", rstds, strides)),
        *(("running_mean", running_mean, (channels, 1)), ("running_var", running_var, (channels, 1))),
    ):
        if any(n > 1 and got != s for n, got, s in zip(t.shape, t.stride(), expected, strict=True)):
            raise ValueError(f"{name}: expected strides {expected}, got {t.stride()} of {tuple(t.shape)}")
    stats, own = (means.dtype, rstds.dtype), (running_mean.dtype, running_var.dtype)
    weights = {decay.dtype, share.dtype, unbiased.dtype}
    if stats[0] != stats[1] or own[0] != own[1] or not {*stats, *own} <= {*_TYPES} or weights != {_TYPES[0]}:
        raise TypeError(f"running_blend: expected float32 or float64, got {stats}, {own} and {weights}")
    if bias is not None and bias.dtype != own[0]:
        bias = bias.to(own[0])
    grid = (rows, triton.cdiv(channels, _CONSTANTS["BC"]))
    _blend[grid](
        running_mean, running_var, means, rstds, decay.contiguous(), share.contiguous(), unbiased.contiguous(),
        running_mean if bias is None else bias.contiguous(), eps, channels, steps * sides * groups * tasks,
        groups * tasks, tasks, pass_stride, group_stride, BIAS=bias is not None, **_CONSTANTS, **launch_options(_WARPS),
    )  # fmt: skip


def launch_configurations() -> Iterator[Configuration]:
    """Everything a call can launch: both types of the buffers and of the passes' statistics, a bias or none."""
    for own, stats, bias in itertools.product(_TYPES, _TYPES, (True, False)):
        constants: dict[str, Any] = {"BIAS": bias, **_CONSTANTS}
        kinds = {"mean_ptr": own, "var_ptr": own, "bias_ptr": own, "means_ptr": stats, "rstds_ptr": stats}
        types = argument_types(_blend, constants, torch.float64, kinds)
        label = f"blend in fp64 {TYPE_NAMES[stats]} -> {TYPE_NAMES[own]}{' bias' * bias}"
        yield Configuration(label, _blend, types, constants, _WARPS)
