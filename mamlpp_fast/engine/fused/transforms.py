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
from mamlpp_fast.engine.fused.derivatives import Lease, plain, runs
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
    """Places of so many tasks with a forward pass in them.

    Attributes:
        held: the mark of the backward pass whose values lie there, or of that one's derivative that is half made.
    """

    def __init__(self, net: DifferentiableNetwork, tasks: int) -> None:
        self.net = net
        self.tasks = tasks
        self.leases = [Lease(net, task) for task in range(tasks)]
        self.held: object = None

    def each(self, plan: _Plan, mark: object = None, *, half: bool = False) -> None:
        """Does what ``plan(task, place)`` lists, for every task: side by side where there are threads.

        Args:
            mark: what is ``held`` afterwards.
            half: what is passing stays for a second half, which is one if ``held`` is still that mark then.
        """
        self.held = None
        for lease in self.leases:
            lease.place.enter()
        try:
            self._each(plan)
            self.held = mark
        finally:
            if not half or self.held is None:
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
    """One call of the model; ``state`` is where its forward pass lies.

    Attributes:
        pending: by the number of autograd's pass that is under way, a derivative of a backward pass that is half made:
            its use, cotangents and gradient of the output. The call's own node makes the other half.
    """

    def __init__(self, net: DifferentiableNetwork) -> None:
        self.net = net
        self.state: _State | None = None
        self.pending: dict[int, tuple[_Use, list[Tensor], Tensor]] = {}


class _Run:
    """One backward pass of a call, or the first half of its derivative; ``state`` is where its values were left.

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
        moved: the first half of that one's derivative along them.
        wanted: of the parameters, for which there is a result.
    """

    call: _Call
    tasks: int
    many: tuple[bool, ...]
    run: _Run | None = None
    along: tuple[bool, ...] = ()
    moved: _Run | None = None
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

    def backward(
        self, gy: Tensor, given: Sequence[Tensor], after: _Plan, left: _Run, *, half: bool = False
    ) -> None:
        """The backward pass of ``run`` and what comes after it, whose values are ``left``; a pass that is there stays.

        Where its forward, of as many tasks, lies nowhere, one comes before it.
        """
        assert self.run is not None
        mark, state = self.run.mark, self.run.state or self.call.state
        if state is None or state.tasks != max(self.tasks, 1):
            state = self.forward(given, lambda task, place: ())
        lies = state.held is mark

        def plan(task: int, place: Place) -> Iterator[_Item]:
            if not lies:
                yield [place.gy], [self.one(gy, task)]
                yield place.whole.backward
            yield from after(task, place)

        state.each(plan, left.mark, half=half)
        left.state = state

    def directed(self, cotangents: Sequence[Tensor], task: int, place: Place) -> Iterator[_Item]:
        """The first half of the derivative of a backward pass."""
        own = iter(cotangents)
        along = [self.one(next(own), task) if c else None for c in self.along]
        yield place.directions.loading(along[: len(self.call.net.names)])
        yield place.whole.tangent

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
    """What they have in common: inputs are a use and tensors, results have the axis of tasks in front."""

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
    """The output [T, N, ...] on x, buffers and parameters, and a token [T] as :class:`derivatives.Forward` has it."""

    @staticmethod
    def forward(use: _Use, *given: Tensor) -> Any:
        net = use.call.net
        x = given[0][0] if use.many[0] else given[0]
        y = use.new(given[-1], (len(x), *net.network.shapes[net.network.output]))
        use.call.state = use.forward(given, lambda task, place: [([use.one(y, task)], [place.result])])
        return y, use.new(y, ()).zero_()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.use, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, _: Tensor | None) -> Any:
        use: _Use = ctx.use.for_whom(ctx)
        *given, token = ctx.saved_tensors
        pending = use.call.pending.pop(torch._C._current_graph_task_id(), None)
        if (gy is None and pending is None) or not any(use.wanted):
            return None, *(None for _ in given)
        if pending is None:
            made = levels.call(_Backward, replace(use, run=_Run()), gy, token, *given)
        else:
            moving, along, first = pending
            moves = torch.zeros_like(first) if gy is None else gy
            made = levels.call(_Second, replace(moving, wanted=use.wanted), *along, first, moves, *given)
        return None, *use.gradients(made)


class _Backward(_Operation):
    """The gradients of each task that are wanted; before x come the gradient [T, N, ...] of the output and the token."""

    @staticmethod
    def forward(use: _Use, *given: Tensor) -> Any:
        (gy, _), rest = use.split(given)
        made, after = use.taken(rest, lambda place: place.gradients)
        assert use.run is not None
        use.backward(gy, rest, after, use.run)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        along = [c for c in cotangents if c is not None]
        gy, _, *given = ctx.saved_tensors
        none = (None,) * len(given)
        if not along:
            return None, None, None, *none
        which = tuple(c is not None for c in ctx.use.spread(cotangents))
        use: _Use = replace(ctx.use, along=which, moved=_Run()).for_whom(ctx)
        moved = levels.call(_Tangent, use, *along, gy, *given)
        number = torch._C._current_graph_task_id()
        if _leads_to_call(ctx, use) and number not in use.call.pending:
            use.call.pending[number] = use, along, gy
            return None, moved, None, *none
        if not any(use.wanted):
            return None, moved, None, *none
        made = levels.call(_Second, use, *along, gy, torch.zeros_like(gy), *given)
        return None, moved, None, *use.gradients(made)


