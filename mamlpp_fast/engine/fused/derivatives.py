"""A call as a node of autograd's graph: what its passes leave with the kernels, and what goes PyTorch's own way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mamlpp_fast import reference
from mamlpp_fast._modes import plainly
from mamlpp_fast.engine.fused.sections import EXAMPLES
from mamlpp_fast.engine.lanes import number
from mamlpp_fast.ops._library import transformed

if TYPE_CHECKING:
    from mamlpp_fast.engine.fused.differentiable import DifferentiableNetwork
    from mamlpp_fast.engine.fused.held import Held
    from mamlpp_fast.engine.fused.sections import Place

__all__ = [
    "Backward",
    "Forward",
    "Lease",
    "added",
    "applied",
    "gradients_in",
    "hand_on",
    "notes_listeners",
    "plain",
    "runs",
    "to_any_order",
]


class Lease:
    """Holds a place until autograd has no more use for it.

    Args:
        passage: the number of those whose calls come one after the other; by default the lane's that the thread is.
    """

    def __init__(self, net: DifferentiableNetwork, passage: int | None = None) -> None:
        self.net = net
        self.place = net.take(number() if passage is None else passage)

    def __del__(self) -> None:
        place = self.place
        place.leave()  # where an error has come between the halves of a pass
        if self.net.sections is place.sections:  # else others have been written, with more parts
            self.net.sections.free[place.number].append(place)


def applied(operation: type[torch.autograd.Function], *args: Any) -> Any:
    """``operation.apply`` outside of ``torch.func``, without a look at what an operation may be besides."""
    if transformed():
        return operation.apply(*args)
    unwrap = torch._C._functorch.unwrap_if_dead
    own = [unwrap(a) if isinstance(a, Tensor) else a for a in args]
    return super(torch.autograd.Function, operation).apply(*own)  # type: ignore[misc]


def notes_listeners(operation: type[torch.autograd.Function]) -> None:
    """Lets the nodes of an operation say whether they have hooks: ``heard``.

    A node's own hooks see the gradients of its inputs, and may change them.
    """

    def listening(register: Callable[..., Any]) -> Callable[..., Any]:
        def call(node: Any, *args: Any, **kwargs: Any) -> Any:
            node.heard = True
            return register(node, *args, **kwargs)

        return call

    node: Any = operation._backward_cls
    node.heard = False
    for name in ("register_hook", "register_prehook"):
        setattr(node, name, listening(getattr(node, name)))


class Forward(torch.autograd.Function):
    """The output, and a token that nobody sees; running statistics follow.

    The token leads from a backward pass to this node, so that autograd comes here after it has differentiated that
    pass: a loss is no linear function of the output as a rule, so that it would as well, and both are one pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        net: DifferentiableNetwork,
        x: Tensor,
        tensors: Held,
        buffers: Mapping[str, Tensor],
        *parameters: Tensor,
    ) -> Any:
        lease = Lease(net)
        net.load(lease.place, x, buffers, parameters[: len(net.names)])
        ctx.net, ctx.lease = net, lease
        ctx.buffers = {n: b.clone() for n, b in buffers.items()}
        ctx.set_materialize_grads(False)
        y = lease.place.result.clone()
        token = y.new_zeros(())
        ctx.save_for_backward(x, token, *parameters)
        net.follow(tensors, lease.place.statistics)
        return y, token

    @staticmethod
    def backward(ctx: Any, gy: Tensor | None, _: Tensor | None) -> Any:
        net, lease = ctx.net, ctx.lease
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        pending = None if lease is None else lease.place.pending
        if pending is not None and pending[0] != torch._C._current_graph_task_id():
            pending = None  # of a pass that ended by an error
        if not keep:
            # Freed with the saved tensors, not with the result: a list of losses keeps no memory of their passes.
            ctx.lease = None
        if gy is None and pending is None:
            return (None,) * (4 + len(net.given) - 1)
        x, token, *parameters = ctx.saved_tensors
        batched = gy is not None and torch._C._functorch.is_legacy_batchedtensor(gy)
        found: list[Tensor | None] = []
        if pending is not None:
            lease.place.pending = None
            found = net.second(lease.place, pending[1], None if batched else gy, x, parameters, pending[2])
            lease.place.leave()
            if not keep:
                lease.place.busy = False
        if batched:  # `is_grads_batched`: many gradients in one
            assert gy is not None
            more = _plain_backward(net, ctx.buffers, gy, x, parameters)
            found = [added(a, b) for a, b in zip(found, more, strict=True)] if found else more
        elif pending is None:
            wanted = net.wanted(ctx)
            if wanted != net.everything:
                wanted = net.part(wanted)
            if torch.is_grad_enabled():
                # Where its graph is freed, this node is of no more use, and not to be led to.
                led = token if keep else None
                found = list(
                    applied(Backward, net, lease, wanted, None, ctx.buffers, gy, led, x, *parameters)
                )
            else:
                assert gy is not None
                to = () if ctx.heard or wanted != net.everything else ctx.next_functions[1:]
                found = gradients_in(net, lease, wanted, False, None, ctx.buffers, gy, x, parameters, to)[1]
        moved, *rest = found
        return None, moved, None, None, *rest


