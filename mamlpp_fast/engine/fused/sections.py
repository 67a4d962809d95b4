"""The passes of a call as sections of one program: forward; backward and its derivative for each set of gradients.

A backward pass that wants the head's gradients alone is another list of calls than one that wants all; both read what
one forward pass left. As they are never taken after the same forward pass, they lie in the same memory.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamlpp_fast.engine.fused.expressions import Expressions
from mamlpp_fast.engine.fused.flat import Layout
from mamlpp_fast.engine.fused.moves import Moves
from mamlpp_fast.engine.fused.network import Network
from mamlpp_fast.engine.fused.passes import clear_missing, write_backward, write_forward, write_tangent
from mamlpp_fast.engine.fused.program import Emitter, Phase, Ref, Section
from mamlpp_fast.engine.fused.steps import Gradients, Pass
from mamlpp_fast.engine.fused.steps.base import aten

__all__ = ["EXAMPLES", "Form", "Part", "Place", "Sections", "input_name"]

EXAMPLES = ""
"""Among names of parameters: the examples, by which a call may be differentiated as well."""


def input_name(index: int) -> str:
    """Among names of buffers, none of which ends so: what is given beside the first input, from 1."""
    return f"{index}."


@dataclass(frozen=True)
class Form:
    """Of the calls that sections are written for.

    Attributes:
        network: lowered with all parameters as slots.
        names: of the parameters, and ``EXAMPLES`` where these take a gradient too: all that may be differentiated by.
        images: examples a call.
    """

    network: Network
    names: tuple[str, ...]
    images: int
    device: torch.device
    dtype: torch.dtype

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name != EXAMPLES)


class Sections:
    """A program of one form.

    Args:
        form: of the calls.
        parts: sets of names whose gradients a backward pass may be asked for, without the others.
    """

    def __init__(self, form: Form, parts: Sequence[frozenset[str]]) -> None:
        self.form = form
        self.parts = tuple(parts)
        self.free: defaultdict[int, list[Place]] = defaultdict(list)
        self.lanes = 0
        self._passages: dict[int, Passage] = {}
        network, images, dtype = form.network, form.images, form.dtype
        em = self._em = Emitter(form.device, dtype)
        shape = network.shapes[network.output]
        self.inputs = [
            self._own(
                "examples", 1, images, *network.shapes[i], dtype=dtype if kind.is_floating_point else kind
            )
            for i, kind in enumerate(network.inputs)
        ]
        self.x = self.inputs[0]
        slots = network.slots()
        layout = Layout(slots, list(form.parameters), 1, dtype)
        theta = self._own("parameters", layout.size)
        self.gy = self._own("gradient", 1, images, *shape)
        with em.passing():
            # Of the examples: their gradient, the direction that they move along, the gradient's derivative.
            self.beside: list[Ref] = []
            if EXAMPLES in form.names:
                self.beside = [em.new(f"{what} of the examples", self.x.shape) for what in "gds"]
            # How the output's gradient moves, and how the output does.
            self.gy_dot, self.moved = (em.new(what, (1, images, *shape)) for what in ("tangent", "moved"))
            self.flats = [em.new(name, (layout.size,)) for name in ("gradients", "directions", "second")]
        self.theta, self.grads, self.directions, self.seconds = map(layout.views, (theta, *self.flats))
        self.statistics: dict[str, tuple[Ref, Ref]] = {}
        for name in network.norms:
            channels = network.channels(name)
            mean, rstd = (self._own(f"{name} {what}", 1, channels) for what in ("mean", "rstd"))
            self.statistics[name] = mean, rstd
        self.buffers = {input_name(i): ref for i, ref in enumerate(self.inputs) if i > 0}
        for name, b in ((n, b) for step in network.steps for n, b in step.buffers.items()):
            kind = dtype if b.is_floating_point() else b.dtype
            self.buffers[name] = em.own(name, torch.zeros_like(b, dtype=kind), each=True)
        given = dict(enumerate(self.inputs))
        ps = Pass(1, images, 0, self.theta, {}, given, self.statistics, buffers=self.buffers)
        em.phase = Phase("forward")
        write_forward(em, network, ps)
        self.result = ps.values[network.output]
        em.keep()  # of the forward, for all that follow
        for i, wanted in enumerate(self.parts):
            with em.apart():
                self._part(i, wanted, _forked(ps))
        self.program = em.finish()

    def _own(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Ref:
        kind = self.form.dtype if dtype is None else dtype
        zeros = torch.zeros(shape, dtype=kind, device=self.form.device)
        return self._em.own(name, zeros, each=True)

    def _part(self, index: int, wanted: frozenset[str], ps: Pass) -> None:
        """The backward pass to these gradients, and the derivatives of them along directions by everything."""
        em, network, names = self._em, self.form.network, self.form.names
        begin = em.here()
        em.phase = Phase(f"backward {index}")
        values = _reaching(network, wanted)
        grads = {name: ref for name, ref in self.grads.items() if name in wanted}
        first = Gradients(values, wanted, memory=grads)
        write_backward(em, network, ps, self.gy, first, keep=True)
        clear_missing(em, first)
        if EXAMPLES in wanted:
            self._leave(first, 0)
        middle = em.here()
        with em.passing():
            em.phase = Phase(f"tangent {index}")
            ps.directions = {name: ref for name, ref in self.directions.items() if name in wanted}
            if EXAMPLES in wanted:
                ps.tangents[0] = self.beside[1]
            write_tangent(em, network, ps, values)
            if network.output in ps.tangents:
                em.call(aten.copy_.default, self.moved, ps.tangents[network.output])
            else:
                em.call(aten.zero_.default, self.moved)
            half = em.here()
            em.phase = Phase(f"second {index}")
            second = Gradients(_reaching(network, frozenset(names)), frozenset(names), memory=self.seconds)
            write_backward(em, network, ps, self.gy_dot, second, tangent=True)
            clear_missing(em, second)
            if self.beside:
                self._leave(second, 2)
        end = em.here()
        em.keep(begin, middle, end)
        gradients, directions, seconds = self.flats
        # What one pass leaves there is gone when the next begins: others have run in between.
        assert not em.names(middle, end, gradients, *self.beside[:1])
        assert not em.names(begin, middle, directions, seconds, self.gy_dot, self.moved, *self.beside[1:])
        em.alive(begin, middle, gradients, *self.beside[:1])
        em.alive(middle, end, directions, self.gy_dot, self.moved, *self.beside[1:2])
        em.alive(half, end, seconds, *self.beside[2:])

    def _leave(self, found: Gradients, place: int) -> None:
        """Leaves the examples' gradient in its place."""
        terms = found.terms.pop(0, [])
        if terms:
            self._em.call(
                aten.copy_.default, self.beside[place], self._em.sum("gradient of the examples", terms)
            )
        else:
            self._em.call(aten.zero_.default, self.beside[place])

    def take(self, passage: int) -> Place:
        """A place more, for those that use its passing memory one after the other."""
        # On a device streams may run on when their host's threads have taken turns.
        own = passage if self.form.device.type == "cpu" else -1 - self.lanes
        if own not in self._passages:
            self._passages[own] = Passage(self)
        place = Place(self, self.lanes, passage, self._passages[own])
        self.lanes += 1
        return place


