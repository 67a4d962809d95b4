"""A lowered network as one operation of autograd that can be differentiated twice.

Its forward pass, its backward pass and the derivative of that (the tangent of the forward along the cotangents of the
gradients, then the tangent of the backward with a gradient that does not move: the pair of rules that the sweep takes
for a Hessian-vector product) are one program in three sections. Each call has memory of its own as long as autograd may
come back to it; memory is used again, so that the calls of an iteration find the places of the last one's.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mamlpp_fast import reference
from mamlpp_fast.copying import copy_of
from mamlpp_fast.engine.base import Unsupported
from mamlpp_fast.engine.fused.flat import Layout
from mamlpp_fast.engine.fused.fusions import drop_inert_biases, fuse_first_layer, fuse_norms
from mamlpp_fast.engine.fused.lowering import lower
from mamlpp_fast.engine.fused.network import Network
from mamlpp_fast.engine.fused.passes import clear_missing, write_backward, write_forward, write_tangent
from mamlpp_fast.engine.fused.program import Emitter, Phase, Ref
from mamlpp_fast.engine.fused.steps import Generic, Gradients, Pass
from mamlpp_fast.engine.fused.steps.base import aten
from mamlpp_fast.engine.record import record
from mamlpp_fast.engine.recorder import Parameter
from mamlpp_fast.engine.verify import check_call
from mamlpp_fast.ops import update_running_stats

__all__ = ["RECORDED_UNDER", "DifferentiableNetwork", "differentiable", "paused", "plainly"]


RECORDED_UNDER: list[Callable[[], contextlib.AbstractContextManager[Any]]] = []
"""Of modules that compute by operations of ours what PyTorch's do: within these they go PyTorch's way."""


def differentiable(model: nn.Module, x: Tensor) -> DifferentiableNetwork:
    """The operation that a model's call on examples like ``x`` is, checked in float64.

    Raises:
        Unsupported: names what the model does that is no fixed list of operations, or where the check parts from it.
    """
    with contextlib.ExitStack() as stack:
        for context in RECORDED_UNDER:
            stack.enter_context(context())
        return _differentiable(model, x)


def _differentiable(model: nn.Module, x: Tensor) -> DifferentiableNetwork:
    try:
        template = copy_of(model)
    except ValueError as error:
        raise Unsupported(type(model).__name__, str(error).removeprefix("model: ")) from error
    keep_one_row(template)
    parameters = dict(template.named_parameters())
    recording = record(template, x, torch.cat([x, x[:1]]))
    network = lower(recording, template, frozenset(parameters))
    for fusion in (drop_inert_biases, fuse_norms, fuse_first_layer):
        network = fusion(network)
    if network.frozen:
        raise Unsupported(next(iter(network.frozen)), "normalises with running statistics")
    if network.rows():
        raise Unsupported(
            next(iter(network.rows())), "has a weight or a bias that is no parameter of the call"
        )
    if not model.training and any(norm.statistics is not None for norm in network.norms.values()):
        raise Unsupported(type(model).__name__, "updates running statistics in evaluation")
    if network.output not in network.depends(frozenset(network.slots())):
        raise Unsupported(type(model).__name__, "its results take part in no gradient")
    read = {(r.name, r.detached) for op in recording.operations for r in op.inputs() if isinstance(r, Parameter)}
    constants = frozenset(name for name, detached in read if detached and (name, False) not in read)
    few = x[: max(4, min(len(x), 2**13 // max(x[0].numel(), 1)))]
    exact = DifferentiableNetwork(network, template, len(few), x.device, torch.float64, constants)
    check_call(exact, template, few)
    dtype = next(iter(parameters.values())).dtype
    return DifferentiableNetwork(network, template, len(x), x.device, dtype, constants)


def keep_one_row(model: nn.Module) -> None:
    """Leaves per-step batch norms the row of their step alone, and PyTorch's own operations.

    The row is part of a call, as the weights are: :class:`_Held` picks it.
    """
    for module in model.modules():
        if isinstance(module, reference.PerStepBatchNorm2d):
            for name, p in module._parameters.items():
                if p is not None and module.per_step_affine:
                    module._parameters[name] = nn.Parameter(p.detach()[module.row].clone(), p.requires_grad)
            for name, b in module._buffers.items():
                if b is not None and module.per_step_stats:
                    module._buffers[name] = b[module.row].clone()
            module.per_step_affine = module.per_step_stats = False
            module.plain = True


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

        def arranged(refs: Mapping[str, Ref]) -> list[Tensor]:
            return [net.slots[name].arranged(refs[name].tensor(lane)[0]) for name in net.names]

        self.parameters, self.gradients = arranged(net.theta), arranged(net.grads)
        self.directions, self.seconds = arranged(net.directions), arranged(net.seconds)
        self.result, self.gy = net.result.tensor(lane)[0], net.gy.tensor(lane)[0]
        self.moved = net.moved.tensor(lane)[0]
        self.statistics = {n: (m.tensor(lane)[0], r.tensor(lane)[0]) for n, (m, r) in net.statistics.items()}
        self.buffers = {name: ref.tensor(lane) for name, ref in net.buffers.items()}
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
        model: that it was lowered from; kept.
        images: examples a call.
        constants: of the parameters that the model reads without a gradient.

    Attributes:
        names: of the parameters that it computes with.
        inert: of those that have a gradient of zero: biases that batch statistics take out again.
    """

    def __init__(
        self,
        network: Network,
        model: nn.Module,
        images: int,
        device: torch.device,
        dtype: torch.dtype,
        constants: frozenset[str] = frozenset(),
    ) -> None:
        self.network = network
        self.constants = constants
        # Not the model that calls: it may hold tensors with a graph, which would hold it.
        self.template = model
        self.slots = network.slots()
        self.names = tuple(name for name, _ in model.named_parameters() if name in self.slots)
        self.inert = tuple(n.bias for n in network.norms.values() if n.bias is not None)
        self.device = device
        self.free: list[_Place] = []
        self._lanes = 0
        self.lock = threading.Lock()
        em = Emitter(device, dtype)

        def own(name: str, *shape: int, dtype: torch.dtype = dtype) -> Ref:
            return em.own(name, torch.zeros(shape, dtype=dtype, device=device), each=True)

        shape = network.shapes[network.output]
        given = dtype if network.dtype.is_floating_point else network.dtype
        self.x = own("examples", 1, images, *network.shapes[0], dtype=given)
        self.gy, still = own("gradient", 1, images, *shape), own("no tangent", 1, images, *shape)
        layout = Layout(self.slots, list(self.names), 1, dtype)
        flats = [own(name, layout.size) for name in ("parameters", "gradients", "directions", "second")]
        self.theta, self.grads, self.directions, self.seconds = map(layout.views, flats)
        wanted, values = frozenset(self.names), network.depends(frozenset(self.names))
        self.statistics: dict[str, tuple[Ref, Ref]] = {}
        for name in network.norms:
            channels = network.channels(name)
            self.statistics[name] = own(f"{name} mean", 1, channels), own(f"{name} rstd", 1, channels)
        self.buffers: dict[str, Ref] = {}
        for name, b in ((n, b) for step in network.steps for n, b in step.buffers.items()):
            kind = dtype if b.is_floating_point() else b.dtype
            self.buffers[name] = em.own(name, torch.zeros_like(b, dtype=kind), each=True)
        ps = Pass(1, images, 0, self.theta, {}, {0: self.x}, self.statistics, buffers=self.buffers)
        em.phase = Phase("forward")
        write_forward(em, network, ps)
        self.result = ps.values[network.output]
        em.phase = Phase("backward")
        first = Gradients(values, wanted, memory=self.grads)
        write_backward(em, network, ps, self.gy, first, keep=True)
        clear_missing(em, first)
        em.keep()
        em.phase = Phase("double")
        ps.directions = self.directions
        write_tangent(em, network, ps, values)
        self.moved = own("moved", 1, images, *shape)
        em.call(aten.copy_.default, self.moved, ps.tangents[network.output])
        second = Gradients(values, wanted, memory=self.seconds)
        write_backward(em, network, ps, still, second, tangent=True)
        clear_missing(em, second)
        self.program = em.finish()

    def __str__(self) -> str:
        generic = [s.name for s in self.network.steps if isinstance(s, Generic)]
        rest = f", generic: {', '.join(generic)}" if generic else ""
        return f"one operation of {len(self.network.steps)} steps{rest}"

    def take(self) -> _Place:
        try:
            return self.free.pop()
        except IndexError:
            with self.lock:
                place = _Place(self, self._lanes)
                self._lanes += 1
            return place

    def call(self, model: nn.Module, x: Tensor) -> Tensor:
        """The model's output [N, ways] on ``x`` with the tensors that it holds; its running statistics follow."""
        tensors = _Held(model)
        given = [tensors.parameter(name) for name in (*self.names, *self.inert)]
        if self.constants:
            names = (*self.names, *self.inert)
            given = [p.detach() if n in self.constants else p for n, p in zip(names, given, strict=True)]
        buffers = {name: tensors.buffer(name) for name in self.buffers}
        apply: Any = _Forward.apply
        made: Tensor = apply(self, x, tensors, buffers, *given)
        return made

    def follow(self, tensors: _Held, statistics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Running statistics take in those of the batch, as ``F.batch_norm`` does it."""
        for name, norm in self.network.norms.items():
            mean, rstd = statistics[name]
            if (kept := norm.statistics) is None:
                continue
            if norm.bias is not None:
                mean = mean + tensors.parameter(norm.bias)
            update_running_stats(
                *(tensors.buffer(kept.mean), tensors.buffer(kept.var), mean, rstd.pow(-2) - kept.eps),
                count=norm.elements * self.x.shape[1],
                momentum=kept.momentum,
            )
            if kept.counted is not None:
                tensors.buffer(kept.counted).add_(1)

    def load(
        self, place: _Place, x: Tensor, buffers: Mapping[str, Tensor], parameters: Sequence[Tensor]
    ) -> None:
        """Runs the forward pass on these."""
        place.x.copy_(x.permute(0, 2, 3, 1) if x.ndim == 4 else x)
        for name, b in buffers.items():
            place.buffers[name].copy_(b)
        torch._foreach_copy_(place.parameters, self.arranged(parameters))
        place.forward()
        place.passes = 0

    def arranged(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Views, or copies where there are none, with the axes that they have in the kernels' layout."""
        slots = (self.slots[name] for name in self.names)
        return [t.reshape(s.split).permute(s.order) for s, t in zip(slots, tensors, strict=False)]

    def taken(self, places: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """Copies of what lies in the kernels' layout, in the parameters'; zeros for those that are inert."""
        made = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in like[: len(self.names)]]
        torch._foreach_copy_(self.arranged(made), list(places))
        return made + [torch.zeros_like(p) for p in like[len(self.names) :]]


class _Held:
    """What a model holds now, by name: its own tensors, or those that a functional call gives it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def _module(self, name: str) -> tuple[nn.Module, str]:
        module, (*path, leaf) = self._model, name.split(".")
        for part in path:
            module = module._modules[part]  # type: ignore[assignment]
        return module, leaf

    def parameter(self, name: str) -> Tensor:
        module, leaf = self._module(name)
        found = module._parameters[leaf]
        assert found is not None
        if isinstance(module, reference.PerStepBatchNorm2d) and module.per_step_affine:
            return found[module.row]
        return found

    def buffer(self, name: str) -> Tensor:
        module, leaf = self._module(name)
        found = module._buffers[leaf]
        assert found is not None
        if isinstance(module, reference.PerStepBatchNorm2d) and module.per_step_stats:
            return found[module.row]
        return found


class _Forward(torch.autograd.Function):
    """The output; running statistics follow."""

    @staticmethod
    def forward(
        ctx: Any,
        net: DifferentiableNetwork,
        x: Tensor,
        tensors: _Held,
        buffers: Mapping[str, Tensor],
        *parameters: Tensor,
    ) -> Any:
        lease = _Lease(net)
        net.load(lease.place, x, buffers, parameters[: len(net.names)])
        ctx.net, ctx.lease = net, lease
        ctx.buffers = {n: b.clone() for n, b in buffers.items()}
        ctx.save_for_backward(x, *parameters)
        net.follow(tensors, lease.place.statistics)
        return lease.place.result.clone()

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:
        x, *parameters = ctx.saved_tensors
        if torch._C._functorch.is_legacy_batchedtensor(gy):  # `is_grads_batched`: many gradients in one
            return None, None, None, None, *_plain_backward(ctx.net, ctx.buffers, gy, x, parameters)
        lease = ctx.lease
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            # Freed with the saved tensors, not with the result: a list of losses keeps no memory of their passes.
            ctx.lease = None
        given = ctx.net, lease, ctx.buffers, gy, x, *parameters
        apply: Any = _Backward.apply
        return None, None, None, None, *apply(*given)


class _Backward(torch.autograd.Function):
    """The gradients of all parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        net: DifferentiableNetwork,
        lease: _Lease,
        buffers: Mapping[str, Tensor],
        gy: Tensor,
        x: Tensor,
        *parameters: Tensor,
    ) -> Any:
        if lease.place.passes:  # an earlier pass left values there that its own derivative reads
            lease = _Lease(net)
            net.load(lease.place, x, buffers, parameters[: len(net.names)])
        place = lease.place
        place.gy.copy_(gy)
        place.backward()
        place.passes += 1
        ctx.net, ctx.lease, ctx.buffers = net, lease, buffers
        ctx.save_for_backward(gy, x, *parameters)
        return tuple(net.taken(place.gradients, parameters))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        gy, x, *parameters = ctx.saved_tensors
        batched = any(torch._C._functorch.is_legacy_batchedtensor(c) for c in cotangents)
        if torch.is_grad_enabled() or batched:
            found = _to_any_order(ctx.net, ctx.buffers, gy, x, parameters, cotangents)
        else:
            net, lease = ctx.net, ctx.lease
            if not torch._C._autograd._get_current_graph_task_keep_graph():
                ctx.lease = None
            place = lease.place
            torch._foreach_copy_(place.directions, net.arranged(cotangents))
            place.double()
            found = [place.moved.clone(), *net.taken(place.seconds, parameters)]
        return None, None, None, found[0], None, *found[1:]


