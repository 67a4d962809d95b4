"""What groups of tasks leave behind, and the sums over all of them.

A group writes to a row of its own of one table, so that none waits for another, and the sums come after, in the order
of the tasks: they do not depend on which lane ran which group, nor when.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mamlpp_fast.engine import base
from mamlpp_fast.engine.fused.flat import Layout
from mamlpp_fast.engine.fused.program import Emitter, Phase, Ref
from mamlpp_fast.engine.fused.steps import Rows
from mamlpp_fast.engine.fused.steps.base import aten
from mamlpp_fast.engine.running import row_of

__all__ = ["Finish", "Key", "Row"]

Key = str | tuple[str, str]
"""What is left: ``"losses"``, say, or a batch norm's name and what of it."""

_ALIGNMENT = 64


class Row:
    """Places in the flat buffer that a group of tasks leaves its results in, each aligned.

    Args:
        shapes: of the results.
        dtype: of all.

    Attributes:
        size: elements of the buffer.
    """

    def __init__(self, shapes: Mapping[Key, tuple[int, ...]], dtype: torch.dtype) -> None:
        self._places: dict[Key, tuple[int, tuple[int, ...]]] = {}
        step, self.size = _ALIGNMENT // dtype.itemsize, 0
        for key, shape in shapes.items():
            self._places[key] = self.size, shape
            self.size += -(-math.prod(shape) // step) * step

    def views(self, flat: Ref) -> dict[Key, Ref]:
        """The results in one row [size], or in a table of them [G, size]: then [G, *shape]."""
        return {key: flat.view(_part(begin, shape)) for key, (begin, shape) in self._places.items()}


def _part(begin: int, shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    return lambda t: t.narrow(-1, begin, math.prod(shape)).unflatten(-1, shape)


class Finish:
    """Writes down the means over all tasks of what their groups left.

    Args:
        em: of a program of its own.
        left: the results of all groups, [G, *shape] each.
        total_tasks: T.
    """

    def __init__(self, em: Emitter, left: Mapping[Key, Ref], total_tasks: int) -> None:
        self.em = em
        self.left = left
        self.total_tasks = total_tasks
        em.phase = Phase("finish")
        self._sums: list[tuple[Ref, Ref, float]] = []

    def _zeros(self, name: str, *shape: int) -> Ref:
        return self.em.own(name, torch.zeros(shape, dtype=self.em.dtype, device=self.em.device))

    def _mean(self, name: str, terms: Ref, axes: list[int]) -> Ref:
        """Over the first axes of the terms."""
        mean = self._zeros(name, *terms.shape[len(axes) :])
        if base.launches_cost(self.em.device):
            self._sums.append((mean, terms, 1 / self.total_tasks))
            return mean
        self.em.call(aten.sum.IntList_out, terms, axes, out=mean)
        self.em.call(aten.mul_.Scalar, mean, 1 / self.total_tasks)
        return mean

    def sum_all(self) -> None:
        """What is left to be summed, in one call where launches cost."""
        if self._sums:
            self.em.strided_sums(self._sums)

    def parameters(self, layout: Layout) -> dict[str, Ref]:
        """Of the adjoints, in the layout of the parameters."""
        self.em.label = "parameters"
        means = {}
        for name, (begin, shape) in layout.places().items():
            terms = self.left["adjoint"].view(_part(begin, shape))
            means[name] = self._mean(f"meta-gradient of {name}", terms, [0, 1])
        return means

    def rates(self) -> Ref:
        self.em.label = "rates"
        return self._mean("rates' gradient", self.left["rates"], [0])

    def _row_sums(self, name: str, rows: Rows, steps: int) -> tuple[Ref, Ref]:
        """Each step's terms are a row's, those of the last steps all the last row's (``row_of``)."""
        found = []
        for what in ("weight", "bias"):
            mean = self._zeros(f"{name} {what} gradient", rows.rows, rows.channels)
            terms = self.left[name, what].view(lambda t: t.permute(0, 2, 3, 1, 4))  # [G, 2, T, K, C]
            last = min(rows.rows, steps) - 1
            if last:
                self._sums.append((mean[:last], terms[:, :, :, :last], 1 / self.total_tasks))
            rest = self.left[name, what][:, last:]
            self._sums.append((mean[last], rest, 1 / self.total_tasks))
            found.append(mean)
        return found[0], found[1]

    def rows(self, rows: Mapping[str, Rows], steps: int) -> dict[str, tuple[Ref, Ref]]:
        """Of the terms [G, K, 2, T, C] of batch norms' weights and biases, summed by row."""
        em = self.em
        em.label = "batch-norm rows"
        if base.launches_cost(em.device):
            return {name: self._row_sums(name, r, steps) for name, r in rows.items()}
        means = {}
        for name, r in rows.items():
            # In float64, in which no GPU rounds the operands of a product.
            shares = torch.zeros(r.rows, steps, dtype=torch.float64, device=em.device)
            for k in range(steps):
                shares[row_of(k, r.rows), k] = 1 / self.total_tasks
            factors = em.own(f"{name} shares", shares)
            found = []
            for what in ("weight", "bias"):
                by_step = em.new(f"{name} {what} by step", (steps, r.channels), torch.float64)
                em.call(
                    aten.sum.IntList_out, self.left[name, what], [0, 2, 3], dtype=torch.float64, out=by_step
                )
                mean = em.own(f"{name} {what} gradient", shares.new_zeros(r.rows, r.channels))
                em.call(aten.mm.out, factors, by_step, out=mean)
                found.append(mean)
            means[name] = found[0], found[1]
        return means
