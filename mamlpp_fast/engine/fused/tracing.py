"""What torch's autograd executes for an operation, as expressions of plain operators.

The rules of a generic step are ``torch.func``'s: ``vjp`` of the operation, and ``jvp`` of that, over tasks by ``vmap``.
They run once, on examples, while a dispatch mode underneath writes down the operators that they come to. (Not on
tensors without memory: forward mode makes of some of those tensors without a device, torch 2.13.)
What is written down makes no use of autograd any more: calls on buffers, like those of every other step.

Equal expressions are one :class:`Node`, in whichever trace of an operation they occur: what the forward has computed is
found again by the backward rules, and what no result needs is never emitted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.func import jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from mamlpp_fast._compiler import lean_mode, lean_vjp
from mamlpp_fast._modes import quiet
from mamlpp_fast.engine.executions import Draw, draws, sized_by_values
from mamlpp_fast.engine.fused.operators import (
    FILLS,
    PLACED,
    SAME,
    SUMS,
    alias_of,
    functional,
    packet_of,
    vanishes,
)
from mamlpp_fast.engine.fused.program import Ref
from mamlpp_fast.machine import release_memory
from mamlpp_fast.reference import math_attention

__all__ = ["Form", "Leaf", "Node", "Term", "Traced", "Untraceable", "draw_leaf"]

aten = torch.ops.aten


# Elements of examples: what they leave the C library keeps, trace after trace, which came to four times as much.
_LARGE = 2**18


class Untraceable(Exception):
    """The operators of an operation cannot be written down; the text says why."""


class Form(NamedTuple):
    """What is known of a tensor without its values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, t: Tensor | Ref) -> Form:
        return cls(tuple(t.shape), tuple(t.stride()), t.dtype)

    @property
    def repeats(self) -> bool:
        """Whether elements share their memory."""
        return any(n > 1 and s == 0 for n, s in zip(self.shape, self.strides, strict=True))


class Leaf(NamedTuple):
    """What an expression is made of.

    Attributes:
        form: without the axis of tasks where ``shared``.
        shared: by all tasks.
        smooth: whether gradients with respect to it may be asked for.
    """

    form: Form
    shared: bool = False
    smooth: bool = False

    @classmethod
    def of(cls, ref: Ref, *, shared: bool = False, smooth: bool = False) -> Leaf:
        return cls(Form.of(ref), shared, smooth)


@dataclass(frozen=True, eq=False)
class Node:
    """A call of an operator.

    Attributes:
        index: nodes it is made of have lower ones.
        op: the operator, which changes none of its arguments.
        args, kwargs: with :class:`Term` in the places of tensors.
        forms: of its results, None where it leaves one out.
    """

    index: int
    op: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    forms: tuple[Form | None, ...]

    @property
    def fill(self) -> int | None:
        """The number that all elements of its result are, where that is plain."""
        return FILLS.get(self.op)

    @property
    def is_view(self) -> bool:
        """Whether its results lie in the memory of its first argument."""
        return self.op in SAME or alias_of(self.op)

    @functools.cached_property
    def terms(self) -> tuple[Term, ...]:
        """What it reads; nothing where it reads sizes alone."""
        if self.fill is not None:
            return ()
        leaves = tree_leaves((self.args, self.kwargs), is_leaf=_is_term)
        return tuple(leaf for leaf in leaves if isinstance(leaf, Term))


class Term(NamedTuple):
    """A leaf by its name, or a result of a node by its number."""

    source: str | Node
    result: int = 0

    @property
    def zero(self) -> bool:
        return isinstance(self.source, Node) and self.source.fill == 0


def _is_term(value: Any) -> bool:
    return isinstance(value, Term)


@dataclass
class Table:
    """The nodes of one operation's expressions, each once."""

    nodes: dict[Any, Node] = field(default_factory=dict)

    def node(
        self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], forms: tuple[Form | None, ...]
    ) -> Node:
        key = op, _frozen(args), _frozen(kwargs)
        if op in FILLS:  # by what it makes, whatever it was made like
            key = op, forms, ()
        if key not in self.nodes:
            self.nodes[key] = Node(len(self.nodes), op, args, kwargs, forms)
        return self.nodes[key]


def _frozen(value: Any) -> Any:
    if isinstance(value, Term):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    return type(value), value  # 1, 1.0 and True are equal, what is computed with them is not


_DRAW = "draw "


def draw_leaf(number: int) -> str:
    """Name of the leaf that an operation's draw of this number is."""
    return f"{_DRAW}{number}"


