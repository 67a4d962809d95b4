"""A lowered network as one operation of autograd that can be differentiated twice.

Its forward pass, its backward pass and the derivative of that (the tangent of the forward along the cotangents of the
gradients, then the tangent of the backward with a gradient that does not move: the pair of rules that the sweep takes
for a Hessian-vector product) are one program in three sections. Each call has memory of its own as long as autograd may
come back to it; memory is used again, so that the calls of an iteration find the places of the last one's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mamlpp_fast.engine.fused.flat import Layout
from mamlpp_fast.engine.fused.network import Network
from mamlpp_fast.engine.fused.program import Emitter, Phase, Ref
from mamlpp_fast.engine.fused.steps import Gradients, Pass

__all__ = ["DifferentiableNetwork"]


class _Place:
    """One call's memory, and the three sections on it."""

    def __init__(self, net: DifferentiableNetwork, lane: int) -> None:
        program = net.program
        memory = torch.empty(program.workspace_bytes, dtype=torch.uint8, device=net.device)
        program.lay(lane, memory)
        self.forward, self.backward, self.double = (
            program.section(name, lane) for name in ("forward", "backward", "double")
        )
        self.x = net.x.tensor(lane)[0]
        arranged = [(net.slots[name], name) for name in net.names]
        self.parameters = [s.arranged(net.theta[n].tensor(lane)[0]) for s, n in arranged]
        self.gradients = [s.arranged(net.grads[n].tensor(lane)[0]) for s, n in arranged]
        self.directions = [s.arranged(net.directions[n].tensor(lane)[0]) for s, n in arranged]
        self.seconds = [s.arranged(net.seconds[n].tensor(lane)[0]) for s, n in arranged]
        self.result, self.gy = net.result.tensor(lane)[0], net.gy.tensor(lane)[0]
        self.moved = net.moved.tensor(lane)[0]
        self.statistics = {n: (m.tensor(lane), r.tensor(lane)) for n, (m, r) in net.statistics.items()}
        # How often a backward pass has run here since the forward: its own derivative needs the last one's values.
        self.passes = 0


class _Lease:
    """Holds a place until autograd has no more use for it."""

    def __init__(self, net: DifferentiableNetwork) -> None:
        self.net = net
        self.place = net.take()

    def __del__(self) -> None:
        self.net.free.append(self.place)


