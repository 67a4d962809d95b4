"""Batch norm, leaky ReLU and max-pool in one: four orders, every backend, against autograd through PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal_on_any_threads, spare_the_interpreter
from op_helpers import (
    MOVING,
    assert_double_backward,
    assert_errs_at_most_twice_as_much_as_pytorch,
    assert_orders,
    assert_shared_directions,
    backend_fixture,
    opcheck,
    tangents,
    wide,
)
from torch import Tensor

from mamlpp_fast.ops.norm_act_pool import output_shape
from mamlpp_fast.testing import backends, use_backend

ops = torch.ops.mamlpp_fast
BACKENDS = backends("norm_act_pool")
backend = backend_fixture("norm_act_pool")
SHAPES = {
    "even": (2, 3, 6, 4, 8),
    "odd": (2, 3, 7, 5, 5),
    "odd-64": (1, 2, 7, 7, 64),
    "odd-columns": (3, 2, 4, 3, 67),
    "one-channel": (2, 2, 3, 3, 1),
    "smallest": (1, 1, 2, 2, 3),
    "long": (1, 1, 2, 37, 12),
    "many-pieces": (1, 6, 14, 14, 1),
}
EPS = 1e-5


def plain(z: Tensor, gamma: Tensor, beta: Tensor, slope: float, pool: bool, group: int = 1) -> Tensor:
    """The composite of PyTorch's own operations, task by task; γ and β are [T, C]."""
    tasks = []
    for task, weight, bias in zip(z, gamma, beta, strict=True):
        images = task.permute(0, 3, 1, 2)
        if group == 1:
            y = F.batch_norm(images, None, None, weight, bias, True, 0.0, EPS)
        else:  # all images of a task as rows of one
            one = images.transpose(0, 1).flatten(1, 2)[None]
            y = F.group_norm(one, z.shape[-1] // group, weight, bias, EPS)
            y = y[0].unflatten(1, images.shape[::2]).transpose(0, 1)
        y = F.leaky_relu(y, slope)
        tasks.append((F.max_pool2d(y, 2) if pool else y).permute(0, 2, 3, 1))
    return torch.stack(tasks)


class Case:
    """Inputs of all orders, and the results of all of them by the operations."""

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        pool: bool = True,
        slope: float = 0.01,
        per_task: bool = False,
        dtype: torch.dtype = torch.float64,
        offset: float = 0.0,
        moving: tuple[str, ...] = (),
        group: int = 1,
        each: int = 1,
        statistics: torch.dtype | None = None,
    ) -> None:
        tasks, channels = shape[0], shape[-1]
        small = output_shape(shape, pool)
        rows = (tasks // each, channels) if per_task else (channels,)
        self.group, self.each = group, each
        self.z, self.u = torch.randn(shape, dtype=dtype) + offset, torch.randn(shape, dtype=dtype)
        self.gy, self.gy_dot = torch.randn(small, dtype=dtype), torch.randn(small, dtype=dtype)
        self.statistics = statistics or dtype
        self.gamma, self.beta = (torch.randn(rows, dtype=self.statistics) for _ in range(2))
        dots = {name: torch.randn(tasks // each, channels, dtype=dtype) for name in moving}
        self.gamma_dot, self.beta_dot = dots.get("gamma"), dots.get("beta")
        self.pool, self.slope = pool, slope
        self.small, self.rows = small, (tasks, channels)

    def fresh(self, *shapes: tuple[int, ...]) -> list[Tensor]:
        types = [self.statistics if shape == self.rows else self.z.dtype for shape in shapes]
        return [torch.full(s, float("nan"), dtype=dtype) for s, dtype in zip(shapes, types, strict=True)]

    def tasks_of(self, row: Tensor) -> Tensor:
        """γ, β or a direction of theirs, of every task."""
        return row.expand(self.rows) if row.dim() == 1 else row.repeat_interleave(self.each, 0)

    def run(self) -> dict[str, Tensor]:
        y, mean, rstd = self.fresh(self.small, self.rows, self.rows)
        index = torch.full(self.small if self.pool else (0,), 255, dtype=torch.uint8)
        group = {"group": self.group}
        form = (self.slope, self.pool)
        ops.norm_act_pool(self.z, self.gamma, self.beta, EPS, *form, y, index, mean, rstd, **group)
        saved = (self.z, index, mean, rstd, self.gamma, self.beta, self.slope)
        gz, ggamma, gbeta = self.fresh(self.z.shape, self.rows, self.rows)
        ops.norm_act_pool_backward(self.gy, *saved, self.pool, gz, ggamma, gbeta, **group)
        uy, r, t = self.fresh(self.small, self.rows, self.rows)
        moved = (self.gamma_dot, self.beta_dot)
        ops.norm_act_pool_tangent(self.u, *saved, self.pool, uy, r, t, *moved, **group)
        dots = self.fresh(self.z.shape, self.rows, self.rows)
        along = (self.gy_dot, self.gy, self.u)
        ops.norm_act_pool_backward_tangent(*along, *saved, r, t, self.pool, *dots, moved[0], **group)
        names = ("y", "mean", "rstd", "gz", "ggamma", "gbeta", "uy", "gz_dot", "ggamma_dot", "gbeta_dot")
        return dict(zip(names, (y, mean, rstd, gz, ggamma, gbeta, uy, *dots), strict=True))

    def expected(self) -> dict[str, Tensor]:
        """The same by autograd; a tangent is the derivative of a gradient by its cotangent."""
        z, gy = self.z.clone().requires_grad_(), self.gy.clone().requires_grad_()
        gamma, beta = (self.tasks_of(row).clone().requires_grad_() for row in (self.gamma, self.beta))
        grouped = self.z.unflatten(-1, (-1, self.group))
        variance, mean = (
            t.repeat_interleave(self.group, -1) for t in torch.var_mean(grouped, (1, 2, 3, 5), correction=0)
        )
        y = plain(z, gamma, beta, self.slope, self.pool, self.group)
        gradients = torch.autograd.grad(y, (z, gamma, beta), gy, create_graph=True)
        found = [y, mean, (variance + EPS).rsqrt(), *gradients]
        dots = ((gamma, self.gamma_dot), (beta, self.beta_dot))
        moves = {p: self.tasks_of(d) for p, d in dots if d is not None}
        directions = {"uy": (y, {z: self.u, **moves})}
        for name, gradient in zip(("gz_dot", "ggamma_dot", "gbeta_dot"), gradients, strict=True):
            directions[name] = (gradient, {z: self.u, gy: self.gy_dot, **moves})
        names = ("y", "mean", "rstd", "gz", "ggamma", "gbeta")
        results = dict(zip(names, (f.detach() for f in found), strict=True))
        return results | tangents(directions)


@pytest.mark.parametrize("slope", [0.01, 0.0, 1.0], ids=["leaky", "relu", "linear"])
@pytest.mark.parametrize("pool", [True, False], ids=["pool", "dense"])
@pytest.mark.parametrize("name", SHAPES)
def test_four_orders(backend: str, name: str, pool: bool, slope: float) -> None:
    # To Triton's kernels the slope is a number like another.
    spare_the_interpreter(backend, slope != 0.01 and name not in ("odd", "odd-columns"))
    assert_orders(Case(SHAPES[name], pool=pool, slope=slope, per_task=slope == 0.01), 1e-11, scaled=False)


@pytest.mark.parametrize("moving", MOVING.values(), ids=MOVING)
@pytest.mark.parametrize("pool", [True, False], ids=["pool", "dense"])
@pytest.mark.parametrize("name", ["even", "odd", "odd-64", "odd-columns", "smallest"])
def test_orders_along_moving_weights(backend: str, name: str, pool: bool, moving: tuple[str, ...]) -> None:
    case = Case(SHAPES[name], pool=pool, per_task=name != "odd", moving=moving)
    case.gamma[..., 1] = 0
    assert_orders(case, 1e-11, scaled=False)


@pytest.mark.parametrize("pool", [True, False], ids=["pool", "dense"])
def test_the_tangents_are_the_double_backward(backend: str, pool: bool) -> None:
    case = Case((2, 3, 7, 5, 5), pool=pool, per_task=True, moving=("gamma", "beta"))
    assert_double_backward(case, "z", lambda *inputs: plain(*inputs, case.slope, pool))


@pytest.mark.parametrize(
    ("shape", "group", "each", "moving"),
    [
        ((2, 3, 6, 4, 8), 4, 1, ()),
        ((4, 1, 7, 5, 6), 3, 2, ("gamma", "beta")),
        ((6, 1, 5, 4, 34), 17, 3, ("gamma",)),
        ((4, 1, 4, 6, 5), 1, 2, ("gamma", "beta")),
        ((2, 1, 4, 2, 6), 6, 1, ("beta",)),
        ((3, 2, 2, 2, 40), 40, 3, ("gamma", "beta")),
    ],
    ids=["groups-of-4", "groups-of-3", "wide-groups", "instances", "one-group", "all-tasks-alike"],
)
@pytest.mark.parametrize("pool", [True, False], ids=["pool", "dense"])
def test_groups_of_channels_and_rows_for_several_tasks(
    backend: str, shape: tuple[int, ...], group: int, each: int, moving: tuple[str, ...], pool: bool
) -> None:
    spare_the_interpreter(backend, group > 1)  # the closed form's
    case = Case(shape, pool=pool, per_task=True, moving=moving, group=group, each=each)
    assert_orders(case, 1e-11, scaled=False)


def test_groups_with_a_large_mean_in_float32(backend: str) -> None:
    """The levels of the channels differ by a thousand, their deviations by one."""
    case = Case((2, 1, 7, 7, 16), dtype=torch.float32, group=8)
    case.z += torch.arange(16.0) * 100 + 1e3
    found = case.run()
    for name, value in wide(case).expected().items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[name].double(), value, rtol=0, atol=2e-5 * scale, msg=name)


def test_directions_shared_by_all_tasks(backend: str) -> None:
    assert_shared_directions(Case((3, 2, 5, 4, 6), moving=("gamma", "beta")))


@pytest.mark.parametrize("moving", [(), ("gamma", "beta")], ids=["fixed", "moving"])
def test_large_mean_in_float32_errs_at_most_twice_as_much_as_pytorch(
    backend: str, moving: tuple[str, ...]
) -> None:
    case = Case((1, 4, 14, 14, 16), dtype=torch.float32, offset=1e3, moving=moving)
    assert_errs_at_most_twice_as_much_as_pytorch(case, but=("mean",))


def test_float32_is_close(backend: str) -> None:
    size = 7 if backend == "triton" else 14  # interpreted, an image takes as long as there are pixels
    case = Case((2, 5, size, size, 40), dtype=torch.float32)
    found, expected = case.run(), case.expected()
    for name, value in found.items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=2e-6 * scale)


def test_nan_in_the_input_reaches_the_output(backend: str) -> None:
    case = Case((2, 2, 4, 4, 9))
    case.z[1, 0, 2, 1, 5] = float("nan")
    y = case.run()["y"]
    assert y[1, ..., 5].isnan().all()
    assert y[0].isfinite().all()


@pytest.mark.skipif("native" not in BACKENDS, reason="no native library")
@pytest.mark.parametrize("tasks", [1, 3, 8])
def test_result_does_not_depend_on_threads(tasks: int) -> None:
    case = Case((tasks, 5, 9, 8, 21), dtype=torch.float32, moving=("gamma", "beta"))
    assert_equal_on_any_threads(case.run)


@pytest.mark.parametrize("pool", [True, False], ids=["pool", "dense"])
def test_opcheck(pool: bool) -> None:
    case = Case((2, 2, 5, 4, 3), pool=pool)
    y, mean, rstd = case.fresh(case.small, case.rows, case.rows)
    index = torch.zeros(case.small, dtype=torch.uint8)
    outputs = (torch.empty_like(case.z), torch.empty_like(mean), torch.empty_like(mean))
    saved = (case.z, index, mean.zero_(), rstd.fill_(1), case.gamma, case.beta, case.slope)
    samples = {
        "norm_act_pool": (case.z, case.gamma, case.beta, EPS, case.slope, pool, y, index, mean, rstd),
        "norm_act_pool_backward": (case.gy, *saved, pool, *outputs),
        "norm_act_pool_tangent": (case.u, *saved, pool, y, *outputs[1:]),
        "norm_act_pool_backward_tangent": (
            case.gy_dot, case.gy, case.u, *saved, mean, rstd.clone(), pool, *outputs,
        ),
    }  # fmt: skip
    opcheck(samples, torch.randn(2, *case.rows, dtype=torch.float64))


def test_errors_name_the_argument(backend: str) -> None:
    def attempt(shape: tuple[int, ...], *, gamma: int = 3, small: tuple[int, ...] | None = None) -> None:
        small = output_shape(shape, True) if small is None else small
        results = (torch.empty(small), torch.empty(small, dtype=torch.uint8), *torch.empty(2, shape[0], 3))
        ops.norm_act_pool(torch.randn(shape), torch.randn(gamma), torch.randn(3), EPS, 0.01, True, *results)

    with pytest.raises(ValueError, match="gamma: expected"):
        attempt((2, 2, 4, 4, 3), gamma=2)
    with pytest.raises(ValueError, match="y: expected"):
        attempt((2, 2, 4, 4, 3), small=(2, 2, 2, 1, 3))
    with pytest.raises(ValueError, match="at least 2x2 pixels"):
        attempt((2, 2, 1, 4, 3))
    with pytest.raises(ValueError, match="more than one element"):
        attempt((2, 1, 1, 1, 3))
    case = Case((2, 2, 4, 4, 6), group=4)
    with pytest.raises(ValueError, match="group: expected a divisor of 6, got 4"):
        case.run()
    case = Case((4, 2, 4, 4, 6), per_task=True)
    case.gamma = case.gamma[:3]
    with pytest.raises(ValueError, match="gamma: expected"):
        case.run()


def test_a_direction_of_another_shape_is_refused(backend: str) -> None:
    case = Case((2, 2, 4, 4, 3), moving=("gamma", "beta"))
    for name in ("gamma_dot", "beta_dot"):
        right = getattr(case, name)
        setattr(case, name, right[:, :2])
        with pytest.raises(ValueError, match=f"{name}: expected"):
            case.run()
        setattr(case, name, right)


@pytest.mark.skipif("triton" not in BACKENDS, reason="no interpreter")
@pytest.mark.parametrize("whole", [0, 1024], ids=["two-passes", "whole"])
@pytest.mark.parametrize(
    ("shape", "pool", "per_task", "slope"),
    [
        ((2, 3, 5, 7, 3), True, False, 0.01),
        ((2, 2, 4, 5, 33), True, True, 0.01),
        ((1, 3, 5, 3, 2), False, True, 0.0),
        ((1, 6, 14, 14, 1), True, False, 1.0),
        ((2, 4, 9, 8, 9), True, True, 0.1),
    ],
    ids=[
        "odd-pooled",
        "two-channel-blocks",
        "relu-unpooled",
        "many-pieces",
        "two-tiles-two-blocks-of-a-whole",
    ],
)
def test_one_launch_for_both_passes_and_two(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    pool: bool,
    per_task: bool,
    slope: float,
    whole: int,
) -> None:
    """Up to so many rows a program takes all of them."""
    from mamlpp_fast.kernels import norm_act_pool as kernels

    monkeypatch.setattr(kernels, "_WHOLE", whole)
    with use_backend("triton"):
        assert_orders(Case(shape, pool=pool, per_task=per_task, slope=slope), 1e-11, scaled=False)


@pytest.mark.skipif("triton" not in BACKENDS, reason="no interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_low_precision_kernels_are_near_the_closed_form(dtype: torch.dtype) -> None:
    case = Case((2, 3, 5, 7, 3), dtype=dtype, statistics=torch.float32)
    with use_backend("python"):
        expected = case.run()
    with use_backend("triton"):
        actual = case.run()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif("triton" not in BACKENDS, reason="no interpreter")
def test_other_memory_order_is_refused_by_the_kernels() -> None:
    case = Case((1, 4, 3, 4, 2))
    case.z = case.z.transpose(1, 2).contiguous().transpose(1, 2)
    with use_backend("triton"), pytest.raises(ValueError, match="z: expected a contiguous tensor"):
        case.run()
