"""The three orders of batch norm against PyTorch's own, on every backend present."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from batch_norm_helpers import LAYOUTS, compare, derivatives, random, witness
from helpers import spare_the_interpreter
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.testing import assert_close

from mamlpp_fast import ops, testing

NAME = "per_step_batch_norm"


@pytest.fixture(params=["python", "native", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in testing.backends(NAME):
        pytest.skip(f"backend {request.param} is not present here")
    with testing.use_backend(request.param):
        yield request.param


SMALL = [
    pytest.param((5, 2), (2,), None, None, id="rows"),
    pytest.param((3, 2, 2, 3), (4, 2), 1, None, id="images-step"),
    pytest.param((2, 3, 3, 2), (3,), None, 0.1, id="images-leaky"),
    pytest.param((2, 3, 2, 2, 1), (2, 2), None, 0.0, id="tasks-own-relu"),
    pytest.param((2, 2, 2, 2, 2), (3, 2), 2, 0.1, id="tasks-step-leaky"),
]


@pytest.mark.parametrize(("shape", "affine", "step", "slope"), SMALL)
def test_first_and_second_derivatives_agree_with_finite_differences(
    backend: str, shape: tuple[int, ...], affine: tuple[int, ...], step: int | None, slope: float | None
) -> None:
    spare_the_interpreter(backend, step == 1 or slope == 0.0)
    inputs = tuple(t.requires_grad_() for t in random(shape, affine))

    def f(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.per_step_batch_norm(x, weight, bias, step=step, eps=1e-3, negative_slope=slope)

    # Random directions instead of every element: the interpreter takes 0.1 s a launch.
    fast = backend == "triton"
    assert gradcheck(f, inputs, fast_mode=fast)
    assert gradgradcheck(f, inputs, fast_mode=fast)


SHAPES = [
    pytest.param((7, 63), (63,), None, id="63-columns"),
    pytest.param((53, 5), (5,), None, id="53x5"),
    pytest.param((3, 100, 5, 3), (2, 100), 1, id="100-channels-step"),
    pytest.param((5, 1, 7, 11), (1,), None, id="one-channel"),
    pytest.param((6, 17, 1, 1), (17,), None, id="one-pixel"),
    pytest.param((2, 3, 63, 67), (3,), None, id="63x67"),
    pytest.param((2, 5, 13, 3, 7), (13,), None, id="tasks-shared"),
    pytest.param((3, 2, 8, 5, 5), (3, 8), None, id="tasks-own"),
    pytest.param((2, 3, 20, 4, 4), (5, 20), 0, id="tasks-step"),
    pytest.param((1, 4, 3, 2, 2), (3,), None, id="one-task"),
]


@pytest.mark.parametrize("slope", [None, 0.01], ids=["plain", "leaky"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "affine", "step"), SHAPES)
@pytest.mark.usefixtures("poisoned_memory")
def test_every_order_agrees_with_pytorch(
    backend: str,
    shape: tuple[int, ...],
    affine: tuple[int, ...],
    step: int | None,
    layout: str,
    slope: float | None,
) -> None:
    if len(shape) == 2 and layout in ("channels-last", "transposed"):
        pytest.skip("a layout of images")
    chosen = (layout, slope) in (("contiguous", 0.01), ("channels-last", None))
    spare_the_interpreter(backend, math.prod(shape) > 1000 or not chosen)
    x, weight, bias = random(shape, affine)
    gy, u = torch.randn(2, *shape, dtype=torch.float64)
    a, b = torch.randn(2, *affine, dtype=torch.float64)
    keywords = {"step": step, "negative_slope": slope}
    found = derivatives(
        lambda *t: ops.per_step_batch_norm(*t, **keywords), LAYOUTS[layout](x), weight, bias, gy, (u, a, b)
    )
    expected = derivatives(lambda *t: witness(*t, **keywords), x, weight, bias, gy, (u, a, b))
    compare(found, expected, 1e-9)


@pytest.mark.parametrize("used", ["u", "a", "b", "ua", "ub", "ab"])
def test_cotangents_may_be_missing(backend: str, used: str) -> None:
    spare_the_interpreter(backend, used not in ("u", "ab"))
    x, weight, bias = random((3, 4, 3, 3), (4,))
    gy, u = torch.randn(2, 3, 4, 3, 3, dtype=torch.float64)
    a, b = torch.randn(2, 4, dtype=torch.float64)
    cotangents = tuple(t if n in used else None for n, t in (("u", u), ("a", a), ("b", b)))
    found, expected = (
        derivatives(lambda *t, f=f: f(*t, negative_slope=0.1), x, weight, bias, gy, cotangents)
        for f in (ops.per_step_batch_norm, witness)
    )
    compare(found, expected, 1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cotangents_may_have_another_layout(backend: str, layout: str) -> None:
    spare_the_interpreter(backend, layout == "sliced")
    x, weight, bias = random((2, 3, 5, 4, 3), (5,))
    gy, u = torch.randn(2, *x.shape, dtype=torch.float64)
    ones = torch.ones(5, dtype=torch.float64)
    expected = derivatives(witness, x, weight, bias, gy, (u, ones, None))
    for mine in ("contiguous", "channels-last"):
        found = derivatives(
            ops.per_step_batch_norm,
            LAYOUTS[mine](x),
            weight,
            bias,
            LAYOUTS[layout](gy),
            (LAYOUTS[layout](u), ones, None),
        )
        compare(found, expected, 1e-10)


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 3, 4, 5, 6)], ids=["images", "tasks"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_memory_format_is_kept(backend: str, shape: tuple[int, ...], layout: str) -> None:
    x, weight, bias = random(shape, (4,))
    x = LAYOUTS[layout](x)
    gy, u = torch.randn(2, *shape, dtype=torch.float64)
    found = derivatives(ops.per_step_batch_norm, x, weight, bias, gy, (u, None, None))
    assert all(found[name].stride() == x.stride() for name in ("y", "gx", "c_gy", "c_x"))


def test_a_step_reads_and_moves_its_row_alone(backend: str) -> None:
    x, weight, bias = random((4, 3, 2, 2), (5, 3))
    gy, u = torch.randn(2, *x.shape, dtype=torch.float64)
    found = derivatives(lambda *t: ops.per_step_batch_norm(*t, step=3), x, weight, bias, gy, (u, None, None))
    others = [0, 1, 2, 4]
    for name in ("gweight", "gbias", "c_weight"):
        assert not found[name][others].any()
        assert found[name][3].all()
    alone = ops.per_step_batch_norm(x, weight[3], bias[3])
    assert_close(found["y"], alone, rtol=0, atol=0)


def _error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {n: float((found[n].double() - t).abs().max() / t.abs().max()) for n, t in truth.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("mean", [0.0, 1e3], ids=["centred", "mean-1000"])
def test_low_precision_is_at_most_twice_as_far_off_as_pytorch(
    backend: str, dtype: torch.dtype, layout: str, mean: float
) -> None:
    if mean and dtype != torch.float32:
        pytest.skip("a spread of 1 around 1000 is below this type's resolution")
    spare_the_interpreter(backend, layout == "channels-last")
    shape = (3, 5, 9, 9)
    x, weight, bias = random(shape, (5,), dtype)
    x = LAYOUTS[layout](x + mean)
    gy, u = torch.randn(2, *shape).to(dtype)
    a, b = torch.randn(2, 5).to(dtype)
    arguments = (x, weight, bias, gy)

    def smooth(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *t: f(*t, negative_slope=None)

    found = derivatives(smooth(ops.per_step_batch_norm), *arguments, (u, a, b))
    rival = derivatives(smooth(witness), *arguments, (u, a, b))
    truth = derivatives(
        smooth(witness), *(t.double() for t in arguments), (u.double(), a.double(), b.double())
    )
    mine, theirs = _error(found, truth), _error(rival, truth)
    # PyTorch sums in float64 on the CPU: where it is exact to the last bit, two roundings of float32 are allowed.
    floor = 2 * torch.finfo(torch.float32).eps
    worse = {n: (mine[n], theirs[n]) for n in mine if mine[n] > max(2 * theirs[n], floor)}
    assert not worse


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", [torch.float64, torch.float32, torch.bfloat16])
def test_types_of_images_and_parameters_may_differ(
    backend: str, dtype: torch.dtype, parameters: torch.dtype
) -> None:
    spare_the_interpreter(backend, parameters != torch.float32)
    x, weight, bias = random((3, 4, 3, 3), (2, 4))
    x, weight, bias = x.to(dtype), weight.to(parameters), bias.to(parameters)
    gy, u = torch.randn(2, *x.shape).to(dtype)
    a, b = torch.randn(2, 2, 4).to(parameters)
    found = derivatives(lambda *t: ops.per_step_batch_norm(*t, step=1), x, weight, bias, gy, (u, a, b))
    assert all(found[n].dtype == dtype for n in ("y", "gx", "c_gy", "c_x"))
    assert all(found[n].dtype == parameters for n in ("gweight", "gbias", "c_weight"))
    truth = derivatives(
        lambda *t: witness(*t, step=1),
        *(t.double() for t in (x, weight, bias, gy)),
        (u.double(), a.double(), b.double()),
    )
    coarse = max(torch.finfo(dtype).eps, torch.finfo(parameters).eps)
    compare({n: t.double() for n, t in found.items()}, truth, 8 * coarse if coarse > 1e-10 else 1e-9)
    _, mean, var = ops.per_step_batch_norm_with_stats(x, weight, bias, step=1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert mean.dtype == var.dtype == wide


def test_a_large_mean_loses_no_variance(backend: str) -> None:
    x, weight, bias = random((8, 3, 16, 16), (3,), torch.float32)
    _, mean, var = ops.per_step_batch_norm_with_stats(x + 1e3, weight, bias)
    shifted = (x + 1e3).double()
    assert_close(mean.double(), shifted.mean((0, 2, 3)), rtol=3e-7, atol=0)
    assert_close(var.double(), shifted.var((0, 2, 3), unbiased=False), rtol=1e-5, atol=0)


ERRORS = [
    pytest.param((3, 4, 5), (4,), (4,), None, r"x: expected shape \[N, C\]", id="three-axes"),
    pytest.param((1, 4, 1, 1), (4,), (4,), None, "more than one value per channel", id="one-value"),
    pytest.param((2, 1, 4, 1, 1), (4,), (4,), None, "more than one value per channel", id="one-value-a-task"),
    pytest.param((0, 4), (4,), (4,), None, "more than one value per channel", id="empty"),
    pytest.param(
        (3, 4, 2, 2), (5,), (5,), None, r"weight: expected shape \[4\] without a step", id="channels"
    ),
    pytest.param((3, 4, 2, 2), (3, 4), (3, 4), None, "without a step", id="step-missing"),
    pytest.param((3, 4, 2, 2), (4,), (4,), 0, r"expected shape \[steps, 4\] with a step", id="no-steps"),
    pytest.param((3, 4, 2, 2), (3, 4), (3, 4), 3, "step: expected 0 <= step < 3, got 3", id="step-beyond"),
    pytest.param(
        (3, 4, 2, 2), (3, 4), (3, 4), -1, "step: expected 0 <= step < 3, got -1", id="step-negative"
    ),
    pytest.param((2, 3, 4, 2, 2), (3, 4), (3, 4), None, r"\[4\] or \[2, 4\]", id="tasks"),
    pytest.param((3, 4, 2, 2), (4,), (3,), None, r"bias: expected the shape \[4\] of weight", id="bias"),
]


@pytest.mark.parametrize(("shape", "weight", "bias", "step", "message"), ERRORS)
def test_what_does_not_fit_is_refused(
    backend: str,
    shape: tuple[int, ...],
    weight: tuple[int, ...],
    bias: tuple[int, ...],
    step: int | None,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        ops.per_step_batch_norm(torch.randn(shape), torch.ones(weight), torch.ones(bias), step=step)


def test_integers_are_refused(backend: str) -> None:
    with pytest.raises(TypeError, match="x: expected float64"):
        ops.per_step_batch_norm(torch.ones(3, 4, dtype=torch.int64), torch.ones(4), torch.ones(4))


def test_a_third_derivative_raises(backend: str) -> None:
    x, weight, bias = (t.requires_grad_() for t in random((4, 2), (2,)))
    value = ops.per_step_batch_norm(x, weight, bias).pow(3).sum()
    for _ in range(2):
        (g,) = grad(value, x, create_graph=True)
        value = g.pow(2).sum()
    with pytest.raises(NotImplementedError, match="third derivative"):
        grad(value, x)


@pytest.mark.parametrize("changed", ["x", "weight", "bias"])
def test_changing_a_saved_tensor_is_caught(backend: str, changed: str) -> None:
    leaves = dict(zip(("x", "weight", "bias"), random((4, 2), (2,)), strict=True))
    inputs = {n: t.requires_grad_() * 1 for n, t in leaves.items()}
    y = ops.per_step_batch_norm(**inputs)
    with torch.no_grad():
        inputs[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_changing_the_statistics_is_caught(backend: str) -> None:
    x, weight, bias = random((4, 2), (2,))
    y, mean, _ = ops.per_step_batch_norm_with_stats(x.requires_grad_(), weight, bias)
    mean.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_statistics_are_not_differentiable(backend: str) -> None:
    x, weight, bias = random((4, 2), (2,))
    y, mean, var = ops.per_step_batch_norm_with_stats(x.requires_grad_(), weight, bias)
    assert y.requires_grad
    assert not mean.requires_grad
    assert not var.requires_grad


# Running statistics and evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [None, 1])
def test_running_statistics_follow_pytorch(backend: str, step: int | None) -> None:
    module = torch.nn.BatchNorm2d(3, momentum=0.3).double()
    shape = (3,) if step is None else (2, 3)
    running_mean, running_var = torch.zeros(shape).double(), torch.ones(shape).double()
    version = running_mean._version
    for _ in range(3):
        x = torch.randn(4, 3, 5, 2, dtype=torch.float64) * 3 + 2
        module(x)
        _, mean, var = ops.per_step_batch_norm_with_stats(x, module.weight.detach(), module.bias.detach())
        ops.update_running_stats(running_mean, running_var, mean, var, count=40, momentum=0.3, step=step)
    row = ... if step is None else step
    assert_close(running_mean[row], module.running_mean)
    assert_close(running_var[row], module.running_var)
    if step is not None:
        assert not running_mean[0].any()
    assert running_mean._version > version


def test_running_statistics_take_tasks_in_turn(backend: str) -> None:
    module = torch.nn.BatchNorm2d(3).double()
    x, weight, bias = random((4, 2, 3, 5, 5), (3,))
    running_mean, running_var = torch.zeros(3).double(), torch.ones(3).double()
    _, mean, var = ops.per_step_batch_norm_with_stats(x, weight, bias)
    ops.update_running_stats(running_mean, running_var, mean, var, count=50, momentum=0.1)
    for task in x:
        module(task)
    assert_close(running_mean, module.running_mean)
    assert_close(running_var, module.running_var)


def test_running_statistics_that_do_not_fit_are_refused() -> None:
    zeros = torch.zeros(3)

    def update(rows: Tensor, *, mean: Tensor = zeros, count: int = 8, step: int | None = None) -> None:
        ops.update_running_stats(rows, rows.clone(), mean, mean, count=count, momentum=0.1, step=step)

    with pytest.raises(ValueError, match="count: expected at least 2, got 1"):
        update(zeros.clone(), count=1)
    with pytest.raises(ValueError, match=r"both \[steps, C\] with a step"):
        update(zeros.clone(), step=0)
    with pytest.raises(ValueError, match="step: expected 0 <= step < 2, got 2"):
        update(torch.zeros(2, 3), step=2)
    with pytest.raises(ValueError, match="mean, var: expected shape"):
        update(zeros.clone(), mean=torch.zeros(4))
