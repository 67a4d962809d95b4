"""A lowered network as one operation of autograd that can be differentiated twice.

Its forward pass, its backward pass and the derivative of that (the tangent of the forward along the cotangents of the
gradients, then the tangent of the backward with a gradient that does not move: the pair of rules that the sweep takes
for a Hessian-vector product) are one program in three sections. Each call has memory of its own as long as autograd may
come back to it; memory is used again, so that the calls of an iteration find the places of the last one's.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec

from mamlpp_fast import reference
from mamlpp_fast._modes import plainly, pytorchs_norms, unnoted
from mamlpp_fast.copying import copy_of
from mamlpp_fast.engine.base import Unsupported, handed_over
from mamlpp_fast.engine.fused.derivatives import Forward, applied, runs
from mamlpp_fast.engine.fused.fusions import drop_inert_biases, fuse_first_layer, fuse_norms
from mamlpp_fast.engine.fused.held import Held
from mamlpp_fast.engine.fused.lowering import lower
from mamlpp_fast.engine.fused.moves import Follower, Moves
from mamlpp_fast.engine.fused.network import Network
from mamlpp_fast.engine.fused.sections import EXAMPLES, Form, Place, Sections, input_name
from mamlpp_fast.engine.fused.steps import Attention, Generic
from mamlpp_fast.engine.operation import Parameter
from mamlpp_fast.engine.record import Recording, record
from mamlpp_fast.engine.verify import check_call, enough
from mamlpp_fast.inputs import examples_of, joined, mapped, structure_of, tensors_of
from mamlpp_fast.machine import release_memory
from mamlpp_fast.reference import Inputs

__all__ = ["DifferentiableNetwork", "differentiable", "gainless"]

_PARTS = 4
"""Sets of gradients of a form that have sections of their own, all gradients among them."""
_OFTEN, _REST, _MOST_REST = 8, 64, 1024
"""Third derivatives within so many calls of a form leave so many calls to PyTorch; twice as many each time, up to."""


def differentiable(model: nn.Module, x: Inputs) -> DifferentiableNetwork:
    """The operation that a model's call on examples like ``x`` is, checked in float64; in these where one takes part.

    Raises:
        Unsupported: names what the model does that is no fixed list of operations, or where the check parts from it.
    """
    # Passes through the model itself are among it.
    with plainly(), pytorchs_norms(), unnoted(), handed_over(model):
        inputs = any(t.requires_grad for t in tensors_of(x))
        return _differentiable(model, mapped(Tensor.detach, x), inputs)


EVEN_WITHOUT_GAIN = False
"""Whether what gains nothing is served as well, for tests."""


def gainless(model: nn.Module) -> bool:
    """Whether a model is of a class that nothing is gained with, which is not to be looked at in every call."""
    return type(model) is nn.Linear and not EVEN_WITHOUT_GAIN


def _differentiable(model: nn.Module, x: Inputs, inputs: bool) -> DifferentiableNetwork:
    try:
        template = copy_of(model)
    except ValueError as error:
        raise Unsupported(type(model).__name__, str(error).removeprefix("model: ")) from error
    if not model.training and any(norm.eval_stats == "running" for norm in _per_step(model)):
        raise Unsupported(type(model).__name__, "normalises with running statistics")
    keep_one_row(template)
    parameters = dict(template.named_parameters())
    count = enough(x)
    recording, network = _lowered(model, template, x, count, inputs)
    if (fewer := enough(x, network)) < count:  # by the steps that it has
        count = fewer
        recording, network = _lowered(model, template, x, count, inputs)
    if network.frozen:
        raise Unsupported(next(iter(network.frozen)), "normalises with running statistics")
    if network.rows():
        raise Unsupported(
            next(iter(network.rows())), "has a weight or a bias that is no parameter of the call"
        )
    if not model.training and any(norm.statistics is not None for norm in network.norms.values()):
        raise Unsupported(type(model).__name__, "updates running statistics in evaluation")
    if not EVEN_WITHOUT_GAIN and not _gains(network):
        raise Unsupported(
            type(model).__name__,
            "is of few steps, all of them products, pointwise functions and the like, or reads large tables, which "
            "PyTorch is faster at",
        )
    if network.output not in network.depends(frozenset(network.slots())):
        raise Unsupported(type(model).__name__, "its results take part in no gradient")
    read = {
        (r.name, r.detached) for op in recording.operations for r in op.inputs() if isinstance(r, Parameter)
    }
    constants = frozenset(name for name, detached in read if detached and (name, False) not in read)
    device, structure = tensors_of(x)[0].device, structure_of(x)
    few = mapped(lambda t: t[:count].clone(), x)
    exact = DifferentiableNetwork(
        network, template, count, device, torch.float64, constants, inputs, structure
    )
    check_call(exact, template, few, exact.everything)
    release_memory()
    dtype = next(iter(parameters.values())).dtype
    return DifferentiableNetwork(
        network, template, examples_of(x), device, dtype, constants, inputs, structure, few
    )


def _lowered(
    model: nn.Module, template: nn.Module, x: Inputs, few: int, inputs: bool
) -> tuple[Recording, Network]:
    """The recording of a model, and its network for so many examples as there are and as few as a check takes."""
    whole = few == examples_of(x)
    other = mapped(lambda t: torch.cat([t, t[:1]]) if whole else t[:few], x)
    recording = record(template, x, other, original=model)
    if recording.asks_gradients:
        raise Unsupported(
            type(model).__name__, "asks which tensors take a gradient, which may differ from call to call"
        )
    if recording.draws is not None:
        raise Unsupported(type(model).__name__, recording.draws)
    network = lower(recording, template, frozenset(dict(template.named_parameters())))
    for fusion in (drop_inert_biases, fuse_norms):
        network = fusion(network)
    if not inputs:  # the fused first layer has no gradient for its images
        network = fuse_first_layer(network)
    return recording, network


_SCANS = frozenset({"gru", "lstm", "rnn_tanh", "rnn_relu"})
_MANY, _OF_A_NORM = 48, 6
"""Steps that gain by their number, and as how many a batch norm counts beside its own. An operation of ours takes some
0.2 ms a call beside what it computes, and each of PyTorch's that it stands for some 5 us, forwards, backwards and twice
so: of 20 small networks without convolutions, norms and scans those of 10 to 40 steps took 0.6 to 0.96 of a plain
loop's speed, those of 58 and more 1.05 to 1.6; MLPs with 1, 2, 4 and 6 batch norms 0.72, 0.91, 1.10 and 1.21."""
_TABLE = 2**19
"""Numbers in embeddings from which a network without scans gains nothing, and of eight times as many one with them:
each pass copies tables, and their gradients, where PyTorch reads some rows. Convolutions of texts took 1.6 of a plain
loop's speed with tables of 2^18 numbers, 0.67 with 2^21; an LSTM 1.8 with 2^19, 1.3 with 2^21."""


