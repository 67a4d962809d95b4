"""A lowered network under ``torch.func``: its passes on the kernels at every level of ``grad`` and ``vmap``.

A level of ``vmap`` makes of one call a call for several tasks, each with parameters and examples of its own where they
are mapped: the tasks' places (:class:`mamlpp_fast.engine.fused.sections.Place`) are run side by
side on the lanes. What stands between the levels knows of no memory: an object that goes through all of them leads the
backward pass back to the place of its forward.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import (
    retrieve_all_functorch_interpreters,
    temporarily_clear_interpreter_stack,
)

from mamlpp_fast import reference
from mamlpp_fast.engine import lanes
from mamlpp_fast.engine.fused import levels
from mamlpp_fast.engine.fused.derivatives import Lease, plain
from mamlpp_fast.engine.fused.differentiable import DifferentiableNetwork
from mamlpp_fast.engine.fused.held import Held
from mamlpp_fast.engine.fused.moves import Moves, Moving
from mamlpp_fast.engine.fused.program import Section
from mamlpp_fast.engine.fused.sections import Place
from mamlpp_fast.inputs import mapped, tensors_of
from mamlpp_fast.reference import Inputs

__all__ = ["Transformed", "outside", "refusal"]


def refusal(model: nn.Module, x: Inputs) -> str | None:
    """Why a call under the transforms at work is not for the kernels; None where it is."""
    kinds = {i.key() for i in retrieve_all_functorch_interpreters()}
    kind = functorch.TransformType
    if kinds - {kind.Grad, kind.Vmap} or torch.autograd.forward_ad._current_level >= 0:
        return "forward mode, or another transform than grad and vmap"
    if any(_differentiated(t) for t in (*tensors_of(x), *model.buffers())):
        return "examples or buffers that are differentiated by"
    return None


def _differentiated(t: Tensor) -> bool:
    """Whether a level of ``grad``, or autograd itself, differentiates by a tensor."""
    while not t.requires_grad:
        if not functorch.is_functorch_wrapped_tensor(t):
            return False
        t = functorch.get_unwrapped(t)
    return True


def _one(t: Tensor) -> Tensor:
    """What is in a tensor, without levels: of one task where ``vmap`` gives it several."""
    axes = []
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t):
            axes.append(functorch.maybe_get_bdim(t))
        t = functorch.get_unwrapped(t)
    # From the lowest level up: each axis is one of what the levels below it make of the tensor.
    for axis in reversed(axes):
        t = t.select(axis, 0)
    return t.detach()


@contextlib.contextmanager
def outside(model: nn.Module, x: Inputs) -> Iterator[Inputs]:
    """Within it no transform is at work, and the model holds tensors of one task; those examples are yielded."""
    with temporarily_clear_interpreter_stack(), torch.enable_grad():
        own = {n: _one(p).requires_grad_() for n, p in model.named_parameters()}
        with reference.swapped(model, own | {n: _one(b) for n, b in model.named_buffers()}):
            yield mapped(_one, x)


_Item = tuple[list[Tensor], list[Tensor]] | Moving | Section
"""Of a task's plan: tensors and what is copied to them, or calls."""


class _State:
    """Places of so many tasks with a forward pass in them; ``held`` is the backward pass that ran there last."""

    def __init__(self, net: DifferentiableNetwork, tasks: int) -> None:
        self.net = net
        self.tasks = tasks
        self.leases = [Lease(net, task) for task in range(tasks)]
        self.held: object = None

    def each(self, plan: _Plan) -> None:
        """Does what ``plan(task, place)`` lists, for every task: side by side where there are threads."""
        for lease in self.leases:
            lease.place.enter()
        try:
            self._each(plan)
        finally:
            for lease in self.leases:
                lease.place.leave()

    def _each(self, plan: _Plan) -> None:
        lists = [list(plan(task, lease.place)) for task, lease in enumerate(self.leases)]
        sections = (item for items in lists for item in items if isinstance(item, Section))
        if self.tasks > 1 and not lanes.here() and all(section.listed is not None for section in sections):
            team = torch.classes.mamlpp_fast.Team()
            for items in lists:
                team.add([_listed(item) for item in items])
            team.run(lanes.NEVER.flag)
            return
        for item in itertools.chain.from_iterable(lists):
            if isinstance(item, tuple):
                torch._foreach_copy_(*item)
            else:
                item()


def _listed(item: _Item) -> Any:
    """As the native library's list."""
    if isinstance(item, Moving):
        return item.listed()
    if isinstance(item, Section):
        return item.listed
    calls = torch.classes.mamlpp_fast.Calls()
    calls.copy(*item)
    return calls


_Plan = Callable[[int, Place], Iterable[_Item]]


class _Call:
    """One call of the model; ``state`` is where its forward pass lies."""

    def __init__(self, net: DifferentiableNetwork) -> None:
        self.net = net
        self.state: _State | None = None


