"""What the steps of a network have in common: the values of a pass and the rules each step must give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mamlpp_fast.engine.base import Unsupported
from mamlpp_fast.engine.fused.masks import PassMasks
from mamlpp_fast.engine.fused.program import Emitter, Ref

__all__ = ["LOSS", "Affine", "Goal", "OneBackward", "Pass", "Rows", "Scaling", "Slot", "Step", "aten"]

aten = torch.ops.aten
LOSS = "loss"
"""Key in ``Pass.saved`` of the loss's value where a step takes it; with "tangent", of its gradient's tangent."""


@dataclass(frozen=True)
class Slot:
    """A parameter that every task has a copy of, in the layout of the kernels.

    Attributes:
        name: of the parameter in the model.
        shape: in the kernels' layout.
        split: the parameter's shape, some axes split in two.
        order: the order of those axes in the kernels' layout.
    """

    name: str
    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]

    def arrange(self, parameter: Tensor) -> Tensor:
        """View of a parameter (or its gradient), axes in the kernels' order."""
        return parameter.view(self.split).permute(self.order)

    def arranged(self, stored: Tensor) -> Tensor:
        """View of a tensor in the kernels' layout with the axes of :meth:`arrange`."""
        return stored.view([self.split[i] for i in self.order])


@dataclass(frozen=True)
class Rows:
    """A batch norm's weight and bias, shared by all tasks, a row for each inner step (or one for all)."""

    name: str
    weight: str | None
    bias: str | None
    rows: int
    channels: int


@dataclass(frozen=True)
class Scaling:
    """A batch norm's weight and bias where the inner loop adapts one of them or both: every task has its own."""

    weight: Slot
    bias: Slot


@dataclass(frozen=True)
class Goal:
    """What the loss of a pass is taken against.

    Attributes:
        target: [T, N, O], as the loss stores it.
        weights: of the losses of all steps [K]; None for 1.
        step: whose weight is meant.
        pair: of two roles, of which the second has no weight.
        want_loss: whether its value is wanted beside the gradient.
        loss: where that goes, [T]; new memory where None.
    """

    target: Ref
    weights: Ref | None = None
    step: int = 0
    want_loss: bool = False
    loss: Ref | None = None
    pair: bool = False


@dataclass
class Pass:
    """One pass of a batch of tasks through the network.

    Attributes:
        tasks, images: sizes [T, N] of every activation.
        step: the inner step, which chooses batch-norm rows.
        weights: fast weights by slot name.
        rows: batch-norm weight and bias [C] by batch norm.
        stats: where batch norms leave mean and 1/std [T, C], by name; scratch memory where absent.
        row_grads: where batch norms leave the gradients [T, C] of weight and bias, likewise.
        values: activations; tangents: their derivatives along ``directions``, absent where zero.
        grads: gradients of the loss with respect to the activations, absent where not needed.
        saved: what a step keeps from its forward for its other rules.
        goal: of the loss; None for predictions alone.
        buffers: of the model, by name; all tasks share them.
        masks: of dropout; None where nobody draws them.
        answers: truth values [T] that are made false where the loss would have been another list of operations.
        roles: several where so many groups of tasks have the same weights, which are then of ``tasks / roles``; rows
            and gradients of weights are [roles, ...].
    """

    tasks: int
    images: int
    step: int
    weights: Mapping[str, Ref]
    rows: Mapping[str, tuple[Ref, Ref]]
    values: dict[int, Ref]
    stats: Mapping[str, tuple[Ref, Ref]] = field(default_factory=dict)
    directions: Mapping[str, Ref] = field(default_factory=dict)
    tangents: dict[int, Ref] = field(default_factory=dict)
    grads: dict[int, Ref] = field(default_factory=dict)
    saved: dict[Any, Any] = field(default_factory=dict)
    goal: Goal | None = None
    buffers: Mapping[str, Ref] = field(default_factory=dict)
    masks: PassMasks | None = None
    answers: Ref | None = None
    roles: int = 1

    def op(self, name: str) -> Any:
        """Our operation of this name, in the form for so many roles."""
        return getattr(torch.ops.mamlpp_fast, f"{name}_shared" if self.roles > 1 else name).default

    @property
    def drawn(self) -> PassMasks:
        """What dropout draws in this pass."""
        if self.masks is None:
            raise Unsupported("dropout", "draws random numbers")
        return self.masks


@dataclass
class Gradients:
    """What a backward rule finds: activations' and parameters' gradients, several terms an activation."""

    wanted_values: frozenset[int]
    wanted_params: frozenset[str]
    terms: dict[int, list[Ref]] = field(default_factory=dict)
    params: dict[str, Ref] = field(default_factory=dict)
    row_memory: Mapping[str, tuple[Ref, Ref]] = field(default_factory=dict)
    memory: Mapping[str, Ref] = field(default_factory=dict)

    def add(self, value: int, ref: Ref) -> None:
        self.terms.setdefault(value, []).append(ref)

    def of(self, em: Emitter, slot: Slot, tasks: int) -> Ref:
        """Where the gradient of a parameter goes."""
        if slot.name in self.memory:
            return self.memory[slot.name]
        return em.new(f"gradient of {slot.name}", (tasks, *slot.shape))

    def of_rows(self, em: Emitter, rows: Rows | None, shape: tuple[int, ...]) -> tuple[Ref, Ref]:
        """Where the gradients of a batch norm's weight and bias go, of this shape."""
        if rows is not None and rows.name in self.row_memory:
            return self.row_memory[rows.name]
        name = "a norm" if rows is None else rows.name
        return em.new(f"gradient of {name}'s weight", shape), em.new(f"gradient of {name}'s bias", shape)


