"""Batch norm, leaky ReLU and 2x2 max-pool of task-batched, channels-last activations, four orders, on a GPU.

Arguments and formulas are those of ``mamlpp_fast.ops.norm_act_pool``. Each order is a reduction, which cuts the rows of
a task into at most 32 pieces and leaves one partial sum of each, and an elementwise pass, which adds them up in a fixed
order: no atomics. Of a task of few rows one program has all and does both, in one launch. What the pool dropped has no
gradient, so sums that hold one run over the pooled grid.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from . import _norm_act_pool_kernels as kernels
from ._launch import (
    ROWS,
    TYPE_NAMES,
    Configuration,
    accumulator,
    argument_types,
    check_memory,
    directions,
    launch_options,
    rows_of_tasks,
    split,
)

_PIECES = 32
_WHOLE = 1024
"""Rows of a task up to which one program takes all of a few channels, four tiles: one launch in place of two."""


def _wide(row_like: Tensor, mean: Tensor) -> Tensor:
    """γ or β as the kernels take it: contiguous, in the type of the statistics."""
    return row_like.to(mean.dtype).contiguous()


class _Launch:
    """Sizes, grid and constexprs of one call; `cut` are the size arguments by name."""

    def __init__(
        self, z: Tensor, mean: Tensor, gamma: Tensor, beta: Tensor, slope: float, pool: bool
    ) -> None:
        tasks, images, height, width, channels = z.shape
        step = 2 if pool else 1
        rows, out = images * height * width, images * (height // step) * (width // step)
        if rows * channels >= 2**31:
            raise ValueError(f"z: expected fewer than 2**31 elements a task, got shape {tuple(z.shape)}")
        if z.dtype not in _TYPES or mean.dtype != accumulator(z.dtype)[0]:
            raise TypeError(
                "z, mean: expected float32 or bfloat16 with float32, or float64 with float64, "
                f"got {z.dtype} and {mean.dtype}"
            )
        self.whole = rows <= _WHOLE
        self.constants = _constants(z.dtype, channels, pool, self.whole)
        self.options = launch_options(_warps(self.whole))
        blocks = triton.cdiv(channels, self.constants["BC"])
        piece, pieces = rows, 1
        if not self.whole:
            piece, pieces = split(rows, blocks * tasks, self.constants["BM"], limit=_PIECES)
        # Tasks first: layer norms have as many as tokens, and the other axes of a grid end at 65,535.
        self.grid = (tasks, blocks, pieces)
        self.tasks, self.channels, self.pieces = tasks, channels, pieces
        self.sizes = {f"{n}_ptr": tasks * rows * channels for n in ("z", "u", "gz")}
        self.sizes |= {f"{n}_ptr": tasks * out * channels for n in ("y", "gy", "uy", "gy_dot")}
        self.sizes |= {f"{n}_ptr": tasks * channels for n in ("mean", "rstd", "ggamma", "gbeta", "r", "t")}
        if pool:
            self.sizes["index_ptr"] = tasks * out * channels
        self.gamma, self.beta, per_row = rows_of_tasks(_wide(gamma, mean), _wide(beta, mean), tasks)
        self.arguments: dict[str, Any] = {
            "C": channels, "H": height, "W": width, "M": rows, "Mo": out, "T": tasks, "S": pieces, "piece": piece,
            "stretch": triton.cdiv(out, pieces), "per_row": per_row, "slope": slope,
        }  # fmt: skip

    def reduced(self, kernel: Any, quantities: int, mean: Tensor, *tensors: Tensor) -> Tensor:
        """The pieces' sums by a reduction; nothing, and no launch, where the second pass makes them itself."""
        parts = mean.new_empty(0 if self.whole else quantities, self.pieces, self.tasks, self.channels)
        if not self.whole:
            self(kernel, *tensors, parts)
        return parts

    def __call__(self, kernel: Any, *tensors: Tensor, **scalars: float) -> None:
        for name, tensor in zip(kernel.arg_names, tensors, strict=False):
            check_memory(name, tensor, ROWS)
            if (size := self.sizes.get(name)) is not None and tensor.numel() != size:
                raise ValueError(
                    f"{name.removesuffix('_ptr')}: expected {size} elements, got {tuple(tensor.shape)}"
                )
        given = {**self.arguments, **scalars, **self.constants, "BS": _PIECES}
        names = kernel.arg_names[len(tensors) :]
        kernel[self.grid](*tensors, **{n: given[n] for n in names}, **self.options)


