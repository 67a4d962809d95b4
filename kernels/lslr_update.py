"""The LSLR update and its derivatives over a flat buffer [tasks, P], on a GPU.

Arguments and formulas are those of ``mamlpp_fast.ops.lslr_update``. A program serves one piece of at most BLOCK
elements of one segment for one task, and finds it in the offsets itself, so the host need not read them; programs
beyond the last piece do nothing. Sums over a segment are left piece by piece and added up in a fixed order by the last
piece of a segment. With one rate an element (EACH) a piece is any BLOCK elements, and sums over tasks are a loop in its
program.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    TYPE_NAMES,
    Configuration,
    accumulator,
    aligned,
    argument_types,
    counters,
    last_piece,
    launch_options,
)

_BLOCK = 1024
_WARPS = 4
_SEGMENTS = (64, 512)
"""Sizes the table of segments is padded to."""

_SIZES = ["P", "L", "K", "step", "S", "T"]


@triton.jit
def _pieces(offsets_ptr, L, BLOCK: tl.constexpr, BL: tl.constexpr):
    """Where segments begin and end, and how many pieces each has [BL]."""
    index = tl.arange(0, BL)
    begins = tl.load(offsets_ptr + index, mask=index < L, other=0).to(tl.int32)
    ends = tl.load(offsets_ptr + index + 1, mask=index < L, other=0).to(tl.int32)
    return begins, ends, (ends - begins + BLOCK - 1) // BLOCK


@triton.jit
def _find(offsets_ptr, P, L, BLOCK: tl.constexpr, BL: tl.constexpr, EACH: tl.constexpr):
    """Segment of this program's piece, its elements in a task's buffer, where they lie, and which of them are there.

    None is, of a piece beyond the last.
    """
    piece = tl.program_id(0)
    task = tl.program_id(1)
    if EACH:
        segment = piece * 0
        begin = piece * BLOCK
        stop = P
    else:
        begins, ends, counts = _pieces(offsets_ptr, L, BLOCK, BL)
        index = tl.arange(0, BL)
        segment = tl.sum((tl.cumsum(counts, 0) <= piece).to(tl.int32), 0)
        before = tl.sum(tl.where(index < segment, counts, 0), 0)
        begin = tl.sum(tl.where(index == segment, begins, 0), 0) + (piece - before) * BLOCK
        stop = tl.sum(tl.where(index == segment, ends, 0), 0)
    i = begin + tl.arange(0, BLOCK)
    valid = i < stop
    return segment, i, task.to(tl.int64) * P + i, valid


@triton.jit
def _rate(rates_ptr, segment, i, valid, P, L, K, step, EACH: tl.constexpr):
    if EACH:
        rate = tl.load(rates_ptr + step * P + i, mask=valid, other=0.0)
    else:
        rate = tl.load(rates_ptr + segment * K + step, mask=segment < L, other=0.0)
    return rate


@triton.jit(do_not_specialize=_SIZES)
def _update(theta_ptr, grad_ptr, rates_ptr, offsets_ptr, out_ptr, P, L, K, step, ACC: tl.constexpr,
            BLOCK: tl.constexpr, BL: tl.constexpr, EACH: tl.constexpr):  # fmt: skip
    segment, i, at, valid = _find(offsets_ptr, P, L, BLOCK, BL, EACH)
    rate = _rate(rates_ptr, segment, i, valid, P, L, K, step, EACH)
    theta = tl.load(theta_ptr + at, mask=valid, other=0.0).to(ACC)
    grad = tl.load(grad_ptr + at, mask=valid, other=0.0).to(ACC)
    tl.store(out_ptr + at, theta - rate * grad, mask=valid)


@triton.jit
def _leave(part_ptr, counter_ptr, offsets_ptr, grates_ptr, value, segment, L, K, step, S, T, ACC: tl.constexpr,
           BLOCK: tl.constexpr, BL: tl.constexpr):  # fmt: skip
    """Leaves a piece's part of the gradient of its rate; the last of a segment adds up all, task after task."""
    tl.store(part_ptr + tl.program_id(1) * S + tl.program_id(0), value)
    _, _, counts = _pieces(offsets_ptr, L, BLOCK, BL)
    index = tl.arange(0, BL)
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(grates_ptr + index * K + step, tl.zeros([BL], ACC), mask=(index < L) & (counts == 0))
    if segment < L:
        first = tl.sum(tl.where(index < segment, counts, 0), 0)
        count = tl.sum(tl.where(index == segment, counts, 0), 0)
        if last_piece(counter_ptr + segment, count * T):
            total = tl.zeros([BL], ACC)
            for task in range(T):
                for start in range(0, count, BL):
                    piece = start + index
                    total += tl.load(
                        part_ptr + task * S + first + piece,
                        mask=piece < count,
                        other=0.0,
                        cache_modifier=".cg",
                    )
            tl.store(grates_ptr + segment * K + step, tl.sum(total, 0))


