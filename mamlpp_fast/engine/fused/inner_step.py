"""An inner step on the loss of one call: its backward pass and the update as one node of autograd's graph.

Of a cross entropy, the loss of nearly all such loops, the node has the derivatives too; then its own backward pass is
one list of calls, and steps that follow each other hand the gradient on where the kernels have left it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mamlpp_fast import _native
from mamlpp_fast.engine.fused.derivatives import (
    Backward,
    Forward,
    Lease,
    added,
    applied,
    gradients_in,
    hand_on,
    notes_listeners,
    runs,
    to_any_order,
)
from mamlpp_fast.engine.fused.steps.base import aten
from mamlpp_fast.ops._library import transformed

if TYPE_CHECKING:
    from mamlpp_fast.engine.fused.differentiable import DifferentiableNetwork

__all__ = ["steps_of_loss"]

_CALL: Any = Forward._backward_cls
_MOST = 64
"""Nodes between a loss and the call."""


def steps_of_loss(
    loss: Tensor, parameters: Sequence[Tensor], rate: float
) -> list[tuple[Tensor, Tensor]] | None:
    """Each parameter p, and ``p - rate * g`` for the gradient g of the loss, to be differentiated again.

    None where the loss is none of a single call of a :class:`DifferentiableNetwork` with just these parameters, or
    depends on them, or on anything with a gradient, by another way: that is for autograd. None too where something
    listens to the gradients of parameters, which nobody makes here.

    Args:
        loss: a scalar.
        parameters: all that it is to be differentiated by; in any order.
    """
    if loss.ndim or not torch.is_grad_enabled() or transformed() or torch.compiler.is_compiling():
        return None
    node = _only_call(loss.grad_fn)
    if node is None or node.heard or node.lease is None or node.net.inputs:
        return None
    try:
        x, token, *own = node.saved_tensors
        if len(own) != len(parameters) or set(map(id, own)) != set(map(id, parameters)):
            return None
        if any(not p.requires_grad or p.retains_grad or p._backward_hooks for p in own):
            return None
        if (entropy := _entropy(loss, node)) is not None:
            made = applied(Step, node.net, node.lease, *entropy, float(rate), node.buffers, x, *own)
            return list(zip(own, made, strict=True))
        (gy,) = torch.autograd.grad(loss, GradientEdge(node, 0), create_graph=True, allow_unused=True)
    except RuntimeError:  # freed, or changed in place: autograd says so of the plain way
        return None
    if gy is None:
        return None
    net: Any = node.net
    _, *made = applied(
        Backward, net, node.lease, net.everything, float(rate), node.buffers, gy, token, x, *own
    )
    return list(zip(own, made, strict=True))


def _only_call(node: Any) -> Any:
    """The call that all ways from a node of the graph end at; None where one goes elsewhere.

    Whatever led to the call's parameters lies behind it. So none of the nodes on these ways is of them.
    """
    found, queue, seen = None, [node], {node}
    for node in queue:  # grows meanwhile
        if type(node) is _CALL:
            if found is not None:
                return None
            found = node
            continue
        below = [n for n, _ in node.next_functions if n is not None] if node is not None else []
        if not below or len(seen) > _MOST:
            return None
        for n in below:
            if n not in seen:
                seen.add(n)
                queue.append(n)
    return found


class CrossEntropy(NamedTuple):
    """The loss of logits [N, K] as PyTorch takes it of their logarithms of probabilities ``log_p``.

    Its gradient by ``log_p``, -weight / total of each row at its label, depends on nothing; with r for the sum of a row
    of that, gy = slope - p r is the gradient by the logits.
    """

    target: Tensor
    weight: Tensor | None
    reduction: int
    ignored: int
    total: Tensor

    def slope(self, log_p: Tensor) -> Tensor:
        """The gradient by ``log_p`` [N, K]."""
        given = log_p, self.target, self.weight, self.reduction, self.ignored, self.total
        slope: Tensor = aten.nll_loss_backward.default(log_p.new_ones(()), *given)
        return slope

    @staticmethod
    def gradient(log_p: Tensor, slope: Tensor) -> Tensor:
        """By the logits [N, K]."""
        gy: Tensor = aten._log_softmax_backward_data.default(slope, log_p, 1, log_p.dtype)
        return gy

    @staticmethod
    def pulled(log_p: Tensor, slope: Tensor, moved: Tensor) -> Tensor:
        """Of <gy, moved>, the derivative by ``log_p``."""
        return -slope.sum(1, keepdim=True) * log_p.exp() * moved

    @staticmethod
    def curvature(log_p: Tensor, slope: Tensor, moved: Tensor, out: Tensor) -> None:
        """And by the logits, to ``out``: how gy moves where they do, -r p (moved - <p, moved>) in each row."""
        turned = aten._softmax_backward_data.default(moved, log_p.exp(), 1, log_p.dtype)
        torch.mul(turned, slope.sum(1, keepdim=True).neg_(), out=out)


def _entropy(loss: Tensor, call: Any) -> tuple[CrossEntropy, Tensor] | None:
    """The loss and its ``log_p``, where it is the cross entropy of a call's output that nobody listens to."""
    node: Any = loss.grad_fn
    if type(node).__name__ != "NllLossBackward0" or not _native.status().loaded:
        return None
    (soft, _), *_ = node.next_functions
    if type(soft).__name__ != "LogSoftmaxBackward0" or soft.next_functions[0] != (call, 0):
        return None
    if _signed(soft._saved_dim) not in (1, -1) or node._saved_self.ndim != 2:
        return None
    if torch.ops.mamlpp_fast.heard.default(loss, 3):
        return None
    found = CrossEntropy(
        node._saved_target,
        node._saved_weight,
        node._saved_reduction,
        _signed(node._saved_ignore_index),
        node._saved_total_weight,
    )
    return found, node._saved_self


