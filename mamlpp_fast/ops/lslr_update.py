"""Inner update of all parameters of all tasks in one launch over a flat buffer, with learnable rates.

``theta' = theta - rate * grad``: one rate per parameter tensor and step (LSLR) or one per element (Meta-SGD).
Derivatives of every order exist with respect to theta, grad and rates. Formulas: ``docs/derivations/lslr_update.md``.

``lslr_update_out`` writes the update into `out`, which may be theta itself; ``lslr_update_backward_out`` is its
adjoint for a gradient gout of the result (theta's is the same): ggrad, which may be gout itself, becomes
``-rate * gout``, and the step's entries of grates, like rates, and no others, ``-(gout * grad)`` summed over tasks and
the elements a rate serves.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mamlpp_fast.ops._library import define, differentiate, launcher, transformed

__all__ = ["lslr_update"]

_RATES = "Tensor rates, Tensor? offsets, int step"


def _check(
    theta: Tensor, grad: Tensor, rates: Tensor, offsets: Tensor | None, step: int, **_: Tensor
) -> None:
    """Raises unless the shapes and types belong together; the values of `offsets` are the kernels' to check."""
    if theta.dim() not in (1, 2):
        raise ValueError(f"theta: expected [P] or [tasks, P], got {tuple(theta.shape)}")
    if grad.shape != theta.shape:
        raise ValueError(f"grad: expected {tuple(theta.shape)} like theta, got {tuple(grad.shape)}")
    for name, tensor in (("theta", theta), ("rates", rates)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point type, got {tensor.dtype}")
    if grad.dtype != theta.dtype:
        raise TypeError(f"grad: expected {theta.dtype} like theta, got {grad.dtype}")
    size = theta.shape[-1]
    if offsets is not None:
        if offsets.dtype != torch.int64:
            raise TypeError(f"offsets: expected torch.int64, got {offsets.dtype}")
        if rates.dim() != 2 or offsets.dim() != 1 or offsets.shape[0] != rates.shape[0] + 1:
            raise ValueError(
                "rates, offsets: expected [L, K] and [L + 1], "
                f"got {tuple(rates.shape)} and {tuple(offsets.shape)}"
            )
        steps = rates.shape[1]
    else:
        if rates.dim() not in (1, 2) or rates.shape[-1] != size:
            raise ValueError(f"rates: expected [{size}] or [K, {size}], got {tuple(rates.shape)}")
        steps = rates.shape[0] if rates.dim() == 2 else 1
    if not 0 <= step < steps:
        raise ValueError(f"step: expected 0 <= step < {steps}, got {step}")


def _wide(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the one type the arithmetic runs in, float32 or wider."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def _sizes(offsets: Tensor, size: int) -> list[int]:
    ends = offsets.tolist()
    if ends[0] != 0 or ends[-1] != size or any(a > b for a, b in pairwise(ends)):
        raise ValueError(f"offsets: expected to rise from 0 to {size}, got {ends}")
    return [b - a for a, b in pairwise(ends)]


def _row(rates: Tensor, offsets: Tensor | None, step: int, size: int) -> Tensor:
    """The step's rate of every element [P]."""
    if offsets is None:
        return rates if rates.dim() == 1 else rates[step]
    if torch.compiler.is_compiling():  # a compiler reads no values, which are then not checked
        sizes = offsets.diff()
    else:
        sizes = torch.tensor(_sizes(offsets, size), device=rates.device)
    return rates[:, step].repeat_interleave(sizes, output_size=size)


def _reduce_into(product: Tensor, offsets: Tensor | None, step: int, out: Tensor) -> None:
    """Sums [.., P] over tasks and segments into the step's entries of `out`, a tensor like rates."""
    total = product.reshape(-1, product.shape[-1]).sum(0)
    if offsets is None:
        (out if out.dim() == 1 else out[step]).copy_(total)
    else:
        parts = total.split(_sizes(offsets, total.shape[0]))
        out[:, step].copy_(torch.stack([part.sum() for part in parts]))


def _update_out(
    theta: Tensor, grad: Tensor, rates: Tensor, offsets: Tensor | None, step: int, out: Tensor
) -> None:
    out.copy_(_updated(theta, grad, rates, offsets, step))


def _updated(theta: Tensor, grad: Tensor, rates: Tensor, offsets: Tensor | None, step: int) -> Tensor:
    theta, grad, rates = _wide(theta, grad, rates)
    return theta - _row(rates, offsets, step, theta.shape[-1]) * grad


def _new_update(update_out: Callable[..., None]) -> Callable[..., Tensor]:
    """What leaves the update in new memory, from what writes it."""

    def update(theta: Tensor, *rest: Any) -> Tensor:
        out = theta.new_empty(theta.shape)
        update_out(theta, *rest, out)
        return out

    return update


def _backward_out(
    gout: Tensor, grad: Tensor, rates: Tensor, offsets: Tensor | None, step: int, ggrad: Tensor, grates: Tensor,
) -> None:  # fmt: skip
    gout, grad, rates = _wide(gout, grad, rates)
    ggrad.copy_(-_row(rates, offsets, step, gout.shape[-1]) * gout)
    _reduce_into(-gout * grad, offsets, step, grates)


def _new_backward(backward_out: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Likewise the gradients; entries of other steps are zero."""

    def backward(gout: Tensor, grad: Tensor, rates: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        ggrad, grates = gout.new_empty(gout.shape), rates.new_zeros(rates.shape)
        backward_out(gout, grad, rates, *rest, ggrad, grates)
        return ggrad, grates

    return backward


def _double_backward(
    a: Tensor, b: Tensor, gout: Tensor, grad: Tensor, rates: Tensor, offsets: Tensor | None, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    cgout, cgrad = gout.new_empty(gout.shape), grad.new_empty(grad.shape)
    crates = rates.new_zeros(rates.shape)
    a, b, gout, grad, rates = _wide(a, b, gout, grad, rates)
    row_b = _row(b, offsets, step, gout.shape[-1])
    cgout.copy_(-_row(rates, offsets, step, gout.shape[-1]) * a - row_b * grad)
    cgrad.copy_(-row_b * gout)
    _reduce_into(-a * gout, offsets, step, crates)
    return cgout, cgrad, crates


def _update_fake(theta: Tensor, *rest: Any) -> Tensor:
    return theta.new_empty(theta.shape)


def _backward_fake(gout: Tensor, grad: Tensor, rates: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return gout.new_empty(gout.shape), rates.new_empty(rates.shape)


def _double_backward_fake(
    a: Tensor, b: Tensor, gout: Tensor, grad: Tensor, rates: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return gout.new_empty(gout.shape), grad.new_empty(grad.shape), rates.new_empty(rates.shape)


_lslr_update = define(
    f"lslr_update(Tensor theta, Tensor grad, {_RATES}) -> Tensor",
    fallback=_new_update(_update_out),
    fake=_update_fake,
    triton=_new_update(launcher("lslr_update", "update_out")),
)
define(
    f"lslr_update_out(Tensor theta, Tensor grad, {_RATES}, Tensor(a!) out) -> ()",
    fallback=_update_out,
    triton=launcher("lslr_update", "update_out"),
    check=_check,
)
_lslr_update_backward = define(
    f"lslr_update_backward(Tensor gout, Tensor grad, {_RATES}) -> (Tensor, Tensor)",
    fallback=_new_backward(_backward_out),
    fake=_backward_fake,
    triton=_new_backward(launcher("lslr_update", "backward_out")),
)
define(
    f"lslr_update_backward_out(Tensor gout, Tensor grad, {_RATES}, Tensor(a!) ggrad, Tensor(b!) grates) -> ()",
    fallback=_backward_out,
    triton=launcher("lslr_update", "backward_out"),
    check=lambda gout, **named: _check(gout, **named),
)
_lslr_update_double_backward = define(
    f"lslr_update_double_backward(Tensor a, Tensor b, Tensor gout, Tensor grad, {_RATES}) "
    "-> (Tensor, Tensor, Tensor)",
    fallback=_double_backward,
    fake=_double_backward_fake,
    triton=launcher("lslr_update", "double_backward"),
)


def _setup_update(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, grad, rates, offsets, ctx.step = inputs
    ctx.save_for_backward(grad, rates, offsets)


def _update_formula(ctx: Any, gout: Tensor) -> tuple[Tensor | None, ...]:
    ggrad = grates = None
    if any(ctx.needs_input_grad[1:3]):
        ggrad, grates = _lslr_update_backward(gout, *ctx.saved_tensors, ctx.step)
    return gout, ggrad, grates, None, None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.step = inputs
    ctx.save_for_backward(*tensors)


def _backward_formula(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _lslr_update_double_backward(a, b, *ctx.saved_tensors, ctx.step)
    return (*gradients, None, None)


def _double_backward_formula(ctx: Any, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor | None, ...]:
    # Every term of the double backward is M(rates, v) = -rate * v or R(v, w) = -(sum of v * w over a segment), and
    # `_lslr_update_backward(v, w, rates)` is (M(rates, v), R(v, w)): so is every term here, and so on for all orders.
    a, b, gout, grad, rates, offsets = ctx.saved_tensors
    at = (offsets, ctx.step)
    ca, crates = _lslr_update_backward(x, a, rates, *at)
    cgrad, cb = _lslr_update_backward(x, grad, b, *at)
    cgout, cb_more = _lslr_update_backward(y, gout, b, *at)
    ca_more, _ = _lslr_update_backward(gout, x, z, *at)
    cgout_more, _ = _lslr_update_backward(a, x, z, *at)
    return ca + ca_more, cb + cb_more, cgout + cgout_more, cgrad, crates, None, None


differentiate("lslr_update", _update_formula, _setup_update)
differentiate("lslr_update_backward", _backward_formula, _setup_backward)
differentiate("lslr_update_double_backward", _double_backward_formula, _setup_backward)


def lslr_update(
    theta: Tensor, grad: Tensor, rates: Tensor, offsets: Tensor | None = None, step: int = 0
) -> Tensor:
    """One inner update of every parameter: ``theta - rate * grad`` (MAML++, section 4, LSLR).

    Equivalent, with `offsets`, to ``theta - rates[:, step].repeat_interleave(offsets.diff()) * grad``, and without to
    ``theta - rates[step] * grad``. Differentiable to any order with respect to theta, grad and rates; under the
    transforms of ``torch.func`` by PyTorch's elementary operations.

    Args:
        theta: flat parameters [P] or [tasks, P], or [P] beside a grad [tasks, P]: shared by all tasks.
        grad: gradients [P] or [tasks, P] of the same type.
        rates: one per parameter tensor and step [L, K]; without `offsets` one per element, [K, P] or [P].
            May be wider than theta.
        offsets: int64 [L + 1], where every parameter tensor starts in the flat buffer, and P.
        step: the inner step, 0 <= step < K.

    Returns:
        The updated parameters, of grad's shape and theta's type.

    Raises:
        ValueError: shapes do not belong together, `step` has no rate, or `offsets` does not rise from 0 to P.
        TypeError: a type is not floating-point, or grad's is not theta's.
        NotImplementedError: in forward mode without ``torch.func``.
    """
    if theta.dim() == 1 and grad.dim() == 2 and theta.shape[0] == grad.shape[1]:
        theta = theta.expand_as(grad)
    _check(theta, grad, rates, offsets, step)
    if transformed():
        return _updated(theta, grad, rates, offsets, step).to(theta.dtype)
    updated: Tensor = _lslr_update(theta, grad, rates, offsets, step)
    return updated