notes_listeners(Forward)


def gradients_in(
    net: DifferentiableNetwork,
    lease: Lease,
    wanted: frozenset[str],
    recorded: bool,
    rate: float | None,
    buffers: Mapping[str, Tensor],
    gy: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    to: Sequence[tuple[Any, int]] = (),
) -> tuple[Lease, list[Tensor | None]]:
    """The gradients of the examples and of all parameters, None for those that are not wanted; and where they lie.

    Args:
        lease: of the forward pass; another is taken where that has no room for this backward pass.
        recorded: whether the values that its own derivative reads are to stay there.
        rate: as in :class:`Backward`.
        to: the parameters' nodes, which may take their gradients where these lie; then there is None for all.
    """
    place = lease.place
    if place.busy or wanted not in place.of:  # or made before these gradients were ever wanted alone
        lease = Lease(net)
        place = lease.place
        net.load(place, x, buffers, parameters[: len(net.names)])
    place.enter()
    place.gy.copy_(gy)
    place.of[wanted].backward()
    place.busy = recorded
    found: list[Tensor | None]
    if rate is not None:
        found = [None, *place.gradients.take(parameters, parameters, -rate)]
    elif _takes(place, to, parameters):
        # By way of a copy: what is passing has no place of its own but while it is needed.
        place.flat_directions.copy_(place.flat_gradients.clone())
        _hand(place, to[0][0], torch._C._current_graph_task_id())
        return lease, [None] * (len(parameters) + 1)
    else:
        first = net.input_taken(place.beside[0], x) if EXAMPLES in wanted else None
        found = [first, *net.taken_of(wanted, place.gradients, parameters)]
    place.leave()
    return lease, found


def hand_on(place: Place, to: Sequence[tuple[Any, int]], parameters: Sequence[Tensor], task: int) -> bool:
    """Leaves the parameters' gradients, which lie in the directions of a place, to the step that they come from.

    Whether it takes them: it has them as its own directions then, without a move.

    Args:
        to: the nodes that the parameters come from, and of what number each is there.
        task: autograd's backward pass that is under way.
    """
    taken = _takes(place, to, parameters)
    if taken:
        _hand(place, to[0][0], task)
    return taken


def _hand(place: Place, step: Any, task: int) -> None:
    step.handed = task
    place.hand_to(step.lease.place)


def _takes(place: Place, to: Sequence[tuple[Any, int]], parameters: Sequence[Tensor]) -> bool:
    """Whether all parameters are what one step led to, whose place goes through the same passage, and nobody listens.

    Nor takes their gradients out: the backward pass goes to all leaves.
    """
    if not to:
        return False
    step = to[0][0]
    lease = getattr(step, "lease", None)
    if lease is None or not hasattr(step, "handed") or not place.passes_with(lease.place):
        return False
    if any(node is not step or number != i for i, (node, number) in enumerate(to)):
        return False
    ops = torch.ops.mamlpp_fast
    return bool(ops.to_leaves.default()) and not ops.heard.default(parameters[0], 1)


