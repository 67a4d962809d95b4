"""A lowered network under ``torch.func``: its passes on the kernels at every level of ``grad`` and ``vmap``.

A level of ``vmap`` makes of one call a call for several tasks, each with parameters and examples of its own where they
are mapped: the tasks' places (:class:`mamlpp_fast.engine.fused.sections.Place`) are run side by
side on the lanes. What stands between the levels knows of no memory: an object that goes through all of them leads the
backward pass back to the place of its forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import (
    retrieve_all_functorch_interpreters,
    temporarily_clear_interpreter_stack,
)

from mamlpp_fast import reference
from mamlpp_fast.engine.fused import levels
from mamlpp_fast.engine.fused.derivatives import plain, runs
from mamlpp_fast.engine.fused.differentiable import DifferentiableNetwork
from mamlpp_fast.engine.fused.held import Held
from mamlpp_fast.engine.fused.uses import Call, Run, Use, Work
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
    def mapped(cls, size: int, axes: Sequence[int | None], use: Use, *given: Tensor) -> Any:
        above, tensors = use.mapped(size, axes, given)
        return use.results(size, levels.call(cls, above, *tensors))


class _Forward(_Operation):
    """The output [T, N, ...] on x, buffers and parameters, and a token [T] as :class:`derivatives.Forward` has it."""

    @staticmethod
    def forward(use: Use, *given: Tensor) -> Any:
        net = use.call.net
        x = given[0][0] if use.many[0] else given[0]
        y = use.new(given[-1], (len(x), *net.network.shapes[net.network.output]))
        use.call.state = use.forward(given, y)
        return y, use.new(y, ()).zero_()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.use, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, _: Tensor | None) -> Any:
        use: Use = ctx.use.for_whom(ctx)
        *given, token = ctx.saved_tensors
        pending = use.call.pending.pop(torch._C._current_graph_task_id(), None)
        if (gy is None and pending is None) or not any(use.wanted):
            return None, *(None for _ in given)
        if pending is not None:
            moving, along, first = pending
            moves = torch.zeros_like(first) if gy is None else gy
            made = levels.call(_Second, replace(moving, wanted=use.wanted), *along, first, moves, *given)
        else:
            assert gy is not None
            made = levels.call(_Backward, replace(use, run=Run()), gy, token, *given)
        return None, *use.gradients(made)


class _Backward(_Operation):
    """The gradients of each task that are wanted; before x come the output's gradient [T, N, ...] and the token."""

    @staticmethod
    def forward(use: Use, *given: Tensor) -> Any:
        (gy, _), rest = use.split(given)
        made, own = use.taken(rest)
        assert use.run is not None
        use.backward(gy, rest, [Work(own=each) for each in own], use.run)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        along = [c for c in cotangents if c is not None]
        gy, _, *given = ctx.saved_tensors
        none = (None,) * len(given)
        if not along:
            return None, None, None, *none
        which = tuple(c is not None for c in ctx.use.spread(cotangents))
        use: Use = replace(ctx.use, along=which, moved=Run()).for_whom(ctx)
        moved = levels.call(_Tangent, use, *along, gy, *given)
        number = torch._C._current_graph_task_id()
        if _leads_to_call(ctx, use) and number not in use.call.pending:
            use.call.pending[number] = use, along, gy
            return None, moved, None, *none
        if not any(use.wanted):
            return None, moved, None, *none
        made = levels.call(_Second, use, *along, gy, torch.zeros_like(gy), *given)
        return None, moved, None, *use.gradients(made)


def _leads_to_call(ctx: Any, use: Use) -> bool:
    """Whether autograd goes on to the node of the call itself, of the same tasks, which has all that is differentiated.

    A level of ``vmap`` between them, for several gradients of one output, is a node between them as well.
    """
    node, place = ctx.next_functions[1]
    own = getattr(node, "use", None)
    same = (
        place == 1
        and isinstance(own, Use)
        and (own.call, own.tasks, own.many) == (use.call, use.tasks, use.many)
    )
    return same and runs(node)


class _Tangent(_Operation):
    """How the output moves [T, N, ...] along cotangents of gradients; before x come these and the output's gradient."""

    @staticmethod
    def forward(use: Use, *given: Tensor) -> Any:
        (*cotangents, gy), rest = use.split(given)
        moved = gy.new_empty(gy.shape)
        works = [
            Work(directions=use.directions(cotangents, task), out=use.one(moved, task)) for task in use.each
        ]
        assert use.moved is not None
        use.backward(gy, rest, works, use.moved, half=True)
        return moved

    @staticmethod
    def written(use: Use, given: Sequence[Tensor], x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
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
    def forward(use: Use, *given: Tensor) -> Any:
        (*cotangents, gy, moves), rest = use.split(given)
        made, own = use.taken(rest)
        works = [Work(moves=use.one(moves, task), own=each) for task, each in enumerate(own)]
        run, half = use.run, use.moved
        assert run is not None and half is not None
        state = half.state
        if state is not None and state.tasks == len(works) and state.held is half.mark:
            state.each(works, run.mark if run.state is state else None)
        else:
            along = [use.directions(cotangents, task) for task in use.each]
            works = [w._replace(directions=a) for w, a in zip(works, along, strict=True)]
            use.backward(gy, rest, works, Run())
        return tuple(made)

    @staticmethod
    def written(use: Use, given: Sequence[Tensor], x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        *along, gy, moves = given
        second = _derived(use, along, gy, x, rest)[1:]
        pull: Any = torch.func.vjp(*_of_parameters(use, x, rest))[1]
        found = zip(second, pull(moves), use.wanted, strict=True)
        return tuple(s + more for s, more, wanted in found if wanted)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        return _pulled(_Second, ctx, cotangents)


def _of_parameters(use: Use, x: Tensor, rest: Sequence[Tensor]) -> tuple[Any, ...]:
    """The output of one task as a function of the parameters, and these."""
    net = use.call.net
    held = dict(zip(net.buffers, rest, strict=False))
    return lambda *own: plain(net, held, x, own), *rest[len(net.buffers) :]


def _derived(
    use: Use, along: Sequence[Tensor], gy: Tensor, x: Tensor, rest: Sequence[Tensor]
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

    Not by `vmap`: PyTorch's rules for batch, layer and instance norms in it lose the history of means and deviations,
    so that further derivatives are wrong (findings/norm_meta_gradient.sh).
    """
    use: Use = ctx.use
    first, rest = use.split(ctx.saved_tensors)
    begin, count = 1 + len(use.call.net.buffers), len(first)
    fixed, parameters = rest[:begin], rest[begin:]

    def written(*moving: Tensor) -> Any:
        given, own = moving[:count], (*fixed, *moving[count:])
        tasks = [
            operation.written(use, [use.one(t, i) for t in given], *use.of_task(i, own)) for i in use.each
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
        made: Tensor = levels.call(_Forward, Use(Call(net), 0, (False,) * len(given)), *given)[0]
        return made
