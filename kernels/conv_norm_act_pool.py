"""The first layer in one, without its feature map, on a GPU.

Arguments and formulas are those of ``mamlpp_fast.ops.conv_norm_act_pool``. The windows are cut in pieces. Those of
forward and tangent fold scale and mean into the weights, then pass over their windows; both backward orders sum over
theirs, and the last finishes channel by channel.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from . import _conv_norm_act_pool_kernels as kernels
from ._launch import (
    TYPE_NAMES,
    Configuration,
    accumulator,
    argument_types,
    check_memory,
    counters,
    directions,
    first_role,
    launch_options,
    rows_of_tasks,
    split,
)

_TYPES = (torch.float64, torch.float32)
_PATCHES = (16, 32)
"""Sizes that the values of a patch are padded to, at least one more than there are."""
_PIECES = 64
_CHANNELS = 4
"""Input channels, rounded up to a power of two; three are what the patches have room for."""


def _constants(kernel: Any, dtype: torch.dtype, values: int) -> dict[str, Any]:
    """Launch configuration: 32 windows or patches of 32 channels; float64, for checks, gets what its registers hold."""
    given = {
        "KP": values,
        "ACC": accumulator(dtype)[1],
        "BM": 32,
        "BC": _CHANNELS if kernel in _PREPARE else 32,
        "BS": _PIECES,
    }
    if kernel in (kernels.pixel_sums, kernels.pad):
        given["BM"] = 256
    elif kernel is kernels.patch_products:
        given["BM"] = 16
    elif kernel in _BACKWARD and dtype == torch.float64:
        given["BM"], given["BC"] = 256 // values, 16
    return {name: given[name] for name in kernel.arg_names if name in given}


_PREPARE = (kernels.pixel_sums, kernels.pad, kernels.moments)
_FORWARD = (kernels.forward, kernels.tangent)
_BACKWARD = (kernels.backward, kernels.backward_tangent)
_KERNELS = (*_PREPARE, kernels.patch_products, *_FORWARD, *_BACKWARD)


def _options(kernel: Any) -> tuple[int, int]:
    """Warps and pipeline depth: what keeps the sums over windows in registers."""
    return (8, 2) if kernel in _BACKWARD else (4, 3)


def _padded_values(values: int) -> int:
    return next(size for size in _PATCHES if size > values)


class _Call:
    """Sizes and scratch memory of one call, by name."""

    def __init__(self, padded: Tensor, kernel: Sequence[int], channels: int) -> None:
        tasks, images, height, width, ci = padded.shape
        kh, kw = kernel
        if padded.dtype not in _TYPES or kh * kw * ci >= _PATCHES[-1]:
            raise TypeError(
                f"padded: expected float32 or float64 in patches of fewer than {_PATCHES[-1]} values, "
                f"got {padded.dtype} in patches of {kh * kw * ci}"
            )
        if images * height * width * max(ci, channels) >= 2**31:
            raise ValueError(
                f"padded: expected fewer than 2**31 elements a task, got shape {tuple(padded.shape)}"
            )
        self.dtype, self.device = padded.dtype, padded.device
        self.values = kh * kw * ci
        self.size = _padded_values(self.values)
        self.tasks, self.channels, self.images = tasks, channels, images
        self.out = (height - kh + 1, width - kw + 1)
        rows, columns = self.out[0] // 2, self.out[1] // 2
        self.windows = images * rows * columns
        self.arguments: dict[str, Any] = {
            "C": channels, "K": self.values, "H": height, "W": width, "CI": ci, "KW": kw, "OH": rows, "OW": columns,
            "T": tasks, "N": images,
        }  # fmt: skip

    def blocks(self, kernel: Any) -> int:
        return triton.cdiv(self.channels, _constants(kernel, self.dtype, self.size)["BC"])

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def __call__(self, kernel: Any, grid: tuple[int, ...], *tensors: Tensor, **scalars: Any) -> None:
        for name, tensor in zip(kernel.arg_names, tensors, strict=False):
            check_memory(name, tensor, kernels.UNALIGNED)
        given = self.arguments | scalars | _constants(kernel, self.dtype, self.size)
        names = kernel.arg_names[len(tensors) :]
        kernel[grid](*tensors, **{n: given[n] for n in names}, **launch_options(*_options(kernel)))

    def affine(self, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Both contiguous; from then on it is known for how many tasks a row of them is."""
        gamma, beta, per_row = rows_of_tasks(gamma.to(self.dtype), beta.to(self.dtype), self.tasks)
        self.arguments["per_row"] = per_row
        return gamma, beta


