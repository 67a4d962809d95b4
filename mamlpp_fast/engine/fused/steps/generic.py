"""Any operation without rules of its own: what torch's autograd makes of it, written down as calls."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from mamlpp_fast.engine.base import Unsupported
from mamlpp_fast.engine.executions import Draw
from mamlpp_fast.engine.fused.composites import COMPOSITES
from mamlpp_fast.engine.fused.expressions import Expressions
from mamlpp_fast.engine.fused.program import Emitter, Ref
from mamlpp_fast.engine.fused.steps.base import Gradients, Pass, Slot, Step, aten
from mamlpp_fast.engine.fused.tracing import Leaf, Term, Traced, Untraceable, draw_leaf
from mamlpp_fast.engine.operation import Buffer, Constant, Operation, Parameter, Value, name_of

__all__ = ["Generic", "Recorded"]


@dataclass(eq=False)
class Recorded:
    """An operation as it was recorded, and its traces.

    Attributes:
        name: of the function.
        examples: the operation by the number of examples: arguments may follow it.
        smooth: the recorded values that it reads, and whether each is floating point.
        dtype: of the model, which stands for the program's own.
    """

    name: str
    examples: Mapping[int, Operation]
    smooth: Mapping[int, bool]
    dtype: torch.dtype
    traces: dict[Any, Traced] = field(default_factory=dict)

    def function(
        self, images: int, result: int, dtype: torch.dtype
    ) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """One of its results, as a function of tensors by the names of :func:`leaf_of`."""
        op = self.examples[images]
        fn = out_of_place(op.function)
        keeps = (
            op.name.endswith("_") and fn is not op.function
        )  # what is written in place keeps type and shape
        fn = COMPOSITES.get(fn, fn)

        def call(given: Mapping[str, Tensor]) -> Tensor:
            def argument(value: Any) -> Any:
                if isinstance(value, (Value, Parameter, Buffer, Constant)):
                    return given[leaf_of(value)]
                return dtype if isinstance(value, torch.dtype) and value == self.dtype else value

            args, kwargs = tree_map(argument, (op.args, op.kwargs))
            if op.function is Tensor.float and self.dtype is torch.float32:
                return cast(Tensor, args[0]).to(dtype)
            made = fn(*args, **kwargs)
            own = [t for t in tree_leaves(made) if isinstance(t, Tensor)][result]
            if keeps:
                return own.to(args[0].dtype).expand(args[0].shape)
            # Numbers times integers are of the process's own type, which a check in float64 is not in.
            own_type = own.dtype.is_floating_point and op.tensors[result][1] == self.dtype
            return own.to(dtype) if own_type else own

        return call

    def draws(self, images: int) -> tuple[Draw, ...]:
        return self.examples[images].draws

    def constants(self, images: int) -> dict[str, Constant]:
        return {leaf_of(r): r for r in self.examples[images].inputs() if isinstance(r, Constant)}


def out_of_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes what ``function`` leaves in its first argument; itself where it changes nothing.

    In place, forward mode may ask where an argument lies in memory.
    """
    name = name_of(function)
    if name.startswith("__i") and name[3:-2] in _OPERATORS:
        return cast(Callable[..., Any], getattr(Tensor, f"__{name[3:]}"))
    if name.endswith("_") and not name.endswith("__"):
        for home in (Tensor, torch, F):
            if getattr(home, name, None) == function and hasattr(home, name[:-1]):
                return cast(Callable[..., Any], getattr(home, name[:-1]))
    # Its own signature: what an operator's function wraps is a builtin, which has none.
    own = inspect.signature(function, follow_wrapped=False) if inspect.isfunction(function) else None
    parameters = {} if own is None else own.parameters
    if "inplace" not in parameters:
        return function
    place = list(parameters).index("inplace")

    def plain(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("inplace", None)
        return function(*(False if i == place else a for i, a in enumerate(args)), **kwargs)

    return plain


_OPERATORS = frozenset({"add", "sub", "mul", "truediv", "pow", "matmul"})


def leaf_of(reference: Value | Parameter | Buffer | Constant) -> str:
    if isinstance(reference, Value):
        return f"value {reference.index}"
    if isinstance(reference, Parameter):
        return f"{'fixed ' if reference.detached else ''}parameter {reference.name}"
    return f"buffer {reference.name}" if isinstance(reference, Buffer) else f"constant {id(reference)}"


@dataclass
class Generic(Step):
    """One result of a recorded operation, with the rules that ``torch.func`` gives it.

    Attributes:
        recorded: the operation; steps of its other results have the same.
        result: which of its results.
        arguments: the recorded values that the inputs are.
        adapting, fixed: the parameters that it reads, those of the latter as constants.
        held: the buffers that it reads.
        cut: whether the result takes part in no gradient.
    """

    recorded: Recorded
    result: int
    arguments: tuple[int, ...]
    adapting: tuple[Slot, ...]
    fixed: tuple[Slot, ...]
    held: Mapping[str, Tensor]
    cut: bool

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (*self.adapting, *(s for s in self.fixed if s not in self.adapting))

    @property
    def constant(self) -> bool:
        return self.cut

    @property
    def convolves(self) -> bool:
        return "conv" in self.recorded.name

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        return self.held

    @property
    def kind(self) -> str:
        return f"generic {self.recorded.name}"

    def params(self) -> frozenset[str]:
        return frozenset() if self.cut else frozenset(s.name for s in self.adapting)

    # Names and tensors

    def _given(self, em: Emitter, ps: Pass) -> dict[str, Ref]:
        """What the operation reads, in the form of the traces."""
        found: dict[str, Ref] = {}
        for value, index in zip(self.inputs, self.arguments, strict=True):
            found[leaf_of(Value(index))] = self._task(ps, ps.values[value])
        for slot in self.adapting:
            found[leaf_of(Parameter(slot.name))] = self._task(ps, ps.weights[slot.name])
        for slot in self.fixed:
            found[leaf_of(Parameter(slot.name, True))] = self._task(ps, ps.weights[slot.name])
        for name in self.held:
            found[leaf_of(Buffer(name))] = ps.buffers[name]
        for name, constant in self.recorded.constants(ps.images).items():
            t = constant.tensor.detach()
            dtype = em.dtype if t.dtype == self.recorded.dtype else t.dtype
            copy = functools.partial(t.to, em.device, dtype, copy=True)
            found[name] = em.once(name, lambda copy=copy: em.own("a constant", copy()))  # type: ignore[misc]
        # Of the operation, not of the step: all its results are of one draw.
        for i, draw in enumerate(self.recorded.draws(ps.images)):
            found[draw_leaf(i)] = self._task(ps, ps.drawn.of(em, (self.recorded, i), draw))
        return found

    def _task(self, ps: Pass, ref: Ref) -> Ref:
        """Without the axis of tasks where there is one task."""
        return ref[0] if ps.tasks == 1 else ref

    def _all(self, ps: Pass, ref: Ref) -> Ref:
        return ref.view(lambda t: t.unsqueeze(0)) if ps.tasks == 1 else ref

    def _sources(self) -> dict[str, int | str]:
        """The inputs and parameters that gradients may be asked for, by leaf."""
        pairs: dict[str, int | str] = {
            leaf_of(Value(i)): v
            for v, i in zip(self.inputs, self.arguments, strict=True)
            if self.recorded.smooth[i]
        }
        return pairs | {leaf_of(Parameter(s.name)): s.name for s in self.adapting}

    def _expressions(self, em: Emitter, ps: Pass) -> tuple[Traced, Expressions]:
        key = "generic", self.name, self.output
        if key not in ps.saved:
            if ps.images not in self.recorded.examples:
                raise Unsupported(self.name, f"{self.recorded.name}: not recorded with {ps.images} examples")
            given, smooth = self._given(em, ps), self._sources()
            shared = {name for name in given if name.startswith(("buffer ", "constant "))}
            leaves = {
                name: Leaf.of(ref, shared=name in shared, smooth=name in smooth and not self.cut)
                for name, ref in given.items()
                if not name.startswith("draw ")
            }
            form = em.dtype, ps.tasks, ps.images, self.result, tuple((n, leaf) for n, leaf in leaves.items())
            traces = self.recorded.traces
            if form not in traces:
                function = self.recorded.function(ps.images, self.result, em.dtype)
                draws = self.recorded.draws(ps.images)
                traces[form] = Traced(function, leaves, ps.tasks, em.device, draws)
            ps.saved[key] = traces[form], Expressions(em, given, self.name)
        found: tuple[Traced, Expressions] = ps.saved[key]
        return found

    # The rules

    def forward(self, em: Emitter, ps: Pass) -> None:
        with self._named():
            traced, expressions = self._expressions(em, ps)
            value = self._all(ps, expressions.emit([traced.value()])[0])
            if value.dtype.is_floating_point and value.dtype != em.dtype and not self.cut:
                raise Untraceable(f"computes in {value.dtype}, where the model does in {em.dtype}")
            ps.values[self.output] = value

    def tangent(self, em: Emitter, ps: Pass) -> None:
        with self._named():
            traced, expressions = self._expressions(em, ps)
            directions = self._directions(ps)
            term = traced.tangent({n: Leaf.of(r) for n, r in directions.items()})
            for name, ref in directions.items():
                expressions.give(f"t {name}", ref)
            ps.tangents[self.output] = self._all(ps, expressions.emit([term])[0])

    def _directions(self, ps: Pass) -> dict[str, Ref]:
        found: dict[str, Ref] = {}
        for name, source in self._sources().items():
            ref = ps.tangents.get(source) if isinstance(source, int) else ps.directions.get(source)
            if ref is not None:
                found[name] = self._task(ps, ref)
        return found

    def backward(self, em: Emitter, ps: Pass, gy: Ref, out: Gradients) -> None:
        self._backward(em, ps, gy, "gy", out)

    def _backward(self, em: Emitter, ps: Pass, gy: Ref, name: str, out: Gradients) -> None:
        with self._named():
            traced, expressions = self._expressions(em, ps)
            given = self._task(ps, gy)
            expressions.give(name, given)
            self._leave(em, ps, expressions, traced.gradients(Leaf.of(given), name), out)

    def backward_tangent(self, em: Emitter, ps: Pass, gy: Ref | None, gy_dot: Ref, out: Gradients) -> None:
        directions = self._directions(ps)
        if gy is None or not directions:
            self._backward(em, ps, gy_dot, "t gy", out)
            return
        with self._named():
            traced, expressions = self._expressions(em, ps)
            first, second = self._task(ps, gy), self._task(ps, gy_dot)
            for name, ref in {
                "gy": first,
                "t gy": second,
                **{f"t {n}": r for n, r in directions.items()},
            }.items():
                expressions.give(name, ref)
            leaves = {n: Leaf.of(r) for n, r in directions.items()}
            found = traced.second(leaves, Leaf.of(first), Leaf.of(second))
            self._leave(em, ps, expressions, found, out)

    def _leave(
        self, em: Emitter, ps: Pass, expressions: Expressions, found: Mapping[str, Term], out: Gradients
    ) -> None:
        """Emits the gradients that are wanted."""
        slots = {slot.name: slot for slot in self.adapting}
        wanted: list[tuple[int | str, Term]] = []
        for name, source in self._sources().items():
            asked = out.wanted_values if isinstance(source, int) else out.wanted_params
            if name in found and source in asked:
                wanted.append((source, found[name]))
        places: dict[int, Ref] = {}
        for i, (source, _) in enumerate(wanted):
            if isinstance(source, str) and source not in out.params:
                out.params[source] = out.of(em, slots[source], ps.tasks)
                places[i] = self._task(ps, out.params[source])
        refs = expressions.emit([term for _, term in wanted], places)
        for i, ((source, _), ref) in enumerate(zip(wanted, refs, strict=True)):
            if isinstance(source, int):
                out.add(source, self._all(ps, ref))
            elif i not in places:  # a tied parameter: gradients of its uses add up
                em.call(aten.add_.Tensor, out.params[source], self._all(ps, ref))

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Names the step where its operation cannot be traced."""
        try:
            yield
        except Untraceable as error:
            raise Unsupported(self.name, f"{self.recorded.name}: {error}") from error
