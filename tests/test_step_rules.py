"""The four rules of steps over windows, groups and single numbers, written down as a program, against autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.nn.functional as F
from op_helpers import pointwise_functions
from test_generic_rules import N, assert_four_rules
from torch import Tensor

from mamlpp_fast.engine.fused.steps import (
    AveragePool,
    Conv,
    MaxPool,
    NormActPool,
    Scaling,
    Slot,
    Smooth,
    Step,
    Times,
    TransposedConv,
)
from mamlpp_fast.ops.pointwise import FUNCTIONS

TASKS = 2
Form = tuple[int, ...]


def _nchw(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of images [N, C, H, W] as one of [N, H, W, C]."""
    return lambda x, *w: function(x.permute(0, 3, 1, 2), *w).permute(0, 2, 3, 1)


def _weight(*shape: int) -> Slot:
    return Slot("w0", shape, shape, tuple(range(len(shape))))


def _conv(stride: int, pads: tuple[int, int]) -> Callable[..., Tensor]:
    return _nchw(lambda x, w: F.conv2d(x, w.permute(3, 2, 0, 1), None, stride, pads))


def _transposed(stride: int, padding: int, more: int) -> Callable[..., Tensor]:
    """Cut out of the one without padding: PyTorch has no second derivative with ``output_padding``."""

    def run(x: Tensor, w: Tensor) -> Tensor:
        y = F.conv_transpose2d(x, w.permute(3, 2, 0, 1), None, stride)
        rows, columns = (size - 2 * padding + more for size in y.shape[2:])
        return y[:, :, padding : padding + rows, padding : padding + columns]

    return _nchw(run)


def _group_norm(groups: int, slope: float, pool: bool) -> Callable[..., Tensor]:
    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = F.leaky_relu(F.group_norm(x, groups, w, b), slope)
        return F.max_pool2d(y, 2) if pool else y

    return _nchw(run)


def _norm(shape: Form, group: int, slope: float, pool: bool) -> Step:
    slots = [Slot(f"w{i}", (4,), (4,), (0,)) for i in (0, 1)]
    return NormActPool("f", (0,), 1, shape, Scaling(*slots), 1e-5, slope, pool, False, "", group)


def _smooth(name: str) -> tuple[Step, Callable[..., Tensor]]:
    return Smooth("f", (0,), 1, (3, 2, 4), FUNCTIONS.index(name), 1.3), pointwise_functions(1.3)[name]


Case = tuple[Step, Callable[..., Tensor], Form, list[Form]]
IMAGE = (7, 6, 4)
CASES: dict[str, Case] = {
    "conv5x5": (
        Conv("f", (0,), 1, (7, 6, 3), _weight(5, 5, 4, 3), 1, 2),
        _conv(1, (2, 2)),
        IMAGE,
        [(5, 5, 4, 3)],
    ),
    "conv7x7-stride-2": (
        Conv("f", (0,), 1, (4, 3, 3), _weight(7, 7, 4, 3), 2, 3),
        _conv(2, (3, 3)),
        IMAGE,
        [(7, 7, 4, 3)],
    ),
    "sequence": (
        Conv("f", (0,), 1, (9, 1, 3), _weight(5, 1, 4, 3), 1, 2),
        _conv(1, (2, 0)),
        (9, 1, 4),
        [(5, 1, 4, 3)],
    ),
    "few-outputs": (
        Conv("f", (0,), 1, (7, 6, 2), _weight(3, 3, 16, 2), 1, 1),
        _conv(1, (1, 1)),
        (7, 6, 16),
        [(3, 3, 16, 2)],
    ),
    "transposed": (
        TransposedConv("f", (0,), 1, (14, 12, 3), _weight(2, 2, 3, 4), 2, 0, IMAGE),
        _transposed(2, 0, 0),
        IMAGE,
        [(2, 2, 3, 4)],
    ),
    "transposed-padded": (
        TransposedConv("f", (0,), 1, (14, 12, 3), _weight(3, 3, 3, 4), 2, 1, IMAGE),
        _transposed(2, 1, 1),
        IMAGE,
        [(3, 3, 3, 4)],
    ),
    "max-pool": (
        MaxPool("f", (0,), 1, (4, 3, 4), (3, 3, 2, 2, 1, 1)),
        _nchw(lambda x: F.max_pool2d(x, 3, 2, 1)),
        IMAGE,
        [],
    ),
    "average-pool": (
        AveragePool("f", (0,), 1, (4, 3, 4), (3, 3, 2, 2, 1, 1)),
        _nchw(lambda x: F.avg_pool2d(x, 3, 2, 1)),
        IMAGE,
        [],
    ),
    "mean": (AveragePool("f", (0,), 1, (4,), (7, 6, 7, 6, 0, 0)), lambda x: x.mean((1, 2)), IMAGE, []),
    "group-norm": (_norm(IMAGE, 2, 1.0, False), _group_norm(2, 1.0, False), IMAGE, [(4,), (4,)]),
    "group-norm-relu-pool": (_norm((3, 3, 4), 2, 0.1, True), _group_norm(2, 0.1, True), IMAGE, [(4,), (4,)]),
    "instance-norm-pool": (_norm((3, 3, 4), 1, 0.0, True), _group_norm(4, 0.0, True), IMAGE, [(4,), (4,)]),
    "one-group": (_norm(IMAGE, 4, 0.1, False), _group_norm(1, 0.1, False), IMAGE, [(4,), (4,)]),
    "times": (Times("f", (0,), 1, (5,), -2.5), lambda x: x * -2.5, (5,), []),
    **{name: (*_smooth(name), (3, 2, 4), []) for name in FUNCTIONS},
}


@pytest.mark.parametrize("still", ["none", "x", "w0", "w1"])
@pytest.mark.parametrize("name", CASES)
def test_the_four_rules(name: str, still: str) -> None:
    step, function, form, weights = CASES[name]
    shapes: dict[int | str, Form] = {0: (N, *form)} | {f"w{i}": w for i, w in enumerate(weights)}
    if still != "none" and (still != "x" or not weights) and still not in shapes:
        pytest.skip("has no such input, or nothing else that moves")
    without = 0 if still == "x" else still
    assert_four_rules(step, function, shapes, TASKS, [without], rtol=1e-9, atol=1e-10)
