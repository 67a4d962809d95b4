"""Linear head and softmax cross-entropy of all tasks on a GPU: one launch an order, no atomics.

Arguments and formulas are those of ``mamlpp_fast.ops.linear_cross_entropy``. A program of the forward and the tangent
takes blocks of BN images of one task through all features; where the task's loss is wanted, one program takes all
blocks. A program of the backward orders takes BF features of one task through all images. What is absent has a count of
zero: its loop makes no trip, its loads and stores are masked. TW tasks have weights of their own: task t has those of
t % TW and the scale t // TW, and a gradient lies `gap` elements further for every TW tasks.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamlpp_fast.ops.linear_cross_entropy import MOST_CLASSES

from ._launch import TYPE_NAMES, Configuration, argument_types, check_memory, first_role, launch_options

_TYPES = (torch.float64, torch.float32)
_CLASSES = (16, MOST_CLASSES)
"""Sizes that the classes C are padded to."""

_SIZES = ["N", "F", "C", "has_f_dot", "has_weight_dot", "has_bias", "has_loss", "has_features", "has_weights", "TW",
          "weight_gap", "bias_gap"]  # fmt: skip
_LOGITS = [f"{n}_ptr" for n in ("target", "z", "p", "gz", "gz0")]
"""Arguments like the logits: a role's part starts on 16 bytes for some numbers of classes only."""


@triton.jit
def _dot(a, b, total, DOUBLE: tl.constexpr):
    """``total + a @ b``; float64 by sums, whose tl.dot sm_90 lacks in places. Triton turns float32 sums into TF32."""
    if DOUBLE:
        total += tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    else:
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _add_products(f_ptr, w_ptr, total, n, o, N, F, C, count, BF: tl.constexpr, DOUBLE: tl.constexpr):
    """``total`` [BN, BO] plus the products of rows n of f and columns o of w over the first `count` features."""
    for first in range(0, count, BF):
        i = first + tl.arange(0, BF)
        f = tl.load(f_ptr + n[:, None] * F + i[None, :], mask=(n < N)[:, None] & (i < F)[None, :], other=0.0)
        w = tl.load(w_ptr + i[:, None] * C + o[None, :], mask=(i < F)[:, None] & (o < C)[None, :], other=0.0)
        total = _dot(f, w, total, DOUBLE)
    return total


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_LOGITS)
def _forward(f_ptr, w_ptr, bias_ptr, target_ptr, scale_ptr, z_ptr, p_ptr, gz_ptr, loss_ptr, N, F, C, TW, has_bias,
             has_loss, BN: tl.constexpr, BF: tl.constexpr, BO: tl.constexpr, DOUBLE: tl.constexpr):  # fmt: skip
    task = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BO)
    own = task % TW
    scale = tl.load(scale_ptr + task // TW)
    bias = tl.load(bias_ptr + own * C + o, mask=(o < C) & (has_bias != 0), other=0.0)
    kind = f_ptr.dtype.element_ty
    chosen = tl.zeros([BN], kind)
    for first in range(tl.program_id(1) * BN, N, tl.num_programs(1) * BN):
        n = first + tl.arange(0, BN)
        at = task * N * C + n[:, None] * C + o[None, :]
        real = (n < N)[:, None] & (o < C)[None, :]
        z = tl.zeros([BN, BO], kind) + bias[None, :]
        z = _add_products(f_ptr + task * N * F, w_ptr + own * F * C, z, n, o, N, F, C, F, BF, DOUBLE)
        top = tl.max(tl.where((o < C)[None, :], z, float("-inf")), axis=1)
        shifted = z - top[:, None]
        power = tl.where((o < C)[None, :], tl.exp(shifted), 0.0)
        total = tl.sum(power, axis=1)
        p = power / total[:, None]
        target = tl.load(target_ptr + at, mask=real, other=0.0)
        tl.store(z_ptr + at, z, mask=real)
        tl.store(p_ptr + at, p, mask=real)
        tl.store(gz_ptr + at, scale * (p - target), mask=real)
        log_p = shifted - tl.log(total)[:, None]
        chosen += tl.sum(tl.where(real, target * log_p, 0.0), axis=1)
    tl.store(loss_ptr + task, -scale * tl.sum(chosen, axis=0), mask=has_loss != 0)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_LOGITS)
