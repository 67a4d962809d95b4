"""The first layer in one: four orders, every backend, against autograd through PyTorch's own."""

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
)
from torch import Tensor

from mamlpp_fast.ops.conv_norm_act_pool import output_shape
from mamlpp_fast.testing import backends

ops = torch.ops.mamlpp_fast
backend = backend_fixture("conv_norm_act_pool")
# Images [T, N, H, W, Ci], filters, kernel, padding.
SHAPES = {
    "even": ((2, 3, 6, 4, 1), 8, (3, 3), 1),
    "odd": ((2, 2, 7, 5, 3), 5, (3, 3), 1),
    "omniglot": ((1, 2, 9, 8, 1), 64, (3, 3), 1),
    "three-registers": ((1, 2, 5, 6, 3), 48, (3, 3), 1),
    "remainder": ((3, 1, 5, 6, 2), 67, (3, 3), 1),
    "no-padding": ((2, 2, 7, 6, 1), 3, (3, 3), 0),
    "point": ((1, 3, 4, 5, 3), 4, (1, 1), 0),
    "smallest": ((1, 1, 2, 2, 1), 1, (3, 3), 1),
}
EPS = 1e-5


class Case:
    """Inputs of all orders, and the results of all of them by the operations."""

    def __init__(
        self,
        images: tuple[int, ...],
        channels: int,
        kernel: tuple[int, int] = (3, 3),
        padding: int = 1,
        *,
        slope: float = 0.01,
        per_task: bool = False,
        dtype: torch.dtype = torch.float64,
        offset: float = 0.0,
        moving: tuple[str, ...] = (),
    ) -> None:
        tasks, count, height, width, ci = images
        self.padding, self.slope, self.dtype, self.rows = padding, slope, dtype, (tasks, channels)
        self.padded = (tasks, count, height + 2 * padding, width + 2 * padding, ci)
        weights = (tasks, *kernel, ci, channels)
        self.small = output_shape(self.padded, weights)
        self.values = kernel[0] * kernel[1] * ci
        self.x = torch.randn(images, dtype=dtype) + offset
        self.w, self.v = (torch.randn(weights, dtype=dtype) for _ in range(2))
        self.gy, self.gy_dot = (torch.randn(self.small, dtype=dtype) for _ in range(2))
        self.gamma, self.beta = (
            torch.randn(self.rows if per_task else (channels,), dtype=dtype) for _ in range(2)
        )
        dots = {name: torch.randn(self.rows, dtype=dtype) for name in moving}
        self.gamma_dot, self.beta_dot = dots.get("gamma"), dots.get("beta")

    def fresh(self, *shapes: tuple[int, ...]) -> list[Tensor]:
        return [torch.full(shape, float("nan"), dtype=self.dtype) for shape in shapes]

    def prepared(self) -> tuple[Tensor, Tensor]:
        (padded,) = self.fresh(self.padded)
        moments = padded.new_full((self.rows[0], self.values + 2, self.values), float("nan")).double()
        ops.patch_moments(self.x, *self.w.shape[1:3], self.padding, padded, moments)
        return padded, moments

    def run(self) -> dict[str, Tensor]:
        images = self.prepared()
        y, mean, rstd = self.fresh(self.small, self.rows, self.rows)
        index = torch.full(self.small, 255, dtype=torch.uint8)
        affine = (self.gamma, self.beta)
        ops.conv_norm_act_pool(*images, self.w, *affine, EPS, self.slope, y, index, mean, rstd)
        saved = (y, index, *images, self.w, self.gamma, rstd, self.slope)
        sums = (self.rows[0], self.values, self.rows[1])
        gw, b, ggamma, gbeta = self.fresh(tuple(self.w.shape), sums, self.rows, self.rows)
        ops.conv_norm_act_pool_backward(self.gy, *saved, gw, b, ggamma, gbeta)
        uy, t = self.fresh(self.small, self.rows)
        ops.conv_norm_act_pool_tangent(self.v, *saved, uy, t, self.gamma_dot, self.beta_dot)
        dots = self.fresh(tuple(self.w.shape), self.rows, self.rows)
        ops.conv_norm_act_pool_backward_tangent(self.gy_dot, self.v, *saved, b, t, *dots, self.gamma_dot)
        names = ("y", "mean", "rstd", "gw", "ggamma", "gbeta", "uy", "gw_dot", "ggamma_dot", "gbeta_dot")
        return dict(zip(names, (y, mean, rstd, gw, ggamma, gbeta, uy, *dots), strict=True))

    def plain(self, w: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """The composite of PyTorch's own operations, task by task, and the convolution's output before the rest."""
        found, features = [], []
        for x, weight, scale, shift in zip(self.x, w, gamma, beta, strict=True):
            z = F.conv2d(x.permute(0, 3, 1, 2), weight.permute(3, 2, 0, 1), padding=self.padding)
            y = F.leaky_relu(F.batch_norm(z, None, None, scale, shift, True, 0.0, EPS), self.slope)
            found.append(F.max_pool2d(y, 2).permute(0, 2, 3, 1))
            features.append(z)
        return torch.stack(found), torch.stack(features)

    def expected(self) -> dict[str, Tensor]:
        """The same by autograd; a tangent is the derivative of a gradient by its cotangent."""
        w, gy = self.w.clone().requires_grad_(), self.gy.clone().requires_grad_()
        gamma, beta = (row.expand(self.rows).clone().requires_grad_() for row in (self.gamma, self.beta))
        y, z = self.plain(w, gamma, beta)
        variance, mean = torch.var_mean(z.detach(), (1, 3, 4), correction=0)
        gradients = torch.autograd.grad(y, (w, gamma, beta), gy, create_graph=True)
        names = ("y", "mean", "rstd", "gw", "ggamma", "gbeta")
        found = (y, mean, (variance + EPS).rsqrt(), *gradients)
        results = {name: value.detach() for name, value in zip(names, found, strict=True)}
        moves = {p: d for p, d in ((gamma, self.gamma_dot), (beta, self.beta_dot)) if d is not None}
        directions = {"uy": (y, {w: self.v, **moves})}
        for name, gradient in zip(("gw_dot", "ggamma_dot", "gbeta_dot"), gradients, strict=True):
            directions[name] = (gradient, {w: self.v, gy: self.gy_dot, **moves})
        return results | tangents(directions)


@pytest.mark.parametrize("slope", [0.01, 0.0, 1.0], ids=["leaky", "relu", "linear"])
@pytest.mark.parametrize("name", SHAPES)
def test_four_orders(backend: str, name: str, slope: float) -> None:
    # To Triton's kernels the slope is a number like another.
    spare_the_interpreter(backend, slope != 0.01 and name != "odd")
    assert_orders(Case(*SHAPES[name], slope=slope, per_task=slope == 0.01), 1e-10)


@pytest.mark.parametrize("moving", MOVING.values(), ids=MOVING)
@pytest.mark.parametrize("name", ["even", "odd", "three-registers", "remainder", "no-padding", "point"])
def test_orders_along_moving_weights(backend: str, name: str, moving: tuple[str, ...]) -> None:
    case = Case(*SHAPES[name], per_task=name != "odd", moving=moving)
    case.gamma[..., 1] = 0
    assert_orders(case, 1e-10)


def test_the_tangents_are_the_double_backward(backend: str) -> None:
    case = Case((2, 3, 7, 6, 2), 5, per_task=True, moving=("gamma", "beta"))
    assert_double_backward(case, "w", lambda *inputs: case.plain(*inputs)[0])


def test_directions_shared_by_all_tasks(backend: str) -> None:
    assert_shared_directions(Case((3, 2, 5, 4, 1), 6, moving=("gamma", "beta")))


@pytest.mark.parametrize("moving", [(), ("gamma", "beta")], ids=["fixed", "moving"])
@pytest.mark.parametrize("offset", [0.0, 100.0], ids=["centred", "mean-100"])
def test_float32_errs_at_most_twice_as_much_as_pytorch(
    backend: str, offset: float, moving: tuple[str, ...]
) -> None:
    case = Case((2, 4, 14, 14, 3), 16, dtype=torch.float32, offset=offset, moving=moving)
    assert_errs_at_most_twice_as_much_as_pytorch(case, but=("mean",))


def test_blank_images_have_no_variance(backend: str) -> None:
    case = Case((1, 2, 6, 6, 1), 4, padding=0)
    case.x.fill_(1.0)
    found = case.run()
    torch.testing.assert_close(found["rstd"], torch.full_like(found["rstd"], EPS**-0.5))
    assert found["gw"].abs().max() < 1e-9
    torch.testing.assert_close(found["y"], F.leaky_relu(case.beta, case.slope).expand(case.small))


@pytest.mark.skipif("native" not in backends("conv_norm_act_pool"), reason="no native library")
@pytest.mark.parametrize("tasks", [1, 3, 8])
def test_result_does_not_depend_on_threads(tasks: int) -> None:
    case = Case((tasks, 5, 9, 8, 3), 21, dtype=torch.float32, moving=("gamma", "beta"))
    assert_equal_on_any_threads(case.run)


def test_opcheck() -> None:
    case = Case((2, 2, 5, 4, 1), 3)
    images = case.prepared()
    y, mean, rstd = case.fresh(case.small, case.rows, case.rows)
    index = torch.zeros(case.small, dtype=torch.uint8)
    gw, sums = torch.empty_like(case.w), torch.zeros(case.rows[0], case.values, case.rows[1]).double()
    saved = (y.zero_(), index, *images, case.w, case.gamma, rstd.fill_(1), case.slope)
    outputs = (torch.empty_like(mean), torch.empty_like(mean))
    samples = {
        "patch_moments": (case.x, 3, 3, case.padding, *images),
        "conv_norm_act_pool": (*images, case.w, case.gamma, case.beta, EPS, case.slope, y, index, mean, rstd),
        "conv_norm_act_pool_backward": (case.gy, *saved, gw, sums, *outputs),
        "conv_norm_act_pool_tangent": (case.v, *saved, torch.empty_like(y), mean),
        "conv_norm_act_pool_backward_tangent": (case.gy_dot, case.v, *saved, sums, rstd, gw, *outputs),
    }
    opcheck(samples, torch.randn(2, *case.rows, dtype=torch.float64))


def test_errors_name_the_argument(backend: str) -> None:
    case = Case((1, 2, 4, 4, 1), 3)
    images = case.prepared()
    y, mean, rstd = case.fresh(case.small, case.rows, case.rows)
    index = torch.zeros(case.small, dtype=torch.uint8)

    def attempt(**changes: Tensor | float) -> None:
        given = {"moments": images[1], "w": case.w, "y": y, "slope": 0.01} | changes
        weights = (given["w"], case.gamma, case.beta, EPS, given["slope"])
        ops.conv_norm_act_pool(images[0], given["moments"], *weights, given["y"], index, mean, rstd)

    attempt()
    with pytest.raises((ValueError, TypeError), match=r"moments: expected (float64|Double)"):
        attempt(moments=images[1].float())
    with pytest.raises(ValueError, match="y: expected"):
        attempt(y=y[:, :1])
    with pytest.raises(ValueError, match="padded, w: expected"):
        attempt(w=torch.randn(1, 3, 3, 2, 3).double())
    with pytest.raises(ValueError, match="slope: expected at least 0, got -1"):
        attempt(slope=-1.0)
