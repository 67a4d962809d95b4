"""An inner step on the loss of one call: its backward pass and the update as one node of autograd's graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mamlpp_fast.engine.fused.derivatives import Backward, Forward, applied
from mamlpp_fast.ops._library import transformed

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


def _listening(register: Callable[..., Any]) -> Callable[..., Any]:
    def call(node: Any, *args: Any, **kwargs: Any) -> Any:
        node.heard = True
        return register(node, *args, **kwargs)

    return call


# A node's own hooks see the gradients of its inputs, and may change them.
_CALL.heard = False
for _name in ("register_hook", "register_prehook"):
    setattr(_CALL, _name, _listening(getattr(_CALL, _name)))