def _tangent(u_ptr, v_ptr, bias_ptr, f_ptr, w_ptr, p_ptr, scale_ptr, gz_ptr, N, F, C, has_f_dot, has_weight_dot,
             has_bias, BN: tl.constexpr, BF: tl.constexpr, BO: tl.constexpr, DOUBLE: tl.constexpr):  # fmt: skip
    task = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BO)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    at = task * N * C + n[:, None] * C + o[None, :]
    real = (n < N)[:, None] & (o < C)[None, :]
    bias = tl.load(bias_ptr + task * C + o, mask=(o < C) & (has_bias != 0), other=0.0)
    z = tl.zeros([BN, BO], f_ptr.dtype.element_ty) + bias[None, :]
    f_at, w_at = task * N * F, task * F * C
    z = _add_products(u_ptr + f_at, w_ptr + w_at, z, n, o, N, F, C, F * has_f_dot, BF, DOUBLE)
    z = _add_products(f_ptr + f_at, v_ptr + w_at, z, n, o, N, F, C, F * has_weight_dot, BF, DOUBLE)
    p = tl.load(p_ptr + at, mask=real, other=0.0)
    mean = tl.sum(p * z, axis=1)
    tl.store(gz_ptr + at, tl.load(scale_ptr) * p * (z - mean[:, None]), mask=real)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_LOGITS)
def _gradients(gz_ptr, gz0_ptr, u_ptr, v_ptr, f_ptr, w_ptr, gf_ptr, gw_ptr, gb_ptr, N, F, C, TW, weight_gap, bias_gap,
               has_f_dot, has_weight_dot, has_features, has_weights, has_bias, BN: tl.constexpr, BF: tl.constexpr,
               BO: tl.constexpr, DOUBLE: tl.constexpr, SECOND: tl.constexpr):  # fmt: skip
    """Both backward orders; SECOND: with the products of gz0 and the tangents u of f and v of w."""
    task = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BF + tl.arange(0, BF)
    o = tl.arange(0, BO)
    kind = f_ptr.dtype.element_ty
    across = (o < C)[:, None] & (i < F)[None, :]
    w_at = task % TW * F * C + i[None, :] * C + o[:, None]
    wt = tl.load(w_ptr + w_at, mask=across & (has_features != 0), other=0.0)
    if SECOND:
        vt = tl.load(v_ptr + w_at, mask=across & (has_features * has_weight_dot != 0), other=0.0)
    gw = tl.zeros([BF, BO], kind)
    gb = tl.zeros([BO], kind)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        real = (n < N)[:, None] & (o < C)[None, :]
        at = task * N * C + n[:, None] * C + o[None, :]
        f_at = task * N * F + n[None, :] * F + i[:, None]
        inside = (n < N)[None, :] & (i < F)[:, None]
        gz = tl.load(gz_ptr + at, mask=real, other=0.0)
        gb += tl.sum(gz, axis=0)
        ft = tl.load(f_ptr + f_at, mask=inside & (has_weights != 0), other=0.0)
        gw = _dot(ft, gz, gw, DOUBLE)
        gf = _dot(gz, wt, tl.zeros([BN, BF], kind), DOUBLE)
        if SECOND:
            gz0 = tl.load(gz0_ptr + at, mask=real, other=0.0)
            ut = tl.load(u_ptr + f_at, mask=inside & (has_weights * has_f_dot != 0), other=0.0)
            gw = _dot(ut, gz0, gw, DOUBLE)
            gf = _dot(gz0, vt, gf, DOUBLE)
        place = task * N * F + n[:, None] * F + i[None, :]
        tl.store(gf_ptr + place, gf, mask=(n < N)[:, None] & (i < F)[None, :] & (has_features != 0))
    place = task * F * C + task // TW * weight_gap + i[:, None] * C + o[None, :]
    tl.store(gw_ptr + place, gw, mask=(i < F)[:, None] & (o < C)[None, :] & (has_weights != 0))
    tl.store(
        gb_ptr + task * C + task // TW * bias_gap + o,
        gb,
        mask=(o < C) & (has_bias != 0) & (tl.program_id(1) == 0),
    )


def _constants(kernel: Any, dtype: torch.dtype, classes: int, second: bool = False) -> dict[str, Any]:
    """Launch configuration; float64, for checks, gets what its registers hold."""
    double = dtype == torch.float64
    given = {
        "BN": 16,
        "BF": 4 if double and classes > _CLASSES[0] else 16,
        "BO": classes,
        "DOUBLE": double,
        "SECOND": second,
    }
    return {name: given[name] for name in kernel.arg_names if name in given}


def _warps(kernel: Any, classes: int) -> int:
    """Twice as many where a program holds all classes of two products."""
    return 8 if kernel is _gradients and classes > _CLASSES[0] else 4


