"""Passes of a call that stands for several tasks: where each task's lie, and what is done there, side by side.

What goes through the levels of ``torch.func`` beside tensors (:mod:`mamlpp_fast.engine.fused.transforms`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamlpp_fast.engine import lanes
from mamlpp_fast.engine.fused.derivatives import Lease
from mamlpp_fast.engine.fused.differentiable import DifferentiableNetwork
from mamlpp_fast.engine.fused.sections import Place

__all__ = ["Call", "Run", "Use", "Work"]


class Work(NamedTuple):
    """What is to be done for a task in its place, in this order; what is empty or None is left out.

    Attributes:
        inputs, parameters: are copied in for a forward pass.
        gy: of the output, for a backward pass.
        directions: of the parameters, for how the output moves along them.
        moves: how ``gy`` does, for the derivative of the backward pass.
        out: takes the output; with directions, how that moves.
        own: take the gradients; where ``gy`` moves, their derivatives.
    """

    inputs: Sequence[Tensor] = ()
    parameters: Sequence[Tensor] = ()
    gy: Tensor | None = None
    directions: Sequence[Tensor | None] = ()
    moves: Tensor | None = None
    out: Tensor | None = None
    own: Sequence[Tensor | None] = ()

    def run(self, place: Place) -> None:
        """By the calling thread."""
        if self.inputs:
            torch._foreach_copy_(place.inputs, list(self.inputs))
            place.parameters.load(self.parameters)
            place.forward()
        if self.gy is not None:
            place.gy.copy_(self.gy)
            place.whole.backward()
        if self.directions:
            place.directions.load(self.directions)
            place.whole.tangent()
        if self.moves is not None:
            place.gy_dot.copy_(self.moves)
            place.whole.second()
        if self.out is not None:
            self.out.copy_(place.moved if self.directions else place.result)
        if self.own:
            (place.gradients if self.moves is None else place.seconds).give(self.own)


class _State:
    """Places of so many tasks with a forward pass in them.

    Attributes:
        held: the mark of the backward pass whose values lie there, or of that one's derivative that is half made.
    """

    def __init__(self, net: DifferentiableNetwork, tasks: int) -> None:
        self.net = net
        self.tasks = tasks
        self.leases = [Lease(net, task) for task in range(tasks)]
        self.held: object = None
        self._team: tuple[Any, list[Any]] = None, []

    def each(self, works: Iterable[Work], mark: object = None, *, half: bool = False) -> None:
        """Does the work of every task: side by side where there are threads.

        Args:
            mark: what is ``held`` afterwards.
            half: what is passing stays for a second half, which is one if ``held`` is still that mark then.
        """
        self.held = None
        places = [lease.place for lease in self.leases]
        for place in places:
            place.enter()
        try:
            self._each(works, places)
            self.held = mark
        finally:
            if not half or self.held is None:
                for place in places:
                    place.leave()

    def _each(self, works: Iterable[Work], places: Sequence[Place]) -> None:
        if self.tasks > 1 and not lanes.here():
            own = [place.native for place in places]
            if not any(lane is None for lane in own):
                team, joined = self._team
                # Another than before where a place got other memory on entering.
                if not joined or not all(map(is_, joined, own)):
                    team = torch.classes.mamlpp_fast.Team(own)
                    self._team = team, own
                for i, work in enumerate(works):
                    team.add(i, *work)
                team.run(lanes.NEVER.flag)
                return
        for work, place in zip(works, places, strict=True):
            work.run(place)


class Call:
    """One call of the model; ``state`` is where its forward pass lies.

    Attributes:
        pending: by the number of autograd's pass that is under way, a derivative of a backward pass that is half made:
            its use, cotangents and gradient of the output. The call's own node makes the other half.
    """

    def __init__(self, net: DifferentiableNetwork) -> None:
        self.net = net
        self.state: _State | None = None
        self.pending: dict[int, tuple[Use, list[Tensor], Tensor]] = {}


class Run:
    """One backward pass of a call, or the first half of its derivative; ``state`` is where its values were left.

    Attributes:
        mark: what ``held`` of a state is where they still lie there; not the run itself, which would hold itself.
    """

    def __init__(self) -> None:
        self.mark = object()
        self.state: _State | None = None


@dataclass(frozen=True)
class Use:
    """What the operations below have beside tensors, the same object at every level but for what ``vmap`` changes.

    Attributes:
        tasks: T, of all levels of ``vmap`` that lie above; 0 above of which there is none, and no axis of tasks.
        many: of x, the buffers and the parameters: which of them have an axis of T tasks in front.
        run: the backward pass that is meant.
        along: of the parameters' gradients, which have a cotangent.
        moved: the first half of that one's derivative along them.
        wanted: of the parameters, for which there is a result.
    """

    call: Call
    tasks: int
    many: tuple[bool, ...]
    run: Run | None = None
    along: tuple[bool, ...] = ()
    moved: Run | None = None
    wanted: tuple[bool, ...] = ()

    @property
    def each(self) -> range:
        return range(max(self.tasks, 1))

    def one(self, t: Tensor, task: int) -> Tensor:
        """Of a tensor that has the axis of tasks where there is one."""
        return t[task] if self.tasks else t

    def of_task(self, task: int, given: Sequence[Tensor]) -> list[Tensor]:
        """x, buffers and parameters of a task."""
        return [t[task] if many else t for t, many in zip(given, self.many, strict=True)]

    def new(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """Memory of a tensor of this shape for each task."""
        return like.new_empty((self.tasks, *shape) if self.tasks else tuple(shape))

    def taken(self, given: Sequence[Tensor]) -> tuple[list[Tensor], list[list[Tensor | None]]]:
        """Tensors like the parameters of each task, and those that are to be written, by task.

        Of those that are wanted; zeros for parameters without a gradient.
        """
        net, count = self.call.net, len(self.call.net.buffers) + 1
        own = zip(given[count:], self.many[count:], self.wanted, strict=True)
        made = [self.new(p, p.shape[1:] if many else p.shape) if wanted else None for p, many, wanted in own]
        moving = made[: len(net.names)]
        for inert in made[len(net.names) :]:
            if inert is not None:
                inert.zero_()
        each = [[None if t is None else self.one(t, task) for t in moving] for task in self.each]
        return [t for t in made if t is not None], each

    def forward(self, given: Sequence[Tensor], out: Tensor | None = None) -> _State:
        """The forward pass on x, buffers and parameters, in places that are fresh; its output, where it is wanted."""
        net, works = self.call.net, []
        count = len(net.buffers) + 1
        for task in self.each:
            own = self.of_task(task, given)
            own[0] = net.stored(own[0])
            y = None if out is None else self.one(out, task)
            works.append(Work(own[:count], own[count : count + len(net.names)], out=y))
        state = _State(net, len(works))
        state.each(works)
        return state

    def backward(
        self, gy: Tensor, given: Sequence[Tensor], after: Sequence[Work], left: Run, *, half: bool = False
    ) -> None:
        """The backward pass of ``run`` and what comes after it, whose values are ``left``; a pass that is there stays.

        Where its forward, of as many tasks, lies nowhere, one comes before it.
        """
        assert self.run is not None
        state = self.run.state or self.call.state
        if state is None or state.tasks != len(self.each):
            state = self.forward(given)
        if state.held is not self.run.mark:
            after = [work._replace(gy=self.one(gy, task)) for task, work in enumerate(after)]
        state.each(after, left.mark, half=half)
        left.state = state

    def directions(self, cotangents: Sequence[Tensor], task: int) -> list[Tensor | None]:
        """Of the parameters of a task, for the derivative of a backward pass along cotangents of gradients."""
        own = iter(cotangents)
        return [self.one(next(own), task) if c else None for c in self.along][: len(self.call.net.names)]

    def split(self, given: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What comes before x, buffers and parameters, and these."""
        begin = len(given) - len(self.many)
        return list(given[:begin]), list(given[begin:])

    def mapped(
        self, size: int, axes: Sequence[int | None], given: Sequence[Tensor]
    ) -> tuple[Use, list[Tensor]]:
        """The use, and tensors, of ``size`` times as many tasks: those of one level of ``vmap`` more.

        The level's axis goes in front of the tasks that there are, and both become one. Of x, buffers and parameters
        those that have neither stay.
        """
        first = len(given) - len(self.many)
        kept = [self.tasks > 0] * first + list(self.many)
        tensors: list[Tensor] = []
        for i, (t, axis, many) in enumerate(zip(given, axes, kept, strict=True)):
            if i >= first and axis is None and not many:
                tensors.append(t)
                continue
            if axis != 0:  # else a view more for every parameter, at every level below
                t = t.expand(size, *t.shape) if axis is None else t.movedim(axis, 0)
            if self.tasks:
                t = t if many else t.unsqueeze(1).expand(size, self.tasks, *t.shape[1:])
                t = t.flatten(0, 1)
            tensors.append(t)
        many_now = tuple(m or axis is not None for m, axis in zip(self.many, axes[first:], strict=True))
        return replace(self, tasks=size * max(self.tasks, 1), many=many_now), tensors

    def results(self, size: int, made: Any) -> Any:
        """Of a rule of ``vmap``: what it made [size·T, ...] as [size, T, ...], where this is the use below it."""
        if not self.tasks:
            return made
        if isinstance(made, Tensor):
            return made.unflatten(0, (size, -1))
        return tuple(t.unflatten(0, (size, -1)) for t in made)

    def for_whom(self, ctx: Any) -> Use:
        """The use whose results are for the parameters that a node of the graph has to find gradients of."""
        return replace(self, wanted=ctx.needs_input_grad[-len(self.call.net.parameters) :])

    def spread(self, found: Iterable[Tensor | None]) -> list[Tensor | None]:
        """What there is for the parameters that are wanted, None for the others."""
        rest = iter(found)
        return [next(rest) if wanted else None for wanted in self.wanted]

    def gradients(self, found: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
        """Of x and the buffers none; of the parameters from each task's, the sum where all tasks share them."""
        begin = len(self.many) - len(self.wanted)
        shared = (self.tasks and not many for many in self.many[begin:])
        own = zip(self.spread(found), shared, strict=True)
        return *(None,) * begin, *(g if g is None or not s else g.sum(0) for g, s in own)
