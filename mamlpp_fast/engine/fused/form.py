"""What decides a program, and the tensors through which it meets the world."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mamlpp_fast.engine.fused.finish import Key
from mamlpp_fast.engine.fused.flat import Layout
from mamlpp_fast.engine.fused.masks import PassMasks
from mamlpp_fast.engine.fused.program import Program, Ref
from mamlpp_fast.engine.fused.steps import Rows, Slot

__all__ = ["Form", "Memory", "Written"]


@dataclass(frozen=True)
class Form:
    """What decides the shape of a program.

    Attributes:
        tasks: tasks of one group; all of them advance together.
        total_tasks: tasks of the meta-batch, which the mean is over.
        support, targets: images a task.
        labels, label_dtype: of a task's support and target set, [N, ...] each.
        steps: inner updates.
        rate_steps: rates (and batch-norm rows) there are; later steps use the last.
        adapted: parameters that the inner loop adapts.
        trainable: parameters that want a meta-gradient.
        rate_names: the parameters of the rows of the rates [L, K]; None when every element has its own rate.
        multi_step: a weighted target loss after every update, or the last one's alone.
        second_order: with Hessian-vector products.
        recompute: run the support pass again in the reverse sweep instead of keeping its activations.
        paired: the target pass of a step and the support pass of the next, which have the same weights, are one of
            twice the tasks, where network and form allow it. It keeps the target's activations too.
    """

    tasks: int
    total_tasks: int
    support: int
    targets: int
    labels: tuple[tuple[int, ...], tuple[int, ...]]
    label_dtype: torch.dtype
    steps: int
    rate_steps: int
    adapted: frozenset[str]
    trainable: frozenset[str]
    rate_names: tuple[str, ...] | None
    multi_step: bool = True
    second_order: bool = True
    recompute: bool = False
    paired: bool = False


@dataclass
class Memory:
    """The tensors through which a program meets the world; all keep their place.

    T are the tasks of a group, G the groups. What a run writes to, each lane has its own of.

    Attributes:
        support_x, target_x: inputs of the network, images [T, N, H, W, C]; support_t, target_t: what the loss stores
            for labels.
        meta: parameters in the kernels' layout; rows: batch-norm weight and bias [R, C]; buffers: of the model.
        rates: [L, K], or [K, size] like the fast weights of all tasks when every element has its own.
        weights: multi-step weights [K].
        running: running mean and variance [K, C] that frozen norms read.
        masks: of dropout, by inner step and side (0 support, 1 target), in the order of the passes.
        answers: truth values [T], false where the loss is another than was recorded; None where it asks for none.
        row: what a group leaves, flat; table: the rows of all groups [G, size]; all: what lies in them, [G, *shape]:
            ``"logits"``, predictions [T, m, O], or of every step [K, T, m, O]; in training ``"losses"`` [T],
            ``"adjoint"``, ``"rates"``, and of each batch norm ``"mean"`` and ``"rstd"`` [K, 2, T, C] that it saw in the
            support (0) and target (1) passes, ``"weight"`` and ``"bias"`` likewise.
        meta_grads, row_grads, rate_grads: means over all tasks.
    """

    support_x: tuple[Ref, ...]
    target_x: tuple[Ref, ...]
    support_t: Ref
    target_t: Ref
    weights: Ref
    rates: Ref
    row: Ref
    table: Ref
    all: dict[Key, Ref]
    meta: dict[str, Ref] = field(default_factory=dict)
    rows: dict[str, tuple[Ref, Ref]] = field(default_factory=dict)
    buffers: dict[str, Ref] = field(default_factory=dict)
    running: dict[str, tuple[Ref, Ref]] = field(default_factory=dict)
    masks: dict[tuple[int, int], PassMasks] = field(default_factory=dict)
    answers: Ref | None = None
    meta_grads: dict[str, Ref] = field(default_factory=dict)
    row_grads: dict[str, tuple[Ref, Ref]] = field(default_factory=dict)
    rate_grads: Ref | None = None


@dataclass(frozen=True)
class Written:
    """The programs of a group and of the sums over groups, their memory, and how parameters lie in it."""

    program: Program
    finish: Program
    memory: Memory
    slots: dict[str, Slot]
    rows: dict[str, Rows]
    layout: Layout
