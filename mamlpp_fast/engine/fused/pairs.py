"""Passes of two roles in one: the target pass of an inner step and the support pass of the next have the same weights.

Both are then one pass of twice the tasks, the targets' first, which takes half the calls. Where calls cost, that is
worth keeping the target pass's activations with the support's.
"""

from __future__ import annotations

import math
from typing import Any

from mamlpp_fast.engine.fused.form import Form
from mamlpp_fast.engine.fused.network import Network
from mamlpp_fast.engine.fused.program import Emitter, Ref
from mamlpp_fast.engine.fused.steps import Conv, FirstLayer, Flatten, Head, NormActPool, Pass, Scaling, Step
from mamlpp_fast.engine.fused.steps.loss import LossValue, scaled

__all__ = ["can_pair", "part"]

_ALIGNMENT = 16
"""Bytes that the kernels' pointers are multiples of."""


def can_pair(net: Network, form: Form, itemsize: int) -> bool:
    """Whether a program of such a form may have passes of both roles.

    They must be alike in size, of steps that take several roles on the same weights, and the second role's part of an
    activation must start where a kernel can take it.

    Args:
        net: of both passes.
        form: of the program.
        itemsize: bytes of an activation's number.
    """
    alike = form.support == form.targets and form.labels[0] == form.labels[1]
    if not (form.paired and form.multi_step and alike and all(map(_shares, net.steps))):
        return False
    size = form.tasks * form.support
    for step in net.steps:
        positions = isinstance(step, FirstLayer) or (isinstance(step, NormActPool) and step.pool)
        number = 1 if positions else itemsize
        if size * math.prod(step.shape) * number % _ALIGNMENT and not isinstance(step, Head):
            return False
    return all(size * math.prod(net.shapes[i]) * itemsize % _ALIGNMENT == 0 for i in range(len(net.inputs)))


def _shares(step: Step) -> bool:
    """Whether the step's forward and backward take tasks of several roles."""
    if isinstance(step, NormActPool) and (step.group or step.per_image):
        return False
    return type(step) in (Conv, FirstLayer, Flatten, Head, NormActPool) and not isinstance(
        getattr(step, "affine", None), Scaling
    )


def part(em: Emitter, both: Pass, own: Pass, role: int) -> None:
    """Gives the pass of one role what the pass of both left, forward and backward."""
    begin, end = role * own.tasks, (role + 1) * own.tasks

    def of(value: Any) -> Any:
        if isinstance(value, Ref):
            return em.part(value, begin, end)
        if isinstance(value, tuple):
            return tuple(map(of, value))
        if isinstance(value, LossValue):
            assert own.goal is not None
            scale = scaled(em, 1 / own.images, own.goal)
            return LossValue(of(value.grad), None, of(value.saved), scale)
        return value

    for mine, theirs in ((own.values, both.values), (own.grads, both.grads), (own.saved, both.saved)):
        for key, value in theirs.items():
            mine[key] = of(value)