@dataclass
class Step:
    """One operation of the lowered network.

    Every rule reads and writes a :class:`Pass` and leaves calls with the emitter:

    - ``forward`` makes the output's value;
    - ``backward`` takes the gradient ``gy`` of the output to the inputs and parameters;
    - ``tangent`` makes the output's derivative along the pass's directions (the output is known to have one);
    - ``backward_tangent`` is the derivative of ``backward`` along the same: from ``gy_dot`` (and ``gy``, where
      anything upstream has a tangent).
    """

    name: str
    inputs: tuple[int, ...]
    output: int
    shape: tuple[int, ...]

    @property
    def slots(self) -> tuple[Slot, ...]:
        return ()

    @property
    def rows(self) -> Rows | None:
        return None

    @property
    def constant(self) -> bool:
        """Whether the output takes part in no gradient."""
        return False

    @property
    def convolves(self) -> bool:
        """Whether it works on images that a processor's caches hold one task of at best."""
        return False

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """The buffers of the model that it reads, by name."""
        return {}

    @property
    def kind(self) -> str:
        return type(self).__name__

    def params(self) -> frozenset[str]:
        """Names of the model's parameters that take a gradient here."""
        names = {s.name for s in self.slots}
        if self.rows is not None:
            names |= {n for n in (self.rows.weight, self.rows.bias) if n is not None}
        return frozenset(names)

    def forward(self, em: Emitter, ps: Pass) -> None:
        raise NotImplementedError

    def backward(self, em: Emitter, ps: Pass, gy: Ref, out: Gradients) -> None:
        raise NotImplementedError

    def tangent(self, em: Emitter, ps: Pass) -> None:
        raise NotImplementedError

    def backward_tangent(self, em: Emitter, ps: Pass, gy: Ref | None, gy_dot: Ref, out: Gradients) -> None:
        raise NotImplementedError

    def new_output(self, em: Emitter, ps: Pass, prefix: str = "") -> Ref:
        return em.new(f"{prefix}{self.name}", (ps.tasks, ps.images, *self.shape))

    def new_gradient(self, em: Emitter, ps: Pass, out: Gradients) -> Ref:
        """Where the gradient of the first input goes, which is a term of it from now on."""
        gx = em.like(f"gradient of input of {self.name}", ps.values[self.inputs[0]])
        out.add(self.inputs[0], gx)
        return gx


class OneBackward(Step):
    """A step whose backward rule is one: its derivative has the same terms, and some more."""

    def gradients(self, em: Emitter, ps: Pass, g: Ref, g0: Ref | None, out: Gradients) -> None:
        """Gradients for ``g``; for ``g`` the tangent of a gradient ``g0``, the tangent of the gradients."""
        raise NotImplementedError

    def backward(self, em: Emitter, ps: Pass, gy: Ref, out: Gradients) -> None:
        self.gradients(em, ps, gy, None, out)

    def backward_tangent(self, em: Emitter, ps: Pass, gy: Ref | None, gy_dot: Ref, out: Gradients) -> None:
        self.gradients(em, ps, gy_dot, gy, out)


class Affine(Step):
    """What steps share that scale and shift normalised channels.

    Attributes:
        affine: weight and bias, of all tasks or each task's own; None for 1 and 0.
    """

    affine: Rows | Scaling | None

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (self.affine.weight, self.affine.bias) if isinstance(self.affine, Scaling) else ()

    @property
    def rows(self) -> Rows | None:
        return self.affine if isinstance(self.affine, Rows) else None

    def weight_and_bias(self, em: Emitter, ps: Pass, channels: int) -> tuple[Ref, Ref]:
        """[C] or [T, C] each."""
        if isinstance(self.affine, Scaling):
            return ps.weights[self.affine.weight.name], ps.weights[self.affine.bias.name]
        if self.affine is not None:
            return ps.rows[self.affine.name]
        return em.constant_vector(1.0, channels), em.constant_vector(0.0, channels)

    def their_directions(self, ps: Pass) -> tuple[Ref | None, ...]:
        """Of weight and bias [T, C], None for one that does not adapt; nothing where neither can."""
        if not isinstance(self.affine, Scaling):
            return ()
        return ps.directions.get(self.affine.weight.name), ps.directions.get(self.affine.bias.name)

    def their_gradients(
        self, em: Emitter, ps: Pass, out: Gradients, shape: tuple[int, ...]
    ) -> tuple[Ref, Ref]:
        """Where the gradients [T, C] of weight and bias go, which a rule then fills."""
        if not isinstance(self.affine, Scaling):
            return out.of_rows(em, self.affine, shape)
        weight, bias = (out.of(em, slot, ps.tasks) for slot in (self.affine.weight, self.affine.bias))
        for slot, place in ((self.affine.weight, weight), (self.affine.bias, bias)):
            if slot.name in out.wanted_params:
                out.params[slot.name] = place
        return weight, bias