def moments(images: Tensor, kh: int, kw: int, padding: int, padded: Tensor, moments: Tensor) -> None:
    """``patch_moments`` of ``mamlpp_fast.ops``; all tensors contiguous, as below."""
    call = _Call(padded, (kh, kw), 0)
    tasks, count, height, width, ci = images.shape
    piece, pieces = split(count * height * width, tasks, 256, limit=_PIECES)
    part = call.empty(pieces, tasks, _CHANNELS, dtype=torch.float64)
    sizes = {"S": pieces, "piece": piece, "CI": ci}
    call(kernels.pixel_sums, (pieces, tasks), images, part, M=count * height * width, **sizes)
    centre = call.empty(tasks, _CHANNELS, dtype=torch.float64)
    pixels = padded.shape[1] * padded.shape[2] * padded.shape[3]
    call(
        kernels.pad, (triton.cdiv(pixels, 256), tasks), images, part, padded, centre,
        H=height, W=width, CI=ci, S=pieces, padding=padding,
    )  # fmt: skip
    patches = count * call.out[0] * call.out[1]
    piece, pieces = split(patches, tasks, 32, limit=_PIECES)
    products = call.empty(pieces, tasks, call.size, call.size, dtype=torch.float64)
    shape = {"OH": call.out[0], "OW": call.out[1]}
    call(kernels.patch_products, (pieces, tasks), padded, products, M=patches, S=pieces, piece=piece, **shape)
    call(kernels.moments, (tasks,), products, centre, moments, S=pieces)


def _over_windows(
    call: _Call, kernel: Any, folded: Sequence[Tensor], windows: Sequence[Tensor], **scalars: Any
) -> None:
    """Folds the weights and passes over the windows, in pieces that do so each for itself."""
    blocks = call.blocks(kernel)
    block = _constants(kernel, call.dtype, call.size)["BM"]
    piece, pieces = split(call.windows, blocks * call.tasks, block, limit=_PIECES)
    scratch = (
        call.empty(pieces, call.tasks, call.values, call.channels),
        call.empty(pieces, call.tasks, call.channels),
    )
    grid = (blocks, call.tasks, pieces)
    call(kernel, grid, *folded, *scratch, *windows, M=call.windows, piece=piece, **scalars)


