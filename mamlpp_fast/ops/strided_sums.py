"""Many small tensors copied or summed, scaled and written elsewhere in one call: what a GPU does in one launch.

``outs[i] = scales[i] · Σ terms[i]`` over the leading axes that ``terms[i]`` has more than ``outs[i]``; without any, a
copy. Parameters come into a program's layouts that way, and the sums over tasks out of it. Strides are any; where the
terms' are zero (``expand``), one number fills a tensor. Sums are float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mamlpp_fast.ops._library import define, launcher

__all__ = ["sum_into"]


def sum_into(out: Tensor, terms: Tensor, scale: float) -> None:
    """One of the sums, in PyTorch."""
    axes = list(range(terms.dim() - out.dim()))
    if not axes and scale == 1:
        out.copy_(terms)
        return
    total = terms.double()
    out.copy_((total.sum(axes) if axes else total) * scale)


def _check(outs: Sequence[Tensor], terms: Sequence[Tensor], scales: Sequence[float]) -> None:
    if not len(outs) == len(terms) == len(scales):
        raise ValueError(
            f"strided_sums: expected as many terms and scales as outs, got {len(outs)}, {len(terms)}, {len(scales)}"
        )
    for out, term in zip(outs, terms, strict=True):
        if term.dim() < out.dim() or term.shape[term.dim() - out.dim() :] != out.shape:
            raise ValueError(f"terms: expected [..., {tuple(out.shape)}], got {tuple(term.shape)}")


def _closed(outs: Sequence[Tensor], terms: Sequence[Tensor], scales: Sequence[float]) -> None:
    for out, term, scale in zip(outs, terms, scales, strict=True):
        sum_into(out, term, scale)


define(
    "strided_sums(Tensor(a!)[] outs, Tensor[] terms, float[] scales) -> ()",
    fallback=_closed,
    fake=_check,
    triton=launcher("strided_sums", "sums"),
    check=_check,
)