def forward(
    z: Tensor, gamma: Tensor, beta: Tensor, eps: float, slope: float, pool: bool, y: Tensor, index: Tensor,
    mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    """``norm_act_pool`` of ``mamlpp_fast.ops``, as are the three below; all tensors contiguous."""
    launch = _Launch(z, mean, gamma, beta, slope, pool)
    parts = launch.reduced(kernels.forward_sums, 2, mean, z)
    launch(kernels.forward_apply, z, launch.gamma, launch.beta, parts, y, index, mean, rstd, eps=eps)


def backward(
    gy: Tensor, z: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, slope: float,
    pool: bool, gz: Tensor, ggamma: Tensor, gbeta: Tensor,
) -> None:  # fmt: skip
    """``norm_act_pool_backward``."""
    launch = _Launch(z, mean, gamma, beta, slope, pool)
    saved = (gy, z, index, mean, rstd, launch.gamma, launch.beta)
    parts = launch.reduced(kernels.backward_sums, 2, mean, *saved)
    launch(kernels.backward_apply, *saved, parts, gz, ggamma, gbeta)


def tangent(
    u: Tensor, z: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, slope: float,
    pool: bool, uy: Tensor, r: Tensor, t: Tensor, gamma_dot: Tensor | None = None, beta_dot: Tensor | None = None,
) -> None:  # fmt: skip
    """``norm_act_pool_tangent``."""
    launch = _Launch(z, mean, gamma, beta, slope, pool)
    parts = launch.reduced(kernels.tangent_sums, 2, mean, u, z, mean, rstd)
    moves, rows = directions((gamma_dot, beta_dot), mean)
    saved = (u, z, index, mean, rstd, launch.gamma, launch.beta)
    launch(kernels.tangent_apply, *saved, *rows, parts, uy, r, t, MOVES=moves)


def backward_tangent(
    gy_dot: Tensor, gy: Tensor, u: Tensor, z: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor,
    beta: Tensor, slope: float, r: Tensor, t: Tensor, pool: bool, gz_dot: Tensor, ggamma_dot: Tensor, gbeta_dot: Tensor,
    gamma_dot: Tensor | None = None,
) -> None:  # fmt: skip
    """``norm_act_pool_backward_tangent``."""
    launch = _Launch(z, mean, gamma, beta, slope, pool)
    saved = (gy_dot, gy, u, z, index, mean, rstd, launch.gamma, launch.beta)
    parts = launch.reduced(kernels.backward_tangent_sums, 5, mean, *saved)
    moves, rows = directions((gamma_dot,), mean)
    results = (gz_dot, ggamma_dot, gbeta_dot)
    launch(kernels.backward_tangent_apply, *saved, *rows, r, t, parts, *results, MOVES=moves)


_TYPES = (torch.float64, torch.float32, torch.bfloat16)
_IMAGES = {f"{n}_ptr" for n in ("z", "y", "gy", "gz", "u", "uy", "gy_dot")}
_KERNELS = (
    kernels.forward_sums,
    kernels.forward_apply,
    kernels.backward_sums,
    kernels.backward_apply,
    kernels.tangent_sums,
    kernels.tangent_apply,
    kernels.backward_tangent_sums,
    kernels.backward_tangent_apply,
)


def _constants(dtype: torch.dtype, channels: int, pool: bool, whole: bool) -> dict[str, Any]:
    """Launch configuration: 32 rows of 32 neighbouring channels at a time, or 256 of 8, 32 bytes of each row."""
    return {
        "CA": channels % 16 == 0 and dtype != torch.float64,
        "POOL": pool,
        "WHOLE": whole,
        "ACC": accumulator(dtype)[1],
        "BM": 256 if whole else 32,
        "BC": 8 if whole else 32,
        "BS": _PIECES,
    }


def _warps(whole: bool) -> int:
    return 8 if whole else 4


def launch_configurations() -> Iterator[Configuration]:
    """Everything a call can launch: types, channels in multiples of 16 or not, pool, γ and β fixed, few rows or not."""
    flags = [(True, False)] * 3
    forms: Iterator[tuple[Any, ...]] = itertools.product(_TYPES, (64, 5), *flags)
    for dtype, channels, pool, moves, whole in forms:
        if dtype == torch.float64 and channels == 64:
            continue
        given = {**_constants(dtype, channels, pool, whole), "MOVES": moves}
        for kernel in _KERNELS:
            if (moves, "MOVES" in kernel.arg_names) == (True, False):
                continue
            if (whole, "WHOLE" in kernel.arg_names) == (True, False):
                continue
            constants = {n: given[n] for n in kernel.arg_names if n in given}
            if not pool and "POOL" not in constants:
                continue
            types = argument_types(kernel, constants, accumulator(dtype)[0], dict.fromkeys(_IMAGES, dtype))
            label = (
                f"{kernel.__name__}{' whole' * whole}{' moving' * moves} {'pool' if pool else 'no pool'} "
                f"C%16={'0' if channels == 64 else 'any'}"
            )
            yield Configuration(f"{label} {TYPE_NAMES[dtype]}", kernel, types, constants, _warps(whole))
