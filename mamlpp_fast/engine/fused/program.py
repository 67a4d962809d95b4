"""Programs: a whole iteration as a flat list of calls on buffers whose addresses never change.

A sweep is written down once, symbolically, with :class:`Emitter`: every call names its function and its buffers. From
the list follow the lifetimes of the buffers, so that those which are never alive together share memory, and with that
the bytes the iteration needs, before anything runs. :meth:`Program.bind` turns names into tensors, others for each lane
(:mod:`mamlpp_fast.engine.lanes`); :meth:`Program.run` makes the calls.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload

import mamlpp_fast.ops.strided_sums  # noqa: F401 - registers the operation
from mamlpp_fast import _native
from mamlpp_fast.engine import base
from mamlpp_fast.engine.fused.buffers import Buffer, Ref, Workspace, place
from mamlpp_fast.engine.lanes import NEVER, Halt, watched

__all__ = ["Buffer", "Copied", "Emitter", "Instruction", "Phase", "Program", "Ref", "Section", "Workspace"]

_STRIDED_SUMS = torch.ops.mamlpp_fast.strided_sums.default
_Made = TypeVar("_Made")
_Arguments = tuple[Any, ...]
_Named = dict[str, Any]


class Phase(NamedTuple):
    """Where in the sweep a call stands: load, support, target, reverse or finish, and the inner step if it has one."""

    name: str
    step: int | None = None


@dataclass(frozen=True)
class Copied:
    """An operator without a form that takes its outputs: called with one argument more, the list of these.

    What it makes is copied to them; None for a result that is left out, or that nobody wants.
    """

    op: OpOverload

    @property
    def __name__(self) -> str:
        return str(self.op)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        *args_, outs = args
        made = self.op(*args_, **kwargs)
        for out, t in zip(outs, made if isinstance(made, (tuple, list)) else (made,), strict=True):
            if out is not None:
                out.copy_(t)


@dataclass
class Instruction:
    """One call; ``phase`` and ``label`` say where in the sweep it stands, ``flops`` counts multiply-adds twice."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    phase: Phase
    label: str
    flops: int

    @property
    def ours(self) -> bool:
        """Whether a kernel of ours is called, whose results do not depend on the number of threads."""
        return getattr(self.fn, "namespace", "") == "mamlpp_fast"

    @property
    def name(self) -> str:
        return str(getattr(self.fn, "__name__", self.fn)).removesuffix(".default")

    def operands(self, lane: int) -> tuple[_Arguments, _Named]:
        """The arguments, with a lane's tensors."""

        def tensor(value: Any) -> Any:
            if isinstance(value, list):
                return [tensor(v) for v in value]
            return value.tensor(lane) if isinstance(value, Ref) else value

        return tuple(map(tensor, self.args)), {name: tensor(a) for name, a in self.kwargs.items()}

    def refs(self) -> Iterator[Ref]:
        for value in (*self.args, *self.kwargs.values()):
            for part in value if isinstance(value, list) else (value,):
                if isinstance(part, Ref):
                    yield part

    @property
    def nbytes(self) -> int:
        """Bytes of all operands, each counted once."""
        return sum(r.nbytes for r in self.refs())


class Section:
    """Calls on tensors; ``listed`` is the native library's list of the same, None where there is none."""

    def __init__(self, calls: Sequence[Callable[[], Any]], listed: Any) -> None:
        self._calls = calls
        self.listed = listed

    def __call__(self) -> None:
        if self.listed is not None and not watched():
            self.listed.run(NEVER.flag)
            return
        for call in self._calls:
            call()


