"""Expressions as calls of a program: what :mod:`mamlpp_fast.engine.fused.tracing` wrote down, on named buffers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from mamlpp_fast.engine.fused.operators import packet_of
from mamlpp_fast.engine.fused.program import Copied, Emitter, Ref
from mamlpp_fast.engine.fused.steps.layout import inverse, viewed
from mamlpp_fast.engine.fused.tracing import Form, Node, Term

__all__ = ["Expressions"]

aten = torch.ops.aten
_Results = tuple[Ref | None, ...]

_COPIES = frozenset({aten.clone.default, aten._to_copy.default})


class Expressions:
    """The expressions of one operation in one pass: each node is emitted once, when it is first needed.

    Args:
        em: writes the program.
        given: leaves by name.
        name: of the buffers.
    """

    def __init__(self, em: Emitter, given: Mapping[str, Ref], name: str) -> None:
        self._em = em
        self._given = dict(given)
        self._name = name
        self._made: dict[Node, _Results] = {}

    def fork(self) -> Expressions:
        """One that goes on from what is there, and leaves this as it is."""
        other = Expressions(self._em, self._given, self._name)
        other._made = dict(self._made)
        return other

    def give(self, name: str, ref: Ref) -> None:
        """A further leaf."""
        self._given[name] = ref

    def emit(self, terms: Sequence[Term], places: Mapping[int, Ref] | None = None) -> list[Ref]:
        """The values of terms.

        Args:
            terms: what is wanted.
            places: where some of them, by number, are to be left.
        """
        places = places or {}
        into: dict[Term, Ref] = {}
        # Of equal terms one is sent; the buffer of all gradients is one, and tells no places apart.
        sent = {i for i, place in places.items() if self._send(terms[i], place, into)}
        for node in self._missing(terms):
            self._made[node] = self._results(node, into)
        found = []
        for i, term in enumerate(terms):
            ref = self._ref(term)
            if i in places and not (i in sent and self._arrived(term, into)):
                self._em.call(aten.copy_.default, places[i], ref)
                ref = places[i]
            found.append(ref)
        return found

    def _missing(self, terms: Sequence[Term]) -> list[Node]:
        """Nodes that are needed and not there, in order."""
        needed: set[Node] = set()
        ahead = [t.source for t in terms if isinstance(t.source, Node)]
        while ahead:
            node = ahead.pop()
            if node in needed or node in self._made:
                continue
            needed.add(node)
            ahead += [t.source for t in node.terms if isinstance(t.source, Node)]
        return sorted(needed, key=lambda node: node.index)

    def _ref(self, term: Term) -> Ref:
        if isinstance(term.source, str):
            return self._given[term.source]
        ref = self._made[term.source][term.result]
        assert ref is not None
        return ref

    # Places

    def _send(self, term: Term, place: Ref, into: dict[Term, Ref]) -> bool:
        """Has the node behind views of its result, of all its elements, leave it where the views are to lie.

        False where it cannot, or leaves it in another place.
        """
        while isinstance(term.source, Node) and term.source.is_view:
            back = _back(term.source)
            source = next(iter(term.source.terms), None)
            if back is None or source is None:
                return False
            try:
                place = place.view(back)
            except RuntimeError:
                return False
            term = source
        if not isinstance(term.source, Node) or term.source in self._made or term in into:
            return False
        into[term] = place
        return True

    def _arrived(self, term: Term, into: Mapping[Term, Ref]) -> bool:
        """Whether the node behind a term's views had a place, which is so its own."""
        while term not in into and isinstance(term.source, Node) and term.source.is_view:
            source = next(iter(term.source.terms), None)
            if source is None:
                return False
            term = source
        return term in into and self._ref(term) is into[term]

    # Calls

    def _results(self, node: Node, into: Mapping[Term, Ref]) -> _Results:
        if node.fill is not None:
            return tuple(None if f is None else self._filled(node.fill, f) for f in node.forms)
        args, kwargs = self._arguments(node)
        if node.is_view:
            return self._views(node, args, kwargs)
        if Term(node) not in into and (repeated := self._repeated(node, args, kwargs)) is not None:
            return (repeated,)
        outs: list[Ref | None] = [
            None if f is None else into.get(Term(node, i)) or self._new(node, f)
            for i, f in enumerate(node.forms)
        ]
        if node.op in _COPIES or node.op is aten.copy.default:
            source, form = args[1] if node.op is aten.copy.default else args[0], node.forms[0]
            kept = node.op is aten.clone.default and form is not None and source.stride() == form.strides
            if kept and Term(node) not in into:
                return (source,)  # nothing is changed in place, so that a copy is the same
            self._em.call(aten.copy_.default, outs[0], source)
            return tuple(outs)
        self._call(node, args, kwargs, outs)
        return tuple(outs)

    def _call(
        self, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any], outs: Sequence[Ref | None]
    ) -> None:
        target = _out_overload(node.op)
        if target is None or any(o is None for o in outs):
            self._em.call(Copied(node.op), *args, list(outs), **kwargs)
        else:
            op, names = target
            places: dict[str, Any] = dict(zip(names, outs, strict=True))
            self._em.call(op, *args, **kwargs, **places)

    def _repeated(self, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Ref | None:
        """What is computed element by element of operands that repeat along an axis: once, in a view that repeats.

        The gradient of a mean over a sequence is so as large as one element of it. None where nothing repeats.
        """
        form, copies = node.forms[0], node.op in _COPIES or node.op is aten.copy.default
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, Ref)]
        if torch.Tag.pointwise not in node.op.tags or copies or len(node.forms) > 1 or form is None:
            return None
        axes = [  # from the last, 1, as they are broadcast
            axis
            for axis in range(1, len(form.shape) + 1)
            if given and form.shape[-axis] > 1 and all(_repeats(ref, axis) for ref in given)
        ]
        if not axes:
            return None

        def one(value: Any) -> Any:
            if not isinstance(value, Ref):
                return value
            own = [axis for axis in axes if axis <= len(value.shape)]
            return functools.reduce(lambda r, axis: r.view(lambda t: t.narrow(-axis, 0, 1)), own, value)

        shape = [1 if len(form.shape) - i in axes else n for i, n in enumerate(form.shape)]
        out = self._em.new(f"{self._name} {packet_of(node.op)}", shape, form.dtype)
        self._call(node, [one(a) for a in args], {n: one(a) for n, a in kwargs.items()}, [out])
        return out.view(lambda t: t.expand(form.shape))

    def _arguments(self, node: Node) -> tuple[list[Any], dict[str, Any]]:
        """By the schema: what stands for a tensor is one, what stands for a real number likewise."""
        schema = node.op._schema.arguments
        args = [self._argument(v, a) for v, a in zip(node.args, schema, strict=False)]
        named = {a.name: a for a in schema}
        return args, {n: self._argument(v, named[n]) for n, v in node.kwargs.items()}

    def _argument(self, value: Any, schema: Any) -> Any:
        kind = str(schema.type).removeprefix("Optional[").removesuffix("]")
        if isinstance(value, Term):
            return self._ref(value)
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            return [self._ref(v) if isinstance(v, Term) else v for v in value]
        if kind == "Tensor" and isinstance(value, (bool, int, float)):
            return self._number(value)
        if kind == "float" and isinstance(value, int):
            return float(value)
        return list(value) if isinstance(value, torch.Size) else value

    def _views(self, node: Node, args: list[Any], kwargs: dict[str, Any]) -> _Results:
        op = aten.view.default if node.op is aten._unsafe_view.default else node.op
        if node.op is aten.lift_fresh_copy.default:
            return (args[0],)
        rest = args[1:]
        single = len(op._schema.returns) == 1 and str(op._schema.returns[0].type) == "Tensor"

        def view(t: Tensor, i: int) -> Tensor:
            made = op(t, *rest, **kwargs)
            part: Tensor = made if single else made[i]
            return part

        name = f"{self._name} {packet_of(op)}"
        return tuple(
            None if f is None else viewed(self._em, args[0], functools.partial(view, i=i), name)
            for i, f in enumerate(node.forms)
        )

    def _new(self, node: Node, form: Form) -> Ref:
        """A buffer with strides in the order of those that torch would give it."""
        order = sorted(range(len(form.shape)), key=lambda i: (-form.strides[i], i))
        stored = [form.shape[i] for i in order]
        ref = self._em.new(f"{self._name} {packet_of(node.op)}", stored, form.dtype)
        if order == list(range(len(order))):
            return ref
        return ref.view(lambda t: t.permute(inverse(order)))

    def _filled(self, number: int, form: Form) -> Ref:
        return self._number(number, form.dtype).view(lambda t: t.expand(form.shape))

    def _number(self, value: float, dtype: torch.dtype | None = None) -> Ref:
        em = self._em
        if dtype is None:
            dtype = em.dtype if isinstance(value, float) else torch.tensor(value).dtype
        if dtype == em.dtype:
            return em.constant(float(value))
        return em.once(
            ("number", value, dtype),
            lambda: em.own(f"{value}", torch.tensor(value, dtype=dtype, device=em.device)),
        )


