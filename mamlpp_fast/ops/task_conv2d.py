"""Convolutions of a batch of tasks, each task with weights of its own.

Activations are channels-last, ``[tasks, images, height, width, channels]``; weights are ``[tasks, kh, kw, in, out]``.
Every op may take a second operand pair whose product is added in the same accumulator (the pairs of
derivation ``docs/derivations/task_conv2d.md``), writes into ``out`` and returns nothing. An axis along which the kernel
is one pixel is not padded, so that sequences [T, N, L, 1, C] have kernels [T, k, 1, Ci, Co].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad as conv_grad

from mamlpp_fast.ops._library import define, launcher

_FORWARD = "task_conv2d"
_TO_INPUT = "task_conv2d_to_input"
_TO_WEIGHT = "task_conv2d_to_weight"


def output_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Pixels of the output along one axis of `size` pixels."""
    return (size + 2 * padding - kernel) // stride + 1


def pads(w: Tensor, padding: int) -> tuple[int, int]:
    """Padding above and below, left and right, of a convolution by `w` [T, kh, kw, Ci, Co]."""
    kh, kw = w.shape[1:3]
    return padding if kh > 1 else 0, padding if kw > 1 else 0


def _pairs(a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    if (a2 is None) != (b2 is None):
        raise ValueError("second operand pair: expected both tensors or neither, got one")
    if a2 is None or b2 is None:
        return [(a, b)]
    if a2.shape != a.shape or b2.shape != b.shape:
        raise ValueError(
            f"second operand pair: expected shapes {tuple(a.shape)} and {tuple(b.shape)}, "
            f"got {tuple(a2.shape)} and {tuple(b2.shape)}"
        )
    return [(a, b), (a2, b2)]


def _check(activation: Tensor, weight: Tensor, result: Tensor, stride: int, padding: int) -> None:
    """Raises unless result [T,N,Ho,Wo,Co] is the shape of activation [T,N,H,W,Ci] * weight [T,kh,kw,Ci,Co]."""
    if activation.dim() != 5 or weight.dim() != 5 or result.dim() != 5:
        raise ValueError(
            "task_conv2d: expected activations [T,N,H,W,C] and weights [T,kh,kw,Ci,Co], "
            f"got {tuple(activation.shape)}, {tuple(weight.shape)} and {tuple(result.shape)}"
        )
    tasks, images, height, width, channels = activation.shape
    kh, kw = weight.shape[1:3]
    pad_y, pad_x = pads(weight, padding)
    if stride < 1 or padding < 0 or pad_y >= kh or pad_x >= kw or padding >= max(kh, kw):
        raise ValueError(
            f"stride, padding: expected stride >= 1, 0 <= padding < kernel, got {stride}, {padding}"
        )
    expected = (
        tasks,
        images,
        output_size(height, kh, stride, pad_y),
        output_size(width, kw, stride, pad_x),
        weight.shape[4],
    )
    if weight.shape[0] != tasks or weight.shape[3] != channels or tuple(result.shape) != expected:
        raise ValueError(
            f"task_conv2d: expected output {expected} of {tuple(activation.shape)} and {tuple(weight.shape)}, "
            f"got {tuple(result.shape)}"
        )


def _images(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _filters(w: Tensor) -> Tensor:
    return w.permute(3, 2, 0, 1)


def _forward(
    x: Tensor, w: Tensor, x2: Tensor | None, w2: Tensor | None, stride: int, padding: int, out: Tensor
) -> None:
    _check(x, w, out, stride, padding)
    pairs = _pairs(x, w, x2, w2)
    for task in range(x.shape[0]):
        terms = [
            F.conv2d(
                _images(a[task]).to(out.dtype),
                _filters(b[task]).to(out.dtype),
                None,
                stride,
                pads(w, padding),
            )
            for a, b in pairs
        ]
        out[task].copy_(torch.stack(terms).sum(0).permute(0, 2, 3, 1))


def _to_input(
    g: Tensor, w: Tensor, g2: Tensor | None, w2: Tensor | None, stride: int, padding: int, out: Tensor
) -> None:
    _check(out, w, g, stride, padding)
    pairs = _pairs(g, w, g2, w2)
    size = _images(out[0]).shape
    for task in range(g.shape[0]):
        terms = [
            conv_grad.conv2d_input(
                size,
                _filters(b[task]).to(out.dtype),
                _images(a[task]).to(out.dtype),
                stride,
                pads(w, padding),
            )
            for a, b in pairs
        ]
        out[task].copy_(torch.stack(terms).sum(0).permute(0, 2, 3, 1))


def _to_weight(
    x: Tensor, g: Tensor, x2: Tensor | None, g2: Tensor | None, stride: int, padding: int, out: Tensor
) -> None:
    _check(x, out, g, stride, padding)
    pairs = _pairs(x, g, x2, g2)
    size = _filters(out[0]).shape
    for task in range(x.shape[0]):
        terms = [
            conv_grad.conv2d_weight(
                _images(a[task]).to(out.dtype),
                size,
                _images(b[task]).to(out.dtype),
                stride,
                pads(out, padding),
            )
            for a, b in pairs
        ]
        out[task].copy_(torch.stack(terms).sum(0).permute(2, 3, 1, 0))


def _fake(
    a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None, stride: int, padding: int, out: Tensor
) -> None:
    return None


define(
    f"{_FORWARD}(Tensor x, Tensor w, Tensor? x2, Tensor? w2, int stride, int padding, Tensor(a!) out) -> ()",
    fallback=_forward,
    fake=_fake,
    triton=launcher("task_conv2d", "forward"),
)
define(
    f"{_TO_INPUT}(Tensor g, Tensor w, Tensor? g2, Tensor? w2, int stride, int padding, Tensor(a!) out) -> ()",
    fallback=_to_input,
    fake=_fake,
    triton=launcher("task_conv2d", "to_input"),
)
define(
    f"{_TO_WEIGHT}(Tensor x, Tensor g, Tensor? x2, Tensor? g2, int stride, int padding, Tensor(a!) out) -> ()",
    fallback=_to_weight,
    fake=_fake,
    triton=launcher("task_conv2d", "to_weight"),
)


def task_conv2d(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    padding: int = 1,
    second: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Convolves the images of every task with that task's own weights.

    Equivalent to ``F.conv2d`` of each task, summed over the operand pairs.

    Args:
        x: activations [T, N, H, W, Ci], contiguous.
        w: weights [T, kh, kw, Ci, Co], contiguous; at most 49 taps in the native kernels.
        out: result [T, N, Ho, Wo, Co], contiguous, overwritten.
        stride, padding: of both axes.
        second: another (x, w) of the same shapes whose convolution is added.

    Returns:
        `out`.

    Raises:
        ValueError: shapes do not belong together.
    """
    x2, w2 = second if second is not None else (None, None)
    torch.ops.mamlpp_fast.task_conv2d(x, w, x2, w2, stride, padding, out)
    return out


def task_conv2d_to_input(
    g: Tensor,
    w: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    padding: int = 1,
    second: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Gradient of `task_conv2d` with respect to its activations.

    Args:
        g: gradient of the result [T, N, Ho, Wo, Co], contiguous.
        w: weights [T, kh, kw, Ci, Co], contiguous.
        out: gradient of the activations [T, N, H, W, Ci], contiguous, overwritten.
        stride, padding: of the forward convolution.
        second: another (g, w) of the same shapes whose product is added.

    Returns:
        `out`.

    Raises:
        ValueError: shapes do not belong together.
    """
    g2, w2 = second if second is not None else (None, None)
    torch.ops.mamlpp_fast.task_conv2d_to_input(g, w, g2, w2, stride, padding, out)
    return out


def task_conv2d_to_weight(
    x: Tensor,
    g: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    padding: int = 1,
    second: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Gradient of `task_conv2d` with respect to its weights, summed over a task's images.

    Args:
        x: activations [T, N, H, W, Ci], contiguous.
        g: gradient of the result [T, N, Ho, Wo, Co], contiguous.
        out: gradient of the weights [T, kh, kw, Ci, Co], contiguous, overwritten.
        stride, padding: of the forward convolution.
        second: another (x, g) of the same shapes whose product is added.

    Returns:
        `out`.

    Raises:
        ValueError: shapes do not belong together.
    """
    x2, g2 = second if second is not None else (None, None)
    torch.ops.mamlpp_fast.task_conv2d_to_weight(x, g, x2, g2, stride, padding, out)
    return out
