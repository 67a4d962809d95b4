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
from mamlpp_fast.engine.fused.fusions import drop_inert_biases, fuse_first_layer, fuse_norms
from mamlpp_fast.engine.fused.lowering import lower
from mamlpp_fast.engine.fused.network import Network
from mamlpp_fast.engine.fused.sections import EXAMPLES, Form, Place, Sections
from mamlpp_fast.engine.fused.steps import Generic
from mamlpp_fast.engine.record import record
from mamlpp_fast.engine.recorder import Parameter
from mamlpp_fast.engine.verify import check_call

__all__ = ["RECORDED_UNDER", "DifferentiableNetwork", "differentiable", "paused", "plainly"]


RECORDED_UNDER: list[Callable[[], contextlib.AbstractContextManager[Any]]] = []
"""Of modules that compute by operations of ours what PyTorch's do: within these they go PyTorch's way."""


def differentiable(model: nn.Module, x: Tensor) -> DifferentiableNetwork:
    """The operation that a model's call on examples like ``x`` is, checked in float64; in these where they take part.

    Raises:
        Unsupported: names what the model does that is no fixed list of operations, or where the check parts from it.
    """
    with _as_recorded():
        return _differentiable(model, x.detach(), x.requires_grad)


@contextlib.contextmanager
def _as_recorded() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in RECORDED_UNDER:
            stack.enter_context(context())
        yield


