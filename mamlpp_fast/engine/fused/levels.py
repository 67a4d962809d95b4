"""An operation at every level of ``torch.func``'s ``grad`` and ``vmap``.

What ``torch.autograd.Function.apply`` does there, for operations whose arguments are one object and tensors: no
tree of arguments is looked through, no signature bound and no class made at each level of each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from mamlpp_fast.ops._library import transformed

__all__ = ["NO_TANGENTS", "call"]

NO_TANGENTS = (
    "accelerate: forward-mode derivatives (torch.func.jvp, jacfwd) that only a backward pass meets are not "
    "implemented; take them of the whole function"
)


def call(operation: Any, use: Any, *tensors: Tensor) -> Any:
    """``operation.apply(use, *tensors)``.

    Args:
        operation: a class of :class:`torch.autograd.Function` with ``setup_context``. Its rule for ``vmap`` is
            ``mapped(size, axes, use, *tensors)``: results with the level's axis of ``size`` in front, from tensors that
            have it where ``axes`` says.
    """
    # As PyTorch's operations do it: of a level that is over, the values are left.
    tensors = tuple(functorch.unwrap_if_dead(t) for t in tensors)
    if not transformed():
        return super(torch.autograd.Function, operation).apply(use, *tensors)
    interpreter: Any = retrieve_current_functorch_interpreter()
    kind = interpreter.key()
    if kind == functorch.TransformType.Vmap:
        return _mapped(interpreter, operation, use, tensors)
    if kind != functorch.TransformType.Grad:
        raise NotImplementedError(NO_TANGENTS)
    lift = interpreter._cptr.lift
    apply: Any = _Level.apply  # type: ignore[attr-defined]
    with enable_single_level_autograd_function():
        return apply(interpreter, operation, use, *map(lift, tensors))


def _mapped(interpreter: Any, operation: Any, use: Any, tensors: Sequence[Tensor]) -> Any:
    level = interpreter.level()
    inner, axes = zip(*(functorch._unwrap_batched(t, level) for t in tensors), strict=True)
    with interpreter.lower():
        if all(axis is None for axis in axes):
            return call(operation, use, *tensors)
        made = operation.mapped(interpreter.batch_size(), axes, use, *inner)
    if isinstance(made, Tensor):
        return functorch._add_batch_dim(made, 0, level)
    return tuple(functorch._add_batch_dim(t, 0, level) for t in made)


class _Level(torch.autograd.function._SingleLevelFunction):
    """An operation at one level of ``grad``: on what is below it, and with a node in the level's graph."""

    @staticmethod
    def forward(interpreter: Any, operation: Any, use: Any, *tensors: Tensor) -> Any:  # type: ignore[override, unused-ignore]
        level = interpreter.level()
        below = [functorch._unwrap_for_grad(t, level) for t in tensors]
        # Both are off in here, and they are the levels' below.
        with torch.enable_grad(), _set_fwd_grad_enabled(True), interpreter.lower():
            made = call(operation, use, *below)
        if isinstance(made, Tensor):
            return functorch._wrap_for_grad(made, level)
        return tuple(functorch._wrap_for_grad(t, level) for t in made)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.operation, *given = inputs
        ctx.operation.setup_context(ctx, given, output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override, unused-ignore]
        return None, None, *ctx.operation.backward(ctx, *grads)
