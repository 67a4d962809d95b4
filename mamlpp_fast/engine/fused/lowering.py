"""Lowering: from recorded operations to steps, one operation to one step, by a table of the functions that have rules.

A rule is a function of the lowering, the operation and its arguments, under the names that PyTorch gives them::

    @rule(F.relu, torch.relu, Tensor.relu, Tensor.relu_)
    def _relu(low, call, input, inplace=False): ...

What it cannot take it refuses with ``raise call.refusal(why)``. Fusions come after
(:mod:`mamlpp_fast.engine.fused.fusions`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from mamlpp_fast.engine.base import Unsupported
from mamlpp_fast.engine.fused.network import Network, Norm, Statistics
from mamlpp_fast.engine.fused.steps import (
    Detach,
    Slot,
    Step,
)
from mamlpp_fast.engine.record import Recording
from mamlpp_fast.engine.recorder import Buffer, Constant, Operation, Parameter, Value

__all__ = ["lower", "rules"]

_Rule = Callable[..., None]
_RULES: dict[Any, _Rule] = {}


def rule(*functions: Any) -> Callable[[_Rule], _Rule]:
    """Registers a rule for functions of PyTorch."""

    def register(fn: _Rule) -> _Rule:
        for function in functions:
            _RULES[function] = fn
        return fn

    return register


def rules() -> Mapping[Any, _Rule]:
    """The functions that have rules, and these."""
    return _RULES


def lower(
    recording: Recording,
    model: nn.Module,
    adapted: frozenset[str],
    running: bool = False,
) -> Network:
    """The network of a recording, a step an operation.

    Args:
        recording: of ``model``.
        model: gives the shapes of the parameters.
        adapted: names of the parameters that the inner loop adapts.
        running: whether per-step batch norms normalise with their running statistics.

    Raises:
        Unsupported: names the first module or call without rules.
    """
    return Lowering(recording, model, adapted, running).run()


class Lowering:
    """The network under construction."""

    def __init__(
        self, recording: Recording, model: nn.Module, adapted: frozenset[str], running: bool
    ) -> None:
        self.recording = recording
        self.parameters = dict(model.named_parameters())
        self.buffers = dict(model.named_buffers())
        self.root = type(model).__name__
        self.adapted = adapted
        self.running = running
        self.shapes: dict[int, tuple[int, ...]] = {}
        # Flattened images are [H, W, C] here and [C, H, W] in the model: values in this order, and their grids.
        self.grids: dict[int, tuple[int, ...]] = {}
        self.steps: list[Step] = []
        self.norms: dict[str, Norm] = {}
        self.frozen: dict[str, Statistics] = {}
        self._values = {0: 0}
        self._count = 1
        self._users: dict[str, Call] = {}
        self._names: set[str] = set()
        shape = recording.shapes[0]
        self.shapes[0] = (*shape[1:], shape[0]) if len(shape) == 3 else shape

    def run(self) -> Network:
        for op in self.recording.operations:
            self._lower(op)
        statistics = [n.statistics for n in self.norms.values() if n.statistics is not None]
        if sorted(self.recording.counted) != sorted(s.counted for s in statistics if s.counted is not None):
            raise Unsupported(self.recording.counted[0], "is counted otherwise than once by a batch norm")
        output = self._values[self.recording.output]
        shape = self.shapes[output]
        if len(shape) != 1:
            sizes = ", ".join(map(str, self.recording.shapes[self.recording.output]))
            raise Unsupported("output", f"expected predictions [N, ways], got [N, {sizes}]")
        return Network(tuple(self.steps), self.shapes, output, self.norms, self.frozen)

    def _lower(self, op: Operation) -> None:
        fn = _RULES.get(op.function)
        call = Call(op, self)
        if fn is None or op.output is None:
            raise call.refusal(f"{op.name} has no fused rules")
        try:
            fn(self, call, *op.args, **op.kwargs)
        except Unsupported:
            raise
        except (TypeError, ValueError) as error:  # arguments that the rule does not foresee
            raise call.refusal(f"{op.name}: {error}") from error
        if op.constant:
            value = self._values[op.output]
            self.step(Detach, call, (value,), self.shapes[value], grid=self.grids.get(value))

    # For the rules

    def value(self, call: Call, argument: Any) -> int:
        """The value that an argument is."""
        if not isinstance(argument, Value):
            raise call.refusal(f"{call.op.name}: expected an activation, got {said(argument)}")
        return self._values[argument.index]

    def images(self, call: Call, argument: Any) -> tuple[int, tuple[int, ...]]:
        """The value that an argument is, and its shape [H, W, C]."""
        value = self.value(call, argument)
        shape = self.shapes[value]
        if len(shape) != 3:
            raise call.refusal(f"{call.op.name}: expected images, got features of shape {shape}")
        return value, shape

    def parameter(self, call: Call, argument: Any) -> str:
        """The name of the parameter that an argument is, which no other call has."""
        if not isinstance(argument, Parameter) or argument.detached:
            raise call.refusal(f"{call.op.name}: expected a parameter as it is, got {said(argument)}")
        user = self._users.setdefault(argument.name, call)
        if user.op.where != call.op.where:
            raise call.refusal(f"shares a parameter with {user.op.where}")
        if user is not call:
            raise call.refusal(f"{argument.name} is used twice in one pass")
        return argument.name

    def vector(self, name: str) -> Slot:
        shape = tuple(self.parameters[name].shape)
        return Slot(name, shape, shape, (0,))

    def step(
        self,
        kind: Callable[..., Step],
        call: Call,
        inputs: tuple[int, ...],
        shape: tuple[int, ...],
        *arguments: Any,
        grid: tuple[int, ...] | None = None,
    ) -> int:
        """Adds a step; the operation's value is what the last one leaves."""
        if any(size < 1 for size in shape):
            raise call.refusal(f"{call.op.name}: the image is too small, its output would be {shape}")
        output, self._count = self._count, self._count + 1
        self.steps.append(kind(call.name, inputs, output, shape, *arguments))
        self.shapes[output] = shape
        if grid is not None:
            self.grids[output] = grid
        self.alias(call, output)
        return output

    def alias(self, call: Call, value: int) -> None:
        """Makes ``value`` what the operation leaves."""
        assert call.op.output is not None
        self._values[call.op.output] = value

    def unique(self, name: str) -> str:
        """``name``, or with a number behind it where a step has it already."""
        found, number = name, 1
        while found in self._names:
            number += 1
            found = f"{name} {number}"
        self._names.add(found)
        return found


class Call:
    """An operation that is being lowered."""

    def __init__(self, op: Operation, low: Lowering) -> None:
        self.op = op
        self.low = low
        owners = [r.name.rpartition(".")[0] for r in op.inputs() if isinstance(r, (Parameter, Buffer))]
        self.where = (owners[0] if owners and owners[0] else op.where) or op.name
        self._name: str | None = None

    @property
    def name(self) -> str:
        """Name of the steps it becomes: of the module that owns its parameters, or that makes the call."""
        if self._name is None:
            self._name = self.low.unique(self.where)
        return self._name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the output, as recorded, without examples."""
        assert self.op.output is not None
        return self.low.recording.shapes[self.op.output]

    def refusal(self, why: str) -> Unsupported:
        return Unsupported(self.op.where or self.low.root, why)


def said(argument: Any) -> str:
    if isinstance(argument, Parameter):
        return f"the parameter {argument.name}" + (" detached" if argument.detached else "")
    if isinstance(argument, Buffer):
        return f"the buffer {argument.name}"
    if isinstance(argument, Constant):
        return "a tensor that is an attribute"
    return "an activation" if isinstance(argument, Value) else repr(argument)
