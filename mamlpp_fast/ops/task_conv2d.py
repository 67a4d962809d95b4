"""Convolutions of a batch of tasks, each task with weights of its own.

``task_conv2d`` is ``F.conv2d`` of each task, ``_to_input`` and ``_to_weight`` are its gradients for a gradient g of the
result, the latter summed over a task's images; ``_gradients`` is both, for a GPU's fewer launches;
``_shared`` is either for tasks of several roles on the same weights. Every op may take a
second operand pair whose product is added in the same accumulator (the pairs of derivation
``docs/derivations/task_conv2d.md``), writes into ``out`` and returns nothing.
All tensors are contiguous:
    x: activations [T, N, H, W, Ci]; w: weights [T, kh, kw, Ci, Co], at most 49 taps in the native kernels.
    g, and the result: [T, N, Ho, Wo, Co], Ho = (H + 2·padding - kh) // stride + 1.
    x2, w2, g2: the second pair, of the same shapes, or None.
    out (gx like x and gw like w): what the op computes, overwritten; float32 where the operands are bfloat16.
An axis along which the kernel
is one pixel is not padded, so that sequences [T, N, L, 1, C] have kernels [T, k, 1, Ci, Co].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad as conv_grad

from mamlpp_fast import _native
from mamlpp_fast.ops._library import Shared, define, launcher


def output_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Pixels of the output along one axis of `size` pixels."""
    return (size + 2 * padding - kernel) // stride + 1


def pads(w: Tensor, padding: int) -> tuple[int, int]:
    """Padding above and below, left and right, of a convolution by `w` [..., kh, kw, Ci, Co]."""
    kh, kw = w.shape[-4:-2]
    return padding if kh > 1 else 0, padding if kw > 1 else 0


def pays_in_bfloat16(
    images: int, size: tuple[int, int], w: tuple[int, ...], stride: int, padding: int
) -> bool:
    """Whether a CPU takes a layer's three products sooner of operands rounded to bfloat16 than of float32 ones.

    Rounding them counts. Always where AMX tiles multiply them; by AVX512-BF16 where that saves more than Winograd's
    forms do, which are float32 alone; nowhere else, as bfloat16 would only be widened again.

    Args:
        images: N, of a task.
        size: height and width of the input.
        w: shape of a task's weights, [kh, kw, Ci, Co].
        stride, padding: as for ``task_conv2d``.
    """
    if not _native.status().loaded:
        return False
    kh, kw, ci, co = w
    pays = torch.ops.mamlpp_fast.task_conv2d_pays_in_bfloat16
    return bool(pays(images, size, ci, (kh, kw), co, stride, padding))


def _check(
    activation: str, weight: str, result: str, *, stride: int, padding: int, **named: Tensor | None
) -> None:
    """Raises unless result [T,N,Ho,Wo,Co] is the shape of activation [T,N,H,W,Ci] * weight [T,kh,kw,Ci,Co]."""
    x, w, y = named[activation], named[weight], named[result]
    assert x is not None and w is not None and y is not None
    if x.dim() != 5 or w.dim() != 5 or y.dim() != 5:
        raise ValueError(
            "task_conv2d: expected activations [T,N,H,W,C] and weights [T,kh,kw,Ci,Co], "
            f"got {tuple(x.shape)}, {tuple(w.shape)} and {tuple(y.shape)}"
        )
    tasks, images, height, width, channels = x.shape
    kh, kw = w.shape[1:3]
    pad_y, pad_x = pads(w, padding)
    if stride < 1 or padding < 0 or pad_y >= kh or pad_x >= kw or padding >= max(kh, kw):
        raise ValueError(
            f"stride, padding: expected stride >= 1, 0 <= padding < kernel, got {stride}, {padding}"
        )
    size = (output_size(height, kh, stride, pad_y), output_size(width, kw, stride, pad_x))
    expected = (tasks, images, *size, w.shape[4])
    if w.shape[0] != tasks or w.shape[3] != channels or tuple(y.shape) != expected:
        raise ValueError(
            f"task_conv2d: expected output {expected} of {tuple(x.shape)} and {tuple(w.shape)}, got {tuple(y.shape)}"
        )
    second = {name: t for name, t in named.items() if name.endswith("2") and t is not None}
    if len(second) == 1:
        raise ValueError("second operand pair: expected both tensors or neither, got one")
    for name, tensor in second.items():
        first = named[name[:-1]]
        if first is None or tensor.shape != first.shape:
            raise ValueError(
                f"second operand pair: expected the shape of {name[:-1]}, got {name} {tuple(tensor.shape)}"
            )


