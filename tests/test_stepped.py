"""An inner step as one node: values and derivatives of every order are those of PyTorch's own operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from mamlpp_fast import _native
from mamlpp_fast.ops.stepped import copied, stepped

SHAPES = ((3, 2, 2), (5,), (), (0,), (1, 4))
RATE = 0.3
Rates = float | Sequence[Tensor]


def tensors(seed: int, *, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def plain(parameters: Sequence[Tensor], gradients: Sequence[Tensor], rates: Rates) -> list[Tensor]:
    each = [rates] * len(parameters) if isinstance(rates, float) else rates
    return [p - r * g for p, g, r in zip(parameters, gradients, each, strict=True)]


def given(kind: str) -> tuple[list[Tensor], list[Tensor], Rates]:
    """Rates: one number for all, a number a parameter, or as many as the parameter has elements."""
    shapes = [()] * len(SHAPES) if kind == "numbers" else SHAPES
    return tensors(0), tensors(1), RATE if kind == "number" else tensors(2, shapes=shapes)


def leaves(p: list[Tensor], g: list[Tensor], rates: Rates) -> list[Tensor]:
    return [*p, *g, *([] if isinstance(rates, float) else rates)]


def chain(step: Callable[..., list[Tensor]], p: list[Tensor], g: list[Tensor], rates: Rates) -> Tensor:
    """Two steps, the second along what the first found: no linear function of anything."""
    for _ in range(2):
        moved = step(p, g, rates)
        p, g = moved, [(a * b).sin() for a, b in zip(moved, g, strict=True)]
    return torch.stack([(t**3).sum() for t in p]).sum()


KINDS = pytest.mark.parametrize("kind", ["number", "numbers", "tensors"])


@KINDS
def test_three_derivatives_are_those_of_plain_operations(kind: str) -> None:
    found = []
    for step in (stepped, plain):
        p, g, rates = given(kind)
        by = leaves(p, g, rates)
        value = chain(step, p, g, rates)
        first = torch.autograd.grad(value, by, create_graph=True)
        second = torch.autograd.grad(sum((t**2).sum() for t in first), by, create_graph=True)
        third = torch.autograd.grad(sum((t**2).sum() for t in second), by)
        found.append([value, *first, *second, *third])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    assert sum(float(t.abs().sum()) for t in found[0][-len(by) :]) > 1  # the third are not all zero


@KINDS
def test_finite_differences(kind: str) -> None:
    p, g, rates = given(kind)

    def step(*flat: Tensor) -> tuple[Tensor, ...]:
        n = len(p)
        return tuple(stepped(flat[:n], flat[n : 2 * n], RATE if kind == "number" else flat[2 * n :]))

    assert torch.autograd.gradcheck(step, leaves(p, g, rates))
    assert torch.autograd.gradgradcheck(step, leaves(p, g, rates))


@pytest.mark.skipif(not _native.status().loaded, reason="native library not loaded")
@KINDS
def test_it_is_one_node(kind: str) -> None:
    p, g, rates = given(kind)
    made = stepped(p, g, rates)
    assert len({t.grad_fn for t in made}) == 1 and all(t.requires_grad and not t.is_leaf for t in made)
    assert not any(t.requires_grad for t in stepped(*[[t.detach() for t in ts] for ts in (p, g)], RATE))
    with torch.no_grad():
        assert not any(t.requires_grad for t in stepped(p, g, rates))


@KINDS
def test_gradients_that_take_no_part_have_none(kind: str) -> None:
    p, g, rates = given(kind)
    g = [t.detach() for t in g]
    made = stepped(p, g, rates)
    one, other, *_ = torch.autograd.grad(made[0].sum(), [p[0], p[1]], allow_unused=True)
    assert torch.equal(one, torch.ones_like(one)) and other is None


@KINDS
def test_many_gradients_in_one_and_hooks(kind: str) -> None:
    p, g, rates = given(kind)
    by = [t for t in leaves(p, g, rates) if t.shape == (5,)]
    seen: list[Tensor] = []
    p[1].register_hook(seen.append)
    along = torch.eye(5, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad(step(p, g, rates)[1], by, along, is_grads_batched=True)
        for step in (stepped, plain)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert len(seen) == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
@KINDS
def test_under_transforms(kind: str) -> None:
    p, g, rates = given(kind)
    n = len(p)

    def loss(step: Any, flat: list[Tensor]) -> Tensor:
        return chain(step, flat[:n], flat[n : 2 * n], RATE if kind == "number" else flat[2 * n :])

    flat = [t.detach() for t in leaves(p, g, rates)]
    many = [torch.stack([t, t + 0.5]) for t in flat]
    for transform in (
        lambda step: torch.func.grad(lambda f: loss(step, f))(flat),
        lambda step: torch.func.vmap(torch.func.grad(lambda f: loss(step, f)))(many),
        lambda step: torch.func.jvp(lambda f: loss(step, f), (flat,), (flat,)),
    ):
        torch.testing.assert_close(transform(stepped), transform(plain), rtol=1e-12, atol=1e-12)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, t) for t in flat]
        tangents = [forward_ad.unpack_dual(loss(step, duals)).tangent for step in (stepped, plain)]
    torch.testing.assert_close(*tangents, rtol=1e-12, atol=1e-12)


def test_what_broadcasts_or_has_another_type() -> None:
    p, g = tensors(0, shapes=[(3, 2), (4,)]), tensors(1, shapes=[(2,), (1,)])
    g[1] = g[1].detach().float().requires_grad_()
    for rates in (RATE, tensors(2, shapes=[(), (4,)])):
        by = leaves(p, g, rates)
        found, expected = (
            torch.autograd.grad(sum((t**2).sum() for t in step(p, g, rates)), by) for step in (stepped, plain)
        )
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_of_steps_and_rates_bit_for_bit(dtype: torch.dtype) -> None:
    """In one pass where they lie plainly, several threads' here: sizes around a thread's share, and turned values."""
    shapes = [(40_000,), (32_768,), (7, 3), (1,), (0,)]
    p, g, rates = ([t.detach().to(dtype) for t in tensors(seed, shapes=shapes)] for seed in range(3))
    down = [t.detach().to(dtype) for t in tensors(3, shapes=shapes)]
    g[2], down[2] = g[2].t().contiguous().t(), -down[2]
    g[0][3], rates[0][4], down[0][5] = torch.nan, torch.inf, -0.0
    by = [t.requires_grad_() for t in (*g, *rates)]
    found = torch.autograd.grad(stepped(p, g, rates), by, down)
    expected = [-d * t for ts in (rates, g) for d, t in zip(down, ts, strict=True)]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.nan_to_num(7).signbit(), other.nan_to_num(7).signbit())
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("taken", [0, 1, 2], ids=["parameters", "gradients", "rates"])
@KINDS
def test_what_takes_no_gradient_has_none_afterwards(kind: str, taken: int) -> None:
    """A parameter that is not recorded beside one that is; each kind of argument alone is recorded."""
    p, g, rates = given(kind)
    for i, t in enumerate(leaves(p, g, rates)):
        t.requires_grad_(i == taken * len(p) + 1)
    for step in (stepped, plain):
        recorded = [t.requires_grad for t in step(p, g, rates)]
        assert recorded == [False, taken < 2 or kind != "number", False, False, False]


@KINDS
def test_complex_values(kind: str) -> None:
    by = [(torch.randn(3, dtype=torch.complex128)).requires_grad_() for _ in range(3)]
    along = torch.randn(3, dtype=torch.complex128)
    rates = RATE if kind == "number" else by[2:]
    by = leaves(by[:1], by[1:2], rates)
    found, expected = (
        torch.autograd.grad((step(by[:1], by[1:2], rates)[0] * along).abs().sum(), by)
        for step in (stepped, plain)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@KINDS
def test_sparse_gradients(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    table, weight = (torch.randn(s, generator=generator).double().requires_grad_() for s in ((5, 3), (3,)))
    found = []
    for step in (stepped, plain):
        read = F.embedding(torch.tensor([1, 2, 1]), table, sparse=True)
        grads = torch.autograd.grad((read * weight).square().sum(), [table, weight])
        assert grads[0].is_sparse
        torch.manual_seed(0)
        rates = RATE if kind == "number" else [torch.rand_like(t).requires_grad_() for t in (table, weight)]
        made = step([table, weight], grads, rates)
        by = leaves([table, weight], [], rates)
        found.append([*made, *torch.autograd.grad(sum((t**2).sum() for t in made), by)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_what_no_derivative_reads_may_change() -> None:
    p, g, rates = given("tensors")
    gradients, held = [t.detach() for t in g], [t.clone() for t in rates]
    made = stepped(p, gradients, held)
    with torch.no_grad():
        held[0].mul_(2)  # the rates, which the gradients alone would read
    assert torch.equal(torch.autograd.grad(made[0].sum(), rates[0])[0], -gradients[0])
    moved = [t * 1 for t in g]
    made = stepped(p, moved, [t.detach() for t in rates])
    with torch.no_grad():
        moved[0].mul_(2)
    assert torch.equal(torch.autograd.grad(made[0].sum(), g[0])[0], -rates[0])


def test_values_that_are_changed_before_they_are_read_are_refused() -> None:
    p, g, rates = given("tensors")
    held = [t.clone() for t in g]
    made = stepped(p, held, rates)
    held[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        made[0].sum().backward()


def test_as_many_of_each() -> None:
    p, g, rates = given("tensors")
    assert stepped([], [], RATE) == []
    for wrong in ((p[1:], g, RATE), (p, g[1:], rates), (p, g, rates[1:])):  # type: ignore[index]
        with pytest.raises(ValueError):
            stepped(*wrong)


def test_copies_are_one_node_and_have_memory_of_their_own() -> None:
    p = tensors(0)
    p[1] = p[1].detach()
    made = copied(p)
    torch.testing.assert_close(made, p, rtol=0, atol=0)
    assert not {t.data_ptr() for t in made if t.numel()} & {t.data_ptr() for t in p}
    assert [t.requires_grad for t in made] == [t.requires_grad for t in p]
    if _native.status().loaded:
        assert len({t.grad_fn for t in made if t.requires_grad}) == 1
    by = [t for t in p if t.requires_grad]
    value = torch.stack([(t**3).sum() for t in made[1:]]).sum()
    first = torch.autograd.grad(value, by, create_graph=True, allow_unused=True)
    assert first[0] is None
    second = torch.autograd.grad(sum((g**2).sum() for g in first if g is not None), by[1:])
    torch.testing.assert_close(list(second), [36 * t**3 for t in by[1:]], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert not any(t.requires_grad for t in copied(p))


def test_copies_of_other_tensors() -> None:
    """Complex and sparse ones, channels last, a class that computes as it likes; and under transforms."""

    class Marked(Tensor):
        pass

    last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    sparse = torch.eye(3).to_sparse().requires_grad_()
    marked = torch.randn(3).as_subclass(Marked)
    made = copied([last, sparse, torch.randn(2, dtype=torch.complex64, requires_grad=True), marked])
    assert made[0].stride() == last.stride() and made[1].is_sparse and type(made[3]) is Marked
    assert all(t.requires_grad for t in made[:3])
    x = torch.randn(3)
    found = torch.func.grad(lambda t: (copied([t])[0] ** 2).sum())(x)
    torch.testing.assert_close(found, 2 * x)
    found = torch.func.vmap(lambda t: copied([t])[0] * 2)(x)
    torch.testing.assert_close(found, 2 * x)
    torch.testing.assert_close(torch.func.jvp(lambda t: copied([t])[0] * 3, (x,), (x,))[1], 3 * x)
