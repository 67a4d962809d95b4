"""What the kernel modules share: the description of a launch and the types and hints behind it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TYPE_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Triton's names of the element types the kernels take."""

ROWS = [
    f"{n}_ptr"
    for n in ("mean", "rstd", "gamma", "beta", "ggamma", "gbeta", "r", "t", "gamma_dot", "beta_dot")
]
"""Arguments of shape [T, C]: a step's part of a table, which starts on 16 bytes for some numbers of channels only."""


def accumulator(dtype: torch.dtype) -> tuple[torch.dtype, Any]:
    """The type sums of `dtype` are kept in, as torch and as Triton names it: float64 of float64, else float32."""
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


@dataclass(frozen=True)
class Configuration:
    """One compiled form of a kernel: everything Triton specialises it on.

    Attributes:
        label: what the ahead-of-time table calls it.
        kernel: the jitted function.
        types: Triton type of every argument that is not a constexpr, by name.
        constants: value of every constexpr argument, by name.
        num_warps: warps of one program.
        num_stages: software pipelining depth of loops with loads.
        tensor_cores: whether sm_90 code is expected to hold matrix instructions.
        by_arch: constants that are others on an architecture.
    """

    label: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = False
    by_arch: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def aligned(self) -> list[str]:
        """Arguments specialised as divisible by 16: pointers, but those that the kernel takes anywhere."""
        anywhere = {p.name for p in self.kernel.params if p.do_not_specialize_on_alignment}
        return [n for n in self.types if n.endswith("_ptr") and n not in anywhere]

    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return launch_options(self.num_warps, self.num_stages)


_KINDS = {"eps": "fp64", "slope": "fp64", "index_ptr": "*u8", "counter_ptr": "*i32", "offsets_ptr": "*i64"}


def argument_types(
    kernel: Any,
    constants: Iterable[str],
    elements: torch.dtype,
    others: Mapping[str, torch.dtype] | None = None,
) -> dict[str, str]:
    """Triton's types of a kernel's arguments, by name.

    Args:
        kernel: the jitted function.
        constants: its constexpr arguments, which have none.
        elements: what pointers point to,
        others: but these.
    """
    kinds = _KINDS | {name: f"*{TYPE_NAMES[dtype]}" for name, dtype in (others or {}).items()}
    plain = f"*{TYPE_NAMES[elements]}"
    return {
        name: kinds.get(name, plain if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if name not in constants
    }


def launch_options(num_warps: int, num_stages: int = 3) -> dict[str, int]:
    """The same from parts; also what ``triton.compile`` takes.

    The limit on registers is the hardware's own: stated, it keeps the assembler from spilling a few bytes to make
    room for one more resident program.
    """
    return {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": 255}


def aligned(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors, each that does not start on 16 bytes (a slice) replaced by a copy that does.

    Kernels are compiled for aligned pointers only.
    """
    return [t if t.data_ptr() % 16 == 0 else t.clone() for t in tensors]


def check_memory(name: str, tensor: Tensor, anywhere: Sequence[str]) -> None:
    """Raises unless a kernel's argument is contiguous and starts on 16 bytes, or is one that may start anywhere."""
    if not tensor.is_contiguous() or (name not in anywhere and tensor.data_ptr() % 16):
        raise ValueError(
            f"{name.removesuffix('_ptr')}: expected a contiguous tensor that starts on 16 bytes, "
            f"got shape {tuple(tensor.shape)}, strides {tensor.stride()} at {tensor.data_ptr():#x}"
        )


def each_task(row: Tensor, tasks: int) -> Tensor:
    """A row [C] as it is, rows [R, C] as [T, C]: each is that of T / R neighbouring tasks."""
    return row if row.dim() == 1 else row.repeat_interleave(tasks // row.shape[0], 0)


def rows_of_tasks(gamma: Tensor, beta: Tensor, tasks: int) -> tuple[Tensor, Tensor, int]:
    """γ and β, [C] or [R, C] each, as contiguous rows of one shape, and for how many neighbouring tasks each row is."""
    counts = {len(row) for row in (gamma, beta) if row.dim() == 2}
    if len(counts) > 1:
        gamma, beta = each_task(gamma, tasks), each_task(beta, tasks)
    gamma, beta = torch.broadcast_tensors(gamma, beta)
    return gamma.contiguous(), beta.contiguous(), tasks if gamma.dim() == 1 else tasks // len(gamma)


def first_role(weights: Tensor, axes: int) -> tuple[Tensor, int]:
    """Gradients of weights [T, ...] of so many axes, the first of those of all roles that share them [R, T, ...].

    Returns:
        Them, and how many elements lie between the end of one role's and the beginning of the next role's.
    """
    if weights.dim() == axes:
        return weights, 0
    if weights.stride(0) * weights.element_size() % 16:
        raise ValueError(
            f"gradients of shared weights: expected each role's to start on 16 bytes, got strides {weights.stride()}"
        )
    return weights[0], weights.stride(0) - weights[0].numel()


def directions(rows: Sequence[Tensor | None], like: Tensor) -> tuple[bool, list[Tensor]]:
    """Tangents of γ and β, [C], [R, C] or None, as kernels take them.

    Returns:
        Whether one of them moves, and each of the shape [T, C] and type of `like`, aligned, zero for one that does not
        move. Where none does they are `like` itself, which no kernel then reads.
    """
    if all(row is None for row in rows):
        return False, [like] * len(rows)
    wide = (
        torch.zeros_like(like)
        if row is None
        else each_task(row.to(like.dtype), len(like)).expand(like.shape).contiguous()
        for row in rows
    )
    return True, aligned(wide)


_counters: dict[tuple[torch.device, int, int], Tensor] = {}


def counters(out: Tensor, count: int) -> Tensor:
    """Zeros [count] by which the pieces of a result's tiles find out which of them is the last.

    That one adds up all pieces in their order, and sets its counter back to zero for the next launch: which one it is
    makes no difference to the bits. Each result has counters of its own, by its address: launches that write to one
    place do not overlap. They are kept for good, as captured graphs use them: some bytes for each place.
    """
    key = out.device, out.data_ptr(), count
    if key not in _counters:
        _counters[key] = torch.zeros(count, dtype=torch.int32, device=out.device)
    return _counters[key]


@triton.jit
def last_piece(counter_ptr, pieces):
    """Whether this program is the last of so many to come here; what the others stored before is then in memory.

    Loads of that must bypass the multiprocessor's own cache (``cache_modifier=".cg"``).
    """
    tl.debug_barrier()  # all threads' stores come before the one thread's count
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    last = before == pieces - 1
    if last:
        tl.store(counter_ptr, 0)
    tl.debug_barrier()
    return last


def split(rows: int, programs: int, block: int, *, target: int = 512, limit: int = 32) -> tuple[int, int]:
    """Cuts a reduction over `rows` among several programs when there are too few without.

    Args:
        rows: length of the reduction.
        programs: programs there are when each takes all rows.
        block: rows a program reads at a time.
        target: programs that fill a large GPU (four for each of 128 multiprocessors).
        limit: most pieces, which the second stage reads at once.

    Returns:
        Rows of one piece (a multiple of `block`) and the number of pieces, none of them empty.
    """
    pieces = max(1, min(limit, target // max(programs, 1), -(-rows // block)))
    piece = -(-rows // (pieces * block)) * block
    return piece, -(-rows // piece)