def _images(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _filters(w: Tensor) -> Tensor:
    return w.permute(3, 2, 0, 1)


def _closed(
    order: tuple[int, int, int, int], product: Callable[[Tensor, Tensor, Tensor, int, int], Tensor]
) -> Callable[..., None]:
    """The sum of the pairs' products, task by task in the type of `out`, which has their axes in this order."""

    def closed(
        a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None, stride: int, padding: int, out: Tensor
    ) -> None:
        pairs = [(a, b)] if a2 is None or b2 is None else [(a, b), (a2, b2)]
        for task in range(out.shape[0]):
            result = out[task]  # no view of `unbind`, into which nothing may be written
            terms = [
                product(a[task].to(out.dtype), b[task].to(out.dtype), result, stride, padding)
                for a, b in pairs
            ]
            result.copy_(torch.stack(terms).sum(0).permute(order))

    return closed


_forward = _closed(
    (0, 2, 3, 1),
    lambda x, w, _, stride, padding: F.conv2d(_images(x), _filters(w), None, stride, pads(w, padding)),
)
_to_input = _closed(
    (0, 2, 3, 1),
    lambda g, w, gx, stride, padding: conv_grad.conv2d_input(
        _images(gx).shape, _filters(w), _images(g), stride, pads(w, padding)
    ),
)
_to_weight = _closed(
    (2, 3, 1, 0),
    lambda x, g, gw, stride, padding: conv_grad.conv2d_weight(
        _images(x), _filters(gw).shape, _images(g), stride, pads(gw, padding)
    ),
)


def _gradients(
    x: Tensor, w: Tensor, g: Tensor, x2: Tensor | None, w2: Tensor | None, g2: Tensor | None, stride: int, padding: int,
    gx: Tensor, gw: Tensor,
) -> None:  # fmt: skip
    _to_input(g, w, g2, w2, stride, padding, gx)
    _to_weight(x, g, x2, g2, stride, padding, gw)


def _check_gradients(*, gx: Tensor, gw: Tensor, stride: int, padding: int, **named: Tensor | None) -> None:
    """Raises unless the operands belong together, as for the products they are of, and the results are like them."""
    _check("x", "w", "g", stride=stride, padding=padding, **named)
    if len({t is None for name, t in named.items() if name.endswith("2")}) > 1:
        raise ValueError("second operands: expected all three or none, got two")
    for name, result, like in (("gx", gx, named["x"]), ("gw", gw, named["w"])):
        assert like is not None
        if result.shape != like.shape:
            raise ValueError(f"{name}: expected the shape {tuple(like.shape)}, got {tuple(result.shape)}")


_SHARED = Shared(frozenset({"w", "w2"}), {"gw": 5})
for _order, _first, _second, _roles, _fallback, _shared in (
    ("", "x", "w", ("x", "w", "out"), _forward, _SHARED),
    ("_to_input", "g", "w", ("out", "w", "g"), _to_input, None),
    ("_to_weight", "x", "g", ("x", "out", "g"), _to_weight, None),
):
    define(
        f"task_conv2d{_order}(Tensor {_first}, Tensor {_second}, Tensor? {_first}2, Tensor? {_second}2, "
        "int stride, int padding, Tensor(a!) out) -> ()",
        fallback=_fallback,
        triton=launcher("task_conv2d", _order[1:] or "forward"),
        check=partial(_check, *_roles),
        shared=_shared,
    )
define(
    "task_conv2d_gradients(Tensor x, Tensor w, Tensor g, Tensor? x2, Tensor? w2, Tensor? g2, int stride, int padding, "
    "Tensor(a!) gx, Tensor(b!) gw) -> ()",
    fallback=_gradients,
    triton=launcher("task_conv2d", "gradients"),
    check=_check_gradients,
    shared=_SHARED,
)