def _signed(number: int) -> int:
    """Of a node's whole number, which Python is shown without its sign."""
    return number - 2**64 if number >= 2**63 else number


class Step(torch.autograd.Function):
    """The parameters that a step on a cross entropy leads to: p - rate g.

    Nothing comes back by way of the logits, whose derivatives are the node's, but where somebody has begun to listen
    there since, or gradients are taken out on the way to the leaves: ``log_p`` is an input for that.
    """

    @staticmethod
    def forward(
        ctx: Any,
        net: DifferentiableNetwork,
        lease: Lease,
        entropy: CrossEntropy,
        log_p: Tensor,
        rate: float,
        buffers: Any,
        x: Tensor,
        *parameters: Tensor,
    ) -> Any:
        slope = entropy.slope(log_p)
        gy = entropy.gradient(log_p, slope)
        own, found = gradients_in(net, lease, net.everything, True, rate, buffers, gy, x, parameters)
        ctx.shared = own is lease
        ctx.net, ctx.lease, ctx.rate, ctx.buffers = net, own, rate, buffers
        ctx.slope, ctx.handed = slope, None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(log_p, x, *parameters)
        return tuple(found[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        net, lease, rate = ctx.net, ctx.lease, ctx.rate
        none = (None,) * 3
        task = torch._C._current_graph_task_id()
        handed, ctx.handed = ctx.handed == task, None
        given = [c for c in cotangents if c is not None]
        if not given and not handed:
            return *none, None, None, None, None, *cotangents
        log_p, x, *parameters = ctx.saved_tensors  # an error where the graph has been freed
        if torch.is_grad_enabled() or any(torch._C._functorch.is_legacy_batchedtensor(c) for c in given):
            net.curved()
            gy = CrossEntropy.gradient(log_p, ctx.slope)
            moving = [c if c is None else -rate * c for c in cotangents]
            moved, first, *found = to_any_order(net, ctx.buffers, gy, x, parameters, (None, *moving))
            assert moved is not None
            by_log_p = CrossEntropy.pulled(log_p, ctx.slope, moved)
            return *none, by_log_p, None, None, first, *map(added, found, cotangents)
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        if not keep:
            ctx.lease = None
        place, count = lease.place, len(net.names)
        place.enter()
        if not handed:
            place.directions.load(cotangents)
        elif given:
            net.add(place.directions, cotangents)
        inert = cotangents[count:]
        ops = torch.ops.mamlpp_fast
        if not ops.to_leaves.default() or ops.heard.default(log_p, 2):
            # Autograd goes on by what they listen to, or take out, to the call itself, which makes the second half.
            direct = place.directions.take(parameters, (*(None,) * count, *inert))
            place.flat_directions.mul_(-rate)
            place.whole.tangent()
            by_log_p = CrossEntropy.pulled(log_p, ctx.slope, place.moved)
            if ctx.shared and runs(ctx.next_functions[0][0]):
                place.pending = task, net.everything, direct
                return *none, by_log_p, None, None, None, *(None for _ in cotangents)
            found = net.second(place, net.everything, None, x, parameters, direct)
            place.leave()
            if not keep:
                place.busy = False
            return *none, by_log_p, None, None, *found
        place.whole.tangent()
        CrossEntropy.curvature(log_p, ctx.slope, place.moved, place.gy_dot)
        place.whole.second()
        place.flat_directions.sub_(place.flat_seconds, alpha=rate)
        if not keep:
            place.busy = False
        if not ctx.heard and hand_on(place, ctx.next_functions[2:], parameters, task):
            return *none, None, None, None, None, *(None,) * count, *inert
        found = place.directions.take(parameters, (*(None,) * count, *inert))
        place.leave()
        return *none, None, None, None, None, *found


notes_listeners(Step)
