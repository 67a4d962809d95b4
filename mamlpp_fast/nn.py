"""Modules of MAML++: per-step batch norm on the fused operations, and what a network needs around it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from mamlpp_fast import ops, reference
from mamlpp_fast._modes import pytorchs_norms
from mamlpp_fast.ops._library import mapped
from mamlpp_fast.ops.per_step_batch_norm import kept_versions
from mamlpp_fast.reference import set_eval_stats, set_step

__all__ = [
    "InertBiasConv2d",
    "PerStepBatchNorm2d",
    "check_model",
    "convert_batch_norm",
    "plain_batch_norm",
    "set_eval_stats",
    "set_step",
]


_M = TypeVar("_M", bound=nn.Module)
# What a module keeps of the hooks around its calls.
_HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook"),
)


class PerStepBatchNorm2d(reference.PerStepBatchNorm2d):
    """:class:`mamlpp_fast.reference.PerStepBatchNorm2d` on the fused kernels: same arguments, state and result.

    Forward, backward and double backward are one operation each, the leaky ReLU included when ``negative_slope`` is
    given. Inside :func:`plain_batch_norm`, ``torch.export`` and ``torch.onnx.export`` it runs PyTorch's own batch norm
    instead. Under ``torch.func.vmap`` it must be in evaluation mode.
    """

    plain = False

    def normalise(self, x: Tensor) -> Tensor:
        without = self.weight is None or self.bias is None
        # A file that is to leave the package (torch.export, ONNX) holds none of its operations.
        leaving = torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
        plain = self.plain or without or leaving or pytorchs_norms.now
        if plain or (not self.training and self.eval_stats == "running"):
            return super().normalise(x)
        step = self.row if self.per_step_affine else None
        images = _images(x)
        if not self.training:
            return ops.per_step_batch_norm(
                images, self.weight, self.bias, step=step, eps=self.eps, negative_slope=self.negative_slope
            ).view(x.shape)
        y, mean, var = ops.per_step_batch_norm_with_stats(
            images, self.weight, self.bias, step=step, eps=self.eps, negative_slope=self.negative_slope
        )
        if mapped(mean):
            raise NotImplementedError(
                "PerStepBatchNorm2d: expected evaluation mode under torch.func.vmap, which normalises with the batch's "
                "statistics too, got training mode: several tasks at once cannot write its running statistics"
            )
        count = x.numel() // x.shape[1]
        if self.momentum is None:
            self.accumulate(mean, var * (count / (count - 1)))
        else:
            ops.update_running_stats(
                *kept_versions(self.running_mean, self.running_var),
                mean,
                var,
                count=count,
                momentum=self.momentum,
                step=self.row if self.per_step_stats else None,
            )
        return y.view(x.shape)


def _images(x: Tensor) -> Tensor:
    """[N, C, ...] as [N, C] or [N, C, H, W], which the operations take: to them five axes are tasks of images."""
    return x.unsqueeze(-1) if x.dim() == 3 else x.flatten(3) if x.dim() > 4 else x


@contextmanager
def plain_batch_norm(model: nn.Module) -> Iterator[None]:
    """Within it, the per-step batch norms of ``model`` run plain PyTorch: the reference path."""
    modules = [m for m in model.modules() if isinstance(m, PerStepBatchNorm2d)]
    before = [m.plain for m in modules]
    for m in modules:
        m.plain = True
    try:
        yield
    finally:
        for m, plain in zip(modules, before, strict=True):
            m.plain = plain


class InertBiasConv2d(nn.Conv2d):
    """A convolution whose bias is kept but takes no gradient, for use in front of batch norm.

    Batch statistics subtract any constant, so the true gradient of such a bias is zero; what autograd computes is
    rounding noise, which Adam would turn into steps of full size.
    """

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.detach()
        return F.conv2d(x, self.weight, bias, self.stride, self.padding, self.dilation, self.groups)


def check_model(model: nn.Module) -> None:
    """Raises where parameters cannot be told by name, or have no shape yet.

    Raises:
        TypeError: for another object than a module, or one whose own ``parameters()`` or ``named_parameters()`` give
            something else than PyTorch's do (a list, say, as MAML code of old did).
        ValueError: for a lazy module that has seen no input yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    own = {name: id(p) for name, p in nn.Module.named_parameters(model)}
    trainable = {id(p) for p in nn.Module.parameters(model) if p.requires_grad}
    listed, named = model.parameters(), model.named_parameters()
    wrong = None
    if not isinstance(listed, Iterator) or not trainable <= {id(p) for p in listed}:
        wrong = f"parameters() to be PyTorch's own iterator over all parameters, got {type(listed).__name__}"
    elif not isinstance(named, Iterator) or {name: id(p) for name, p in named} != own:
        wrong = f"named_parameters() to be PyTorch's own iterator, got {type(named).__name__}"
    if wrong is not None:
        raise TypeError(f"model: expected {wrong} of {type(model).__name__}")
    for name, tensor in (*nn.Module.named_parameters(model), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(
                f"model: expected initialised parameters, {name} is lazy: call the model once before"
            )


def convert_batch_norm(
    model: _M, num_steps: int, *, per_step_affine: bool = True, per_step_stats: bool = True
) -> _M:
    """Replaces every batch norm (1d, 2d, 3d) of ``model`` by a :class:`PerStepBatchNorm2d`, in place.

    Weights, biases and running statistics are repeated for each step. Tell the model the inner step with
    :func:`set_step` (:func:`mamlpp_fast.adapt` does). Without both flags weights and statistics keep their shapes. A
    batch norm used in several places stays one, and tied weights stay tied; one without running statistics gets some.
    Hooks on a batch norm go over to its successor. Optimizers must be made after, of the new parameters.

    In evaluation mode the new batch norms, unlike PyTorch's, use the statistics of the batch until
    :func:`set_eval_stats` chooses ``"running"``.

    Only what computes as PyTorch's batch norm does is replaced. A subclass of it with a forward, parameters or modules
    of its own is left in place, without a row per step, and named in a warning. So, silently, is an instance norm with
    running statistics. Those left obey :func:`set_eval_stats` too: with ``"batch"`` they compute in evaluation mode
    what they do in training mode, and their buffers are put back.

    Args:
        model: the network; returned too (a batch norm itself is returned converted, as another object).
        num_steps: inner steps K.
        per_step_affine: a weight and bias per step (BNWB), of those batch norms that have them.
        per_step_stats: running statistics per step (BNRS).

    Raises:
        ValueError: for ``num_steps`` below 1, a batch norm's weight that gets rows and is another layer's too, a
            ``nn.SyncBatchNorm`` (its statistics would mix the tasks of several processes), or a lazy norm that has seen
            no input yet.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: expected at least 1, got {num_steps}")
    new: dict[nn.Module, nn.Module] = {}
    parameters: dict[nn.Parameter, nn.Parameter] = {}
    left: dict[str, _NormBase] = {}
    for name, old in model.named_modules():
        if isinstance(old, nn.SyncBatchNorm):
            raise ValueError(f"model: expected batch norms of one process, {name or 'it'} is a SyncBatchNorm")
        if isinstance(old, _NormBase) and isinstance(old, LazyModuleMixin):
            raise ValueError(
                f"model: expected norms that have seen an input, {name or 'it'} is a {type(old).__name__}: call the "
                "model once before"
            )
        if _is_batch_norm(old):
            new[old] = _converted(old, num_steps, per_step_affine, per_step_stats, parameters)
        elif isinstance(old, _BatchNorm) or (isinstance(old, _NormBase) and old.running_mean is not None):
            left[name] = old
    odd = [f"{name} ({type(norm).__name__})" for name, norm in left.items() if isinstance(norm, _BatchNorm)]
    if odd:
        warnings.warn(
            f"batch norms left as they are, for their classes may compute otherwise: {', '.join(odd)}",
            stacklevel=2,
        )
    for name, p in model.named_parameters():
        others = [m for m in model.modules() if m not in new and any(q is p for q in m._parameters.values())]
        if parameters.get(p, p) is not p and others:
            raise ValueError(
                f"model: expected weights of batch norms that no other module holds (they get rows), {name} is shared"
            )
    for norm in left.values():
        _obey_eval_stats(norm)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                setattr(parent, name, new[child])
    return cast(_M, new.get(model, model))


def _is_batch_norm(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether it is PyTorch's batch norm, or a subclass (one of :mod:`mamlpp_fast.compat`, say) of the same result."""
    kind = type(module)
    return (
        isinstance(module, _BatchNorm)
        and (kind.forward is _BatchNorm.forward or kind.__module__.startswith("mamlpp_fast."))
        and "forward" not in vars(module)
        and not module._modules
        and module._parameters.keys() == {"weight", "bias"}
    )


def _converted(
    old: _BatchNorm,
    num_steps: int,
    per_step_affine: bool,
    per_step_stats: bool,
    parameters: dict[nn.Parameter, nn.Parameter],
) -> nn.Module:
    """A per-step batch norm in the place of ``old``; ``parameters``: old ones to new ones, so that ties stay tied."""
    new = PerStepBatchNorm2d(
        old.num_features,
        num_steps,
        eps=old.eps,
        momentum=old.momentum,
        affine=old.weight is not None or old.bias is not None,
        bias=old.bias is not None,
        per_step_affine=per_step_affine,
        per_step_stats=per_step_stats,
    )
    if old.weight is None:
        new.weight = None  # a bias alone
    for tensor in (old.running_mean, old.weight, old.bias):
        if tensor is not None:
            new.to(tensor)
    new.train(old.training)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        value, repeated = getattr(old, name), getattr(new, name, None)
        if value is not None and repeated is not None:
            repeated.copy_(value)
    for name in ("weight", "bias"):
        p, repeated = getattr(old, name), getattr(new, name)
        if p is None:
            continue
        if not per_step_affine:
            repeated = p
        elif p not in parameters:
            repeated.data.copy_(p.data)
            repeated.requires_grad_(p.requires_grad)
        setattr(new, name, parameters.setdefault(p, repeated))
    for hooks in _HOOKS:  # the very tables, so that the handles that users hold go on removing
        setattr(new, hooks, getattr(old, hooks))
    return new


def _obey_eval_stats(norm: _NormBase) -> None:
    """Has a norm that is not ours do in evaluation mode what it does in training mode, until told otherwise."""
    if "eval_stats" not in vars(norm):
        vars(norm)["eval_stats"] = "batch"
        norm.register_forward_pre_hook(_train)
        norm.register_forward_hook(_untrain, always_call=True)


def _train(norm: nn.Module, _: Any) -> None:
    if not norm.training and vars(norm)["eval_stats"] == "batch":
        vars(norm)["kept_buffers"] = norm._buffers
        norm._buffers = {name: None if b is None else b.clone() for name, b in norm._buffers.items()}
        norm.training = True


def _untrain(norm: nn.Module, *_: Any) -> None:
    if (kept := vars(norm).pop("kept_buffers", None)) is not None:
        norm._buffers = kept
        norm.training = False
