"""The LSLR update: every backend against autograd through the plain formula, and every order of derivative."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_equal_on_any_threads, spare_the_interpreter
from op_helpers import backend_fixture, opcheck
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from mamlpp_fast.ops import lslr_update
from mamlpp_fast.testing import backends, use_backend

ops = torch.ops.mamlpp_fast
BACKENDS = backends("lslr_update")
backend = backend_fixture("lslr_update")
SIZES = {"one": [1], "primes": [7, 3, 11], "empty-segment": [5, 0, 2], "conv": [9 * 5, 5, 25 * 9, 5, 13]}


def segments(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0)


def plain(theta: Tensor, grad: Tensor, rates: Tensor, offsets: Tensor | None, step: int) -> Tensor:
    """The formula, differentiated by autograd."""
    if offsets is None:
        return theta - (rates if rates.dim() == 1 else rates[step]) * grad
    return theta - rates[:, step].repeat_interleave(offsets.diff()) * grad


def arguments(
    sizes: list[int], tasks: int | None, form: str, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
    """theta, grad, rates, offsets and step; form is tensor, element or single (one rate an element, no steps)."""
    generator = torch.Generator().manual_seed(0)
    total, steps, step = sum(sizes), 3, 1
    shape = (total,) if tasks is None else (tasks, total)
    rates = {"tensor": (len(sizes), steps), "element": (steps, total), "single": (total,)}[form]
    theta, grad, alpha = (
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for s in (shape, shape, rates)
    )
    offsets = segments(sizes) if form == "tensor" else None
    return theta, grad, alpha, offsets, 0 if form == "single" else step


@pytest.mark.parametrize("form", ["tensor", "element", "single"])
@pytest.mark.parametrize("tasks", [None, 1, 3], ids=["flat", "one-task", "three-tasks"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_value_and_gradients(backend: str, sizes: list[int], tasks: int | None, form: str) -> None:
    # One task is what a flat vector is to Triton's kernels; without segments only the number of elements counts.
    spare_the_interpreter(backend, tasks == 1 or (form != "tensor" and sizes != SIZES["conv"]))
    args = arguments(sizes, tasks, form)
    weights = torch.randn_like(args[0])
    ours, expected = lslr_update(*args), plain(*args)
    torch.testing.assert_close(ours, expected, rtol=1e-14, atol=1e-14)
    gradients = [torch.autograd.grad((out * weights).sum(), args[:3]) for out in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("form", ["tensor", "element"])
def test_gradcheck_and_gradgradcheck(backend: str, form: str) -> None:
    args = arguments([4, 1, 3], 2, form)
    fast = backend == "triton"  # random directions instead of every element
    assert gradcheck(lslr_update, args, fast_mode=fast)
    assert gradgradcheck(lslr_update, args, fast_mode=fast)


@pytest.mark.parametrize("form", ["tensor", "element"])
def test_third_and_fourth_derivatives(backend: str, form: str) -> None:
    theta, grad, rates, offsets, step = arguments([4, 1, 3], 2, form)

    def derivatives(function: object) -> list[Tensor]:
        order = [function(theta.sin(), grad.cos(), rates.exp(), offsets, step).pow(3).sum()]  # type: ignore[operator]
        found = []
        for n in range(4):
            gradients = torch.autograd.grad(order[-1], (theta, grad, rates), create_graph=n < 3)
            found.extend(gradients)
            order.append(sum((g * g).sum() for g in gradients))  # type: ignore[arg-type]
        return found

    torch.testing.assert_close(derivatives(lslr_update), derivatives(plain), rtol=1e-10, atol=1e-10)


def test_sliced_and_expanded_inputs(backend: str) -> None:
    theta, _, rates, offsets, step = arguments([5, 2], 4, "tensor")
    wide = torch.randn(8, 15, dtype=torch.float64)
    views = (
        theta.mT.contiguous().mT,
        wide[::2, 1::2],
        torch.randn(3, 2, dtype=torch.float64).mT,
        offsets,
        step,
    )
    torch.testing.assert_close(lslr_update(*views), plain(*views))
    expanded = (wide[0, :7].expand(4, 7), wide[:4, 3:10], rates.expand(2, 3), offsets, step)
    torch.testing.assert_close(lslr_update(*expanded), plain(*expanded))


def test_parameters_shared_by_the_tasks(backend: str) -> None:
    theta, _, rates, offsets, step = arguments([5, 2], None, "tensor")
    grad = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lslr_update, (theta, grad, rates, offsets, step), fast_mode=backend == "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rounds_once(backend: str, dtype: torch.dtype) -> None:
    theta, grad, rates, offsets, step = arguments([2000, 1, 300], 3, "tensor", dtype=dtype)
    for alpha in {dtype: rates, torch.float32: rates.detach().float()}.values():
        ours = lslr_update(theta, grad, alpha, offsets, step)
        exact = plain(theta.double(), grad.double(), alpha.double(), offsets, step)
        assert ours.dtype == dtype
        torch.testing.assert_close(
            ours.double(), exact, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps
        )


def test_rate_gradient_error_is_that_of_a_pairwise_sum(backend: str) -> None:
    theta, grad, rates, offsets, step = arguments([40_000, 10], 2, "tensor", dtype=torch.float32)
    (ours,) = torch.autograd.grad(lslr_update(theta, grad, rates, offsets, step).sum(), rates)
    wide = [t.detach().double().requires_grad_() for t in (theta, grad, rates)]
    (exact,) = torch.autograd.grad(plain(*wide, offsets, step).sum(), wide[2])
    scale = grad.detach().double().abs().sum()
    assert (ours.double() - exact).abs().max() < 1e-7 * scale


def test_out_forms_write_what_they_name_and_nothing_else(backend: str) -> None:
    theta, grad, rates, offsets, step = (
        a.detach() if isinstance(a, Tensor) else a for a in arguments(SIZES["conv"], 3, "tensor")
    )
    out, ggrad = (torch.full_like(theta, float("nan")) for _ in range(2))
    grates = torch.full_like(rates, 7.0)
    ops.lslr_update_out(theta, grad, rates, offsets, step, out)
    ops.lslr_update_backward_out(theta, grad, rates, offsets, step, ggrad, grates)
    row = rates[:, step].repeat_interleave(offsets.diff())
    torch.testing.assert_close(out, theta - row * grad)
    torch.testing.assert_close(ggrad, -row * theta)
    parts = (theta * grad).sum(0).split(SIZES["conv"])
    torch.testing.assert_close(grates[:, step], -torch.stack([part.sum() for part in parts]))
    others = [k for k in range(rates.shape[1]) if k != step]
    assert (grates[:, others] == 7.0).all()
    in_place = theta.clone()
    ops.lslr_update_out(in_place, grad, rates, offsets, step, in_place)
    torch.testing.assert_close(in_place, out, rtol=0, atol=0)


@pytest.mark.skipif("native" not in BACKENDS, reason="no native library")
@pytest.mark.parametrize("form", ["tensor", "element"])
def test_result_does_not_depend_on_threads(form: str) -> None:
    args = arguments([70_000, 64, 9_001], 3, form, dtype=torch.float32)

    def run() -> list[Tensor]:
        out = lslr_update(*args)
        return [out, *torch.autograd.grad((out * out).sum(), args[:3])]

    assert_equal_on_any_threads(run)


# torch 2.14's opcheck gives AOTAutograd non-leaf tensors, which it asks for their gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("form", ["tensor", "element"])
def test_opcheck(form: str) -> None:
    theta, grad, rates, offsets, step = arguments([5, 2, 3], 2, form)
    samples = {
        "lslr_update": (theta, grad, rates, offsets, step),
        "lslr_update_backward": (theta, grad, rates, offsets, step),
        "lslr_update_double_backward": (theta, rates, theta, grad, rates, offsets, step),
    }
    opcheck(samples)
    theta, grad, rates = (t.detach() for t in (theta, grad, rates))
    out = torch.empty_like(theta)
    given = (theta, grad, rates, offsets, step, out)
    opcheck({"lslr_update_out": given, "lslr_update_backward_out": (*given, torch.zeros_like(rates))})


def test_saved_tensors_are_guarded_by_their_version(backend: str) -> None:
    theta, grad, rates, offsets, step = arguments([5, 2], 2, "tensor")
    gradient = grad * 1
    out = lslr_update(theta, gradient, rates, offsets, step)
    gradient.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_errors_name_the_argument(backend: str) -> None:
    theta, grad, rates, offsets, step = arguments([5, 2], 2, "tensor")
    assert offsets is not None
    with pytest.raises(ValueError, match="theta: expected"):
        lslr_update(theta[0, 0], grad, rates, offsets, step)
    with pytest.raises(ValueError, match="grad: expected"):
        lslr_update(theta, grad[:, :3], rates, offsets, step)
    with pytest.raises(ValueError, match="rates: expected"):
        lslr_update(theta, grad, rates, None, step)
    with pytest.raises(ValueError, match="rates, offsets: expected"):
        lslr_update(theta, grad, rates, offsets[:2], step)
    with pytest.raises(ValueError, match="step: expected 0 <= step < 3, got 3"):
        lslr_update(theta, grad, rates, offsets, 3)
    with pytest.raises(TypeError, match="grad: expected"):
        lslr_update(theta, grad.float(), rates, offsets, step)
    with pytest.raises(TypeError, match="offsets: expected"):
        lslr_update(theta, grad, rates, offsets.int(), step)


@pytest.mark.parametrize("ends", [[0, 5, 6], [1, 5, 7], [0, 8, 7], [0, 5, 9]], ids=str)
@pytest.mark.parametrize("name", [b for b in BACKENDS if b != "triton"])
def test_offsets_must_rise_to_the_end(name: str, ends: list[int]) -> None:
    theta, grad, rates, _, step = arguments([5, 2], 2, "tensor")
    with use_backend(name), pytest.raises(ValueError, match="offsets: expected to rise from 0 to 7"):
        lslr_update(theta, grad, rates, torch.tensor(ends), step)