def _differentiable(model: nn.Module, x: Tensor, inputs: bool) -> DifferentiableNetwork:
    try:
        template = copy_of(model)
    except ValueError as error:
        raise Unsupported(type(model).__name__, str(error).removeprefix("model: ")) from error
    if not model.training and any(norm.eval_stats == "running" for norm in _per_step(model)):
        raise Unsupported(type(model).__name__, "normalises with running statistics")
    keep_one_row(template)
    parameters = dict(template.named_parameters())
    recording = record(template, x, torch.cat([x, x[:1]]))
    network = lower(recording, template, frozenset(parameters), any_shape=True)
    for fusion in (drop_inert_biases, fuse_norms):
        network = fusion(network)
    if not inputs:  # the fused first layer has no gradient for its images
        network = fuse_first_layer(network)
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
    read = {
        (r.name, r.detached) for op in recording.operations for r in op.inputs() if isinstance(r, Parameter)
    }
    constants = frozenset(name for name, detached in read if detached and (name, False) not in read)
    few = x[: max(4, min(len(x), 2**13 // max(x[0].numel(), 1)))].clone()
    exact = DifferentiableNetwork(network, template, len(few), x.device, torch.float64, constants, inputs)
    check_call(exact, template, few, exact.everything)
    dtype = next(iter(parameters.values())).dtype
    return DifferentiableNetwork(network, template, len(x), x.device, dtype, constants, inputs, few)


def keep_one_row(model: nn.Module) -> None:
    """Leaves per-step batch norms the row of their step alone, and PyTorch's own operations.

    The row is part of a call, as the weights are: :class:`_Held` picks it.
    """
    for norm in _per_step(model):
        for name, p in norm._parameters.items():
            if p is not None and norm.per_step_affine:
                norm._parameters[name] = nn.Parameter(p.detach()[norm.row].clone(), p.requires_grad)
        for name, b in norm._buffers.items():
            if b is not None and norm.per_step_stats:
                norm._buffers[name] = b[norm.row].clone()
        norm.per_step_affine = norm.per_step_stats = False
        norm.plain = True  # type: ignore[assignment]


def _per_step(model: nn.Module) -> list[reference.PerStepBatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, reference.PerStepBatchNorm2d)]


class _Lease:
    """Holds a place until autograd has no more use for it."""

    def __init__(self, net: DifferentiableNetwork) -> None:
        self.net = net
        self.place = net.take()

    def __del__(self) -> None:
        if self.net.sections is self.place.sections:  # else others have been written, with more parts
            self.net.sections.free.append(self.place)


class DifferentiableNetwork:
    """``y = f(x, parameters)`` for one shape of examples, differentiable twice in the parameters.

    Args:
        network: lowered with all parameters as slots.
        model: that it was lowered from; kept.
        images: examples a call.
        constants: of the parameters that the model reads without a gradient.
        inputs: whether it is differentiable in the examples too.
        few: examples to check sections on that are written later; None: they need no check.

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
        inputs: bool = False,
        few: Tensor | None = None,
    ) -> None:
        self.network = network
        # Not the model that calls: it may hold tensors with a graph, which would hold it.
        self.template = model
        self.constants = constants
        self.inputs = inputs
        self.few = few
        self.slots = network.slots()
        self.names = tuple(name for name, _ in model.named_parameters() if name in self.slots)
        self.inert = tuple(n.bias for n in network.norms.values() if n.bias is not None)
        self.device = device
        self.lock = threading.RLock()
        # By the order of what autograd sees: the examples, the parameters, those that are inert.
        self.given = (EXAMPLES, *self.names, *self.inert)
        smooth = (EXAMPLES, *self.names) if inputs else self.names
        self.everything = frozenset(smooth)
        self.heavy = tuple(
            i
            for i, n in enumerate(self.given)
            if n in self.everything and n not in constants and (n == EXAMPLES or len(self.slots[n].shape) > 1)
        )
        self.sections = Sections(Form(network, smooth, images, device, dtype), [self.everything])
        self.buffers = self.sections.buffers
        self._kept = [
            (n, norm, norm.statistics) for n, norm in network.norms.items() if norm.statistics is not None
        ]
        held = dict(model.named_parameters())
        # How each parameter gets the axes of the kernels' layout; None for one that has them.
        self._arranged = [
            None if s.split == held[n].shape and s.order == tuple(range(len(s.split))) else (s.split, s.order)
            for n, s in ((n, self.slots[n]) for n in self.names)
        ]
        self._refused: set[frozenset[str]] = set()
        self._calls, self._curved, self._rest = 0, -_OFTEN, 0

    def __str__(self) -> str:
        generic = [s.name for s in self.network.steps if isinstance(s, Generic)]
        rest = f", generic: {', '.join(generic)}" if generic else ""
        return f"one operation of {len(self.network.steps)} steps{rest}"

    def take(self) -> Place:
        sections = self.sections
        try:
            return sections.free.pop()
        except IndexError:
            with self.lock:
                return sections.take()

    def wanted(self, node: Any) -> frozenset[str]:
        """Of what gradients a backward pass that is under way has need, where it leaves out products; else of all.

        Args:
            node: of the call in the graph.
        """
        edges = [following for following, _ in node.next_functions]
        if all(_runs(edges[i]) for i in self.heavy):
            return self.everything
        found = frozenset(n for n, node in zip(self.given, edges, strict=True) if _runs(node))
        return found & self.everything

    def part(self, wanted: frozenset[str]) -> frozenset[str]:
        """Sees to sections for these gradients alone, and says which there are: these, or all."""
        with self.lock:
            if wanted in self.sections.parts:
                return wanted
            if not wanted or wanted in self._refused or len(self.sections.parts) >= _PARTS:
                return self.everything
            try:
                if self.few is not None:
                    self._check(self.few, wanted)
                sections = Sections(self.sections.form, [*self.sections.parts, wanted])
            except Unsupported:
                self._refused.add(wanted)
                return self.everything
            self.sections = sections
            return wanted

    def _check(self, few: Tensor, wanted: frozenset[str]) -> None:
        """Raises Unsupported where the gradients of ``wanted`` alone are not what the model's are, in float64."""
        exact = DifferentiableNetwork(
            self.network, self.template, len(few), self.device, torch.float64, self.constants, self.inputs
        )
        with _as_recorded():
            check_call(exact, self.template, few, wanted)

    def resting(self) -> bool:
        """Whether a call is left to PyTorch, by whose operations those before were differentiated a third time."""
        self._calls += 1
        self._rest = max(0, self._rest - 1)
        return self._rest > 0

    def curved(self) -> None:
        """Notes that a call was differentiated a third time."""
        if self._calls - self._curved < _OFTEN:
            self._rest = _REST
        self._curved = self._calls

    def call(self, model: nn.Module, x: Tensor) -> Tensor:
        """The model's output [N, ways] on ``x`` with the tensors that it holds; its running statistics follow."""
        tensors = _Held(model)
        given = [tensors.parameter(name) for name in (*self.names, *self.inert)]
        if self.constants:
            names = (*self.names, *self.inert)
            given = [p.detach() if n in self.constants else p for n, p in zip(names, given, strict=True)]
        buffers = {name: tensors.buffer(name) for name in self.buffers}
        apply: Any = _Forward.apply
        made: Tensor = apply(self, x, tensors, buffers, *given)[0]
        return made

    def follow(self, tensors: _Held, statistics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Running statistics take in those of the batch, as ``F.batch_norm`` does it."""
        if not self._kept:
            return
        images = self.sections.form.images
        running, new, shares, counts = [], [], [], []
        for name, norm, kept in self._kept:
            mean, rstd = statistics[name]
            if norm.bias is not None:
                mean = mean + tensors.parameter(norm.bias)
            count = norm.elements * images
            # By `data`, as PyTorch's kernel: the graph of a plain pass beside may have kept the buffers' versions.
            running += [tensors.buffer(kept.mean).data, tensors.buffer(kept.var).data]
            new += [mean, (rstd.pow(-2) - kept.eps).mul_(count / (count - 1))]
            shares += [kept.momentum] * 2
            if kept.counted is not None:
                counts.append(tensors.buffer(kept.counted))
        torch._foreach_mul_(running, [1 - share for share in shares])
        torch._foreach_add_(running, torch._foreach_mul(new, shares))
        if counts:
            torch._foreach_add_(counts, 1)

    def load(
        self, place: Place, x: Tensor, buffers: Mapping[str, Tensor], parameters: Sequence[Tensor]
    ) -> None:
        """Runs the forward pass on these."""
        place.x.copy_(self.stored(x))
        for name, b in buffers.items():
            place.buffers[name].copy_(b)
        torch._foreach_copy_(place.parameters, self.arranged(parameters))
        place.forward()
        place.busy, place.pending = False, None

    def stored(self, x: Tensor) -> Tensor:
        """A view of examples with the axes that they have in the kernels' layout."""
        return x.permute(0, 2, 3, 1) if x.ndim == 4 else x

    def arranged(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Views, or copies where there are none, with the axes that they have in the kernels' layout."""
        return [
            t if how is None else t.reshape(how[0]).permute(how[1])
            for how, t in zip(self._arranged, tensors, strict=False)
        ]

    def taken(self, places: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """Copies of what lies in the kernels' layout, in the parameters'; zeros for those that are inert."""
        made = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in like[: len(self.names)]]
        torch._foreach_copy_(self.arranged(made), list(places))
        return made + [torch.zeros_like(p) for p in like[len(self.names) :]]

    def taken_of(
        self, wanted: frozenset[str], places: Sequence[Tensor], like: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """As :meth:`taken`, of some; None for the others."""
        if wanted == self.everything:
            return list(self.taken(places, like))
        made: list[Tensor | None] = [None] * len(self.names)
        for i, name in enumerate(self.names):
            if name in wanted:
                made[i] = torch.empty(like[i].shape, dtype=like[i].dtype, device=like[i].device)
                slot = self.slots[name]
                made[i].view(slot.split).permute(slot.order).copy_(places[i])  # type: ignore[union-attr]
        return made + [torch.zeros_like(p) for p in like[len(self.names) :]]

    def direct(
        self, place: Place, wanted: frozenset[str], along: Tensor | None, cotangents: Sequence[Tensor | None]
    ) -> None:
        """Loads the directions of a double backward pass: none is one of zeros."""
        if EXAMPLES in wanted:
            if along is None:
                place.beside[1].zero_()
            else:
                place.beside[1].copy_(self.stored(along))
        places, values = [], []
        rows = zip(self.names, self._arranged, place.directions, cotangents, strict=False)
        for name, how, held, c in rows:
            if c is not None:
                places.append(held)
                values.append(c if how is None else c.reshape(how[0]).permute(how[1]))
            elif name in wanted:
                held.zero_()
        if places:
            torch._foreach_copy_(places, values)

    def second(
        self,
        place: Place,
        wanted: frozenset[str],
        gy: Tensor | None,
        x: Tensor,
        parameters: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """What the second half of a double backward pass leaves for the examples and the parameters.

        Args:
            gy: how the gradient of the output moves; with it, a further gradient of the output is passed back too.
        """
        if gy is None:
            place.gy_dot.zero_()
        else:
            place.gy_dot.copy_(gy)
        place.of[wanted].second()
        return [
            self.input_taken(place.beside[2], x) if self.inputs else None,
            *self.taken(place.seconds, parameters),
        ]

    def input_taken(self, stored: Tensor, like: Tensor) -> Tensor:
        """A copy of what lies as the examples do in the kernels' layout."""
        made = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        self.stored(made).copy_(stored)
        return made


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
    """The output, and a token that nobody sees; running statistics follow.

    The token leads from a backward pass to this node, so that autograd comes here after it has differentiated that
    pass: a loss is no linear function of the output as a rule, so that it would as well, and both are one pass.
    """

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
        if gy is None and pending is None:
            return (None,) * (4 + len(net.given) - 1)
        x, token, *parameters = ctx.saved_tensors
        if not keep:
            # Freed with the saved tensors, not with the result: a list of losses keeps no memory of their passes.
            ctx.lease = None
        batched = gy is not None and torch._C._functorch.is_legacy_batchedtensor(gy)
        found: list[Tensor | None] = []
        if pending is not None:
            lease.place.pending = None
            found = net.second(lease.place, pending[1], None if batched else gy, x, parameters)
            if not keep:
                lease.place.busy = False
        if batched:  # `is_grads_batched`: many gradients in one
            assert gy is not None
            more = _plain_backward(net, ctx.buffers, gy, x, parameters)
            found = [_sum(a, b) for a, b in zip(found, more, strict=True)] if found else more
        elif pending is None:
            wanted = net.wanted(ctx)
            if wanted != net.everything:
                wanted = net.part(wanted)
            apply: Any = _Backward.apply
            recorded = torch.is_grad_enabled()
            # Where its graph is freed, this node is of no more use, and not to be led to.
            token = token if recorded and keep else None
            given = net, lease, wanted, recorded, ctx.buffers, gy, token, x, *parameters
            found = list(apply(*given))
        moved, *rest = found
        return None, moved, None, None, *rest


class _Backward(torch.autograd.Function):
    """The gradients of the examples and of all parameters; None for those that are not wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        net: DifferentiableNetwork,
        lease: _Lease,
        wanted: frozenset[str],
        recorded: bool,
        buffers: Mapping[str, Tensor],
        gy: Tensor,
        token: Tensor | None,
        x: Tensor,
        *parameters: Tensor,
    ) -> Any:
        place = lease.place
        ctx.shared = token is not None
        if place.busy or wanted not in place.of:  # or made before these gradients were ever wanted alone
            lease = _Lease(net)
            place = lease.place
            net.load(place, x, buffers, parameters[: len(net.names)])
            ctx.shared = False
        place.gy.copy_(gy)
        place.of[wanted].backward()
        place.busy = recorded
        ctx.net, ctx.lease, ctx.wanted, ctx.buffers = net, lease, wanted, buffers
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gy, x, *parameters)
        first = net.input_taken(place.beside[0], x) if EXAMPLES in wanted else None
        return first, *net.taken_of(wanted, place.gradients, parameters)

    @staticmethod
    def backward(ctx: Any, along: Tensor | None, *cotangents: Tensor | None) -> Any:
        gy, x, *parameters = ctx.saved_tensors
        net, lease = ctx.net, ctx.lease
        none = (None,) * 5
        given = [c for c in (along, *cotangents) if c is not None]
        if not given:
            return *none, None, None, None, *(None for _ in parameters)
        batched = any(torch._C._functorch.is_legacy_batchedtensor(c) for c in given)
        if torch.is_grad_enabled() or batched:
            net.curved()
            by_gy, *found = _to_any_order(net, ctx.buffers, gy, x, parameters, (along, *cotangents))
            return *none, by_gy, None, *found
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        if not keep:
            ctx.lease = None
        place = lease.place
        net.direct(place, ctx.wanted, along, cotangents)
        place.of[ctx.wanted].tangent()
        moved = place.moved.clone()
        if ctx.shared and _runs(ctx.next_functions[1][0]):
            place.pending = torch._C._current_graph_task_id(), ctx.wanted
            return *none, moved, None, None, *(None for _ in parameters)
        found = net.second(place, ctx.wanted, None, x, parameters)
        if not keep:
            place.busy = False
        return *none, moved, None, *found


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _to_any_order(
    net: DifferentiableNetwork,
    buffers: Mapping[str, Tensor],
    gy: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The derivative of the backward pass by PyTorch's own operations: somebody asks for one that has derivatives.

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
        y = _plain(net, buffers, x, parameters)
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
        y = _plain(net, buffers, x, parameters)
    found = torch.autograd.grad(y, own, gy, create_graph=graph)
    return list(found) if net.inputs else [None, *found]


def _renamed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values, to differentiate by; with the graph that leads to them where one is recorded."""
    graph = torch.is_grad_enabled()
    return [t.view_as(t) if graph and t.requires_grad else t.detach().requires_grad_() for t in tensors]


def _plain(
    net: DifferentiableNetwork, buffers: Mapping[str, Tensor], x: Tensor, parameters: Sequence[Tensor]
) -> Tensor:
    """The forward pass on these tensors by PyTorch's own operations."""
    held = dict(zip((*net.names, *net.inert), parameters, strict=True))
    # One template for all threads.
    with plainly(), _as_recorded(), net.lock, reference.swapped(net.template, held | dict(buffers)):
        made: Tensor = net.template(x)
    return made


_paused = threading.local()
_PARTS = 4
"""Sets of gradients of a form that have sections of their own, all gradients among them."""
_OFTEN, _REST = 8, 64
"""Third derivatives within so many calls of a form leave so many calls to PyTorch."""


def _runs(node: Any) -> bool:
    """Whether the backward pass that is under way comes to a node of the graph."""
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient `autograd.grad` returns: torch tells it by an error
        return True


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