@triton.jit(do_not_specialize=_SIZES)
def _backward(gout_ptr, grad_ptr, rates_ptr, offsets_ptr, ggrad_ptr, part_ptr, counter_ptr, grates_ptr, P, L, K, step,
              S, T, ACC: tl.constexpr, BLOCK: tl.constexpr, BL: tl.constexpr):  # fmt: skip
    segment, i, at, valid = _find(offsets_ptr, P, L, BLOCK, BL, False)
    rate = _rate(rates_ptr, segment, i, valid, P, L, K, step, False)
    gout = tl.load(gout_ptr + at, mask=valid, other=0.0).to(ACC)
    grad = tl.load(grad_ptr + at, mask=valid, other=0.0).to(ACC)
    tl.store(ggrad_ptr + at, -rate * gout, mask=valid)
    total = -tl.sum(gout * grad, 0)
    _leave(part_ptr, counter_ptr, offsets_ptr, grates_ptr, total, segment, L, K, step, S, T, ACC, BLOCK, BL)


@triton.jit(do_not_specialize=_SIZES)
def _backward_each(gout_ptr, grad_ptr, rates_ptr, ggrad_ptr, grates_ptr, P, step, T, ACC: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < P
    row = step * P + i
    rate = tl.load(rates_ptr + row, mask=valid, other=0.0)
    total = tl.zeros([BLOCK], ACC)
    at = i.to(tl.int64)
    for _ in range(T):
        gout = tl.load(gout_ptr + at, mask=valid, other=0.0).to(ACC)
        total -= gout * tl.load(grad_ptr + at, mask=valid, other=0.0).to(ACC)
        tl.store(ggrad_ptr + at, -rate * gout, mask=valid)
        at += P
    tl.store(grates_ptr + row, total, mask=valid)


@triton.jit(do_not_specialize=_SIZES)
def _double_backward(a_ptr, b_ptr, gout_ptr, grad_ptr, rates_ptr, offsets_ptr, cgout_ptr, cgrad_ptr, part_ptr,
                     counter_ptr, grates_ptr, P, L, K, step, S, T, ACC: tl.constexpr, BLOCK: tl.constexpr,
                     BL: tl.constexpr):  # fmt: skip
    segment, i, at, valid = _find(offsets_ptr, P, L, BLOCK, BL, False)
    rate = _rate(rates_ptr, segment, i, valid, P, L, K, step, False)
    b = _rate(b_ptr, segment, i, valid, P, L, K, step, False)
    a = tl.load(a_ptr + at, mask=valid, other=0.0).to(ACC)
    gout = tl.load(gout_ptr + at, mask=valid, other=0.0).to(ACC)
    grad = tl.load(grad_ptr + at, mask=valid, other=0.0).to(ACC)
    tl.store(cgout_ptr + at, -rate * a - b * grad, mask=valid)
    tl.store(cgrad_ptr + at, -b * gout, mask=valid)
    total = -tl.sum(a * gout, 0)
    _leave(part_ptr, counter_ptr, offsets_ptr, grates_ptr, total, segment, L, K, step, S, T, ACC, BLOCK, BL)


@triton.jit(do_not_specialize=_SIZES)
def _double_backward_each(a_ptr, b_ptr, gout_ptr, grad_ptr, rates_ptr, cgout_ptr, cgrad_ptr, crates_ptr, P, step, T,
                          ACC: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < P
    row = step * P + i
    rate = tl.load(rates_ptr + row, mask=valid, other=0.0)
    b = tl.load(b_ptr + row, mask=valid, other=0.0)
    total = tl.zeros([BLOCK], ACC)
    at = i.to(tl.int64)
    for _ in range(T):
        a = tl.load(a_ptr + at, mask=valid, other=0.0).to(ACC)
        gout = tl.load(gout_ptr + at, mask=valid, other=0.0).to(ACC)
        grad = tl.load(grad_ptr + at, mask=valid, other=0.0).to(ACC)
        total -= a * gout
        tl.store(cgout_ptr + at, -rate * a - b * grad, mask=valid)
        tl.store(cgrad_ptr + at, -b * gout, mask=valid)
        at += P
    tl.store(crates_ptr + row, total, mask=valid)


class _Call:
    """Operands as the kernels take them, and the grid."""

    def __init__(self, data: list[Tensor], rows: list[Tensor], offsets: Tensor | None, step: int) -> None:
        dtype = torch.float32
        for tensor in (*data, *rows):
            dtype = torch.promote_types(dtype, tensor.dtype)
        self.dtype, self.acc = accumulator(dtype)
        kind = data[0].dtype if accumulator(data[0].dtype)[0] == self.dtype else self.dtype
        self.data = aligned(tensor.to(kind).contiguous() for tensor in data)
        self.rows = aligned(row.to(self.dtype).contiguous() for row in rows)
        self.shape, self.size = data[0].shape, data[0].shape[-1]
        self.tasks = data[0].shape[0] if data[0].dim() == 2 else 1
        self.each, self.step = offsets is None, step
        if self.size >= 2**31 or rows[0].numel() >= 2**31:
            raise ValueError(
                f"theta: expected fewer than 2**31 elements a task, got shape {tuple(self.shape)}"
            )
        self.segments = self.steps = 0
        self.pieces, self.table = triton.cdiv(self.size, _BLOCK), _SEGMENTS[0]
        if offsets is not None:
            self.segments, self.steps = rows[0].shape
            self.pieces = self.size // _BLOCK + self.segments
            if self.segments > _SEGMENTS[-1]:
                raise ValueError(f"offsets: expected at most {_SEGMENTS[-1]} segments, got {self.segments}")
            self.table = next(size for size in _SEGMENTS if size >= self.segments)
            (self.offsets,) = aligned([offsets.contiguous()])
        self.grid = (self.pieces, self.tasks)

    def empty(self, like: Tensor | None = None) -> Tensor:
        """A result for the kernels to write: `like` itself where that will do."""
        kind = self.data[0].dtype
        if like is not None and like.dtype == kind and like.is_contiguous() and like.data_ptr() % 16 == 0:
            return like
        return torch.empty(self.shape, dtype=kind, device=self.data[0].device)

    def constants(self) -> dict[str, Any]:
        return {"ACC": self.acc, "BLOCK": _BLOCK, **launch_options(_WARPS)}

    def reduce(
        self, kernel: Any, kernel_each: Any, operands: list[Tensor], outputs: list[Tensor], grates: Tensor
    ) -> None:
        """Runs a kernel that leaves a gradient of rates, whose entries of this step go to `grates`."""
        if self.size == 0 or self.tasks == 0:
            step = grates if grates.dim() == 1 else grates.select(1 if not self.each else 0, self.step)
            step.zero_()
            return
        target = grates
        if grates.dtype != self.dtype or not grates.is_contiguous() or grates.data_ptr() % 16:
            target = grates.to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        if self.each:
            kernel_each[(self.pieces,)](
                *operands, *outputs, target, self.size, self.step, self.tasks, **self.constants()
            )
        else:
            part = torch.empty(self.tasks, self.pieces, dtype=self.dtype, device=operands[0].device)
            counts = counters(target, self.segments)
            cut = (self.segments, self.steps, self.step, self.pieces, self.tasks)
            kernel[self.grid](
                *operands, self.offsets, *outputs, part, counts, target, self.size, *cut, **self.constants(),
                BL=self.table,
            )  # fmt: skip
        if target is not grates:
            grates.copy_(target)


def update_out(
    theta: Tensor, grad: Tensor, rates: Tensor, offsets: Tensor | None, step: int, out: Tensor
) -> None:
    """Writes ``theta - rate * grad`` into `out`."""
    call = _Call([theta, grad], [rates], offsets, step)
    target = call.empty(out)
    if call.size and call.tasks:
        _update[call.grid](
            *call.data, *call.rows, call.rows[0] if call.each else call.offsets, target, call.size, call.segments,
            call.steps, step, **call.constants(), BL=call.table, EACH=call.each,
        )  # fmt: skip
    if target is not out:
        out.copy_(target)


def backward_out(
    gout: Tensor, grad: Tensor, rates: Tensor, offsets: Tensor | None, step: int, ggrad: Tensor, grates: Tensor,
) -> None:  # fmt: skip
    """Writes ``-rate * gout`` into `ggrad` and the sums of ``-gout * grad`` into this step's entries of `grates`."""
    call = _Call([gout, grad], [rates], offsets, step)
    target = call.empty(ggrad)
    call.reduce(_backward, _backward_each, [*call.data, *call.rows], [target], grates)
    if target is not ggrad:
        ggrad.copy_(target)


def double_backward(
    a: Tensor, b: Tensor, gout: Tensor, grad: Tensor, rates: Tensor, offsets: Tensor | None, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `backward_out` with respect to gout, grad and rates for cotangents a and b of its results."""
    call = _Call([a, gout, grad], [b, rates], offsets, step)
    cgout, cgrad, crates = call.empty(), call.empty(), rates.new_zeros(rates.shape)
    operands = [call.data[0], call.rows[0], *call.data[1:], call.rows[1]]
    call.reduce(_double_backward, _double_backward_each, operands, [cgout, cgrad], crates)
    return cgout.to(gout.dtype), cgrad.to(grad.dtype), crates


def launch_configurations() -> Iterator[Configuration]:
    """Everything the functions above can launch."""
    for dtype, table in itertools.product(TYPE_NAMES, _SEGMENTS):
        common = {"ACC": accumulator(dtype)[1], "BLOCK": _BLOCK}
        for kernel in (_update, _backward, _double_backward):
            each = {"EACH": False} if kernel is _update else {}
            yield _configuration(f"{table} segments", kernel, dtype, {**common, "BL": table, **each})
    for dtype in TYPE_NAMES:
        common = {"ACC": accumulator(dtype)[1], "BLOCK": _BLOCK}
        yield _configuration("each", _update, dtype, {**common, "BL": _SEGMENTS[0], "EACH": True})
        for kernel in (_backward_each, _double_backward_each):
            yield _configuration("each", kernel, dtype, common)


def _configuration(label: str, kernel: Any, dtype: torch.dtype, constants: dict[str, Any]) -> Configuration:
    wide = ["rates_ptr", "b_ptr", "part_ptr", "grates_ptr", "crates_ptr"]
    if constants.get("EACH", False):
        wide.append("offsets_ptr")  # not read with one rate an element: the rates stand in
    types = argument_types(kernel, constants, dtype, dict.fromkeys(wide, accumulator(dtype)[0]))
    text = f"{kernel.__name__[1:]} {label} {TYPE_NAMES[dtype]}"
    return Configuration(text, kernel, types, constants, _WARPS)