class _Call:
    """Sizes of one call; an absent tensor is stood in for by f, and its count is zero."""

    def __init__(self, f: Tensor, weight: Tensor) -> None:
        if f.dtype not in _TYPES:
            raise TypeError(f"f: expected float32 or float64, got {f.dtype}")
        if weight.shape[2] > MOST_CLASSES:
            raise ValueError(f"weight: expected at most {MOST_CLASSES} classes, got {tuple(weight.shape)}")
        self.f = f
        self.tasks, self.images, self.features = f.shape
        self.classes = weight.shape[2]
        self.size = next(size for size in _CLASSES if size >= self.classes)

    def blocks(self, kernel: Any, of: str, count: int) -> int:
        return triton.cdiv(count, _constants(kernel, self.f.dtype, self.size)[of])

    def __call__(
        self,
        kernel: Any,
        programs: int,
        *tensors: Tensor | None,
        second: bool = False,
        sizes: Mapping[str, int] | None = None,
        **has: Tensor | None,
    ) -> None:
        for name, tensor in zip(kernel.arg_names, tensors, strict=False):
            if tensor is None:
                continue
            if tensor.dtype != self.f.dtype:
                raise TypeError(
                    f"{name.removesuffix('_ptr')}: expected {self.f.dtype} like f, got {tensor.dtype}"
                )
            check_memory(name, tensor, _LOGITS)
        counts = {f"has_{name}": int(tensor is not None) for name, tensor in has.items()}
        kernel[(self.tasks, programs)](
            *(self.f if t is None else t for t in tensors),
            self.images,
            self.features,
            self.classes,
            **(sizes or {}),
            **counts,
            **_constants(kernel, self.f.dtype, self.size, second),
            **launch_options(_warps(kernel, self.size)),
        )


def forward(
    f: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: Tensor,
    logits: Tensor, probabilities: Tensor, gz: Tensor, loss: Tensor | None,
) -> None:  # fmt: skip
    """``linear_cross_entropy``; all tensors contiguous, as below."""
    call = _Call(f, weight)
    programs = 1 if loss is not None else call.blocks(_forward, "BN", call.images)
    tensors = (f, weight, bias, target, scale, logits, probabilities, gz, loss)
    call(_forward, programs, *tensors, bias=bias, loss=loss, sizes={"TW": len(weight)})


def tangent(
    f_dot: Tensor | None, weight_dot: Tensor | None, bias_dot: Tensor | None, f: Tensor, weight: Tensor,
    probabilities: Tensor, scale: Tensor, gz_dot: Tensor,
) -> None:  # fmt: skip
    """``linear_cross_entropy_tangent``."""
    call = _Call(f, weight)
    tensors = (f_dot, weight_dot, bias_dot, f, weight, probabilities, scale, gz_dot)
    programs = call.blocks(_tangent, "BN", call.images)
    call(_tangent, programs, *tensors, f_dot=f_dot, weight_dot=weight_dot, bias=bias_dot)


def backward(
    gz: Tensor, f: Tensor, weight: Tensor, gf: Tensor | None, gweight: Tensor | None, gbias: Tensor | None
) -> None:
    """``linear_cross_entropy_backward``."""
    _both(gz, None, None, None, f, weight, gf, gweight, gbias)


def backward_tangent(
    gz_dot: Tensor, gz: Tensor, f_dot: Tensor | None, weight_dot: Tensor | None, f: Tensor, weight: Tensor,
    gf_dot: Tensor | None, gweight_dot: Tensor | None, gbias_dot: Tensor | None,
) -> None:  # fmt: skip
    """``linear_cross_entropy_backward_tangent``."""
    _both(gz_dot, gz, f_dot, weight_dot, f, weight, gf_dot, gweight_dot, gbias_dot)


def _both(
    gz: Tensor, gz0: Tensor | None, f_dot: Tensor | None, weight_dot: Tensor | None, f: Tensor, weight: Tensor,
    gf: Tensor | None, gweight: Tensor | None, gbias: Tensor | None,
) -> None:  # fmt: skip
    call = _Call(f, weight)
    programs = call.blocks(_gradients, "BF", call.features)
    sizes = {"TW": len(weight), "weight_gap": 0, "bias_gap": 0}
    if gweight is not None:
        gweight, sizes["weight_gap"] = first_role(gweight, 3)
    if gbias is not None:
        gbias, sizes["bias_gap"] = first_role(gbias, 2)
    tensors = (gz, gz0, f_dot, weight_dot, f, weight, gf, gweight, gbias)
    has = {"f_dot": f_dot, "weight_dot": weight_dot, "features": gf, "weights": gweight, "bias": gbias}
    call(_gradients, programs, *tensors, second=gz0 is not None, sizes=sizes, **has)


def launch_configurations() -> Iterator[Configuration]:
    """Everything a call can launch: two types, two sizes of classes."""
    for dtype in _TYPES:
        for classes in _CLASSES:
            for kernel, second in (
                (_forward, False),
                (_tangent, False),
                (_gradients, False),
                (_gradients, True),
            ):
                constants = _constants(kernel, dtype, classes, second)
                types = argument_types(kernel, constants, dtype)
                order = " tangent" if second else ""
                text = f"{kernel.__name__[1:]}{order} {classes} classes {TYPE_NAMES[dtype]}"
                yield Configuration(text, kernel, types, constants, _warps(kernel, classes))