class _Run:
    """One backward pass of a call; ``state`` is where its values were left.

    Attributes:
        mark: what ``held`` of a state is where they still lie there; not the run itself, which would hold itself.
    """

    def __init__(self) -> None:
        self.mark = object()
        self.state: _State | None = None


@dataclass(frozen=True)
class _Use:
    """What the operations below have beside tensors, the same object at every level but for what ``vmap`` changes.

    Attributes:
        tasks: T, of all levels of ``vmap`` that lie above; 0 above of which there is none, and no axis of tasks.
        many: of x, the buffers and the parameters: which of them have an axis of T tasks in front.
        run: the backward pass that is meant.
        along: of the parameters' gradients, which have a cotangent.
        wanted: of the parameters, for which there is a result.
    """

    call: _Call
    tasks: int
    many: tuple[bool, ...]
    run: _Run | None = None
    along: tuple[bool, ...] = ()
    wanted: tuple[bool, ...] = ()

    def one(self, t: Tensor, task: int) -> Tensor:
        """Of a tensor that has the axis of tasks where there is one."""
        return t[task] if self.tasks else t

    def of_task(self, task: int, given: Sequence[Tensor]) -> list[Tensor]:
        """x, buffers and parameters of a task."""
        return [t[task] if many else t for t, many in zip(given, self.many, strict=True)]

    def new(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """Memory of a tensor of this shape for each task."""
        return like.new_empty((self.tasks, *shape) if self.tasks else tuple(shape))

    def taken(self, given: Sequence[Tensor], of: Callable[[Place], Moves]) -> tuple[list[Tensor], _Plan]:
        """Tensors like the parameters of each task, and what copies a task's values to them from a place.

        Of those that are wanted; zeros for parameters without a gradient.
        """
        net, count = self.call.net, len(self.call.net.buffers) + 1
        own = zip(given[count:], self.many[count:], self.wanted, strict=True)
        made = [self.new(p, p.shape[1:] if many else p.shape) if wanted else None for p, many, wanted in own]
        moving = made[: len(net.names)]
        for inert in made[len(net.names) :]:
            if inert is not None:
                inert.zero_()

        def after(task: int, place: Place) -> list[_Item]:
            return [of(place).giving([None if t is None else self.one(t, task) for t in moving])]

        return [t for t in made if t is not None], after

    def forward(self, given: Sequence[Tensor], after: _Plan) -> _State:
        """The forward pass on x, buffers and parameters, in places that are fresh, and what comes after it there."""
        net = self.call.net
        state = _State(net, max(self.tasks, 1))

        def plan(task: int, place: Place) -> Iterator[_Item]:
            x, *rest = self.of_task(task, given)
            buffers, own = rest[: len(net.buffers)], rest[len(net.buffers) :]
            yield [place.x, *(place.buffers[name] for name in net.buffers)], [net.stored(x), *buffers]
            yield place.parameters.loading(own[: len(net.names)])
            yield place.forward
            yield from after(task, place)

        state.each(plan)
        return state

    def backward(self, state: _State | None, gy: Tensor, given: Sequence[Tensor], after: _Plan) -> _State:
        """The backward pass of ``run``, where its forward lies in the state; else this runs before it."""
        assert self.run is not None

        def plan(task: int, place: Place) -> Iterator[_Item]:
            yield [place.gy], [self.one(gy, task)]
            yield place.whole.backward
            yield from after(task, place)

        if state is None or state.tasks != max(self.tasks, 1):
            state = self.forward(given, plan)
        else:
            state.each(plan)
        state.held = self.run.mark
        return state

    def split(self, given: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What comes before x, buffers and parameters, and these."""
        begin = len(given) - len(self.many)
        return list(given[:begin]), list(given[begin:])

    def mapped(
        self, size: int, axes: Sequence[int | None], given: Sequence[Tensor]
    ) -> tuple[_Use, list[Tensor]]:
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

    def for_whom(self, ctx: Any) -> _Use:
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


class _Operation(torch.autograd.Function):
    """What the three have in common: inputs are a use and tensors, results have the axis of tasks in front."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.use, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(levels.NO_TANGENTS)

    @classmethod
    def mapped(cls, size: int, axes: Sequence[int | None], use: _Use, *given: Tensor) -> Any:
        above, tensors = use.mapped(size, axes, given)
        return use.results(size, levels.call(cls, above, *tensors))


class _Forward(_Operation):
    """The output [T, N, ...] on x, buffers and parameters."""

    @staticmethod
    def forward(use: _Use, *given: Tensor) -> Any:
        net = use.call.net
        x = given[0][0] if use.many[0] else given[0]
        y = use.new(given[-1], (len(x), *net.network.shapes[net.network.output]))
        use.call.state = use.forward(given, lambda task, place: [([use.one(y, task)], [place.result])])
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None) -> Any:
        use = ctx.use.for_whom(ctx)
        if gy is None or not any(use.wanted):
            return None, *(None for _ in ctx.saved_tensors)
        made = levels.call(_Backward, replace(use, run=_Run()), gy, *ctx.saved_tensors)
        return None, *use.gradients(made)


class _Backward(_Operation):
    """The gradients of each task that are wanted; before x comes the gradient [T, N, ...] of the output."""

    @staticmethod
    def forward(use: _Use, *given: Tensor) -> Any:
        (gy,), rest = use.split(given)
        made, after = use.taken(rest, lambda place: place.gradients)
        state = use.backward(use.call.state, gy, rest, after)
        assert use.run is not None
        use.run.state = state
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        given = [c for c in cotangents if c is not None]
        if not given:
            return None, *(None for _ in ctx.saved_tensors)
        along = tuple(c is not None for c in ctx.use.spread(cotangents))
        use = replace(ctx.use, along=along).for_whom(ctx)
        moved, *second = levels.call(_Double, use, *given, *ctx.saved_tensors)
        return None, moved, *use.gradients(second)


class _Double(_Operation):
    """The derivative of the backward pass along cotangents: by its gradient, and by the parameters."""

    @staticmethod
    def forward(use: _Use, *given: Tensor) -> Any:
        (*cotangents, gy), rest = use.split(given)
        net, run = use.call.net, use.run
        assert run is not None
        moved, still = gy.new_empty(gy.shape), gy.new_zeros(())
        made, after = use.taken(rest, lambda place: place.seconds)

        def plan(task: int, place: Place) -> Iterator[_Item]:
            own = iter(cotangents)
            along = [use.one(next(own), task) if c else None for c in use.along]
            yield place.directions.loading(along[: len(net.names)])
            yield [place.gy_dot], [still.expand_as(place.gy_dot)]
            yield place.whole.tangent
            yield place.whole.second
            yield [use.one(moved, task)], [place.moved]
            yield from after(task, place)

        if run.state is not None and run.state.tasks == max(use.tasks, 1) and run.state.held is run.mark:
            run.state.each(plan)
        else:
            use.backward(run.state, gy, rest, plan)
        return moved, *made

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        use: _Use = ctx.use
        (*along, gy), rest = use.split(ctx.saved_tensors)
        begin = 1 + len(use.call.net.buffers)
        fixed, parameters = rest[:begin], rest[begin:]
        count = len(along)

        def double(*moving: Tensor) -> Any:
            return _written_double(use, moving[:count], moving[count], (*fixed, *moving[count + 1 :]))

        pulled: Any = torch.func.vjp(double, *along, gy, *parameters)
        made, pull = pulled
        first, *others = cotangents
        full = (first, *use.spread(others))
        given = tuple(torch.zeros_like(m) if c is None else c for m, c in zip(made, full, strict=True))
        found: Any = pull(given)
        return None, *found[: count + 1], *(None,) * begin, *found[count + 1 :]


def _written_double(
    use: _Use, along: Sequence[Tensor], gy: Tensor, given: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """What :class:`_Double` computes, by PyTorch's own operations: somebody differentiates it."""
    net = use.call.net
    differentiated = [i for i, c in enumerate(use.along) if c]

    def one(along: Sequence[Tensor], gy: Tensor, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        held = dict(zip(net.buffers, rest, strict=False))

        def gradients(gy: Tensor, *parameters: Tensor) -> Any:
            pull: Any = torch.func.vjp(lambda *own: plain(net, held, x, own), *parameters)[1]
            found = pull(gy)
            return tuple(found[i] for i in differentiated)

        pull: Any = torch.func.vjp(gradients, gy, *rest[len(net.buffers) :])[1]
        moved: tuple[Tensor, ...] = pull(tuple(along))
        return moved

    # Not by `vmap`: PyTorch's rules for batch, layer and instance norms in it lose the history of means and deviations,
    # so that further derivatives are wrong (findings/norm_meta_gradient.sh).
    tasks = [
        one([use.one(c, i) for c in along], use.one(gy, i), *use.of_task(i, given))
        for i in range(max(use.tasks, 1))
    ]
    return tuple(map(torch.stack, zip(*tasks, strict=True))) if use.tasks else tasks[0]


class Transformed:
    """The route of a model's calls under ``torch.func``.

    Args:
        net: what computes a task.
    """

    def __init__(self, net: DifferentiableNetwork) -> None:
        self.net = net

    def __str__(self) -> str:
        return f"{self.net}, tasks of vmap side by side"

    def call(self, held: Held, x: Inputs) -> Tensor:
        """The output on ``x`` with the tensors that a model holds, at the level that the call is made at."""
        net = self.net
        net.calls += 1
        own = zip(net.parameters, held.parameters(net.parameters), strict=True)
        parameters = [p.detach() if n in net.constants else p for n, p in own]
        first, buffers = net.read(held, x)
        given = [first, *buffers.values(), *parameters]
        made: Tensor = levels.call(_Forward, _Use(_Call(net), 0, (False,) * len(given)), *given)
        return made