@lean_mode
class _Tracer(TorchDispatchMode):
    """Writes nodes into a table for what is executed on tensors that are known.

    Args:
        table: of the nodes.
        draws: what may be drawn, in this order, with the axis of tasks.

    Attributes:
        drawn: how many of them were.
    """

    def __init__(self, table: Table, draws: Sequence[Draw] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.table = table
        self.drawn = 0
        self._draws = draws
        self._terms: dict[int, Term] = {}
        self._alive: list[Tensor] = []  # an id is a tensor's own only while it lives
        self._aliased: set[int] = set()
        self._absent: set[int] = set()

    def know(self, t: Tensor, term: Term) -> None:
        self._terms[id(t)] = term
        self._alive.append(t)

    def term(self, t: Tensor) -> Term:
        if id(t) not in self._terms:
            raise Untraceable("computes with a tensor that comes from nowhere")
        return self._terms[id(t)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (draw := Draw.of(func, args, kwargs)) is not None:
            return self._draw(func, args[0], draw)
        # Zeros without memory, as of forward mode, end the process in some operators (`mul.Scalar`, torch 2.13).
        call = aten.zeros.default if func is aten._efficientzerotensor.default else func
        result = call(*args, **kwargs)
        made, _ = tree_flatten(result)
        if not any(isinstance(t, Tensor) for t in made):
            if torch.Tag.data_dependent_output in func.tags:
                raise Untraceable(f"{packet_of(func)} asks for values")
            return result
        if sized_by_values(func, args):
            raise Untraceable(f"{packet_of(func)} gives as many elements as its values say")
        if draws(func, args, kwargs):
            raise Untraceable(f"{packet_of(func)} draws random numbers")
        if packet_of(func).startswith(PLACED):
            raise Untraceable(f"{packet_of(func)} asks where its argument lies in memory")
        changed = self._changed(func, args, kwargs)
        if changed is not None:
            if (given := functional(func)) is None:
                raise Untraceable(f"{packet_of(func)} changes its argument")
            func = given
        terms, named = tree_map(lambda a: self.term(a) if isinstance(a, Tensor) else a, (tuple(args), kwargs))
        forms = tuple(Form.of(t) if isinstance(t, Tensor) else None for t in made)
        absent = func is aten._efficientzerotensor.default or vanishes(
            func, [id(a) in self._absent for a in args]
        )
        if alias_of(func):
            self._aliased.update(id(t) for t in (*made, args[0]) if isinstance(t, Tensor))
        if (kept := self._summand(func, args, kwargs, forms[0])) is not None:
            func, terms, named = aten.clone.default, (terms[kept],), {}
        node = None if absent else self.table.node(func, terms, named, forms)
        for i, t in enumerate(made if changed is None else [changed]):
            if not isinstance(t, Tensor):
                continue
            if node is None:
                self._absent.add(id(t))
                self.know(t, Term(self.table.node(aten.zeros.default, (), {}, forms[i : i + 1])))
            else:
                self._absent.discard(id(t))
                self.know(t, Term(node, i))
        return result

    def _summand(
        self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], form: Form | None
    ) -> int | None:
        """The number of the operand that a sum is, the other being zeros that stand for no derivative."""
        if func not in SUMS or form is None:
            return None
        first = func is aten.add.Tensor and kwargs.get("alpha", 1) == 1
        for kept, other in ((0, 1), (1, 0))[: 1 + first]:
            t = args[kept]
            alike = isinstance(t, Tensor) and (tuple(t.shape), t.dtype) == (form.shape, form.dtype)
            if alike and id(args[other]) in self._absent:
                return kept
        return None

    def _draw(self, func: OpOverload, t: Tensor, draw: Draw) -> Tensor:
        """The next draw, which is a leaf, in a trace with ones; axes of one may be others than in the forward.

        (Of attention without heads torch 2.14 makes one up.)
        """
        expected = self._draws[self.drawn : self.drawn + 1]
        if draw.by_values or [d.numbers for d in expected] != [draw.numbers]:
            raise Untraceable(f"{packet_of(func)} draws random numbers")
        if func._schema.is_mutable and (id(t) in self._aliased or isinstance(self.term(t).source, str)):
            raise Untraceable(f"{packet_of(func)} writes to memory that has another name too")
        ones = t.fill_(1) if func._schema.is_mutable else torch.ones_like(t)
        term = Term(draw_leaf(self.drawn))
        if expected[0].shape != draw.shape:
            term = Term(self.table.node(aten.view.default, (term, draw.shape), {}, (Form.of(ones),)))
        self.know(ones, term)
        self.drawn += 1
        return ones

    def _changed(self, func: OpOverload, args: Any, kwargs: Any) -> Tensor | None:
        """The argument that a call changes, whose name alone its memory has."""
        if not func._schema.is_mutable:
            return None
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        changed = [
            given[a.name]
            for a in func._schema.arguments
            if a.alias_info is not None and a.alias_info.is_write
        ]
        if len(changed) != 1 or changed[0] is not args[0]:
            raise Untraceable(f"{packet_of(func)} writes to memory that is given")
        source = self.term(args[0]).source
        given = isinstance(source, str) and not source.startswith(_DRAW)
        if id(args[0]) in self._aliased or given:
            raise Untraceable(f"{packet_of(func)} writes to memory that has another name too")
        target: Tensor = args[0]
        return target


_Given = Mapping[str, Tensor]
_Tensors = tuple[Tensor, ...]
_Several = Callable[[_Given], _Tensors]
Function = Callable[[_Given], Tensor]
Gradients = dict[str, Term]


class Traced:
    """An operation on leaves of given forms, and its derivatives, as expressions.

    Args:
        function: from tensors by name, of one task, to one tensor.
        leaves: those names; per task [T, ...] unless shared.
        tasks: T. One task is traced without its axis: leaves and results have none.
        device: of the tensors.
        draws: what the function draws in one task, in order: leaves of :func:`draw_leaf`, of every task its own.

    Raises:
        Untraceable: by the methods.
    """

    def __init__(
        self,
        function: Function,
        leaves: Mapping[str, Leaf],
        tasks: int,
        device: torch.device,
        draws: Sequence[Draw] = (),
    ) -> None:
        self.function = function
        self.leaves = leaves
        self.tasks = tasks
        self.device = device
        self.smooth = [name for name, leaf in leaves.items() if leaf.smooth]
        lead = (tasks,) if tasks > 1 else ()
        self._draws = [dataclasses.replace(draw, shape=(*lead, *draw.shape)) for draw in draws]
        self._table = Table()
        self._found: dict[Any, list[Term]] = {}

    def value(self) -> Term:
        """The result."""

        def plain(given: _Given) -> _Tensors:
            return (self.function(given),)

        # As the backward rules, which so find its nodes.
        return self._once("value", self._watched if self.smooth else plain, self.leaves)[0]

    def gradients(self, gy: Leaf, name: str) -> Gradients:
        """The gradients of the smooth leaves for that of the result, a leaf ``name``; without those that are zero."""

        def pulled(given: _Given) -> _Tensors:
            return self._pull(given)[1](given[name])

        found = self._once(("gradients", name, gy), pulled, {**self.leaves, name: gy})
        return self._nonzero(found)

    def tangent(self, directions: Mapping[str, Leaf]) -> Term:
        """The derivative of the result along directions of some smooth leaves.

        Args:
            directions: leaves by the name of the leaf that they are the direction of; they are called ``"t NAME"``.
        """
        return self._along("tangent", self._watched, list(directions), directions, {})[0]

    def second(self, directions: Mapping[str, Leaf], gy: Leaf, gy_dot: Leaf) -> Gradients:
        """The derivatives of the gradients along directions, likewise.

        Args:
            directions: see :meth:`tangent`.
            gy: the gradient of the result, a leaf ``"gy"``.
            gy_dot: its derivative, a leaf ``"t gy"``.
        """

        def gradients(given: _Given) -> _Tensors:
            return self._pull(given)[1](given["gy"])

        beside = {"gy": gy, "t gy": gy_dot}
        found = self._along("second", gradients, [*directions, "gy"], directions, beside)
        return self._nonzero(found)

    def _watched(self, given: _Given) -> _Tensors:
        return (self._pull(given)[0],)

    def _pull(self, given: _Given) -> tuple[Tensor, Callable[[Tensor], _Tensors]]:
        def function(*xs: Tensor) -> Tensor:
            return self.function({**given, **dict(zip(self.smooth, xs, strict=True))})

        return lean_vjp(function, *(given[name] for name in self.smooth))

    def _along(
        self,
        what: str,
        function: _Several,
        moving: Sequence[str],
        directions: Mapping[str, Leaf],
        beside: Mapping[str, Leaf],
    ) -> list[Term]:
        """The derivative of ``function`` along the leaves ``"t NAME"`` of the names in ``moving``."""
        leaves = {**self.leaves, **beside, **{f"t {n}": d for n, d in directions.items()}}

        # Forward mode copies a direction into the form of what moves, which may be one that no copy fits in.
        pairs = ((n, leaves[n].form, leaves[f"t {n}"].form) for n in moving)
        repeated = {n for n, form, own in pairs if form.repeats and form.strides != own.strides}

        def moved(given: _Given) -> tuple[Callable[..., _Tensors], _Tensors, _Tensors]:
            given = {n: _dense(t) if n in repeated else t for n, t in given.items()}
            primals, tangents = (tuple(given[before + n] for n in moving) for before in ("", "t "))
            return lambda *xs: function({**given, **dict(zip(moving, xs, strict=True))}), primals, tangents

        def forward(given: _Given) -> _Tensors:
            derivatives: _Tensors = jvp(*moved(given))[1]
            return derivatives

        def twice(given: _Given) -> _Tensors:
            # Jᵀw is linear in w, so that its transpose is J, whatever w is.
            fn, primals, tangents = moved(given)
            results, pull = lean_vjp(fn, *primals)
            _, push = lean_vjp(pull, tuple(torch.zeros_like(r) for r in results))
            derivatives: _Tensors = push(tangents)[0]
            return derivatives

        key = what, tuple(leaves.items())
        try:
            return self._once(key, forward, leaves)
        except NotImplementedError as first:  # an operator without a formula for forward mode
            try:
                return self._once(key, twice, leaves)
            except NotImplementedError:
                raise Untraceable(str(first).splitlines()[0]) from first

    def _nonzero(self, found: Sequence[Term]) -> Gradients:
        return {name: term for name, term in zip(self.smooth, found, strict=True) if not term.zero}

    def _once(self, key: Any, fn: _Several, leaves: Mapping[str, Leaf]) -> list[Term]:
        if key not in self._found:
            self._found[key] = self._trace(fn, leaves)
            if sum(math.prod(leaf.form.shape) for leaf in leaves.values()) >= _LARGE:
                release_memory()
        return self._found[key]

    def _trace(self, fn: _Several, leaves: Mapping[str, Leaf]) -> list[Term]:
        """The results of ``fn`` as terms; task by task where ``vmap`` cannot."""
        first: Exception | None = None
        for mapped in (True, False) if self.tasks > 1 else (False,):
            try:
                return self._traced(fn, leaves, mapped)
            except NotImplementedError:
                raise
            except Exception as error:  # whatever an operator has against being traced
                first = error
        assert first is not None
        raise Untraceable(str(first).splitlines()[0] if str(first) else type(first).__name__) from first

    def _traced(self, fn: _Several, leaves: Mapping[str, Leaf], mapped: bool) -> list[Term]:
        names = list(leaves)

        def one(*tensors: Tensor) -> _Tensors:
            return fn(dict(zip(names, tensors, strict=True)))

        def each(*tensors: Tensor) -> _Tensors:
            tasks = [
                one(*(t if leaves[n].shared else t[i] for n, t in zip(names, tensors, strict=True)))
                for i in range(self.tasks)
            ]
            return tuple(torch.stack(parts) for parts in zip(*tasks, strict=True))

        run: Callable[..., _Tensors] = one
        if self.tasks > 1:
            axes = tuple(None if leaf.shared else 0 for leaf in leaves.values())
            run = vmap(one, in_dims=axes, randomness="different") if mapped else each
        tracer = _Tracer(self._table, self._draws)
        # Where vmap has no rule it warns, and goes task by task through operators that are seen all the same.
        # With gradients: without, some formulas (of `linalg.solve`) are such as have no right derivative.
        with quiet(), math_attention(), torch.enable_grad():
            given = [_example(leaf.form, self.device) for leaf in leaves.values()]
            for name, t in zip(names, given, strict=True):
                tracer.know(t, Term(name))
            with tracer:
                results = run(*given)
            if tracer.drawn != len(self._draws):
                raise Untraceable("draws other random numbers than its forward")
            return [tracer.term(t) for t in results]


def _dense(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def _example(form: Form, device: torch.device) -> Tensor:
    """A tensor of this form whose values do no harm: between 0.25 and 0.75, or the number 0 of a token."""
    span = max(1, 1 + sum((n - 1) * s for n, s in zip(form.shape, form.strides, strict=True)))
    memory = torch.zeros(span, dtype=form.dtype, device=device)
    if form.dtype.is_floating_point:
        # Of golden ratios: no two alike, no matrix of them singular.
        ratios = torch.arange(span, dtype=torch.float64, device=device).mul_(0.618034)
        memory.copy_(ratios.frac_().div_(2).add_(0.25))
    return memory.as_strided(form.shape, form.strides)