def _repeats(ref: Ref, axis: int) -> bool:
    """Whether all elements along an axis, counted from the last, are one."""
    return axis > len(ref.shape) or ref.shape[-axis] == 1 or ref.stride()[-axis] == 0


def _back(node: Node) -> Callable[[Tensor], Tensor] | None:
    """The inverse of a view that has all elements of its argument; None for others."""
    op, args = node.op, node.args
    source = node.terms[0]
    if op is aten.t.default:
        return lambda t: t.t()
    if op is aten.transpose.int:
        return lambda t: t.transpose(args[1], args[2])
    if op is aten.permute.default:
        order = [a % len(args[1]) for a in args[1]]
        return lambda t: t.permute(inverse(order))
    whole = {aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.alias.default}
    whole |= {aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.detach.default}
    if op in whole and isinstance(source.source, Node):
        form = source.source.forms[source.result]
        return None if form is None else lambda t: t.view(form.shape)
    return None


@functools.cache
def _out_overload(op: OpOverload) -> tuple[OpOverload, tuple[str, ...]] | None:
    """The overload that writes its results to memory that is given, and the names of these arguments."""
    wanted = [(a.name, str(a.type)) for a in op._schema.arguments]
    # Some results of the former are none; the latter put all terms in their output first, and make it larger for that.
    if {"output_mask", "reduction"}.intersection(name for name, _ in wanted):
        return None
    for name in op.overloadpacket.overloads():
        other: OpOverload = getattr(op.overloadpacket, name)
        outs = [a for a in other._schema.arguments if a.is_out]
        rest = [(a.name, str(a.type)) for a in other._schema.arguments if not a.is_out]
        if (
            outs
            and rest == wanted
            and len(outs) == len(op._schema.returns)
            and all(str(a.type) == "Tensor" for a in outs)
        ):
            return other, tuple(a.name for a in outs)
    return None
