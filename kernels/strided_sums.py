"""``strided_sums`` of ``mamlpp_fast.ops`` on a GPU: one launch for each pair of types, whatever the number of tensors.

What is to be moved is written down in a table on the device, a row a tensor: addresses, counts, sizes and strides. A
program serves BLOCK elements of one of them, and finds its row by the number of its first program. Tables are kept for
good, as captured graphs read them: some hundred bytes for each set of addresses that was ever moved.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamlpp_fast.ops.strided_sums import sum_into

from ._launch import TYPE_NAMES, Configuration, launch_options

_TYPES = {torch.float64: tl.float64, torch.float32: tl.float32}
_AXES = 5
"""Axes of a result, those that lie behind each other in both tensors taken as one."""
_COLUMNS = 8 + 3 * _AXES
_ROWS = (64, 512)
"""Sizes the table is padded to."""
_BLOCK = 256
_WARPS = 4


@triton.jit(do_not_specialize=["rows"])
def _sums(table_ptr, scales_ptr, rows, SOURCE: tl.constexpr, TARGET: tl.constexpr, AXES: tl.constexpr,
          BM: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Columns of the table: first program, elements, both addresses, count and stride of two axes that are summed over,
    then size, source's and target's stride of AXES axes, the innermost first."""
    columns: tl.constexpr = 8 + 3 * AXES
    program = tl.program_id(0)
    index = tl.arange(0, BM)
    firsts = tl.load(table_ptr + index * columns, mask=index < rows, other=2**31)
    row = tl.sum((firsts <= program).to(tl.int32), 0) - 1
    scale = tl.load(scales_ptr + row)
    table_ptr += row * columns
    i = ((program - tl.load(table_ptr)) * BLOCK + tl.arange(0, BLOCK)).to(tl.int32)
    valid = i < tl.load(table_ptr + 1)
    source = tl.load(table_ptr + 2).to(tl.pointer_type(SOURCE))
    target = tl.load(table_ptr + 3).to(tl.pointer_type(TARGET))
    outer = tl.load(table_ptr + 4).to(tl.int32)
    outer_stride = tl.load(table_ptr + 5)
    inner = tl.load(table_ptr + 6).to(tl.int32)
    inner_stride = tl.load(table_ptr + 7)
    source_at = tl.zeros([BLOCK], tl.int64)
    target_at = tl.zeros([BLOCK], tl.int64)
    for axis in tl.static_range(AXES):
        size = tl.load(table_ptr + 8 + 3 * axis).to(tl.int32)
        place = (i % size).to(tl.int64)
        i = i // size
        source_at += place * tl.load(table_ptr + 9 + 3 * axis)
        target_at += place * tl.load(table_ptr + 10 + 3 * axis)
    # The first is no term of a sum with 0, so that what is copied keeps its bits.
    total = tl.load(source + source_at, mask=valid, other=0.0).to(tl.float64)
    for term in range(1, outer * inner):
        shift = (term // inner) * outer_stride + (term % inner) * inner_stride
        total += tl.load(source + source_at + shift, mask=valid, other=0.0).to(tl.float64)
    tl.store(target + target_at, (total * scale).to(TARGET), mask=valid)


_Row = tuple[int, ...]
_tables: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}


def _merged(axes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Axes (size, *strides), outermost first; neighbours that are one in all tensors become one."""
    found: list[tuple[int, ...]] = []
    for size, *strides in (axis for axis in axes if axis[0] != 1):
        if found and all(outer == size * inner for outer, inner in zip(found[-1][1:], strides, strict=True)):
            size *= found.pop()[0]
        found.append((size, *strides))
    return found


def _row(out: Tensor, terms: Tensor, first: int) -> _Row | None:
    """A row of the table; None for what has too many axes."""
    lead = terms.dim() - out.dim()
    summed = _merged(list(zip(terms.shape[:lead], terms.stride()[:lead], strict=True)))
    axes = sorted(zip(out.shape, terms.stride()[lead:], out.stride(), strict=True), key=lambda axis: -axis[2])
    kept = _merged([tuple(axis) for axis in axes])
    if len(summed) > 2 or len(kept) > _AXES or out.numel() >= 2**31:
        return None
    summed = [(1, 0)] * (2 - len(summed)) + summed
    kept = kept[::-1] + [(1, 0, 0)] * (_AXES - len(kept))
    addresses = terms.data_ptr(), out.data_ptr()
    return first, out.numel(), *addresses, *itertools.chain(*summed), *itertools.chain(*kept)


def sums(outs: Sequence[Tensor], terms: Sequence[Tensor], scales: Sequence[float]) -> None:
    """``strided_sums``; other types than float32 and float64, and more axes, one after the other in PyTorch."""
    groups: dict[tuple[torch.dtype, torch.dtype], list[tuple[_Row, float]]] = {}
    ends: dict[tuple[torch.dtype, torch.dtype], int] = {}
    for out, term, scale in zip(outs, terms, scales, strict=True):
        if out.numel() == 0:
            continue
        kinds = term.dtype, out.dtype
        row = None
        if set(kinds) <= _TYPES.keys() and term.numel():
            rows = groups.setdefault(kinds, [])
            if len(rows) == _ROWS[-1]:
                _launch(kinds, rows, ends.pop(kinds), out.device)
                rows.clear()
            row = _row(out, term, ends.get(kinds, 0))
        if row is None:
            sum_into(out, term, scale)
            continue
        groups[kinds].append((row, scale))
        ends[kinds] = row[0] + triton.cdiv(out.numel(), _BLOCK)
    for kinds, rows in groups.items():
        if rows:
            _launch(kinds, rows, ends[kinds], outs[0].device)


def _launch(
    kinds: tuple[torch.dtype, torch.dtype],
    rows: list[tuple[_Row, float]],
    programs: int,
    device: torch.device,
) -> None:
    key = (device, *rows)
    if key not in _tables:
        # A capture would end here, as it may not wait for the host: what is captured has been run before.
        table = torch.tensor([row for row, _ in rows], dtype=torch.int64)
        scales = torch.tensor([scale for _, scale in rows], dtype=torch.float64)
        _tables[key] = table.to(device), scales.to(device)
    table, scales = _tables[key]
    _sums[(programs,)](table, scales, len(rows), **_constants(kinds, len(rows)), **launch_options(_WARPS))


def _constants(kinds: tuple[torch.dtype, torch.dtype], rows: int) -> dict[str, object]:
    size = next(size for size in _ROWS if size >= rows)
    source, target = (_TYPES[kind] for kind in kinds)
    return {"SOURCE": source, "TARGET": target, "AXES": _AXES, "BM": size, "BLOCK": _BLOCK}


def launch_configurations() -> Iterator[Configuration]:
    """Everything a call can launch: both types on both sides, two sizes of tables."""
    types = {"table_ptr": "*i64", "scales_ptr": "*fp64", "rows": "i32"}
    for source, target, size in itertools.product(_TYPES, _TYPES, _ROWS):
        label = f"sums in fp64 {TYPE_NAMES[source]} -> {TYPE_NAMES[target]}, {size} tensors"
        constants = _constants((source, target), size)
        yield Configuration(label, _sums, types, constants, _WARPS)