def _gains(network: Network) -> bool:
    """Whether the kernels are faster at a network, of any size."""
    generic = [step for step in network.steps if isinstance(step, Generic)]
    scans = any(step.recorded.name in _SCANS for step in generic)
    tables = {
        s.name: math.prod(s.shape)
        for step in generic
        if step.recorded.name == "embedding"
        for s in step.slots
    }
    if sum(tables.values()) > (8 * _TABLE if scans else _TABLE):
        return False
    heavy = scans or any(step.convolves or isinstance(step, Attention) for step in network.steps)
    return heavy or len(network.steps) + _OF_A_NORM * len(network.norms) >= _MANY


def keep_one_row(model: nn.Module) -> None:
    """Leaves per-step batch norms the row of their step alone, and PyTorch's own operations.

    The row is part of a call, as the weights are: :class:`Held` picks it.
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


class DifferentiableNetwork:
    """``y = f(x, parameters)`` for one shape of examples, differentiable twice in the parameters.

    Args:
        network: lowered with all parameters as slots.
        model: that it was lowered from; kept.
        images: examples a call.
        constants: of the parameters that the model reads without a gradient.
        inputs: whether it is differentiable in the examples too, the first tensor of them.
        structure: of what the model is given.
        few: examples to check sections on that are written later; None: they need no check.

    Attributes:
        names: of the parameters that it computes with.
        inert: of those that have a gradient of zero: biases that batch statistics take out again.
        parameters: both.
        calls: how many there were.
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
        structure: TreeSpec | None = None,
        few: Inputs | None = None,
    ) -> None:
        self.network = network
        # Not the model that calls: it may hold tensors with a graph, which would hold it.
        self.template = model
        self._normalises = reference.normalises(model)
        self.constants = constants
        self.inputs = inputs
        self.structure = structure
        self.few = few
        self.slots = network.slots()
        self.names = tuple(name for name, _ in model.named_parameters() if name in self.slots)
        dropped = (*(n.bias for n in network.norms.values() if n.bias is not None), *network.inert)
        self.inert = tuple(name for name in dict.fromkeys(dropped) if name not in self.slots)
        self.device = device
        self.lock = threading.RLock()
        # By the order of what autograd sees: the examples, the parameters, those that are inert.
        self.parameters = (*self.names, *self.inert)
        self.given = (EXAMPLES, *self.parameters)
        smooth = (EXAMPLES, *self.names) if inputs else self.names
        self.everything = frozenset(smooth)
        self.heavy = tuple(
            i
            for i, n in enumerate(self.given)
            if n in self.everything and n not in constants and (n == EXAMPLES or len(self.slots[n].shape) > 1)
        )
        self.sections = Sections(Form(network, smooth, images, device, dtype), [self.everything])
        self.buffers = self.sections.buffers
        self.follow = Follower(network.norms, images, device)
        self._refused: set[frozenset[str]] = set()
        self.calls, self._curved, self._rest, self._next_rest = 0, -_OFTEN, 0, _REST

    def __str__(self) -> str:
        generic = [s.name for s in self.network.steps if isinstance(s, Generic)]
        rest = f", generic: {', '.join(generic)}" if generic else ""
        return f"one operation of {len(self.network.steps)} steps{rest}"

    def take(self, passage: int) -> Place:
        """A place that is free, among those of a number that go through one passage."""
        sections = self.sections
        try:
            return sections.free[passage].pop()
        except IndexError:
            with self.lock:
                return sections.take(passage)

    def wanted(self, node: Any) -> frozenset[str]:
        """Of what gradients a backward pass that is under way has need, where it leaves out products; else of all.

        Args:
            node: of the call in the graph.
        """
        edges = [following for following, _ in node.next_functions]
        if all(runs(edges[i]) for i in self.heavy):
            return self.everything
        found = frozenset(n for n, node in zip(self.given, edges, strict=True) if runs(node))
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

    def _check(self, few: Inputs, wanted: frozenset[str]) -> None:
        """Raises Unsupported where the gradients of ``wanted`` alone are not what the model's are, in float64."""
        exact = DifferentiableNetwork(
            self.network,
            self.template,
            examples_of(few),
            self.device,
            torch.float64,
            self.constants,
            self.inputs,
            self.structure,
        )
        with plainly(), pytorchs_norms():
            check_call(exact, self.template, few, wanted)

    def to_any_order(self) -> contextlib.AbstractContextManager[object]:
        """Within it the calling thread's norms are PyTorch's, right in derivatives of any order."""
        return reference.norms_of_any_order() if self._normalises else contextlib.nullcontext()

    def resting(self) -> bool:
        """Whether a call is left to PyTorch, by whose operations those before were differentiated a third time."""
        self.calls += 1
        self._rest = max(0, self._rest - 1)
        return self._rest > 0

    def curved(self) -> None:
        """Notes that a call was differentiated a third time."""
        if self.calls - self._curved < _OFTEN:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _MOST_REST)
        self._curved = self.calls

    def call(self, tensors: Held, x: Inputs) -> Tensor:
        """The output [N, ...] on ``x`` with the tensors that a model holds; its running statistics follow."""
        given = tensors.parameters(self.parameters)
        if self.constants:
            named = zip(self.parameters, given, strict=True)
            given = [p.detach() if n in self.constants else p for n, p in named]
        first, buffers = self.read(tensors, x)
        made: Tensor = applied(Forward, self, first, tensors, buffers, *given)[0]
        tensors.count(self.network.counts)
        return made

    def read(self, tensors: Held, x: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The first input; the others and the model's buffers by the names of :attr:`buffers`."""
        first, *others = tensors_of(x)
        found = {input_name(i): t for i, t in enumerate(others, 1)}
        return first, {n: found[n] if n in found else tensors.buffer(n) for n in self.buffers}

    def written(self, first: Tensor, buffers: Mapping[str, Tensor]) -> tuple[Inputs, dict[str, Tensor]]:
        """What :meth:`read` was given: the inputs; the model's buffers."""
        names = [input_name(i) for i in range(1, len(self.network.inputs))]
        own = {name: b for name, b in buffers.items() if name not in names}
        return joined([first, *(buffers[name] for name in names)], self.structure), own

    def load(
        self, place: Place, x: Tensor, buffers: Mapping[str, Tensor], parameters: Sequence[Tensor]
    ) -> None:
        """Runs the forward pass on these."""
        place.x.copy_(self.stored(x))
        for name, b in buffers.items():
            place.buffers[name].copy_(b)
        place.parameters.load(parameters)
        place.forward()
        place.busy, place.pending = False, None

    def like_result(self, x: Inputs) -> Tensor:
        """Zeros of the output's shape and type."""
        shape = self.network.shapes[self.network.output]
        return torch.zeros(examples_of(x), *shape, dtype=self.sections.form.dtype, device=self.device)

    def stored(self, x: Tensor) -> Tensor:
        """A view of examples with the axes that they have in the kernels' layout."""
        return x.permute(0, 2, 3, 1) if x.ndim == 4 else x

    def taken_of(self, wanted: frozenset[str], of: Moves, like: Sequence[Tensor]) -> list[Tensor | None]:
        """Copies of some gradients, in the parameters' layout; None for the others, zeros for those that are inert."""
        if wanted == self.everything:
            return list(of.take(like))
        made: list[Tensor | None] = [None] * len(self.names)
        for i, name in enumerate(self.names):
            if name in wanted:
                made[i] = torch.empty(like[i].shape, dtype=like[i].dtype, device=like[i].device)
                slot = self.slots[name]
                made[i].view(slot.split).permute(slot.order).copy_(of.places[i])  # type: ignore[union-attr]
        return made + [torch.zeros_like(p) for p in like[len(self.names) :]]

    def direct(
        self,
        place: Place,
        wanted: frozenset[str],
        along: Tensor | None,
        cotangents: Sequence[Tensor | None],
        scale: float = 1.0,
    ) -> None:
        """Loads the directions of a double backward pass: none is one of zeros.

        Args:
            scale: of the cotangents, where everything is wanted.
        """
        if EXAMPLES in wanted:
            if along is None:
                place.beside[1].zero_()
            else:
                place.beside[1].copy_(self.stored(along))
        if wanted == self.everything:
            place.directions.load(cotangents, scale)
            return
        # The other places are not read.
        for name, held, c in zip(self.names, place.directions.places, cotangents, strict=False):
            if c is not None:
                held.copy_(self.slots[name].arrange(c.contiguous()))
            elif name in wanted:
                held.zero_()

    def add(self, to: Moves, given: Sequence[Tensor | None]) -> None:
        """Adds to what lies in the places what there is for the parameters."""
        for name, place, t in zip(self.names, to.places, given, strict=False):
            if t is not None:
                place.add_(self.slots[name].arrange(t.contiguous()))

    def second(
        self,
        place: Place,
        wanted: frozenset[str],
        gy: Tensor | None,
        x: Tensor,
        parameters: Sequence[Tensor],
        plus: Sequence[Tensor | None] | None = None,
    ) -> list[Tensor | None]:
        """What the second half of a double backward pass leaves for the examples and the parameters.

        Args:
            gy: how the gradient of the output moves; with it, a further gradient of the output is passed back too.
            plus: is added to what is for the parameters.
        """
        if gy is None:
            place.gy_dot.zero_()
        else:
            place.gy_dot.copy_(gy)
        place.of[wanted].second()
        return [
            self.input_taken(place.beside[2], x) if self.inputs else None,
            *place.seconds.take(parameters, plus),
        ]

    def input_taken(self, stored: Tensor, like: Tensor) -> Tensor:
        """A copy of what lies as the examples do in the kernels' layout."""
        made = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        self.stored(made).copy_(stored)
        return made