def _reaching(network: Network, wanted: frozenset[str]) -> frozenset[int]:
    """Values whose gradient reaches any of these."""
    return network.depends(wanted, frozenset({0} if EXAMPLES in wanted else ()))


def _forked(ps: Pass) -> Pass:
    """A pass that goes on from another's forward, and leaves that as it is."""

    def own(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(v.fork() if isinstance(v, Expressions) else v for v in value)
        return value

    saved = {key: own(value) for key, value in ps.saved.items()}
    return replace(ps, values=dict(ps.values), tangents={}, grads={}, saved=saved)


class Part(NamedTuple):
    """Sections for one set of gradients: the backward pass, and its derivative in two halves.

    Attributes:
        tangent: from the directions to the output's derivative.
        second: from how the output's gradient moves to the derivatives of the gradients.
    """

    backward: Section
    tangent: Section
    second: Section


class Passage:
    """Memory that holds gradients until they are taken, and a double backward pass while it is under way.

    Places have it in common whose calls come one after the other, so that it is in the processor's cache.
    """

    def __init__(self, sections: Sections) -> None:
        nbytes, device = sections.program.passing_bytes, sections.form.device
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.taken = threading.Lock()


class Place:
    """One call's memory, and the sections on it.

    Attributes:
        number: of those that share its passage, among the lists of free places.
        busy: whether a backward pass has left values here that its own derivative reads.
        pending: the backward pass of autograd's, by its number, that has left the tangent pass of these gradients here,
            and what is to be added to the parameters' derivatives.
    """

    def __init__(self, sections: Sections, lane: int, number: int, passage: Passage) -> None:
        self.sections = sections
        self.number = number
        self._lane = lane
        self._within = False
        program, form = sections.program, sections.form
        memory = torch.empty(program.workspace_bytes, dtype=torch.uint8, device=form.device)
        program.lay(lane, memory)
        self.forward = program.section("forward", lane)
        self.x, *others = (ref.tensor(lane)[0] for ref in sections.inputs)
        self.parameters = self._moves(sections.theta)
        self.result, self.gy = sections.result.tensor(lane)[0], sections.gy.tensor(lane)[0]
        self._go_through(passage)
        self.statistics = {
            n: (m.tensor(lane)[0], r.tensor(lane)[0]) for n, (m, r) in sections.statistics.items()
        }
        self.buffers = {name: ref.tensor(lane) for name, ref in sections.buffers.items()}
        for i, t in enumerate(others, 1):  # with the axes that they have in the model
            self.buffers[input_name(i)] = t.permute(0, 3, 1, 2) if t.ndim == 4 else t
        self.busy = False
        self.pending: tuple[int, frozenset[str], Sequence[Tensor | None] | None] | None = None

    def _moves(self, refs: Mapping[str, Ref]) -> Moves:
        form = self.sections.form
        slots = [form.network.slots()[name] for name in form.parameters]
        return Moves(slots, [slot.arranged(refs[slot.name].tensor(self._lane)[0]) for slot in slots])

    def _go_through(self, passage: Passage) -> None:
        """Binds what is passing, and the calls on it, to this memory."""
        sections, lane = self.sections, self._lane
        self._passage, program = passage, sections.program
        self._native: Any = None
        program.pass_through(lane, passage.memory)
        self.of = {
            wanted: Part(
                *(program.section(f"{what} {i}", lane) for what in ("backward", "tangent", "second"))
            )
            for i, wanted in enumerate(sections.parts)
        }
        self.beside = [ref.tensor(lane)[0] for ref in sections.beside]
        self.gradients, self.directions = self._moves(sections.grads), self._moves(sections.directions)
        self.seconds = self._moves(sections.seconds)
        self.gy_dot, self.moved = sections.gy_dot.tensor(lane)[0], sections.moved.tensor(lane)[0]
        flats = (ref.tensor(lane) for ref in sections.flats)
        self.flat_gradients, self.flat_directions, self.flat_seconds = flats

    @property
    def native(self) -> Any:
        """The native library's object that makes all gradients here, to run beside others; None where there is none."""
        if self._native is None:
            moves = [m.native for m in (self.parameters, self.directions, self.gradients, self.seconds)]
            sections = [s.listed for s in (self.forward, *self.whole)]
            if not any(part is None for part in (*moves, *sections)):
                places = [self.result, self.gy, self.gy_dot, self.moved, *self.inputs]
                self._native = torch.classes.mamlpp_fast.Lane(moves, sections, places)
        return self._native

    @property
    def inputs(self) -> list[Tensor]:
        """Where the examples and the buffers lie."""
        return [self.x, *(self.buffers[name] for name in self.sections.buffers)]

    def enter(self) -> None:
        """Before a pass that uses what is passing: nobody else does until :meth:`leave`.

        Where somebody does, in another thread or between the halves of a double backward pass, the place has such
        memory of its own from now on.
        """
        if self._within:
            return
        if not self._passage.taken.acquire(blocking=False):
            self._go_through(Passage(self.sections))
            self._passage.taken.acquire()
        self._within = True

    def leave(self) -> None:
        """After the last that is read of what is passing, or when nobody will."""
        if self._within:
            self._within = False
            self._passage.taken.release()

    def passes_with(self, other: Place) -> bool:
        """Whether both have what is passing in the same memory, which this one has entered."""
        same = self.sections is other.sections and self._passage is other._passage
        return same and self._within and other is not self

    def hand_to(self, other: Place) -> None:
        """Leaves to another place, of those that it passes with, what lies there."""
        self._within, other._within = False, True

    @property
    def whole(self) -> Part:
        """The sections for all gradients."""
        return self.of[self.sections.parts[0]]
