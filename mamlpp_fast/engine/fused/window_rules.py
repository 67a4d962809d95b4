"""Rules of what looks at windows of images and sequences: convolutions and pools."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlpp_fast.engine.fused.lowering import Lowering, rule
from mamlpp_fast.engine.fused.steps import AveragePool, Bias, Conv, MaxPool, Slot, Step, TransposedConv
from mamlpp_fast.engine.operation import Parameter
from mamlpp_fast.ops.window_pool import MOST_PIXELS

# Of the native kernels.
_MOST_TAPS = 49

# Convolutions --------------------------------------------------------------------------------------------------------


_CONVOLUTIONS = (
    "of images and sequences; kernels of up to 49 taps (7x7), any stride, the same on both axes, "
    "zero padding below the kernel likewise (none along an axis of one tap), one group, no dilation"
)
_POOLS = (
    "any window (of a maximum 256 pixels at most), step and padding; no dilation, floor, padding that counts"
)


@rule(F.conv1d, torch.conv1d, F.conv2d, torch.conv2d, takes=_CONVOLUTIONS)
def _conv(low: Lowering, input: Any, weight: Any, bias: Any = None, *windows: Any, **named: Any) -> None:
    x, shape, slot, step, pad = _geometry(low, input, weight, *windows, **named)
    sizes = (
        (s + 2 * (pad if k > 1 else 0) - k) // step + 1
        for s, k in zip(shape[:2], slot.shape[:2], strict=True)
    )
    product = low.step(Conv, (x,), (*sizes, slot.shape[3]), slot, step, pad)
    _bias(low, product, bias)


@rule(
    F.conv_transpose1d,
    torch.conv_transpose1d,
    F.conv_transpose2d,
    torch.conv_transpose2d,
    takes=_CONVOLUTIONS,
)
def _conv_transpose(
    low: Lowering,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> None:
    x, shape, slot, step, pad = _geometry(low, input, weight, stride, padding, dilation, groups)
    more = (*_sides(output_padding, len(low.shape) - 1), 0)[:2]
    if max(more) >= step:
        raise low.refusal(f"transposed convolution: expected output_padding below the stride, got {more}")
    sizes = (
        (s - 1) * step - 2 * (pad if k > 1 else 0) + k + m
        for s, k, m in zip(shape[:2], slot.shape[:2], more, strict=True)
    )
    product = low.step(TransposedConv, (x,), (*sizes, slot.shape[2]), slot, step, pad, shape)
    _bias(low, product, bias)


def _sides(value: Any, axes: int) -> tuple[Any, ...]:
    """One value for each axis of an image or a sequence."""
    if isinstance(value, (tuple, list)):
        return tuple(value) if len(value) > 1 else tuple(value) * axes
    return (value,) * axes


def _geometry(
    low: Lowering,
    input: Any,
    weight: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[int, tuple[int, ...], Slot, int, int]:
    """Input, its shape [H, W, C] (of a sequence [L, 1, C]), weight, stride and padding of a convolution."""
    name = low.parameter(weight)
    first, second, *kernel = low.parameters[name].shape
    axes = len(kernel)
    x, shape = low.images(input, axes=(1 + axes,))
    if groups != 1:
        raise low.refusal("convolution: expected one group")
    if padding in ("valid", "same"):
        if padding == "same" and any(k % 2 == 0 for k in kernel):
            raise low.refusal("convolution: expected the same padding on both sides")
        padding = [k // 2 for k in kernel] if padding == "same" else 0
    wide = [i for i, k in enumerate(kernel) if k > 1]  # the axes on which padding and dilation count
    steps, pads = set(_sides(stride, axes)), _sides(padding, axes)
    counting = {pads[i] for i in wide} or {0}
    if len(steps) != 1 or len(counting) != 1 or any(p for i, p in enumerate(pads) if i not in wide):
        raise low.refusal(f"convolution: expected one stride and one padding, got {stride} and {padding}")
    if any(_sides(dilation, axes)[i] != 1 for i in wide):
        raise low.refusal("convolution: expected no dilation")
    (step,), (pad,) = steps, counting
    if math.prod(kernel) > _MOST_TAPS or any(pad >= kernel[i] for i in wide):
        raise low.refusal(
            f"convolution: expected at most {_MOST_TAPS} taps, padding below the kernel, got {tuple(kernel)}, {pad}"
        )
    # The weight of the convolution that this is, or whose gradient to the input it is: [out, in, kh, kw].
    kh, kw = (*kernel, 1)[:2]
    return x, shape, Slot(name, (kh, kw, second, first), (first, second, kh, kw), (2, 3, 1, 0)), step, pad


def _bias(low: Lowering, product: int, bias: Any) -> None:
    if bias is not None:
        inert = isinstance(bias, Parameter) and bias.detached
        vector = low.vector(low.parameter(Parameter(bias.name) if inert else bias))
        low.step(Bias, (product,), low.shapes[product], vector, inert)


# Pools ---------------------------------------------------------------------------------------------------------------


@rule(F.max_pool1d, torch.max_pool1d, F.max_pool2d, torch.max_pool2d, takes=_POOLS)
def _max_pool(
    low: Lowering,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> None:
    axes = len(low.shape) - 1
    if ceil_mode or return_indices or set(_sides(dilation, axes)) != {1}:
        raise low.refusal("max-pooling: expected no dilation, no positions, floor")
    if math.prod(_sides(kernel_size, axes)) > MOST_PIXELS:
        raise low.refusal(f"max-pooling: expected windows of at most {MOST_PIXELS} pixels, got {kernel_size}")
    _pool(low, MaxPool, input, kernel_size, stride, padding)


@rule(F.avg_pool1d, torch.avg_pool1d, F.avg_pool2d, takes=_POOLS)
def _avg_pool(
    low: Lowering,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: Any = None,
) -> None:
    if divisor_override is not None:
        raise low.refusal("average pooling: expected no divisor_override")
    if ceil_mode or (any(_sides(padding, 2)) and not count_include_pad):
        raise low.refusal("average pooling: expected floor, padding that counts")
    _pool(low, AveragePool, input, kernel_size, stride, padding)


def _pool(low: Lowering, kind: type[Step], input: Any, kernel_size: Any, stride: Any, padding: Any) -> None:
    """Adds a pool of images, or of sequences, which are images of width 1."""
    axes = len(low.shape) - 1
    x, shape = low.images(input, axes=(1 + axes,))
    stride = kernel_size if stride is None or stride == [] else stride
    kernel, steps, pads = (
        (*_sides(v, axes), beside)[:2] for v, beside in ((kernel_size, 1), (stride, 1), (padding, 0))
    )
    sizes = [
        (s + 2 * p - k) // step + 1 for s, p, k, step in zip(shape[:2], pads, kernel, steps, strict=True)
    ]
    low.step(kind, (x,), (*sizes, shape[2]), (*kernel, *steps, *pads))


@rule(
    F.adaptive_avg_pool1d, torch.adaptive_avg_pool1d, F.adaptive_avg_pool2d, takes="to a divisor of the size"
)
def _adaptive_avg_pool(low: Lowering, input: Any, output_size: Any) -> None:
    axes = len(low.shape) - 1
    x, shape = low.images(input, axes=(1 + axes,))
    sizes = [s if n is None else n for n, s in zip((*_sides(output_size, axes), 1)[:2], shape, strict=False)]
    if any(s % n for s, n in zip(shape, sizes, strict=False)):
        raise low.refusal(f"adaptive average pooling: expected a divisor of {shape[:2]}, got {output_size!r}")
    sides = tuple(s // n for s, n in zip(shape, sizes, strict=False))
    low.step(AveragePool, (x,), (*sizes, shape[2]), (*sides, *sides, 0, 0))


@rule(torch.mean, Tensor.mean, takes="over height and width, or over the length of a sequence")
def _mean(low: Lowering, input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> None:
    x, shape = low.images(input)
    if not isinstance(dim, (tuple, list)) or sorted(d % 4 for d in dim) != [2, 3] or dtype is not None:
        raise low.refusal(f"mean: expected height and width (dim=(2, 3)), got dim={dim!r}")
    sides = shape[:2]
    window = (*sides, *sides, 0, 0)
    low.step(AveragePool, (x,), (1, 1, shape[2]) if keepdim else (shape[2],), window)