def _to_any_order(
    net: DifferentiableNetwork,
    buffers: Mapping[str, Tensor],
    gy: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    cotangents: Sequence[Tensor],
) -> list[Tensor]:
    """The derivative of the backward pass by PyTorch's own operations: somebody asks for one that has derivatives."""
    # Names of their own, since the gradient may depend on the parameters by ways that lie outside of the call.
    graph = torch.is_grad_enabled()
    gy, *parameters = wanted = _renamed((gy, *parameters))
    with torch.enable_grad():
        y = _plain(net, buffers, x, parameters)
        grads = torch.autograd.grad(y, parameters, gy, create_graph=True)
    second = torch.autograd.grad(grads, wanted, cotangents, create_graph=graph, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(second, wanted, strict=True)]


def _plain_backward(
    net: DifferentiableNetwork,
    buffers: Mapping[str, Tensor],
    gy: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
) -> list[Tensor]:
    """The backward pass by PyTorch's own operations, which take tensors that no kernel of ours does."""
    graph, own = torch.is_grad_enabled(), _renamed(parameters)
    with torch.enable_grad():
        y = _plain(net, buffers, x, own)
    return list(torch.autograd.grad(y, own, gy, create_graph=graph))


def _renamed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values, to differentiate by; with the graph that leads to them where one is recorded."""
    graph = torch.is_grad_enabled()
    return [t.view_as(t) if graph and t.requires_grad else t.detach().requires_grad_() for t in tensors]


def _plain(
    net: DifferentiableNetwork, buffers: Mapping[str, Tensor], x: Tensor, parameters: Sequence[Tensor]
) -> Tensor:
    """The forward pass on these tensors by PyTorch's own operations."""
    held = dict(zip((*net.names, *net.inert), parameters, strict=True))
    with contextlib.ExitStack() as stack:
        for context in (plainly, *RECORDED_UNDER):
            stack.enter_context(context())
        stack.enter_context(net.lock)  # one template for all threads
        stack.enter_context(reference.swapped(net.template, held | dict(buffers)))
        made: Tensor = net.template(x)
    return made


_paused = threading.local()


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Within it the calling thread's models run as PyTorch runs them."""
    before, _paused.now = paused(), True
    try:
        yield
    finally:
        _paused.now = before


def paused() -> bool:
    """Whether the calling thread is within :func:`plainly`."""
    return getattr(_paused, "now", False)