class Backward(torch.autograd.Function):
    """The gradients of the examples and of all parameters; None for those that are not wanted.

    With a rate, the parameters that a step by it leads to, p - rate g, in place of their gradients, which are all
    wanted then and the examples' is not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        net: DifferentiableNetwork,
        lease: Lease,
        wanted: frozenset[str],
        rate: float | None,
        buffers: Mapping[str, Tensor],
        gy: Tensor,
        token: Tensor | None,
        x: Tensor,
        *parameters: Tensor,
    ) -> Any:
        own, found = gradients_in(net, lease, wanted, True, rate, buffers, gy, x, parameters)
        ctx.shared = token is not None and own is lease
        ctx.net, ctx.lease, ctx.wanted, ctx.rate, ctx.buffers = net, own, wanted, rate, buffers
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gy, x, *parameters)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, along: Tensor | None, *cotangents: Tensor | None) -> Any:
        net, lease, rate = ctx.net, ctx.lease, ctx.rate
        none = (None,) * 5
        given = [c for c in (along, *cotangents) if c is not None]
        if not given:
            return *none, None, None, None, *(None for _ in cotangents)
        # Of a step: parameters lead to it by themselves as well.
        direct = None if rate is None else cotangents
        batched = any(torch._C._functorch.is_legacy_batchedtensor(c) for c in given)
        plain = torch.is_grad_enabled() or batched
        place = None if lease is None else lease.place
        shared = ctx.shared and runs(ctx.next_functions[1][0])
        if plain or place is None or not shared:  # else the forward's node reads its own
            gy, x, *parameters = ctx.saved_tensors  # an error where the graph has been freed
        if plain:
            net.curved()
            moving = [c if c is None or rate is None else -rate * c for c in cotangents]
            by_gy, first, *found = to_any_order(net, ctx.buffers, gy, x, parameters, (along, *moving))
            if direct is not None:
                found = [added(a, b) for a, b in zip(found, direct, strict=True)]
            return *none, by_gy, None, first, *found
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        if not keep:
            ctx.lease = None
        assert place is not None
        place.enter()
        net.direct(place, ctx.wanted, along, cotangents, 1.0 if rate is None else -rate)
        place.of[ctx.wanted].tangent()
        moved = place.moved.clone()
        if shared:
            place.pending = torch._C._current_graph_task_id(), ctx.wanted, direct
            return *none, moved, None, None, *(None for _ in cotangents)
        found = net.second(place, ctx.wanted, None, x, parameters, direct)
        place.leave()
        if not keep:
            place.busy = False
        return *none, moved, None, *found


def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def to_any_order(
    net: DifferentiableNetwork,
    buffers: Mapping[str, Tensor],
    gy: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The derivative of the backward pass by PyTorch's operations: somebody asks for one that has derivatives.

    Args:
        cotangents: of the examples' gradient and the parameters'.

    Returns:
        By gy, the examples and the parameters.
    """
    # Names of their own, since the gradient may depend on the parameters by ways that lie outside of the call.
    graph = torch.is_grad_enabled()
    gy, *given = _renamed((gy, x, *parameters) if net.inputs else (gy, *parameters))
    x, *parameters = given if net.inputs else (x, *given)
    # What nobody asked the derivative of is not differentiated by either.
    first, along = zip(
        *((t, c) for t, c in zip((x, *parameters), cotangents, strict=True) if c is not None), strict=True
    )
    with torch.enable_grad():
        y = plain(net, buffers, x, parameters)
        grads = torch.autograd.grad(y, first, gy, create_graph=True)
    second = torch.autograd.grad(grads, (gy, *given), along, create_graph=graph, allow_unused=True)
    found = [torch.zeros_like(t) if g is None else g for g, t in zip(second, (gy, *given), strict=True)]
    return list(found) if net.inputs else [found[0], None, *found[1:]]


def _plain_backward(
    net: DifferentiableNetwork,
    buffers: Mapping[str, Tensor],
    gy: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
) -> list[Tensor | None]:
    """The backward pass by PyTorch's own operations, which take tensors that no kernel of ours does."""
    graph = torch.is_grad_enabled()
    own = _renamed((x, *parameters) if net.inputs else parameters)
    x, *parameters = own if net.inputs else (x, *own)
    with torch.enable_grad():
        y = plain(net, buffers, x, parameters)
    found = torch.autograd.grad(y, own, gy, create_graph=graph)
    return list(found) if net.inputs else [None, *found]


def _renamed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values, to differentiate by; with the graph that leads to them where one is recorded."""
    graph = torch.is_grad_enabled()
    return [t.view_as(t) if graph and t.requires_grad else t.detach().requires_grad_() for t in tensors]


def plain(
    net: DifferentiableNetwork, buffers: Mapping[str, Tensor], x: Tensor, parameters: Sequence[Tensor]
) -> Tensor:
    """The forward pass on these tensors by PyTorch's own operations."""
    held = dict(zip((*net.names, *net.inert), parameters, strict=True))
    inputs, own = net.written(x, buffers)
    # One template for all threads.
    with plainly(), net.to_any_order(), net.lock, reference.swapped(net.template, held | own):
        made: Tensor = reference.called(net.template, inputs)
    return made


def runs(node: Any) -> bool:
    """Whether the backward pass that is under way comes to a node of the graph."""
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient `autograd.grad` returns: torch tells it by an error
        return True