@dataclass
class Program:
    """A list of calls, the workspace bytes they need, those for what is passing, and the tensors it owns."""

    instructions: list[Instruction]
    buffers: list[Buffer]
    workspace_bytes: int
    passing_bytes: int = 0
    _calls: list[list[Callable[[], Any]]] = field(default_factory=list)
    _lists: list[Any] = field(default_factory=list)
    _generation: int = -1

    def owned_bytes(self, lanes: int = 1) -> int:
        return sum(b.nbytes * (lanes if b.each else 1) for b in self.buffers if b.owned)

    @property
    def flops(self) -> int:
        return sum(i.flops for i in self.instructions)

    def bind(self, workspace: Workspace, lanes: int = 1) -> None:
        """Gives every buffer its place, in every lane; does nothing where they have them and the workspace stays."""
        workspace.reserve(self.workspace_bytes * lanes)
        if self._generation != workspace.generation:
            self._calls, self._lists = [], []
            self._generation = workspace.generation
            for b in self.buffers:
                if not b.owned:
                    b.tensors = []
        for lane in range(len(self._calls), lanes):
            begin = lane * self.workspace_bytes
            self.lay(lane, workspace.memory[begin : begin + self.workspace_bytes])
            operands = [i.operands(lane) for i in self.instructions]
            self._calls.append([_bound(i, *own) for i, own in zip(self.instructions, operands, strict=True)])
            if _without_python(self.instructions, workspace.device):
                self._lists.append(_listed(self.instructions, operands))

    def lay(self, lane: int, memory: Tensor) -> None:
        """Gives the buffers of the next lane their places in memory of ``workspace_bytes``."""
        for b in self.buffers:
            if b.owned and b.each and len(b.tensors) <= lane:
                b.tensors.append(b.tensors[0].clone())
            elif not (b.owned or b.passing):
                b.tensors.append(b.within(memory))

    def pass_through(self, lane: int, memory: Tensor) -> None:
        """Gives what is passing on a lane, the next or one that there is, its place in memory of ``passing_bytes``."""
        for b in self.buffers:
            if b.passing:
                b.tensors[lane : lane + 1] = [b.within(memory)]

    def section(self, name: str, lane: int) -> Section:
        """The calls of one phase alone, on a lane that has its places."""
        instructions = [i for i in self.instructions if i.phase.name == name]
        operands = [i.operands(lane) for i in instructions]
        calls = [_bound(i, *own) for i, own in zip(instructions, operands, strict=True)]
        native = _without_python(instructions, self._device())
        return Section(calls, _listed(instructions, operands) if native else None)

    def _device(self) -> torch.device:
        return next(b.tensors[0].device for b in self.buffers if b.tensors)

    def run(self, lane: int = 0, threads: int = 1, halt: Halt = NEVER) -> None:
        """Makes the calls on a lane's memory.

        Args:
            lane: which.
            threads: of our kernels, where that is more than the one that torch has on a lane.
            halt: stops in front of the next call once it is wanted.
        """
        if threads > 1:
            self._run_wide(lane, threads, halt)
            return
        if self._lists and not watched():
            self._lists[lane].run(halt.flag)
            return
        for call in self._calls[lane]:
            if halt.wanted:
                return
            call()

    def _run_wide(self, lane: int, threads: int, halt: Halt) -> None:
        wide = False
        try:
            for call, instruction in zip(self._calls[lane], self.instructions, strict=True):
                if halt.wanted:
                    return
                if instruction.ours != wide:
                    wide = instruction.ours
                    _native.set_threads(threads if wide else 1)
                call()
        finally:
            _native.set_threads(1)

    def profile(self, repeats: int = 3) -> dict[tuple[str, str, str], float]:
        """Seconds of each (phase, label, call) of one lane, on the calling thread: the least of ``repeats`` runs.

        Waits for the device after each call.
        """
        import time

        device, calls = self._device(), self._calls[0]
        best: list[float] = [math.inf] * len(calls)
        for _ in range(repeats):
            for i, call in enumerate(calls):
                start = time.perf_counter()
                call()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                best[i] = min(best[i], time.perf_counter() - start)
        total: defaultdict[tuple[str, str, str], float] = defaultdict(float)
        for instruction, seconds in zip(self.instructions, best, strict=True):
            total[instruction.phase.name, instruction.label, instruction.name] += seconds
        return dict(total)

    def table(self) -> str:
        """Calls of every phase and step of the network, with operations and bytes (of one task group)."""
        rows: dict[tuple[str, str], list[Any]] = {}
        for i in self.instructions:
            row = rows.setdefault((i.phase.name, i.label), [0, 0, 0, Counter[str]()])
            row[0] += 1
            row[1] += i.flops
            row[2] += i.nbytes
            row[3][i.name] += 1
        lines = [f"{'phase':<10} {'step':<24} {'calls':>6} {'MFLOP':>10} {'MiB':>9}  operations"]
        for (phase, label), (calls, flops, nbytes, names) in rows.items():
            ops = ", ".join(f"{n} x{c}" for n, c in names.most_common(3))
            lines.append(
                f"{phase:<10} {label:<24} {calls:>6} {flops / 1e6:>10.1f} {nbytes / 2**20:>9.1f}  {ops}"
            )
        return "\n".join(lines)


