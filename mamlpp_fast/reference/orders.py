"""Norms that are right in derivatives of any order, for models that PyTorch's own are not right in."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from mamlpp_fast.reference.code import PLUMBING, names_in
from mamlpp_fast.reference.norms import PerStepBatchNorm2d, per_step_norm

__all__ = [
    "Watch",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "normalises",
    "norms_of_any_order",
    "put_back",
    "rightly",
]

_T = TypeVar("_T")


def _normalised(x: Tensor, axes: list[int], eps: float) -> Tensor:
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    centred = x - x.mean(axes, keepdim=True)
    return centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()


def _by_channel(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """[N, C, ...] times weight [C] plus bias [C]."""
    channels = (-1, *[1] * (y.ndim - 2))
    if weight is not None:
        y = y * weight.reshape(channels)
    return y if bias is None else y + bias.reshape(channels)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """``F.layer_norm``, written out."""
    y = _normalised(input, list(range(-len(normalized_shape), 0)), eps)
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """``F.group_norm``, written out."""
    grouped = input.reshape(input.shape[0], num_groups, -1)
    return _by_channel(_normalised(grouped, [2], eps).reshape(input.shape), weight, bias)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.instance_norm``, written out; running statistics stay."""
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return group_norm(input, input.shape[1], weight, bias, eps)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm``, written out; running statistics stay."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return _by_channel(_normalised(input, [0, *range(2, input.ndim)], eps), weight, bias)


