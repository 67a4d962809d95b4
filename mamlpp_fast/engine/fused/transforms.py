"""A lowered network under ``torch.func``: its passes on the kernels at every level of ``grad`` and ``vmap``.

A level of ``vmap`` makes of one call a call for several tasks, each with parameters and examples of its own where they
are mapped: the tasks' places (:class:`mamlpp_fast.engine.fused.differentiable.DifferentiableNetwork`) are run side by
side on the lanes. What stands between the levels knows of no memory: an object that goes through all of them leads the
backward pass back to the place of its forward.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
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
from mamlpp_fast.engine.fused.differentiable import DifferentiableNetwork, _Held, _Lease, _plain

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


class _State:
    """Places of so many tasks with a forward pass in them; ``held`` is the backward pass that ran there last."""

    def __init__(self, net: DifferentiableNetwork, tasks: int) -> None:
        self.net = net
        self.tasks = tasks
        self.leases = [_Lease(net) for _ in range(tasks)]
        self.held: object = None

    def each(self, work: Callable[[int, Any], None]) -> None:
        """Calls ``work(task, place)`` for every task, side by side where there are threads."""
        threads = torch.get_num_threads()
        if self.tasks == 1 or threads == 1 or self.net.device.type != "cpu":
            for task, lease in enumerate(self.leases):
                work(task, lease.place)
            return
        following = itertools.count()

        def on_lane(_: int, halt: lanes.Halt) -> None:
            for task in following:
                if task >= self.tasks or halt.wanted:
                    return
                work(task, self.leases[task].place)

        lanes.run(on_lane, min(self.tasks, threads), 1)


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
        tasks: T, of all levels of ``vmap`` that lie above.
        many: of x, the buffers and the parameters: which of them have an axis of T tasks in front.
        run: the backward pass that is meant.
    """

    call: _Call
    tasks: int
    many: tuple[bool, ...]
    run: _Run | None = None

    @property
    def net(self) -> DifferentiableNetwork:
        return self.call.net

    def load(self, given: Sequence[Tensor], state: _State) -> _State:
        """The forward pass on x, buffers and parameters."""
        net = self.net

        def pick(task: int) -> list[Tensor]:
            return [t[task] if many else t for t, many in zip(given, self.many, strict=True)]

        def work(task: int, place: Any) -> None:
            x, *rest = pick(task)
            buffers = dict(zip(net.buffers, rest, strict=False))
            net.load(place, x, buffers, rest[len(buffers) : len(buffers) + len(net.names)])

        state.each(work)
        return state

    def backward(self, gy: Tensor, given: Sequence[Tensor]) -> _State:
        """The backward pass of ``run``, on its forward's places; on other ones where these are of other tasks."""
        state = self.call.state
        if state is None or state.tasks != self.tasks:
            state = self.load(given, _State(self.net, self.tasks))

        def work(task: int, place: Any) -> None:
            place.gy.copy_(gy[task])
            place.backward()

        state.each(work)
        assert self.run is not None
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

        The level's axis goes in front of the tasks that there are, and both become one. What has neither stays as it is.
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

    def summed(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Gradients [T, ...] of the parameters, for those that all tasks share their sum."""
        many = self.many[len(self.many) - len(gradients) :]
        return [g if own else g.sum(0) if self.tasks > 1 else g[0] for g, own in zip(gradients, many, strict=True)]


def _results(size: int, made: Any) -> tuple[Any, Any]:
    """Of a rule of ``vmap``: results [size·T, ...] as [size, T, ...]."""
    if isinstance(made, Tensor):
        return made.unflatten(0, (size, -1)), 0
    return tuple(t.unflatten(0, (size, -1)) for t in made), (0,) * len(made)


_NO_TANGENTS = (
    "accelerate: forward-mode derivatives (torch.func.jvp, jacfwd) of a backward pass that is an operation are not "
    "implemented; take them around the whole function, or call the model within mamlpp_fast.engine.fused.differentiable.plainly()"
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
    """The output [T, N, ...] on x, buffers and parameters."""

    @staticmethod
    def forward(use: _Use, *given: Tensor) -> Any:
        state = use.load(given, _State(use.net, use.tasks))
        use.call.state = state
        first = state.leases[0].place.result
        y = first.new_empty((use.tasks, *first.shape))
        torch._foreach_copy_(list(y), [lease.place.result for lease in state.leases])
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:
        use = replace(ctx.use, run=_Run())
        made: Any = _Backward.apply(use, gy, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return None, *(None,) * (1 + len(use.net.buffers)), *use.summed(made)

    @staticmethod
    def vmap(info: Any, in_dims: Any, use: _Use, *given: Tensor) -> Any:
        use, tensors = use.mapped(info.batch_size, in_dims[1:], given)
        return _results(info.batch_size, _Forward.apply(use, *tensors))  # type: ignore[no-untyped-call]


class _Backward(_Operation):
    """Gradients [T, *shape] of all parameters, each task's own; before x the gradient [T, N, ...] of the output."""

    @staticmethod
    def forward(use: _Use, *given: Tensor) -> Any:
        (gy,), given_ = use.split(given)
        state = use.backward(gy, given_)
        assert use.run is not None
        use.run.state = state
        return _taken(use, state, given_, lambda place: place.gradients)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        use = ctx.use
        made: Any = _Double.apply(use, *cotangents, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        moved, *seconds = made
        return None, moved, *(None,) * (1 + len(use.net.buffers)), *use.summed(seconds)

    @staticmethod
    def vmap(info: Any, in_dims: Any, use: _Use, *given: Tensor) -> Any:
        use, tensors = use.mapped(info.batch_size, in_dims[1:], given)
        return _results(info.batch_size, _Backward.apply(use, *tensors))  # type: ignore[no-untyped-call]


class _Double(_Operation):
    """The derivative of the backward pass along cotangents [T, *shape]: by its gradient, and by the parameters."""

    @staticmethod
    def forward(use: _Use, *given: Tensor) -> Any:
        (*cotangents, gy), given_ = use.split(given)
        net, run = use.net, use.run
        assert run is not None
        state = run.state
        if state is None or state.tasks != use.tasks or state.held is not run.mark:
            state = use.backward(gy, given_)

        def work(task: int, place: Any) -> None:
            torch._foreach_copy_(place.directions, net.arranged([c[task] for c in cotangents]))
            place.double()

        state.each(work)
        moved = gy.new_empty(gy.shape)
        torch._foreach_copy_(list(moved), [lease.place.moved for lease in state.leases])
        return moved, *_taken(use, state, given_, lambda place: place.seconds)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        use: _Use = ctx.use
        (*along, gy), given = use.split(ctx.saved_tensors)
        names = len(along)
        fixed, parameters = given[: len(given) - names], given[len(given) - names :]
        moving = [*along, gy, *parameters]

        def double(*values: Tensor) -> Any:
            return _written_double(use, names, fixed, values)

        _, pull = torch.func.vjp(double, *moving)
        found = pull(cotangents)
        return None, *found[: names + 1], *(None,) * len(fixed), *found[names + 1 :]

    @staticmethod
    def vmap(info: Any, in_dims: Any, use: _Use, *given: Tensor) -> Any:
        use, tensors = use.mapped(info.batch_size, in_dims[1:], given)
        return _results(info.batch_size, _Double.apply(use, *tensors))  # type: ignore[no-untyped-call]


def _taken(
    use: _Use, state: _State, given: Sequence[Tensor], of: Callable[[Any], list[Tensor]]
) -> tuple[Tensor, ...]:
    """Copies [T, *shape] of what lies in the kernels' layout, in the parameters'; zeros for those that are inert."""
    net = use.net
    begin = 1 + len(net.buffers)
    made = [
        t.new_empty((use.tasks, *(t.shape[1:] if many else t.shape)))
        for t, many in zip(given[begin:], use.many[begin:], strict=True)
    ]
    own, inert = made[: len(net.names)], made[len(net.names) :]

    def work(task: int, place: Any) -> None:
        torch._foreach_copy_(net.arranged([t[task] for t in own]), of(place))

    state.each(work)
    for t in inert:
        t.zero_()
    return tuple(made)


def _written_double(use: _Use, names: int, fixed: Sequence[Tensor], values: Sequence[Tensor]) -> Any:
    """What :class:`_Double` computes, by PyTorch's own operations: somebody differentiates it."""
    net = use.net

    def one(*given: Tensor) -> Any:
        along, gy, x = given[:names], given[names], given[names + 1]
        buffers = dict(zip(net.buffers, given[names + 2 : names + 2 + len(net.buffers)], strict=True))
        parameters = given[names + 2 + len(net.buffers) :]

        def gradients(gy: Tensor, *parameters: Tensor) -> Any:
            _, pull = torch.func.vjp(lambda *own: _plain(net, buffers, x, own), *parameters)
            return pull(gy)

        _, pull = torch.func.vjp(gradients, gy, *parameters)
        return pull(tuple(along))

    tensors = [*values[: names + 1], *fixed, *values[names + 1 :]]
    kept = [True] * (names + 1) + list(use.many)
    # Not by `vmap`: PyTorch's rules for norms in it lose the history of means and deviations, and are wrong from the
    # second derivative (batch norm) or the third (layer norm) on.
    tasks = [one(*(t[i] if many else t for t, many in zip(tensors, kept, strict=True))) for i in range(use.tasks)]
    return tuple(torch.stack(parts) for parts in zip(*((moved, *seconds) for moved, *seconds in tasks), strict=True))


class Transformed:
    """The route of a model's calls under ``torch.func``."""

    def __init__(self, net: DifferentiableNetwork) -> None:
        self.net = net

    def __str__(self) -> str:
        return f"{self.net}, tasks of vmap side by side"

    def call(self, model: nn.Module, x: Tensor) -> Tensor:
        """The model's output on ``x`` with the tensors that it holds, at the level that the call is made at."""
        held, net = _Held(model), self.net
        given = [x, *map(held.buffer, net.buffers), *map(held.parameter, (*net.names, *net.inert))]
        made: Any = _Forward.apply(_Use(_Call(net), 1, (False,) * len(given)), *given)  # type: ignore[no-untyped-call]
        result: Tensor = made.squeeze(0)
        return result
