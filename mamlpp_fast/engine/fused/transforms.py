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
from mamlpp_fast.engine.fused.derivatives import Lease, plain
from mamlpp_fast.engine.fused.differentiable import DifferentiableNetwork, Held
from mamlpp_fast.engine.fused.program import Section
from mamlpp_fast.engine.fused.sections import Place

__all__ = ["Transformed", "active", "outside", "refusal"]


def active() -> bool:
    """Whether a transform of ``torch.func`` is at work on the calling thread."""
    return functorch.peek_interpreter_stack() is not None


def refusal(model: nn.Module, x: Tensor) -> str | None:
    """Why a call under the transforms at work is not for the kernels; None where it is."""
    kinds = {i.key() for i in retrieve_all_functorch_interpreters()}
    kind = functorch.TransformType
    if kinds - {kind.Grad, kind.Vmap} or torch.autograd.forward_ad._current_level >= 0:
        return "forward mode, or another transform than grad and vmap"
    if any(_differentiated(t) for t in (x, *model.buffers())):
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
def outside(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Within it no transform is at work, and the model holds tensors of one task; those examples are yielded."""
    with temporarily_clear_interpreter_stack(), torch.enable_grad():
        own = {n: _one(p).requires_grad_() for n, p in model.named_parameters()}
        with reference.swapped(model, own | {n: _one(b) for n, b in model.named_buffers()}):
            yield _one(x)


class _Flat:
    """The parameters of a call as one tensor [P], so that a level handles one and not each.

    Attributes:
        names: in their order there, those without a gradient last.
        moving: where those with a gradient end.
    """

    def __init__(self, net: DifferentiableNetwork) -> None:
        shapes = {name: p.shape for name, p in net.template.named_parameters()}  # where norms have one row
        self.names = (*net.names, *net.inert)
        self._shapes = [shapes[name] for name in self.names]
        self._sizes = [shape.numel() for shape in self._shapes]
        self.moving = sum(self._sizes[: len(net.names)])
        views = net.arranged(self.parts(torch.empty(sum(self._sizes), device="meta")))
        self._places = [(v.shape, v.stride(), v.storage_offset()) for v in views]

    def parts(self, flat: Tensor) -> list[Tensor]:
        """The parameters in a tensor [P]."""
        return [t.view(shape) for t, shape in zip(flat.split(self._sizes), self._shapes, strict=True)]

    def arranged(self, row: Tensor) -> list[Tensor]:
        """Those with a gradient in a tensor [P] without gaps, with the axes that they have in the kernels' layout."""
        begin = row.storage_offset()
        return [row.as_strided(shape, stride, begin + at) for shape, stride, at in self._places]


_Item = tuple[list[Tensor], list[Tensor]] | Section
"""Of a task's plan: tensors and what is copied to them, or calls."""


class _State:
    """Places of so many tasks with a forward pass in them; ``held`` is the backward pass that ran there last."""

    def __init__(self, net: DifferentiableNetwork, tasks: int) -> None:
        self.net = net
        self.tasks = tasks
        self.leases = [Lease(net) for _ in range(tasks)]
        self.held: object = None

    def each(self, plan: _Plan) -> None:
        """Does what ``plan(task, place)`` lists, for every task: side by side where there are threads."""
        lists = [list(plan(task, lease.place)) for task, lease in enumerate(self.leases)]
        if (
            self.tasks > 1
            and not lanes.here()
            and all(isinstance(item, tuple) or item.listed is not None for items in lists for item in items)
        ):
            team = torch.classes.mamlpp_fast.Team()
            for items in lists:
                team.add([_listed_copies(*i) if isinstance(i, tuple) else i.listed for i in items])
            team.run(lanes.NEVER.flag)
            return
        for item in itertools.chain.from_iterable(lists):
            if isinstance(item, tuple):
                torch._foreach_copy_(*item)
            else:
                item()


def _listed_copies(to: list[Tensor], of: list[Tensor]) -> Any:
    calls = torch.classes.mamlpp_fast.Calls()
    calls.add("aten::_foreach_copy_", "", [to, of, False], [])
    return calls


_Plan = Callable[[int, Place], Iterable[_Item]]


class _Call:
    """One call of the model; ``state`` is where its forward pass lies."""

    def __init__(self, net: DifferentiableNetwork, flat: _Flat) -> None:
        self.net = net
        self.flat = flat
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
        tasks: T, of all levels of ``vmap`` that lie above.
        many: of x, the buffers and the parameters [P]: which of them have an axis of T tasks in front.
        run: the backward pass that is meant.
    """

    call: _Call
    tasks: int
    many: tuple[bool, ...]
    run: _Run | None = None

    def forward(self, given: Sequence[Tensor], after: _Plan) -> _State:
        """The forward pass on x, buffers and parameters, in places that are fresh, and what comes after it there."""
        net, flat = self.call.net, self.call.flat
        *given, parameters = given
        parameters = parameters.contiguous()
        state = _State(net, self.tasks)

        def plan(task: int, place: Place) -> Iterator[_Item]:
            x, *rest, own = (
                t[task] if many else t for t, many in zip((*given, parameters), self.many, strict=True)
            )
            to = [place.x, *(place.buffers[name] for name in net.buffers), *place.parameters]
            yield to, [net.stored(x), *rest, *flat.arranged(own)]
            yield place.forward
            yield from after(task, place)

        state.each(plan)
        return state

    def backward(self, state: _State | None, gy: Tensor, given: Sequence[Tensor], after: _Plan) -> _State:
        """The backward pass of ``run``, where its forward lies in the state; else this runs before it."""
        assert self.run is not None

        def plan(task: int, place: Place) -> Iterator[_Item]:
            yield [place.gy], [gy[task]]
            yield place.whole.backward
            yield from after(task, place)

        if state is None or state.tasks != self.tasks:
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

        The level's axis goes in front of the tasks that there are, and both become one. What has neither stays.
        """
        first = len(given) - len(self.many)
        kept = [True] * first + list(self.many)
        tensors: list[Tensor] = []
        for t, axis, many in zip(given, axes, kept, strict=True):
            if axis is None and not many:
                tensors.append(t)
                continue
            t = t.expand(size, *t.shape) if axis is None else t.movedim(axis, 0)
            if not many and self.tasks > 1:
                t = t.unsqueeze(1).expand(size, self.tasks, *t.shape[1:])
            tensors.append(t.flatten(0, 1) if many or self.tasks > 1 else t)
        many_now = tuple(m or axis is not None for m, axis in zip(self.many, axes[first:], strict=True))
        return replace(self, tasks=size * self.tasks, many=many_now), tensors

    def gradients(self, of_parameters: Tensor) -> tuple[Tensor | None, ...]:
        """Of x and the buffers none; of the parameters from each task's [T, P], the sum where all tasks share them."""
        g = of_parameters
        if not self.many[-1]:
            g = g.sum(0) if self.tasks > 1 else g[0]
        return *(None,) * (len(self.many) - 1), g


def _results(size: int, made: Any) -> tuple[Any, Any]:
    """Of a rule of ``vmap``: results [size·T, ...] as [size, T, ...]."""
    if isinstance(made, Tensor):
        return made.unflatten(0, (size, -1)), 0
    return tuple(t.unflatten(0, (size, -1)) for t in made), (0,) * len(made)


_NO_TANGENTS = (
    "accelerate: forward-mode derivatives (torch.func.jvp, jacfwd) that only a backward pass meets are not "
    "implemented; take them of the whole function"
)


class _Operation(torch.autograd.Function):
    """What the three have in common: inputs are a use and tensors, results have an axis of tasks in front."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.use, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_TANGENTS)


class _Forward(_Operation):
    """The output [T, N, ...] on x, buffers and parameters [P]."""

    @staticmethod
    def forward(use: _Use, *given: Tensor) -> Any:
        net = use.call.net
        shape = net.network.shapes[net.network.output]
        y = given[-1].new_empty((use.tasks, len(given[0][0] if use.many[0] else given[0]), *shape))
        use.call.state = use.forward(given, lambda task, place: [([y[task]], [place.result])])
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:
        made: Any = _Backward.apply(replace(ctx.use, run=_Run()), gy, *ctx.saved_tensors)  # type: ignore[no-untyped-call, unused-ignore]
        return None, *ctx.use.gradients(made)

    @staticmethod
    def vmap(info: Any, in_dims: Any, use: _Use, *given: Tensor) -> Any:
        use, tensors = use.mapped(info.batch_size, in_dims[1:], given)
        return _results(info.batch_size, _Forward.apply(use, *tensors))  # type: ignore[no-untyped-call, unused-ignore]


class _Backward(_Operation):
    """The gradients [T, P] of each task; before x comes the gradient [T, N, ...] of the output."""

    @staticmethod
    def forward(use: _Use, *given: Tensor) -> Any:
        (gy,), rest = use.split(given)
        made, after = _taken(use, rest[-1], lambda place: place.gradients)
        state = use.backward(use.call.state, gy, rest, after)
        assert use.run is not None
        use.run.state = state
        return made

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        made: Any = _Double.apply(ctx.use, cotangent, *ctx.saved_tensors)  # type: ignore[no-untyped-call, unused-ignore]
        moved, second = made
        return None, moved, *ctx.use.gradients(second)

    @staticmethod
    def vmap(info: Any, in_dims: Any, use: _Use, *given: Tensor) -> Any:
        use, tensors = use.mapped(info.batch_size, in_dims[1:], given)
        return _results(info.batch_size, _Backward.apply(use, *tensors))  # type: ignore[no-untyped-call, unused-ignore]


class _Double(_Operation):
    """The derivative of the backward pass along a cotangent [T, P]: by its gradient, and by the parameters."""

    @staticmethod
    def forward(use: _Use, *given: Tensor) -> Any:
        (cotangent, gy), rest = use.split(given)
        flat, run = use.call.flat, use.run
        assert run is not None
        moved, still = gy.new_empty(gy.shape), gy.new_zeros(gy.shape[1:])
        made, after = _taken(use, rest[-1], lambda place: place.seconds)
        cotangent = cotangent.contiguous()

        def plan(task: int, place: Place) -> Iterator[_Item]:
            yield place.directions, flat.arranged(cotangent[task])
            yield [place.gy_dot], [still]
            yield place.whole.tangent
            yield place.whole.second
            yield [moved[task]], [place.moved]
            yield from after(task, place)

        if run.state is not None and run.state.tasks == use.tasks and run.state.held is run.mark:
            run.state.each(plan)
        else:
            use.backward(run.state, gy, rest, plan)
        return moved, made

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        use: _Use = ctx.use
        (along, gy), (*fixed, parameters) = use.split(ctx.saved_tensors)

        def double(along: Tensor, gy: Tensor, parameters: Tensor) -> Any:
            return _written_double(use, along, gy, (*fixed, parameters))

        pull: Any = torch.func.vjp(double, along, gy, parameters)[1]
        by_along, by_gy, by_parameters = pull(cotangents)
        return None, by_along, by_gy, *(None,) * len(fixed), by_parameters

    @staticmethod
    def vmap(info: Any, in_dims: Any, use: _Use, *given: Tensor) -> Any:
        use, tensors = use.mapped(info.batch_size, in_dims[1:], given)
        return _results(info.batch_size, _Double.apply(use, *tensors))  # type: ignore[no-untyped-call, unused-ignore]


def _taken(use: _Use, like: Tensor, of: Callable[[Place], list[Tensor]]) -> tuple[Tensor, _Plan]:
    """A tensor [T, P], and what copies a task's values to it from a place; zero for parameters without a gradient."""
    flat = use.call.flat
    made = like.new_empty((use.tasks, like.shape[-1]))
    made[:, flat.moving :].zero_()
    return made, lambda task, place: [(flat.arranged(made[task]), of(place))]


def _written_double(use: _Use, along: Tensor, gy: Tensor, given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What :class:`_Double` computes, by PyTorch's own operations: somebody differentiates it."""
    net, flat = use.call.net, use.call.flat

    def one(along: Tensor, gy: Tensor, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        *buffers, parameters = rest
        held = dict(zip(net.buffers, buffers, strict=True))

        def gradient(gy: Tensor, parameters: Tensor) -> Any:
            pull: Any = torch.func.vjp(lambda own: plain(net, held, x, flat.parts(own)), parameters)[1]
            return pull(gy)[0]

        pull: Any = torch.func.vjp(gradient, gy, parameters)[1]
        moved, second = pull(along)
        return moved, second

    # Not by `vmap`: PyTorch's rules for batch, layer and instance norms in it lose the history of means and deviations,
    # so that further derivatives are wrong (findings/norm_meta_gradient.sh).
    many = (True, True, *use.many)
    tasks = [
        one(*(t[i] if own else t for t, own in zip((along, gy, *given), many, strict=True)))
        for i in range(use.tasks)
    ]
    moved, second = (torch.stack(parts) for parts in zip(*tasks, strict=True))
    return moved, second


class Transformed:
    """The route of a model's calls under ``torch.func``.

    Args:
        net: what computes a task.
    """

    def __init__(self, net: DifferentiableNetwork) -> None:
        self.net = net
        self._flat = _Flat(net)

    def __str__(self) -> str:
        return f"{self.net}, tasks of vmap side by side"

    def call(self, model: nn.Module, x: Tensor) -> Tensor:
        """The model's output on ``x`` with the tensors that it holds, at the level that the call is made at."""
        held, net = Held(model), self.net
        own = ((name, held.parameter(name)) for name in self._flat.names)
        parameters = torch.cat([(p.detach() if n in net.constants else p).reshape(-1) for n, p in own])
        given = [x, *map(held.buffer, net.buffers), parameters]
        use = _Use(_Call(net, self._flat), 1, (False,) * len(given))
        made: Any = _Forward.apply(use, *given)  # type: ignore[no-untyped-call, unused-ignore]
        result: Tensor = made.squeeze(0)
        return result
