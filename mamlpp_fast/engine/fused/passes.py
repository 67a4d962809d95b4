"""One rule of every step of a network in turn: what a pass leaves with the emitter."""

from __future__ import annotations

from collections.abc import Collection

from mamlpp_fast.engine.fused.network import Network
from mamlpp_fast.engine.fused.program import Emitter, Ref
from mamlpp_fast.engine.fused.steps import Gradients, Pass
from mamlpp_fast.engine.fused.steps.base import aten

__all__ = ["clear_missing", "write_backward", "write_forward", "write_tangent"]


def write_forward(em: Emitter, net: Network, ps: Pass) -> None:
    for step in net.steps:
        em.label = step.name
        step.forward(em, ps)


def write_tangent(em: Emitter, net: Network, ps: Pass, values: Collection[int]) -> None:
    """Derivatives of these values along the directions of the pass."""
    for step in net.steps:
        if step.output in values:
            em.label = step.name
            step.tangent(em, ps)


def write_backward(
    em: Emitter,
    net: Network,
    ps: Pass,
    grad: Ref,
    out: Gradients,
    *,
    keep: bool = False,
    tangent: bool = False,
) -> None:
    """Gradients of the parameters; ``tangent``: the derivative of the backward pass, which was one with ``keep``."""
    out.add(net.output, grad)
    for step in reversed(net.steps):
        if step.output not in out.wanted_values or step.output not in out.terms:
            continue  # the latter where nothing reads the value, or only as a constant
        em.label = step.name
        gy = em.sum(f"gradient of {step.name}", out.terms.pop(step.output))
        if tangent:
            step.backward_tangent(em, ps, ps.grads.get(step.output), gy, out)
        else:
            if keep:
                ps.grads[step.output] = gy
            step.backward(em, ps, gy, out)


def clear_missing(em: Emitter, out: Gradients) -> None:
    """Clears the places of gradients that the pass did not find."""
    for name, place in out.memory.items():
        if name not in out.params:
            em.call(aten.zero_.default, place)