def _leads_to_call(ctx: Any, use: _Use) -> bool:
    """Whether autograd goes on to the node of the call itself, of the same tasks, which has all that is differentiated.

    A level of ``vmap`` between them, for several gradients of one output, is a node between them as well.
    """
    node, place = ctx.next_functions[1]
    own = getattr(node, "use", None)
    same = (
        place == 1
        and isinstance(own, _Use)
        and (own.call, own.tasks, own.many) == (use.call, use.tasks, use.many)
    )
    return same and runs(node)


class _Tangent(_Operation):
    """How the output moves [T, N, ...] along cotangents of gradients; before x come these and the output's gradient."""

    @staticmethod
    def forward(use: _Use, *given: Tensor) -> Any:
        (*cotangents, gy), rest = use.split(given)
        moved = gy.new_empty(gy.shape)
        assert use.moved is not None

        def after(task: int, place: Place) -> Iterator[_Item]:
            yield from use.directed(cotangents, task, place)
            yield [use.one(moved, task)], [place.moved]

        use.backward(gy, rest, after, use.moved, half=True)
        return moved

    @staticmethod
    def written(use: _Use, given: Sequence[Tensor], x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        *along, gy = given
        return _derived(use, along, gy, x, rest)[:1]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        return _pulled(_Tangent, ctx, cotangents)


class _Second(_Operation):
    """The derivative of wanted gradients along cotangents by the parameters, where the output's gradient moves too.

    Before x come the cotangents, the output's gradient and how that moves, which is passed back as well.
    """

    @staticmethod
    def forward(use: _Use, *given: Tensor) -> Any:
        (*cotangents, gy, moves), rest = use.split(given)
        made, taken = use.taken(rest, lambda place: place.seconds)

        def half(task: int, place: Place) -> Iterator[_Item]:
            yield [place.gy_dot], [use.one(moves, task)]
            yield place.whole.second
            yield from taken(task, place)

        def whole(task: int, place: Place) -> Iterator[_Item]:
            yield from use.directed(cotangents, task, place)
            yield from half(task, place)

        run, before = use.run, use.moved
        assert run is not None and before is not None
        state = before.state
        if state is not None and state.tasks == max(use.tasks, 1) and state.held is before.mark:
            state.each(half, run.mark if run.state is state else None)
        else:
            use.backward(gy, rest, whole, _Run())
        return tuple(made)

    @staticmethod
    def written(use: _Use, given: Sequence[Tensor], x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        *along, gy, moves = given
        second = _derived(use, along, gy, x, rest)[1:]
        pull: Any = torch.func.vjp(*_of_parameters(use, x, rest))[1]
        found = zip(second, pull(moves), use.wanted, strict=True)
        return tuple(s + more for s, more, wanted in found if wanted)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        return _pulled(_Second, ctx, cotangents)


def _of_parameters(use: _Use, x: Tensor, rest: Sequence[Tensor]) -> tuple[Any, ...]:
    """The output of one task as a function of the parameters, and these."""
    net = use.call.net
    held = dict(zip(net.buffers, rest, strict=False))
    return lambda *own: plain(net, held, x, own), *rest[len(net.buffers) :]


def _derived(
    use: _Use, along: Sequence[Tensor], gy: Tensor, x: Tensor, rest: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Of the gradients of one task along cotangents, the derivative by the output's gradient, then by parameters."""
    forward, *parameters = _of_parameters(use, x, rest)

    def gradients(gy: Tensor, *own: Tensor) -> Any:
        pull: Any = torch.func.vjp(forward, *own)[1]
        return tuple(g for g, c in zip(pull(gy), use.along, strict=True) if c)

    pull: Any = torch.func.vjp(gradients, gy, *parameters)[1]
    found: tuple[Tensor, ...] = pull(tuple(along))
    return found


def _pulled(operation: type[_Tangent] | type[_Second], ctx: Any, cotangents: Sequence[Tensor | None]) -> Any:
    """The backward pass of one of these, by PyTorch's own operations: somebody differentiates it.

    Not by `vmap`: PyTorch's rules for batch, layer and instance norms in it lose the history of means and deviations, so
    that further derivatives are wrong (findings/norm_meta_gradient.sh).
    """
    use: _Use = ctx.use
    first, rest = use.split(ctx.saved_tensors)
    begin, count = 1 + len(use.call.net.buffers), len(first)
    fixed, parameters = rest[:begin], rest[begin:]

    def written(*moving: Tensor) -> Any:
        given, own = moving[:count], (*fixed, *moving[count:])
        tasks = [
            operation.written(use, [use.one(t, i) for t in given], *use.of_task(i, own))
            for i in range(max(use.tasks, 1))
        ]
        return tuple(map(torch.stack, zip(*tasks, strict=True))) if use.tasks else tasks[0]

    pulled: Any = torch.func.vjp(written, *first, *parameters)
    made, pull = pulled
    given = tuple(torch.zeros_like(m) if c is None else c for m, c in zip(made, cotangents, strict=True))
    found: Any = pull(given)
    return None, *found[:count], *(None,) * begin, *found[count:]


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
        made: Tensor = levels.call(_Forward, _Use(_Call(net), 0, (False,) * len(given)), *given)[0]
        return made
