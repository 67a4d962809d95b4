"""Models of loops of one's own on the fused engine's kernels: an operation of autograd, differentiable twice."""

from __future__ import annotations

import copyreg
import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mamlpp_fast import reference, routes
from mamlpp_fast._modes import plainly
from mamlpp_fast.engine.fused.differentiable import DifferentiableNetwork, gainless
from mamlpp_fast.engine.fused.held import Held
from mamlpp_fast.engine.lanes import watched
from mamlpp_fast.inputs import Call, call_of, tensors_of
from mamlpp_fast.ops._library import transformed
from mamlpp_fast.reference.code import ROUTED, standing_for

__all__ = ["accelerate", "acceleration", "functional_call"]

_M = TypeVar("_M", bound=nn.Module)
_R = TypeVar("_R")
_left: weakref.WeakKeyDictionary[nn.Module, dict[str, None]] = weakref.WeakKeyDictionary()
"""Why calls of a model were not looked at, in order."""
_resting: weakref.WeakKeyDictionary[nn.Module, DifferentiableNetwork] = weakref.WeakKeyDictionary()
"""Models whose last call was left to PyTorch, and the network that says for how long."""


def accelerate(model: _M) -> _M:
    """Lets a model's calls run on the fused engine's kernels, in any loop that differentiates them once or twice.

    The model stays what it is: the same object with the same parameters, names, state dict, hooks and results. What
    changes is what a call ``model(x)`` executes where autograd records: the whole forward as one operation, whose
    backward pass and double backward are kernels too. So a textbook inner loop (``autograd.grad(...,
    create_graph=True)``, ``functional_call`` with fast weights) is several times as fast. All else runs as ever: other
    arguments than tensors [N, ...] of the parameters' type, integers or bool (in tuples, lists and dicts too), None,
    True and False; more than one of them that takes a gradient, forward mode, ``torch.compile``, autocast, hooks on
    saved tensors (checkpoints), normalising with running statistics, parameters that are sparse or of a subclass of
    tensors, models of ``torch.fx``, those whose forward is no fixed list of operations, or one of linear layers and
    pointwise functions alone. :func:`acceleration` says what was served and what not, and why.

    ``torch.func.grad``, ``vjp`` and ``vmap`` are served as well, nested in any way, by the parameters: the tasks of a
    ``vmap`` run side by side on the threads. Norms that update running statistics are not, for PyTorch refuses most of
    that itself.

    The first call of each form (shapes, attributes, training or evaluation, examples with a gradient or without) is
    checked in float64 against the plain forward: output, gradients, second derivatives and running statistics to 1e-6;
    what differs runs as ever. A backward pass that wants some gradients alone (ANIL's head, the examples of a gradient
    penalty) has calls of its own, checked likewise when it is first taken, up to three such sets. Copies, pickles and
    learners of the model work as before. Per-step batch norms use the row of their step at the call.

    Where a second derivative is taken with ``create_graph=True``, for a third, it is made of PyTorch's operations, with
    batch, instance and layer norms written out, since PyTorch's own third derivative of those is wrong
    (``findings/norm_third_derivative.sh``); where that comes again within eight calls, the next 63 calls of that form
    are made so, then 127, up to 1023. Of a form that the kernels do not serve,
    ``with mf.reference.norms_of_any_order():`` around the calls does the same.

    Args:
        model: any module.

    Returns:
        ``model`` itself.
    """
    # torch.fx writes a graph's code into the class that it finds, and would call itself.
    compiled = isinstance(model, (torch.jit.ScriptModule, torch.fx.GraphModule))
    cls: Any = type(model)
    if not compiled and not _is_routed(cls) and not gainless(model):
        made_by_torch = cls.__module__ == parametrize.__name__ and parametrize.is_parametrized(model)
        model.__class__ = _routed_parametrized(cls) if made_by_torch else _routed(cls)
    return model


def acceleration(model: nn.Module) -> str:
    """What serves the calls of a model that was given to :func:`accelerate`: a line for each form seen so far.

    Forms are those of the model, its copies, and others of its class with parameters of the same names and shapes.
    """
    if gainless(model):
        return "not accelerated: a linear layer alone, which PyTorch is faster at"
    if not _is_routed(type(model)):
        return "not accelerated: made by torch.jit or torch.fx, or never given to mamlpp_fast.accelerate"
    left = list(_left.get(model, ()))
    lines = [*routes.described(model), *(f"other calls: plain PyTorch: {why}" for why in left)]
    return "\n".join(lines) or "no call yet"


@functools.cache
def _routed(cls: Any) -> Any:
    """A class like ``cls``, under its name, whose forward takes the kernels where it can."""

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # first of all: what follows is not for a compiler to read
            return cls.forward(self, *args, **kwargs)
        if (made := served(self, args, kwargs)) is not None:
            return made
        return as_left(self, lambda: cls.forward(self, *args, **kwargs))  # which may have been set anew

    forward.__dict__[ROUTED] = True

    def reduce(self: nn.Module, protocol: Any) -> Any:
        made, args, *rest = super(own, self).__reduce_ex__(protocol)
        if made is copyreg.__newobj__ and args[0] is own:  # type: ignore[attr-defined]
            return _new, (cls, *args[1:]), *rest
        return made, args, *rest

    own = standing_for(cls, {"forward": forward, "__reduce_ex__": reduce, ROUTED: True})
    return own


_parametrized: dict[type, type] = {}


