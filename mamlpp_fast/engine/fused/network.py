"""A lowered network: steps with shapes and parameter layouts, for one shape of examples."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch

from mamlpp_fast.engine.counts import Count
from mamlpp_fast.engine.fused.steps import Rows, Slot, Step

__all__ = ["Network", "Norm", "Statistics"]


@dataclass(frozen=True)
class Statistics:
    """A batch norm's running statistics.

    Attributes:
        mean, var, counted: names of the buffers; ``counted`` is PyTorch's number of batches, if there is one.
        rows: of the buffers, one for each inner step or one for all.
        momentum: share of a pass in them.
        eps: added to the variance by the norm.
    """

    mean: str
    var: str
    counted: str | None
    rows: int
    momentum: float
    eps: float


@dataclass(frozen=True)
class Norm:
    """A batch norm that normalises with the statistics of the batch.

    Attributes:
        elements: per image that a channel's statistics are taken over.
        statistics: what running statistics it keeps, if any.
        bias: of the convolution in front, where it was left out: it changes nothing but the running mean.
    """

    elements: int
    statistics: Statistics | None
    bias: str | None = None


@dataclass(frozen=True)
class Network:
    """A lowered network for one shape of examples.

    Attributes:
        steps: in order.
        shapes: of every value, without the leading [tasks, images]; images are [H, W, C].
        output: the value that holds the predictions.
        norms: the batch norms that normalise with the statistics of the batch, by name.
        frozen: the running statistics that others normalise with, by name.
        inputs: types of the first values, as the model is given them; integers are token ids.
        inert: biases that a norm of each example takes out again; those of batch norms are with ``norms``.
        asked: values [tasks] of a loss, and the answers by which it is this network.
        counts: that modules keep of their calls.
    """

    steps: tuple[Step, ...]
    shapes: dict[int, tuple[int, ...]]
    output: int
    norms: dict[str, Norm]
    frozen: dict[str, Statistics]
    inputs: tuple[torch.dtype, ...]
    inert: tuple[str, ...] = ()
    asked: tuple[tuple[int, bool], ...] = ()
    counts: tuple[Count, ...] = ()

    def channels(self, norm: str) -> int:
        """Of a batch norm, by name."""
        return next(self.shapes[step.output][-1] for step in self.steps if step.name == norm)

    def slots(self) -> dict[str, Slot]:
        return {slot.name: slot for step in self.steps for slot in step.slots}

    def rows(self) -> dict[str, Rows]:
        return {step.rows.name: step.rows for step in self.steps if step.rows is not None}

    def uses(self) -> Counter[int]:
        """How often each value is read, the predictions once more."""
        return Counter(i for step in self.steps for i in step.inputs) + Counter([self.output])

    def reader(self, value: int) -> Step | None:
        """The step that alone reads ``value``; None where there are several, or where it is the output."""
        if self.uses()[value] != 1:
            return None
        return next((step for step in self.steps if value in step.inputs), None)

    def table(self, images: int) -> str:
        """The steps with the shape, values in memory and parameters of each, for this many images."""
        lines = [f"{'step':<24} {'rule':<24} {'inputs':<10} {'output':<14} {'values':>10}  parameters"]
        for step in self.steps:
            shape = "x".join(map(str, step.shape))
            names = ", ".join(sorted(step.params())) or "-"
            inputs = ", ".join(map(str, step.inputs))
            values = images * math.prod(step.shape)
            lines.append(f"{step.name:<24} {step.kind:<24} {inputs:<10} {shape:<14} {values:>10}  {names}")
        return "\n".join(lines)

    def depends(self, params: frozenset[str], values: frozenset[int] = frozenset()) -> frozenset[int]:
        """Values whose gradient reaches any of these parameters or values, the latter themselves among them."""
        found = set(values)
        for step in self.steps:
            if step.constant:
                continue
            if step.params() & params or found.intersection(step.inputs):
                found.add(step.output)
        return frozenset(found)