def forward(
    padded: Tensor, moments: Tensor, w: Tensor, gamma: Tensor, beta: Tensor, eps: float, slope: float, y: Tensor,
    index: Tensor, mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    """``conv_norm_act_pool``."""
    call = _Call(padded, w.shape[1:3], w.shape[4])
    rows = call.affine(gamma, beta)
    folded = (padded, moments, w, *rows)
    _over_windows(call, kernels.forward, folded, (y, index, mean, rstd), eps=eps, slope=slope, TW=len(w))


def tangent(
    v: Tensor, y: Tensor, index: Tensor, padded: Tensor, moments: Tensor, w: Tensor, gamma: Tensor, rstd: Tensor,
    slope: float, uy: Tensor, t: Tensor, gamma_dot: Tensor | None = None, beta_dot: Tensor | None = None,
) -> None:  # fmt: skip
    """``conv_norm_act_pool_tangent``."""
    call = _Call(padded, w.shape[1:3], w.shape[4])
    gamma, _ = call.affine(gamma, gamma)
    moves, dots = directions((gamma_dot, beta_dot), rstd)
    folded = (padded, v, moments, w, gamma, *dots, rstd)
    _over_windows(call, kernels.tangent, folded, (y, index, uy, t), slope=slope, MOVES=moves)


def _finished_sums(
    call: _Call,
    kernel: Any,
    windows: Sequence[Tensor],
    operands: Sequence[Tensor],
    gw: Tensor,
    **scalars: Any,
) -> None:
    """Sums over the windows in pieces, the last of which finishes what they are for."""
    blocks = call.blocks(kernel)
    piece, pieces = split(call.windows, blocks * call.tasks, _constants(kernel, call.dtype, call.size)["BM"])
    part = call.empty(pieces, call.tasks, call.size, call.channels)
    counts = counters(gw, blocks * call.tasks)
    grid = (blocks, call.tasks, pieces)
    call(kernel, grid, *windows, part, counts, *operands, M=call.windows, S=pieces, piece=piece, **scalars)


def backward(
    gy: Tensor, y: Tensor, index: Tensor, padded: Tensor, moments: Tensor, w: Tensor, gamma: Tensor, rstd: Tensor,
    slope: float, gw: Tensor, sums: Tensor, ggamma: Tensor, gbeta: Tensor,
) -> None:  # fmt: skip
    """``conv_norm_act_pool_backward``."""
    call = _Call(padded, w.shape[1:3], w.shape[4])
    gamma, _ = call.affine(gamma, gamma)
    gw, gap = first_role(gw, 5)
    operands = (moments, w, gamma, rstd, gw, sums, ggamma, gbeta)
    windows = (padded, gy, y, index)
    _finished_sums(call, kernels.backward, windows, operands, gw, slope=slope, TW=len(w), gap=gap)


def backward_tangent(
    gy_dot: Tensor, v: Tensor, y: Tensor, index: Tensor, padded: Tensor, moments: Tensor, w: Tensor, gamma: Tensor,
    rstd: Tensor, slope: float, sums: Tensor, t: Tensor, gw_dot: Tensor, ggamma_dot: Tensor, gbeta_dot: Tensor,
    gamma_dot: Tensor | None = None,
) -> None:  # fmt: skip
    """``conv_norm_act_pool_backward_tangent``."""
    call = _Call(padded, w.shape[1:3], w.shape[4])
    gamma, _ = call.affine(gamma, gamma)
    moves, dots = directions((gamma_dot,), rstd)
    operands = (v, moments, w, gamma, *dots, rstd, sums, t, gw_dot, ggamma_dot, gbeta_dot)
    _finished_sums(
        call, kernels.backward_tangent, (padded, gy_dot, y, index), operands, gw_dot, slope=slope,
        stretch=call.images * call.out[0] * call.out[1], MOVES=moves,
    )  # fmt: skip


def launch_configurations() -> Iterator[Configuration]:
    """Everything a call can launch: two types, two sizes of patches, γ and β fixed or not."""
    for dtype in _TYPES:
        for values in _PATCHES:
            for kernel, moves in itertools.product(_KERNELS, (False, True)):
                constants = _constants(kernel, dtype, values)
                if "MOVES" in kernel.arg_names:
                    constants["MOVES"] = moves
                elif moves:
                    continue
                if values != _PATCHES[0] and not {"KP"} & constants.keys():
                    continue
                if dtype == torch.float32 and kernel is kernels.moments:
                    continue  # all float64
                kind = TYPE_NAMES[dtype]
                wide = {"centre_ptr", "moments_ptr"} | (set() if kernel in _BACKWARD else {"part_ptr"})
                types = argument_types(kernel, constants, dtype, dict.fromkeys(wide, torch.float64))
                # Products of what happens once a channel are float64 ones.
                inside = "" if kind == "fp64" else "fp64 of "
                text = f"{kernel.__name__}{' moving' * moves} {values} values {inside}{kind}"
                yield Configuration(text, kernel, types, constants, *_options(kernel))