def _after(own: Callable[..., Tensor], written_out: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``written_out``, with the errors, the dtype and the effect on running statistics of PyTorch's ``own``."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            made = own(*args, **kwargs)
        return written_out(*args, **kwargs).to(made.dtype)

    return run


def _weights_first(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """By the arguments of ``torch.batch_norm`` and ``torch.instance_norm``."""

    def reordered(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Tensor:
        return run(input, running_mean, running_var, weight, bias, training, momentum, eps)

    return reordered


_run_batch_norm = _after(F.batch_norm, _batch_norm)
_run_instance_norm = _after(F.instance_norm, instance_norm)
_WRITTEN_OUT: Mapping[Any, Callable[..., Tensor]] = {
    F.batch_norm: _run_batch_norm,
    torch.batch_norm: _weights_first(_run_batch_norm),
    F.instance_norm: _run_instance_norm,
    torch.instance_norm: _weights_first(_run_instance_norm),
    F.layer_norm: _after(F.layer_norm, layer_norm),
    torch.layer_norm: _after(torch.layer_norm, layer_norm),
}


class norms_of_any_order(TorchFunctionMode):
    """Within it PyTorch's batch, instance and layer norms have right derivatives of any order.

    Their third derivative is wrong in silence (torch 2.11 to 2.13; 2.14 has an error for the first two), since their
    double backward reads statistics through which nothing is differentiated further:
    ``findings/norm_third_derivative.sh``. So they are made of elementary operations, at several times the cost. The
    package's own batch norms, which have no third derivative, are PyTorch's within it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is per_step_norm:  # a function of Python, whose own operations are to be met as well
            with self:
                return func(*args, **(kwargs or {}))
        run = _WRITTEN_OUT.get(func, func) if torch.is_grad_enabled() else func
        return run(*args, **(kwargs or {}))


# Tensor.grad: nobody overrides torch.autograd.backward, but what it leaves is read.
_ASKING = frozenset({torch.autograd.grad, Tensor.backward, Tensor.grad.__get__})  # type: ignore[union-attr]


class Watch(TorchFunctionMode):
    """Notes whether the forward that runs within it takes derivatives, and changes nothing.

    Attributes:
        asked: whether it has. Who takes some in between, to check an operation say, sets it back.
    """

    asked = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.asked |= func in _ASKING or forward_ad._current_level >= 0
        return func(*args, **(kwargs or {}))


_NORMS = (PerStepBatchNorm2d, _NormBase, nn.LayerNorm)
_FUNCTIONS = frozenset({"batch_norm", "instance_norm", "layer_norm"})
_BY_NAME = frozenset(
    {"grad", "grad_and_value", "backward", "vjp", "jvp", "vhp", "hvp", "linearize", "make_dual"}
)
_BY_NAME |= {"jacobian", "jacrev", "jacfwd", "hessian"}
"""By which code takes derivatives."""


def normalises(model: nn.Module) -> bool:
    """Whether it holds norms that are not right in any order, or its code names their functions.

    Compiled modules are left alone: a mode around them would have them compiled again.
    """
    modules = list(model.modules())
    if any(type(m).__name__ == "OptimizedModule" for m in modules):
        return False
    return any(isinstance(m, _NORMS) for m in modules) or not _FUNCTIONS.isdisjoint(names_in(model))


def put_back(t: Tensor, values: Tensor) -> None:
    """Gives a tensor its earlier values, as norms write to one: uncounted, for the sake of graphs that keep it."""
    with torch.no_grad(), _unsafe_preserve_version_counter(t):
        t.copy_(values)


def _state(model: nn.Module) -> Callable[[], None]:
    """Makes what puts back buffers, attributes, what is in their lists and dicts, and random numbers, once."""
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    own = [value for m in modules for name, value in vars(m).items() if name not in PLUMBING]
    with torch._C.DisableTorchFunction():
        # Running statistics [C] may be frozen parameters, or attributes.
        others = [
            t for t in (*nn.Module.parameters(model), *own) if isinstance(t, Tensor) and not t.requires_grad
        ]
        written = [*model.buffers(), *(t for t in others if t.ndim == 1 and t.layout is torch.strided)]
        buffers = [(b, b.detach().clone()) for b in written]
    places: list[dict[str, Any]] = [place for m in modules for place in (vars(m), m._buffers)]
    named = [(place, dict(place)) for place in (*places, *(v for v in own if type(v) is dict))]
    listed = [(found, list(found)) for found in own if type(found) is list]
    random = torch.get_rng_state()
    of_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def undo() -> None:
        for place, held in named:
            for name in place.keys() - held.keys():
                del place[name]
            place.update(held)
        for found, items in listed:
            found[:] = items
        for b, before in buffers:
            put_back(b, before)
        torch.set_rng_state(random)
        torch.cuda.set_rng_state_all(of_devices)

    return undo


class _Model:
    """What is known of a model with norms.

    Attributes:
        may_ask: whether its code names what takes derivatives.
        asks: whether it has taken some, by whether it trained and gradients were recorded.
    """

    def __init__(self, model: nn.Module) -> None:
        self.may_ask = not _BY_NAME.isdisjoint(names_in(model))
        self.asks: dict[tuple[bool, bool], bool] = {}


_known: weakref.WeakKeyDictionary[nn.Module, _Model | None] = weakref.WeakKeyDictionary()
"""None of models without norms."""


def rightly(model: nn.Module, run: Callable[[], _T]) -> _T:
    """What ``run``, a call of ``model``, returns, with norms of any order where its forward takes derivatives itself.

    The energy of a Hamiltonian network is such a forward, or the residual of a physics-informed one: the inner
    gradient is the second derivative of its norms then, and the meta-gradient the third. The first call tells (of code
    that names what takes derivatives, each call until one has taken some), and is made again where it was made with
    PyTorch's norms (attributes, buffers and random numbers as before it). In forward mode their tangents have wrong
    gradients at once (``findings/norm_gradient_of_tangent.sh``).
    """
    if torch.compiler.is_compiling():
        return run()
    if model not in _known:
        _known[model] = _Model(model) if normalises(model) else None
    known = _known[model]
    if known is None:
        return run()
    kind = model.training, torch.is_grad_enabled()
    asks = known.asks.get(kind)
    # What a checkpoint saves has to be the same in its second pass, whatever was found meanwhile; lazy modules are made
    # by their first call, which cannot be made again.
    once = known.may_ask and (
        torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        or (not known.asks and any(map(is_lazy, (*model.parameters(), *model.buffers()))))
    )
    if asks or once or forward_ad._current_level >= 0:
        with norms_of_any_order():
            return run()
    if asks is False and not known.may_ask:
        return run()
    undo = _state(model)
    watch = Watch()
    try:
        with watch:
            made = run()
    except RuntimeError:  # PyTorch's and our own where there is no third derivative
        if not watch.asked:
            raise
    known.asks[kind] = watch.asked
    if not watch.asked:
        return made
    undo()
    with norms_of_any_order():
        return run()
