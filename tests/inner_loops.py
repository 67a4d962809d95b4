"""A small task, and inner loops that several test files compare: a textbook's, ``mf.adapt``'s, learn2learn's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from helpers import moved
from torch import Tensor, nn
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast import reference

STEPS, RATE, CLASSES = 2, 0.3, 4
Task = tuple[Tensor, Tensor, Tensor, Tensor]
Loss = Callable[[Task], Tensor]


def task(seed: int) -> Task:
    """Support x [5, 6] and labels, target x [7, 6] and labels."""
    generator = torch.Generator().manual_seed(seed)

    def side(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
        return x, torch.randint(CLASSES, (n,), generator=generator)

    return *side(5), *side(7)


def plainly(model: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """The model's call with these tensors, of PyTorch's operations alone."""
    with reference.swapped(model, tensors):
        made: Tensor = model(x)
    return made


def textbook(model: nn.Module, buffers: dict[str, Tensor] | None = None, right: bool = True) -> Loss:
    """The target loss after the steps, with the model's own buffers or copies of the given ones.

    PyTorch's weight norm is written out where ``right``: its second derivative is wrong.
    """

    def loss(data: Task) -> Tensor:
        fast: dict[str, Tensor] = dict(model.named_parameters())
        copies = {} if buffers is None else {name: b.clone() for name, b in model.named_buffers()}
        for _ in range(STEPS):
            with reference.right_weight_norm(model) if right else contextlib.nullcontext():
                support = F.cross_entropy(plainly(model, fast | copies, data[0]), data[1])
            fast = moved(support, fast, RATE)
        return F.cross_entropy(plainly(model, fast | copies, data[2]), data[3])

    return loss


def adapted(model: nn.Module, aliases: bool = False) -> Loss:
    named = model.named_parameters(remove_duplicate=not aliases)
    rates = mf.LSLR(named, STEPS, RATE, learnable=False)

    def loss(data: Task) -> Tensor:
        fast = mf.adapt(model, data[0], data[1], rates)
        return F.cross_entropy(mf.reference.functional_call(model, fast, (data[2],)), data[3])

    return loss


def learned(learner: nn.Module) -> Loss:
    def loss(data: Task) -> Tensor:
        clone = learner.clone()
        for _ in range(STEPS):
            clone.adapt(F.cross_entropy(clone(data[0]), data[1]))
        return F.cross_entropy(clone(data[2]), data[3])

    return loss


def assert_as_the_textbook(
    model: nn.Module, witness: nn.Module, engine: str | None
) -> mf.MAMLPlusPlus | None:
    """Loss and meta-gradient of a task by a learner's engine, or by ``mf.adapt`` for None, are the textbook's.

    Returns:
        The learner.
    """
    data, learner = task(0), None
    expected = textbook(witness)(data)
    expected.backward()
    if engine is None:
        loss = adapted(model)(data)
        loss.backward()
    else:
        config = mf.MAMLConfig.maml(steps=STEPS, inner_lr=RATE)
        learner = mf.MAMLPlusPlus(model, config, engine=engine, precision="float64")  # type: ignore[arg-type]
        loss = learner.meta_gradient(mf.EpisodeBatch(*(part[None] for part in data))).loss
    assert_close(loss, expected.detach() if engine else expected)
    assert_close([p.grad for p in model.parameters()], [p.grad for p in witness.parameters()])
    return learner