def _routed_parametrized(cls: Any) -> Any:
    """Likewise for a class that torch has made of a model's for parametrizations, and takes back with the last of them.

    That it is the model's own again then, its base is to be the routed one.
    """
    made = _parametrized.get(cls)
    if made is None or vars(cls).keys() - vars(made).keys():  # of which some have been taken back
        own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        made = _parametrized[cls] = type(cls)(cls.__name__, (_routed(cls.__bases__[0]),), own)
    return made


def _is_routed(cls: type) -> bool:
    """Whether the forward that a class has is one that :func:`_routed` made."""
    forward = next(vars(base)["forward"] for base in cls.__mro__ if "forward" in vars(base))
    return getattr(forward, ROUTED, False) is True


def served(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    plain: Callable[[], nn.Module] | None = None,
) -> Tensor | None:
    """What ``model(*args, **kwargs)`` returns, from the kernels; None where they do not serve it.

    Args:
        model: need not have been given to :func:`accelerate`.
        args, kwargs: of the call.
        plain: makes a module that computes what ``model`` does, of the user's own classes; ``model`` by default.
    """
    if torch.compiler.is_compiling() or plainly.now:
        return None
    if routes.unasked(model) or gainless(model):
        return None
    if (before := _resting.get(model)) is not None:
        if before.resting():
            return None
        _resting.pop(model, None)
    x = _inputs(args, kwargs)
    if isinstance(x, str):
        _left.setdefault(model, {})[x] = None
        return None
    route, seen = routes.looked_up(model, x, plain)
    if isinstance(route, routes.Refusal):
        return None
    if isinstance(route, DifferentiableNetwork) and route.resting():
        _resting[model] = route
        return None
    return route.call(Held(model, seen=seen), x)


def as_left(model: nn.Module, run: Callable[[], _R]) -> _R:
    """What ``run`` returns, a call of a model that :func:`served` was none of.

    It may be differentiated as often as the model's last calls were, or as its own forward does.
    """
    with reference.right_weight_norm(model):
        if plainly.now:
            return run()
        if (resting := _resting.get(model)) is None:
            return reference.rightly(model, run)
        with resting.to_any_order():
            return run()


def network_of(model: nn.Module, inputs: reference.Inputs) -> DifferentiableNetwork | str:
    """What calls of a model on inputs like these are served by, outside of ``torch.func``; else why they are not."""
    x = _inputs(*_arguments(inputs))
    if isinstance(x, str):
        return x
    route, _ = routes.looked_up(model, x, None)
    if isinstance(route, DifferentiableNetwork):
        return "its passes are differentiated a third time" if route.resting() else route
    return str(route)


def functional_call(
    model: nn.Module,
    tensors: reference.Tensors,
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Calls ``model`` with ``tensors`` in place of its parameters and buffers of those names, and leaves it as it was.

    On a CPU the call is one operation of the kernels wherever it would be after :func:`accelerate`. Arguments, errors
    and all else are as of :func:`mamlpp_fast.reference.functional_call`.
    """
    args = args if isinstance(args, tuple) else (args,)
    if torch.compiler.is_compiling():
        return reference.functional_call(model, tensors, args, kwargs)
    return predicted(model, tensors, reference.Arguments(args, dict(kwargs or {})))


def predicted(model: nn.Module, tensors: reference.Tensors, x: reference.Inputs) -> Any:
    """:func:`mamlpp_fast.reference.predicted`, from the kernels where they serve it (on a CPU)."""
    with reference.swapped(model, tensors):
        first = next(nn.Module.parameters(model), None)  # one's own may return a list
        own = (
            first is not None and first.device.type == "cpu" and not isinstance(model, torch.jit.ScriptModule)
        )
        made = served(model, *_arguments(x)) if own else None
        if made is not None:
            return made
        return as_left(model, lambda: reference.called(model, x))


def _arguments(x: reference.Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Of the call that :func:`mamlpp_fast.reference.called` makes."""
    if isinstance(x, reference.Arguments):
        return x.args, x.kwargs
    if isinstance(x, dict):
        return (), x
    return (x if isinstance(x, tuple) else (x,)), {}


def _new(cls: Any, *args: Any) -> nn.Module:
    """For pickle, which finds a class by its name."""
    own = _routed(cls)
    model: nn.Module = own.__new__(own, *args)
    return model


def _inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | Call | str:
    """A call as inputs; why it is of no kind that is served, where it is none."""
    x = call_of(args, kwargs)
    return x if isinstance(x, str) else _unfit(x) or x


def _unfit(x: Tensor | Call) -> str | None:
    """What stands against a call that is cheap to tell and may differ from call to call; one of a few sentences."""
    given = tensors_of(x)
    for t in given:
        if type(t) is not Tensor or t.layout is not torch.strided:
            return "an argument is no plain tensor"
        if t.__dict__:
            return "an argument has attributes of its own, which a forward may read"
    first = given[0]
    if first.ndim < (2 if len(given) == 1 else 1):
        return f"its examples have {first.ndim} axes"
    if first.shape[0] == 0:
        return "it has no examples"
    if len(given) > 1 and any(t.shape[:1] != first.shape[:1] for t in given):
        return "arguments are of another number of examples"
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return "no gradient is recorded"
    if torch.is_autocast_enabled(first.device.type):
        return "under torch.autocast"
    if torch._C._get_tracing_state():
        return "under torch.jit"
    if torch.autograd.forward_ad._current_level >= 0 and not transformed():
        return "under forward mode"
    # A checkpoint's: what it saves has to be the same in its second pass, whatever was prepared meanwhile.
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "under hooks on saved tensors"
    if watched():
        return "something watches the calling thread: a mode, or the profiler"
    return None
