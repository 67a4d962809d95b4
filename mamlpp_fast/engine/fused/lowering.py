"""Lowering: from recorded operations to steps, by a table of the functions that have rules; the others become generic.

A rule is a function of the lowering and the operation's arguments, under the names that PyTorch gives them::

    @rule(F.relu, torch.relu, Tensor.relu, Tensor.relu_)
    def _relu(low, input, inplace=False): ...

What it cannot take it refuses with ``raise low.refusal(why)``; then the operation is a generic step. Steps of rules
have activations in the layout of the kernels, images as [tasks, N, H, W, C], generic ones in the model's own; where one
reads what the other made, a step of its own is in between, which is a view where it can be. Fusions come after
(:mod:`mamlpp_fast.engine.fused.fusions`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mamlpp_fast.engine.base import Unsupported, handed_over
from mamlpp_fast.engine.fused.composites import DENSE
from mamlpp_fast.engine.fused.multi_head import taken_apart
from mamlpp_fast.engine.fused.network import Network, Norm, Statistics
from mamlpp_fast.engine.fused.steps import (
    Detach,
    Dropout,
    FrozenNorm,
    Generic,
    Noise,
    NormActPool,
    Relayout,
    Slot,
    Step,
)
from mamlpp_fast.engine.fused.steps.generic import Recorded
from mamlpp_fast.engine.operation import TAKE_SIZES, Buffer, Constant, Operation, Parameter, Value
from mamlpp_fast.engine.record import Recording

__all__ = ["lower", "lower_loss", "rules", "taken"]

_Rule = Callable[..., None]
_Kind = Callable[..., Step]
_Ints = tuple[int, ...]
_RULES: dict[Any, _Rule] = {}
_TAKES: dict[_Rule, str] = {}
_ALONE: set[Any] = set()


def rule(*functions: Any, takes: str = "", alone: bool = False) -> Callable[[_Rule], _Rule]:
    """Registers a rule for functions of PyTorch.

    Args:
        takes: the forms that it takes, in words, for the table in ``docs/engine.md``.
        alone: whether they have effects that no generic step has.
    """

    def register(fn: _Rule) -> _Rule:
        _ALONE.update(functions if alone else ())
        _TAKES[fn] = takes
        for function in functions:
            _RULES[function] = fn
        return fn

    return register


def rules() -> Mapping[Any, _Rule]:
    """The functions that have rules, and these."""
    return _RULES


def taken() -> dict[str, list[Any]]:
    """The functions that have rules, by what these take, in words."""
    found: dict[str, list[Any]] = {}
    for function, fn in _RULES.items():
        found.setdefault(_TAKES[fn], []).append(function)
    return found


def lower(recording: Recording, model: nn.Module, adapted: frozenset[str], running: bool = False) -> Network:
    """The network of a recording, step after step an operation.

    Args:
        recording: of ``model``.
        model: gives the shapes of the parameters.
        adapted: names of the parameters that the inner loop adapts.
        running: whether per-step batch norms normalise with their running statistics.

    Raises:
        Unsupported: names the first call that cannot be a step.
    """
    for name, p in model.named_parameters():
        if p.is_complex():
            raise Unsupported(name, "is of complex numbers")
    with handed_over(model):
        return Lowering(taken_apart(recording), model, adapted, running).run()


def lower_loss(recording: Recording, module: nn.Module, dtype: torch.dtype) -> Network:
    """The generic steps of a recorded loss; values 0 and 1 are its predictions and labels.

    Args:
        module: that was recorded; it has no parameters.
        dtype: of the predictions.

    Raises:
        Unsupported: names the first call that cannot be a step.
    """
    with handed_over(module):
        return Lowering(recording, module, frozenset(), False, dtype).run_loss()


class Lowering:
    """The network under construction, at one operation of the recording.

    Attributes:
        op: the operation; ``other`` is the same for another number of examples.
        where: name of the module that owns its parameters, or that makes the call.
        shapes: of the network's values, by its own numbers.
        grids: of flattened images, which are [H, W, C] here and [C, H, W] in the model.
    """

    def __init__(
        self,
        recording: Recording,
        model: nn.Module,
        adapted: frozenset[str],
        running: bool,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.recording = recording
        self.parameters = dict(model.named_parameters())
        self.dtype = next(iter(self.parameters.values())).dtype if dtype is None else dtype
        self.buffers = dict(model.named_buffers())
        self.root = type(model).__name__
        self.adapted = adapted
        self.running = running
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.grids: dict[int, tuple[int, ...]] = {}
        self.steps: list[Step] = []
        self.norms: dict[str, Norm] = {}
        self.frozen: dict[str, Statistics] = {}
        # What a recorded value is in the kernels' layout, and in the model's own.
        self._values = {i: i for i in range(recording.inputs)}
        self._natives: dict[int, int] = {}
        # Recorded values that gradients may be asked for: of another precision than the model's none is.
        self._moving = {i for i in range(recording.inputs) if recording.dtypes[i].is_floating_point}
        self._count = recording.inputs
        self._names: set[str] = set()
        uses = (r.name for op in recording.operations for r in op.inputs() if isinstance(r, Parameter))
        self._shared = {name for name, count in Counter(uses).items() if count > 1}
        for i in range(recording.inputs):
            shape = recording.shapes.get(i, ())
            self.shapes[i] = (*shape[1:], shape[0]) if len(shape) == 3 else shape

    def _begin(self, op: Operation, other: Operation) -> None:
        self.op, self.other = op, other
        owners = [r.name.rpartition(".")[0] for r in op.inputs() if isinstance(r, (Parameter, Buffer))]
        self.where = (owners[0] if owners and owners[0] else op.where) or op.name
        self._name: str | None = None
        read = op.inputs()
        moving = any(isinstance(r, Parameter) and not r.detached for r in read)
        moving |= any(isinstance(r, Value) and r.index in self._moving for r in read)
        if moving and not op.constant:
            self._moving.update(
                i for i, (_, dtype) in zip(op.outputs, op.tensors, strict=True) if dtype.is_floating_point
            )

    def run(self) -> Network:
        for op, other in zip(self.recording.operations, self.recording.others, strict=True):
            self._lower(op, other)
        statistics = [n.statistics for n in self.norms.values() if n.statistics is not None]
        if sorted(self.recording.counted) != sorted(s.counted for s in statistics if s.counted is not None):
            raise Unsupported(self.recording.counted[0], "is counted otherwise than once by a batch norm")
        shape = self.recording.shapes.get(self.recording.output)
        if shape is None:
            raise Unsupported("output", "expected predictions [N, ...], of each example as many")
        output = self.value(Value(self.recording.output)) if len(shape) == 1 else None
        if output is None or output in self.grids:
            output = self.settled(self.native(self.recording.output))
        own = self.norms, self.frozen, self._inputs()
        return Network(self._read(output), self.shapes, output, *own, counts=self.recording.counts)

    def run_loss(self) -> Network:
        self._values, self._natives = {}, self._values
        for op, other in zip(self.recording.operations, self.recording.others, strict=True):
            self._begin(op, other)
            self._generic()
        output = self._natives[self.recording.output]
        asked = tuple((self._natives[value], answer) for value, answer in self.recording.asked)
        steps = self._read(output, *(value for value, _ in asked))
        return Network(steps, self.shapes, output, {}, {}, self._inputs(), asked=asked)

    def _inputs(self) -> tuple[torch.dtype, ...]:
        return tuple(self.recording.dtypes[i] for i in range(self.recording.inputs))

    def _read(self, *results: int) -> tuple[Step, ...]:
        """The steps, without those whose output nobody reads and that have no effect beside it."""
        read, kept = set(results), list[Step]()
        for step in reversed(self.steps):
            if step.output in read or _acts(step):
                read.update(step.inputs)
                kept.append(step)
        return tuple(reversed(kept))

    def _lower(self, op: Operation, other: Operation) -> None:
        self._begin(op, other)
        if op.draws and not op.inputs():
            self._noise()
            return
        fn = _RULES.get(op.function)
        if fn is not None and not self._regular() and not (op.function in _ALONE and self.rows > 1):
            fn = None
        refusal: Unsupported | None = None
        if fn is not None:
            before = {name: _copied(value) for name, value in vars(self).items()}
            try:
                fn(self, *op.args, **op.kwargs)
            except Unsupported as error:
                refusal = error.with_traceback(None)  # whose frames hold this one, and all above
            except (TypeError, ValueError) as error:  # arguments that the rule does not foresee
                refusal = self.refusal(f"{op.name}: {error}")
            if refusal is not None:
                vars(self).update(before)
        if fn is None or refusal is not None:
            if op.function in _ALONE:
                raise refusal or self.refusal(f"{op.name}: expected examples along the first axis")
            self._generic()
        elif op.constant and op.output is not None:
            for table in (self._values, self._natives):
                if (value := table.get(op.output)) is not None:
                    grid = self.grids.get(value)
                    table[op.output] = self._add(Detach, (value,), self.shapes[value], grid=grid)

    def _regular(self) -> bool:
        """Whether the operation is the same for each number of examples, which are the first axis of what it reads."""
        op, other = self.op, self.other
        values = [r.index for r in op.inputs() if isinstance(r, Value)]
        regular = op.output is not None and all(i in self.recording.shapes for i in (*values, op.output))
        regular &= not any(self._foreign(self.recording.dtypes[i]) for i in values)
        return regular and (op.function in TAKE_SIZES or (op.args, op.kwargs) == (other.args, other.kwargs))

    def _foreign(self, dtype: torch.dtype) -> bool:
        """Whether a type is of another precision than the model's, which no rule computes in."""
        return dtype.is_floating_point and dtype != self.dtype

    def _noise(self) -> None:
        """What is drawn beforehand, as an activation without inputs."""
        (index,), ((shape, dtype),) = self.op.outputs, self.op.tensors
        if self._foreign(dtype) and (dtype, self.dtype) != (torch.float32, torch.float64):
            raise self.refusal(f"{self.op.name} draws random numbers of {dtype} in a model of {self.dtype}")
        draws = {n: op.draws[0] for n, op in zip(self.recording.examples, (self.op, self.other), strict=True)}
        own = None if dtype == self.dtype else dtype
        self._natives[index] = self._add(Noise, (), self.recording.shapes.get(index, shape), draws, own)

    def _generic(self) -> None:
        op = self.op
        if not op.outputs:
            raise self.refusal(f"{op.name} has no fused rules")
        if any(dtype.is_complex for _, dtype in op.tensors):
            raise self.refusal(f"{op.name} computes in complex numbers")
        values = dict.fromkeys(r.index for r in op.inputs() if isinstance(r, Value))
        natives = {i: self.native(i) for i in values}
        dense = op.function in DENSE and self._regular()
        if dense:
            natives = {i: self._plain(value, (True, False)) for i, value in natives.items()}
        smooth = {i: self.recording.dtypes[i].is_floating_point for i in values}
        names = dict.fromkeys(r.name for r in op.inputs() if isinstance(r, Parameter) and not r.detached)
        fixed = dict.fromkeys(r.name for r in op.inputs() if isinstance(r, Parameter) and r.detached)
        slots = {}
        for name in (*names, *fixed):
            shape = tuple(self.parameters[name].shape)
            slots[name] = Slot(name, shape, shape, tuple(range(len(shape))))
        buffers = {r.name: self.buffers[r.name] for r in op.inputs() if isinstance(r, Buffer)}
        examples = dict(zip(self.recording.examples, (op, self.other), strict=True))
        recorded = Recorded(op.name, examples, smooth, self.dtype)
        for i, (index, (shape, dtype)) in enumerate(zip(op.outputs, op.tensors, strict=True)):
            shown = self.recording.shapes.get(index, shape)
            constant = op.constant or not dtype.is_floating_point
            if self._foreign(dtype):  # a mask's `float()` in a model of float64, say
                if index in self._moving:
                    raise self.refusal(f"{op.name} computes in {dtype}, where the model does in {self.dtype}")
                constant = True
            result = self._add(
                Generic,
                tuple(natives.values()),
                shown,
                recorded,
                i,
                tuple(values),
                tuple(slots[n] for n in names),
                tuple(slots[n] for n in fixed),
                buffers,
                constant,
            )
            self._natives[index] = self._plain(result, (False, True)) if dense else result

    # For the rules

    @property
    def name(self) -> str:
        """Name of the steps that the operation becomes."""
        if self._name is None:
            self._name = self.unique(self.where)
        return self._name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the output, as recorded, without examples."""
        assert self.op.output is not None
        return self.recording.shapes[self.op.output]

    @property
    def rows(self) -> int:
        """How many rows of the output [N * rows, ...] an example has; 0 where its first axis is another's.

        What is computed of all rows alike does not depend on which rows are an example's.
        """
        op, other = self.op, self.other
        if op.output is None or (op.args, op.kwargs) != (other.args, other.kwargs):
            return 0
        (first, _), (second, _), (n, m) = op.tensors[0], other.tensors[0], self.recording.examples
        rows, rest = (first[0] // n if first else 0), first[1:]
        return rows if (first, second) == ((rows * n, *rest), (rows * m, *rest)) else 0

    def index(self, argument: Any) -> int:
        """The recorded value that an argument is."""
        if not isinstance(argument, Value):
            raise self.refusal(f"{self.op.name}: expected an activation, got {said(argument)}")
        return argument.index

    def refusal(self, why: str) -> Unsupported:
        return Unsupported(self.op.where or self.root, why)

    def value(self, argument: Any) -> int:
        """The value that an argument is, in the kernels' layout."""
        index = self.index(argument)
        if index not in self._values:
            shape = self.recording.shapes.get(index)
            if shape is None or len(shape) != 1:
                raise self.refusal(f"{self.op.name}: expected features of examples, got {shape}")
            self._values[index] = self.settled(self._natives[index])
        return self._values[index]

    def settled(self, native: int) -> int:
        """Features that lie side by side in memory."""
        return self._plain(native, (True, False))

    def _plain(self, value: int, settle: tuple[bool, bool]) -> int:
        """The same value, side by side in memory itself, or in its gradient."""
        shape = self.shapes[value]
        return self._add(Relayout, (value,), shape, shape, tuple(range(len(shape))), settle)

    def images(self, argument: Any, axes: tuple[int, ...] = (3,)) -> tuple[int, tuple[int, ...]]:
        """The value that an argument is, and its shape [H, W, C].

        Args:
            axes: that it may have in the model beside the examples: features are one pixel, rows have a width of 1.
        """
        index = self.index(argument)
        shape = self.recording.shapes[index]
        if len(shape) not in axes:
            raise self.refusal(f"{self.op.name}: expected images, got features of shape {shape}")
        if index not in self._values or len(self.shapes[self._values[index]]) != 3:
            native = self.native(index)
            channels, *sides = shape
            height = sides[0] if sides else 1
            width = math.prod(sides[1:])
            split = (channels, height, width)
            value = self._add(Relayout, (native,), (height, width, channels), split, (1, 2, 0), (True, False))
            if len(shape) != 1:
                self._values[index] = value
            return value, self.shapes[value]
        return self._values[index], self.shapes[self._values[index]]

    def of_rows(self, argument: Any) -> tuple[int, tuple[int, ...]]:
        """An argument of the output's shape, [N * rows, C, ...], as images [rows * H, W, C] of the examples."""
        (_, channels, *sides), rows = self.op.tensors[0][0], self.rows
        height, width = (*sides, 1)[0], math.prod(sides[1:])
        shape, split = (rows * height, width, channels), (rows, channels, height, width)
        native = self.native(self.index(argument))
        return self._add(Relayout, (native,), shape, split, (0, 2, 3, 1), (True, False)), shape

    def to_rows(self, value: int) -> None:
        """Makes such images what the operation leaves."""
        shape, rows = self.op.tensors[0][0], self.rows
        height, width, channels = self.shapes[value]
        split = rows, height // rows, width, channels
        self.native_step(Relayout, (value,), shape, split, (0, 3, 1, 2), (False, True), rows)

    def native(self, index: int) -> int:
        """A recorded value in the model's own layout."""
        if index not in self._natives:
            if index not in self._values:
                raise self.refusal(f"{self.op.name}: reads a value that no operation left alone")
            value = self._values[index]
            self._natives[index] = self.as_native(value, self.recording.shapes[index])
        return self._natives[index]

    def as_native(self, value: int, shape: tuple[int, ...]) -> int:
        """A value in the kernels' layout as one of the model's, of this shape."""
        stored = self.shapes[value]
        grid = self.grids.get(value) or (stored if len(stored) == 3 else None)
        split, order = (stored, tuple(range(len(stored)))) if grid is None else (grid, (2, 0, 1))
        return self._add(Relayout, (value,), shape, split, order, (False, True))

    def parameter(self, argument: Any) -> str:
        """The name of the parameter that an argument is, which no other call has."""
        if not isinstance(argument, Parameter) or argument.detached:
            raise self.refusal(f"{self.op.name}: expected a parameter as it is, got {said(argument)}")
        if argument.name in self._shared:
            raise self.refusal(f"{argument.name} is used more than once in a pass")
        return argument.name

    def vector(self, name: str) -> Slot:
        shape = tuple(self.parameters[name].shape)
        return Slot(name, shape, shape, (0,))

    def step(
        self, kind: _Kind, inputs: _Ints, shape: _Ints, *arguments: Any, grid: _Ints | None = None
    ) -> int:
        """Adds a step; the operation's value is what the last one leaves."""
        if any(size < 1 for size in shape):
            raise self.refusal(f"{self.op.name}: the image is too small, its output would be {shape}")
        output = self._add(kind, inputs, shape, *arguments, grid=grid)
        self.alias(output)
        return output

    def native_step(self, kind: _Kind, inputs: _Ints, shape: _Ints, *arguments: Any) -> None:
        """Adds a step on values in the model's own layout, which leaves such a one."""
        assert self.op.output is not None
        self._natives[self.op.output] = self._add(kind, inputs, shape, *arguments)

    def _add(
        self, kind: _Kind, inputs: _Ints, shape: _Ints, *arguments: Any, grid: _Ints | None = None
    ) -> int:
        output, self._count = self._count, self._count + 1
        name = self.unique(f"{self.where} layout") if kind is Relayout else self.name
        self.steps.append(kind(name, inputs, output, shape, *arguments))
        self.shapes[output] = shape
        if grid is not None:
            self.grids[output] = grid
        return output

    def alias(self, value: int) -> None:
        """Makes ``value`` what the operation leaves."""
        assert self.op.output is not None
        self._values[self.op.output] = value

    def same(self, argument: Any) -> None:
        """Makes an activation what the operation leaves, in the layouts that there are."""
        index = self.index(argument)
        assert self.op.output is not None
        for table in (self._values, self._natives):
            if index in table:
                table[self.op.output] = table[index]

    def unique(self, name: str) -> str:
        """``name``, or with a number behind it where a step has it already."""
        found, number = name, 1
        while found in self._names:
            number += 1
            found = f"{name} {number}"
        self._names.add(found)
        return found


def _acts(step: Step) -> bool:
    """Whether a step does something besides its output: running statistics, or a draw that others come behind."""
    if isinstance(step, Generic):
        return any(op.draws for op in step.recorded.examples.values())
    return isinstance(step, (NormActPool, FrozenNorm, Dropout, Noise))


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list, set)) else value


def said(argument: Any) -> str:
    if isinstance(argument, Parameter):
        return f"the parameter {argument.name}" + (" detached" if argument.detached else "")
    if isinstance(argument, Buffer):
        return f"the buffer {argument.name}"
    if isinstance(argument, Constant):
        return "a tensor that is an attribute"
    return "an activation" if isinstance(argument, Value) else repr(argument)