class Emitter:
    """Writes a program down."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, operand_dtype: torch.dtype | None = None
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.operand_dtype = operand_dtype
        self.phase = Phase("load")
        self.label = ""
        self._instructions: list[Instruction] = []
        self._buffers: list[Buffer] = []
        self._constants: dict[float, Ref] = {}
        self._operands: dict[int, tuple[Ref, Ref]] = {}
        self._once: dict[Hashable, Any] = {}
        self._passing = False
        self._kept: list[tuple[int, int, int | None]] = []

    def new(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Ref:
        """A buffer in the workspace, alive from the first call that names it to the last."""
        buffer = Buffer(name, shape, self.dtype if dtype is None else dtype)
        buffer.passing = self._passing
        self._buffers.append(buffer)
        return Ref(buffer)

    def like(self, name: str, other: Ref) -> Ref:
        return self.new(name, other.shape)

    def own(self, name: str, value: Tensor, *, each: bool = False) -> Ref:
        """A buffer that keeps its contents between iterations; ``each``: of every lane, which a run writes to."""
        buffer = Buffer(name, value.shape, value.dtype, value, each)
        self._buffers.append(buffer)
        return Ref(buffer)

    def constant(self, value: float) -> Ref:
        """A number as a tensor of no axes."""
        if value not in self._constants:
            number = torch.tensor(value, dtype=self.dtype, device=self.device)
            self._constants[value] = self.own(f"{value:g}", number)
        return self._constants[value]

    def constant_vector(self, value: float, size: int) -> Ref:
        return self.constant(value).view(lambda t: t.expand(size))

    def call(self, fn: Callable[..., Any], *args: Any, flops: int = 0, **kwargs: Any) -> None:
        index = len(self._instructions)
        instruction = Instruction(fn, args, kwargs, self.phase, self.label, flops)
        for ref in instruction.refs():
            b = ref.buffer
            b.first = index if b.first < 0 else b.first
            b.last = index
        self._instructions.append(instruction)

    def once(self, key: Hashable, make: Callable[[], _Made]) -> _Made:
        """What ``make`` left when it was first called for ``key``: for values that stay the same in an iteration."""
        if key not in self._once:
            self._once[key] = make()
        made: _Made = self._once[key]
        return made

    def operand(self, ref: Ref) -> Ref:
        """``ref`` in the precision that products take their operands in."""
        if self.operand_dtype is None:
            return ref
        if id(ref) not in self._operands:
            rounded = self.new(f"{ref.buffer.name} rounded", ref.shape, self.operand_dtype)
            self.call(torch.ops.aten.copy_.default, rounded, ref)
            self._operands[id(ref)] = (ref, rounded)
        return self._operands[id(ref)][1]

    def part(self, ref: Ref, begin: int, end: int) -> Ref:
        """``ref[begin:end]``; what is known of ``ref`` in the precision of products is known of it too."""
        own = ref[begin:end]
        if id(ref) in self._operands:
            self._operands[id(own)] = (own, self._operands[id(ref)][1][begin:end])
        return own

    def move(self, pairs: Sequence[tuple[Ref, Ref]]) -> None:
        """Copies the second of each pair to the first, of a shape that it broadcasts to."""
        if not base.launches_cost(self.device):
            for out, ref in pairs:
                self.call(torch.ops.aten.copy_.default, out, ref)
        elif pairs:
            self.strided_sums([(out, ref.expand(*out.shape), 1.0) for out, ref in pairs])

    def strided_sum_of_owned(self, out: Ref, terms: Ref, scale: float) -> None:
        """One of :meth:`strided_sums` that needs none of what is computed: in the first such call, so at no cost."""
        first = next((i for i in self._instructions if i.fn is _STRIDED_SUMS), None)
        if first is None:
            self.strided_sums([(out, terms, scale)])
            return
        for values, value in zip(first.args, (out, terms, scale), strict=True):
            values.append(value)

    def strided_sums(self, sums: Sequence[tuple[Ref, Ref, float]]) -> None:
        """Results, terms and scales in one call of ``mamlpp_fast.ops.strided_sums``."""
        outs, terms, scales = map(list, zip(*sums, strict=True))
        self.call(_STRIDED_SUMS, outs, terms, scales)

    def sum(self, name: str, terms: Sequence[Ref]) -> Ref:
        """The sum of one or more buffers of one shape; a single one is returned as it is."""
        total = terms[0]
        for term in terms[1:]:
            out = self.like(name, total)
            self.call(torch.ops.aten.add.out, total, term, out=out)
            total = out
        return total

    def here(self) -> int:
        """The number of the next call."""
        return len(self._instructions)

    def keep(self, begin: int = 0, end: int | None = None, until: int | None = None) -> None:
        """What these calls name first, all so far by default, stays alive: a program may run in parts.

        Args:
            begin, end: of the calls.
            until: a later call, up to which; by default to the end of the program.
        """
        self._kept.append((begin, self.here() if end is None else end, until))

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """New buffers within it hold nothing that is read when another lane has run: lanes may share their memory."""
        self._passing = True
        try:
            yield
        finally:
            self._passing = False

    def alive(self, begin: int, end: int, *refs: Ref) -> None:
        """What is read or written beside the calls is alive during these."""
        for b in (ref.buffer for ref in refs):
            b.first = begin if b.first < 0 else min(b.first, begin)
            b.last = max(b.last, end - 1, b.first)

    def names(self, begin: int, end: int, *refs: Ref) -> bool:
        """Whether any of these calls names one of the buffers."""
        buffers = {id(ref.buffer) for ref in refs}
        return any(id(ref.buffer) in buffers for i in self._instructions[begin:end] for ref in i.refs())

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """What calls within it compute is not known (:meth:`once`, :meth:`operand`) to those behind it."""
        before = dict(self._once), dict(self._operands)
        try:
            yield
        finally:
            self._once, self._operands = before

    def finish(self) -> Program:
        for begin, end, until in self._kept:
            last = len(self._instructions) if until is None else until
            for b in self._buffers:
                if begin <= b.first < end and not b.passing:
                    b.last = max(b.last, last)
        used = [b for b in self._buffers if b.owned or b.first >= 0]
        kept, passing = (
            place([b for b in used if not b.owned and b.passing == which]) for which in (False, True)
        )
        return Program(self._instructions, used, kept, passing)


def _bound(instruction: Instruction, args: _Arguments, kwargs: _Named) -> Callable[[], Any]:
    fn = instruction.fn
    if kwargs:
        return lambda: fn(*args, **kwargs)
    return lambda: fn(*args)


def _without_python(instructions: Sequence[Instruction], device: torch.device) -> bool:
    """Whether the native library can make the calls: on a CPU, of operators alone."""
    operators = all(isinstance(i.fn, (OpOverload, Copied)) for i in instructions)
    return device.type == "cpu" and operators and _native.status().loaded


def _listed(instructions: Sequence[Instruction], operands: Sequence[tuple[_Arguments, _Named]]) -> Any:
    """The calls as the native library's list, which holds no interpreter lock while it makes them."""
    calls = torch.classes.mamlpp_fast.Calls()
    for i, (args, kwargs) in zip(instructions, operands, strict=True):
        outs: list[Tensor | None] = []
        op = i.fn
        if isinstance(op, Copied):
            *args_, outs = args
            op, args = op.op, tuple(args_)
        assert isinstance(op, OpOverload)
        schema = op._schema
        rest = [kwargs.get(a.name, a.default_value) for a in schema.arguments[len(args) :]]
        # An empty list has no type that could be told; the schema's is taken for None.
        given = [None if isinstance(a, list) and not a else a for a in (*args, *rest)]
        calls.add(schema.name, schema.overload_name, given, outs)
    return calls
