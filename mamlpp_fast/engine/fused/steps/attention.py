"""Attention of long sequences, a few heads at a time: no rule keeps a matrix of L x S for more than those."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mamlpp_fast.engine.fused.program import Emitter, Ref
from mamlpp_fast.engine.fused.steps.base import Gradients, Pass, Step, aten

__all__ = ["LONG", "Attention"]

LONG = 2**18
"""Elements of the matrices of an example's heads: below, a call for all heads and examples is faster than many."""

_AT_ONCE = 2**18
"""Elements of the matrices of the heads that are worked on together: five or six such are alive at once."""


@dataclass
class Attention(Step):
    """softmax(Q Kᵀ / √d) V of queries [H, L, d], keys [H, S, d] and values [H, S, e], its three inputs.

    Every rule makes the probabilities P again, of as many heads as fit. With the softmax's Jacobian
    J(P) X = P ∘ (X − (P∘X) 1 1ᵀ), and dots for what moves (the scale left out)::

        backward:   dV = Pᵀ dO    dP = dO Vᵀ    dS = J(P) dP    dQ = dS K    dK = dSᵀ Q
        tangent:    Ṗ = J(P) (Q̇ Kᵀ + Q K̇ᵀ)    Ȯ = Ṗ V + P V̇
        its derivative:  dV̇ = Ṗᵀ dO + Pᵀ dȮ    dṖ = dȮ Vᵀ + dO V̇ᵀ
                         dṠ = J(P) dṖ + Ṗ ∘ (dP − (P∘dP) 1 1ᵀ) − P ∘ (Ṗ∘dP) 1 1ᵀ
                         dQ̇ = dṠ K + dS K̇    dK̇ = dṠᵀ Q + dSᵀ Q̇

    Attributes:
        keys: S.
        scale: of the products, 1 / √d as a rule.
        causal: whether a query sees no later key.
    """

    keys: int
    scale: float
    causal: bool

    def _chunks(self, ps: Pass) -> Iterator[tuple[int, int, slice]]:
        """Task, example and heads of each."""
        heads, length, _ = self.shape
        size = max(1, _AT_ONCE // (length * self.keys))
        for task in range(ps.tasks):
            for example in range(ps.images):
                for begin in range(0, heads, size):
                    yield task, example, slice(begin, min(begin + size, heads))

    def forward(self, em: Emitter, ps: Pass) -> None:
        out = self.new_output(em, ps)
        for at in self._chunks(ps):
            chunk = _Chunk(self, em, ps, at)
            chunk.product(out[at], chunk.probabilities(), chunk.v)
        ps.values[self.output] = out

    def tangent(self, em: Emitter, ps: Pass) -> None:
        out = self.new_output(em, ps, "tangent of ")
        for at in self._chunks(ps):
            chunk = _Chunk(self, em, ps, at)
            p = chunk.probabilities()
            p_dot = chunk.moved(p)
            terms = [
                (a, b) for a, b in ((p_dot, chunk.v), (p, chunk.v_dot)) if a is not None and b is not None
            ]
            for i, (a, b) in enumerate(terms):
                chunk.product(out[at], a, b, add=i > 0)
        ps.tangents[self.output] = out

    def backward(self, em: Emitter, ps: Pass, gy: Ref, out: Gradients) -> None:
        places = self._places(em, ps, out)
        for at in self._chunks(ps) if any(p is not None for p in places) else ():
            chunk = _Chunk(self, em, ps, at)
            gq, gk, gv = (None if p is None else p[at] for p in places)
            p = chunk.probabilities()
            if gv is not None:
                chunk.product(gv, _t(p), gy[at])
            if gq is None and gk is None:
                continue
            gs = chunk.jacobian(p, chunk.product(chunk.new("gradient of p"), gy[at], _t(chunk.v)))
            if gq is not None:
                chunk.product(gq, gs, chunk.k, self.scale)
            if gk is not None:
                chunk.product(gk, _t(gs), chunk.q, self.scale)
        self._leave(out, places)

    def backward_tangent(self, em: Emitter, ps: Pass, gy: Ref | None, gy_dot: Ref, out: Gradients) -> None:
        if gy is None or not any(i in ps.tangents for i in self.inputs):
            self.backward(em, ps, gy_dot, out)
            return
        places = self._places(em, ps, out)
        for at in self._chunks(ps) if any(p is not None for p in places) else ():
            self._second(_Chunk(self, em, ps, at), gy[at], gy_dot[at], [p and p[at] for p in places])
        self._leave(out, places)

    def _second(self, chunk: _Chunk, g: Ref, g_dot: Ref, places: list[Ref | None]) -> None:
        gq, gk, gv = places
        p = chunk.probabilities()
        p_dot = chunk.moved(p)
        if gv is not None:
            chunk.product(gv, _t(p), g_dot)
            if p_dot is not None:
                chunk.product(gv, _t(p_dot), g, add=True)
        if gq is None and gk is None:
            return
        gp = chunk.product(chunk.new("gradient of p"), g, _t(chunk.v))
        gp_dot = chunk.product(chunk.new("its derivative"), g_dot, _t(chunk.v))
        if chunk.v_dot is not None:
            chunk.product(gp_dot, g, _t(chunk.v_dot), add=True)
        gs_dot = chunk.jacobian(p, gp_dot)
        if p_dot is not None:
            chunk.bend(gs_dot, p, p_dot, gp)
        gs = chunk.jacobian(p, gp)  # last, when fewer others are alive
        if gq is not None:
            chunk.product(gq, gs_dot, chunk.k, self.scale)
            if chunk.k_dot is not None:
                chunk.product(gq, gs, chunk.k_dot, self.scale, add=True)
        if gk is not None:
            chunk.product(gk, _t(gs_dot), chunk.q, self.scale)
            if chunk.q_dot is not None:
                chunk.product(gk, _t(gs), chunk.q_dot, self.scale, add=True)

    def _places(self, em: Emitter, ps: Pass, out: Gradients) -> list[Ref | None]:
        """Where the gradients of queries, keys and values go; None for one that is not wanted."""
        return [
            em.like(f"gradient of input of {self.name}", ps.values[i]) if i in out.wanted_values else None
            for i in self.inputs
        ]

    def _leave(self, out: Gradients, places: list[Ref | None]) -> None:
        for i, place in zip(self.inputs, places, strict=True):
            if place is not None:
                out.add(i, place)


class _Chunk:
    """Some heads [C, ...] of an example in a pass."""

    def __init__(self, step: Attention, em: Emitter, ps: Pass, at: tuple[int, int, slice]) -> None:
        self.step, self.em = step, em
        self.q, self.k, self.v = (ps.values[i][at] for i in step.inputs)
        moving = (ps.tangents.get(i) for i in step.inputs)
        self.q_dot, self.k_dot, self.v_dot = (None if t is None else t[at] for t in moving)
        self.shape = (self.q.shape[0], self.q.shape[1], step.keys)

    def new(self, name: str) -> Ref:
        return self.em.new(f"{name} of {self.step.name}", self.shape)

    def product(self, out: Ref, a: Ref, b: Ref, scale: float = 1.0, *, add: bool = False) -> Ref:
        """``out`` becomes ``scale`` a b, or grows by it."""
        flops = 2 * math.prod(out.shape) * a.shape[-1]
        self.em.call(aten.baddbmm_.default, out, a, b, beta=1.0 if add else 0.0, alpha=scale, flops=flops)
        return out

    def probabilities(self) -> Ref:
        scores = self.product(self.new("scores"), self.q, _t(self.k), self.step.scale)
        if self.step.causal:
            _, length, keys = self.shape
            later = self.em.once(
                ("later keys", length, keys),
                lambda: self.em.own(
                    "later keys", torch.ones(length, keys, dtype=torch.bool, device=self.em.device).triu(1)
                ),
            )
            self.em.call(aten.masked_fill_.Scalar, scores, later, -math.inf)
        p = self.new("p")
        self.em.call(aten._softmax.out, scores, -1, False, out=p)
        return p

    def jacobian(self, p: Ref, x: Ref) -> Ref:
        out = self.new("product with the softmax's Jacobian")
        self.em.call(aten._softmax_backward_data.out, x, p, -1, self.em.dtype, grad_input=out)
        return out

    def moved(self, p: Ref) -> Ref | None:
        """The derivative of the probabilities; None where they stay."""
        pairs = [
            (a, b) for a, b in ((self.q_dot, self.k), (self.q, self.k_dot)) if a is not None and b is not None
        ]
        if not pairs:
            return None
        scores = self.new("tangent of scores")
        for i, (a, b) in enumerate(pairs):
            self.product(scores, a, _t(b), self.step.scale, add=i > 0)
        return self.jacobian(p, scores)

    def bend(self, out: Ref, p: Ref, p_dot: Ref, x: Ref) -> None:
        """Adds Ṗ ∘ (X − (P∘X) 1 1ᵀ) − P ∘ (Ṗ∘X) 1 1ᵀ, how the Jacobian's product moves with P."""
        em, terms = self.em, self.new("terms")
        total = em.new(f"sum of {self.step.name}", (*self.shape[:2], 1))
        em.call(aten.mul.out, p, x, out=terms)
        em.call(aten.sum.IntList_out, terms, [2], True, out=total)
        em.call(aten.sub.out, x, total, out=terms)
        em.call(aten.addcmul_.default, out, p_dot, terms)
        em.call(aten.mul.out, p_dot, x, out=terms)
        em.call(aten.sum.IntList_out, terms, [2], True, out=total)
        em.call(aten.addcmul_.default, out, p, total, value=-1)


def _t(ref: Ref) -> Ref:
    return ref.view(lambda t: t.transpose(-2, -1))