class DifferentiableNetwork:
    """``logits = f(x, parameters)`` for one shape of examples, differentiable twice in the parameters.

    Args:
        network: lowered with all parameters as slots.
        images: examples a call.
        names: the parameters that are given, in order; each is a slot of the network.
    """

    def __init__(
        self, network: Network, images: int, names: Sequence[str], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.network = network
        self.names = tuple(names)
        self.slots = network.slots()
        self.device = device
        self.free: list[_Place] = []
        self._lanes = 0
        self._lock = threading.Lock()
        em = Emitter(device, dtype)

        def own(name: str, *shape: int, dtype: torch.dtype = dtype) -> Ref:
            return em.own(name, torch.zeros(shape, dtype=dtype, device=device), each=True)

        shape = network.shapes[network.output]
        self.x = own("examples", 1, images, *network.shapes[0])
        self.gy, still = own("gradient", 1, images, *shape), own("no tangent", 1, images, *shape)
        layout = Layout(self.slots, list(self.names), 1, dtype)
        flats = [own(name, layout.size) for name in ("parameters", "gradients", "directions", "second")]
        self.theta, self.grads, self.directions, self.seconds = map(layout.views, flats)
        wanted, values = frozenset(self.names), network.depends(frozenset(self.names))
        self.statistics: dict[str, tuple[Ref, Ref]] = {}
        for name in network.norms:
            channels = next(network.shapes[s.output][-1] for s in network.steps if s.name == name)
            self.statistics[name] = own(f"{name} mean", 1, channels), own(f"{name} rstd", 1, channels)
        ps = Pass(1, images, 0, self.theta, {}, {0: self.x}, self.statistics)
        em.phase = Phase("forward")
        for step in network.steps:
            em.label = step.name
            step.forward(em, ps)
        self.result = ps.values[network.output]
        em.phase = Phase("backward")
        self._backward(em, ps, self.gy, Gradients(values, wanted, memory=self.grads), tangent=False)
        em.keep()
        em.phase = Phase("double")
        ps.directions = self.directions
        for step in network.steps:
            if step.output in values:
                em.label = step.name
                step.tangent(em, ps)
        self.moved = ps.tangents[network.output]
        copied = own("moved", *self.moved.shape)
        em.call(torch.ops.aten.copy_.default, copied, self.moved)
        self.moved = copied
        self._backward(em, ps, still, Gradients(values, wanted, memory=self.seconds), tangent=True)
        self.program = em.finish()

    def _backward(self, em: Emitter, ps: Pass, grad: Ref, out: Gradients, *, tangent: bool) -> None:
        out.add(self.network.output, grad)
        for step in reversed(self.network.steps):
            if step.output not in out.wanted_values or step.output not in out.terms:
                continue
            em.label = step.name
            gy = em.sum(f"gradient of {step.name}", out.terms.pop(step.output))
            if tangent:
                step.backward_tangent(em, ps, ps.grads.get(step.output), gy, out)
            else:
                ps.grads[step.output] = gy
                step.backward(em, ps, gy, out)
        for name, place in out.memory.items():
            if name not in out.params:
                em.call(torch.ops.aten.zero_.default, place)

    def take(self) -> _Place:
        try:
            return self.free.pop()
        except IndexError:
            with self._lock:
                place = _Place(self, self._lanes)
                self._lanes += 1
            return place

    def __call__(self, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        result: Tensor = _Forward.apply(self, x, *parameters)  # type: ignore[no-untyped-call]
        return result

    def load(self, place: _Place, x: Tensor, parameters: Sequence[Tensor]) -> None:
        place.x.copy_(x.permute(0, 2, 3, 1) if x.ndim == 4 else x)
        sources = [self.slots[n].arrange(p) for n, p in zip(self.names, parameters, strict=True)]
        torch._foreach_copy_(place.parameters, sources)
        place.forward()
        place.passes = 0

    def taken(self, places: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """Copies of what lies in the kernels' layout, in the parameters'."""
        made = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in like]
        torch._foreach_copy_([self.slots[n].arrange(t) for n, t in zip(self.names, made, strict=True)], list(places))
        return made


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, net: DifferentiableNetwork, x: Tensor, *parameters: Tensor) -> Tensor:
        lease = _Lease(net)
        net.load(lease.place, x, parameters)
        ctx.net, ctx.lease = net, lease
        ctx.save_for_backward(x, *parameters)
        return lease.place.result.clone()

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:  # type: ignore[override]
        return None, None, *_Backward.apply(ctx.net, ctx.lease, gy, *ctx.saved_tensors)  # type: ignore[no-untyped-call]


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, net: DifferentiableNetwork, lease: _Lease, gy: Tensor, x: Tensor, *parameters: Tensor) -> Any:
        if lease.place.passes:  # an earlier backward pass left values there that its own derivative reads
            lease = _Lease(net)
            net.load(lease.place, x, parameters)
        place = lease.place
        place.gy.copy_(gy)
        place.backward()
        place.passes += 1
        ctx.net, ctx.lease = net, lease
        ctx.save_for_backward(gy, x, *parameters)
        return tuple(net.taken(place.gradients, parameters))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *cotangents: Tensor) -> Any:  # type: ignore[override]
        _, _, *parameters = ctx.saved_tensors
        net, place = ctx.net, ctx.lease.place
        torch._foreach_copy_(place.directions, [net.slots[n].arrange(v) for n, v in zip(net.names, cotangents, strict=True)])
        place.double()
        return None, None, place.moved.clone(), None, *net.taken(place.seconds, parameters)
