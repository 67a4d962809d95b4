"""Models of loops of one's own on the fused engine's kernels: an operation of autograd, differentiable twice."""

from __future__ import annotations

import copyreg
import functools
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

import mamlpp_fast.engine.fused.rules  # noqa: F401 - fills the table of the lowering
from mamlpp_fast import reference
from mamlpp_fast._modes import plainly
from mamlpp_fast.engine.base import UncheckedError, Unsupported
from mamlpp_fast.engine.counts import kind_of, known_counts
from mamlpp_fast.engine.fingerprint import look
from mamlpp_fast.engine.fused import transforms
from mamlpp_fast.engine.fused.differentiable import DifferentiableNetwork, differentiable, gainless
from mamlpp_fast.engine.fused.held import Held
from mamlpp_fast.engine.glances import Seen, traits
from mamlpp_fast.engine.lanes import watched
from mamlpp_fast.engine.named import ROUTED
from mamlpp_fast.inputs import Call, call_of, form_of_inputs, tensors_of
from mamlpp_fast.ops._library import transformed

__all__ = ["accelerate", "acceleration", "functional_call"]

_M = TypeVar("_M", bound=nn.Module)
_R = TypeVar("_R")
_OWN = ("_parameters", "_modules", "_flat_weights")  # the last are a recurrent layer's parameters again
_KEPT = 64
"""Forms of models whose programs are kept, those used last."""


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
    kind, shapes = kind_of(type(model)), _shapes(model)
    with _lock:
        lines = [
            f"{_said(key)}: {route}"
            for whole, route in _routes.items()
            for cls, *key, _ in (whole,)
            if cls is kind and _holders[whole] == shapes
        ]
        left = list(_left.get(model, ()))
    return "\n".join([*lines, *(f"other calls: plain PyTorch: {why}" for why in left)]) or "no call yet"


def _shapes(model: nn.Module) -> _Shapes:
    return [(name, traits(p)[:2]) for name, p in model.named_parameters()]


def _said(key: list[Any]) -> str:
    (_, *tensors), _, training, inputs, why = key
    shown = ", ".join(f"{list(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in tensors)
    kind = "training" if training else "evaluation"
    beside = ", examples with a gradient" if inputs else ""
    under = ", under torch.func" if why else ""
    return f"{shown}, {kind}{beside}{under}"


class _Refusal:
    """Why a form of a model runs plain PyTorch."""

    def __init__(self, why: str, *, passing: bool = False, of_all: bool = False) -> None:
        self.why = why
        self.passing = passing  # of these examples alone
        self.of_all = of_all  # of whatever form that was not served before

    def __str__(self) -> str:
        return f"plain PyTorch: {self.why}"


_FREE, _CALLS = 8, 64
"""So many forms of a model are written as they come, and a further one for each so many calls that they served."""
_MOST = 1024
"""Calls that are left one after the other without a look, which takes some ms of a model of one's own classes."""


class _Turnover:
    """Whether a further form of a model is worth writing, which takes longer than some hundred calls of PyTorch."""

    def __init__(self) -> None:
        self._written: list[weakref.ref[DifferentiableNetwork]] = []

    def pays(self) -> bool:
        served = sum(net.calls for ref in self._written if (net := ref()) is not None)
        return served >= _CALLS * (len(self._written) - _FREE + 1)

    def add(self, route: _Route) -> None:
        if isinstance(route, DifferentiableNetwork):
            self._written.append(weakref.ref(route))


_Route = DifferentiableNetwork | transforms.Transformed | _Refusal
_Shapes = list[tuple[str, tuple[object, ...]]]
_routes: OrderedDict[tuple[Any, ...], _Route] = OrderedDict()
_holders: dict[tuple[Any, ...], _Shapes] = {}
"""The parameters' shapes by the key of a route, which tell a model and its copies from others of the class."""
_lock = threading.RLock()
_unsettled: weakref.WeakKeyDictionary[nn.Module, Counter[Any]] = weakref.WeakKeyDictionary()
"""In how many forms a model was refused on examples of each shape: one that changes at each call, by a count of its
calls say, is not looked at for ever, for that runs its forward."""
_TRIES = 3
_changing: weakref.WeakKeyDictionary[nn.Module, _Turnover] = weakref.WeakKeyDictionary()
"""Of models for which programs were written."""
_idle: weakref.WeakKeyDictionary[nn.Module, dict[object, _Idle]] = weakref.WeakKeyDictionary()
"""Of models the kinds of calls that were refused."""
_alone: dict[type, _Alone] = {}
_UNASKED = 15
"""To ask for the kind takes some 20 us, of a layer or two a tenth of the time."""
_left: weakref.WeakKeyDictionary[nn.Module, dict[str, None]] = weakref.WeakKeyDictionary()
"""Why calls of a model were not looked at, in order."""
_resting: weakref.WeakKeyDictionary[nn.Module, DifferentiableNetwork] = weakref.WeakKeyDictionary()
"""Models whose last call was left to PyTorch, and the network that says for how long."""


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

    own: Any = type(
        cls.__name__,
        (cls,),
        {
            "forward": forward,
            "__reduce_ex__": reduce,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            ROUTED: True,
        },
    )
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
    # Without a look at the call or the form, which plain PyTorch does not need.
    if (alone := _alone.get(type(model))) is not None and alone.left > 0 and alone.model() is model:
        alone.left -= 1
        return None
    if gainless(model):
        return None
    if (before := _resting.get(model)) is not None:
        if before.resting():
            return None
        _resting.pop(model, None)
    x = _inputs(args, kwargs)
    if isinstance(x, str):
        _left.setdefault(model, {})[x] = None
        return None
    route, seen = _looked_up(model, x, plain)
    if isinstance(route, _Refusal):
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
    route, _ = _looked_up(model, x, None)
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


class _Idle:
    """Calls of one kind that were refused one after the other, of which few are looked at then; none: it was served."""

    def __init__(self) -> None:
        self.refused = self.left = 0
        self.refusal: _Refusal | None = None


class _Alone:
    """A model of which no kind of calls is served, and how many more of its calls are not even asked for their kind."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.left = weakref.ref(model), _UNASKED


def _looked_up(
    model: nn.Module, x: reference.Inputs, plain: Callable[[], nn.Module] | None
) -> tuple[_Route, Seen | None]:
    """As :func:`_route`, which takes some ms: of calls that are refused again and again one in 64, 128, ... 1024."""
    kinds = _idle.setdefault(model, {})
    shapes = form_of_inputs(x)
    kind = model.training, transformed(), shapes
    own = kinds.get(kind)
    for idle in (own, kinds.get(kind[:2]) if own is None or own.refused else None):
        if idle is not None and idle.left > 0 and idle.refusal is not None:
            if all(i.refusal is not None for i in kinds.values()):
                _alone[type(model)] = _Alone(model)
                idle.left -= _UNASKED
            idle.left -= 1
            return idle.refusal, None
    route, seen = _route(model, x, shapes, plain)
    if len(kinds) >= _KEPT:
        kinds.clear()
    if not isinstance(route, _Refusal):
        kinds[kind] = _Idle()
        return route, seen
    idle = kinds.setdefault(kind[:2] if route.of_all else kind, _Idle())
    idle.refused += 1
    if idle.refused >= _FREE:
        idle.left, idle.refusal = min(_CALLS << (idle.refused - _FREE), _MOST) - 1, route
    return route, seen


def _route(
    model: nn.Module, x: reference.Inputs, shapes: object, plain: Callable[[], nn.Module] | None
) -> tuple[_Route, Seen | None]:
    """What serves a call on inputs of these shapes, and what the look at the model has found."""
    form, seen = look(model)
    # Empty without a transform of torch.func; with one, why its kind is refused.
    transform = (transforms.refusal(model, x),) if transformed() else ()
    given = tensors_of(x)
    inputs = any(t.requires_grad for t in given)
    devices = frozenset(t.device for t in given)
    key = (kind_of(type(model)), shapes, devices, model.training, inputs, transform, form)
    with _lock:
        if (known := _routes.get(key)) is not None:
            _routes.move_to_end(key)
            return known, seen
        refused = _unsettled.setdefault(model, Counter())
        if max(refused.values(), default=0) >= _TRIES:
            return _Refusal("refused in too many forms", of_all=True), None
        turnover = _changing.setdefault(model, _Turnover())
        if not turnover.pays():
            why = "forms change from call to call, so that no program would serve often"
            return _Refusal(why, of_all=True), None
        if transform:
            route = _under_transforms(model, x, plain, *transform)
        else:
            counts = known_counts()
            route = _made(model if plain is None else plain(), x)
            if known_counts() != counts:  # and the form another one
                if isinstance(route, _Refusal):
                    return route, None
                key = (*key[:-1], look(model)[0])
        turnover.add(route)
        if isinstance(route, _Refusal) and not transform:
            refused[key[:-1]] += 1
            if route.passing and refused[key[:-1]] < _TRIES:
                return route, None
        _routes[key], _holders[key] = route, _shapes(model)
        while len(_routes) > _KEPT:
            _holders.pop(_routes.popitem(last=False)[0], None)
        return route, None


def _under_transforms(
    model: nn.Module, x: reference.Inputs, plain: Callable[[], nn.Module] | None, refusal: str | None
) -> _Route:
    if refusal is not None:
        return _Refusal(refusal)
    with transforms.outside(model, x) as one:
        route, _ = _route(model, one, form_of_inputs(one), plain)
    if not isinstance(route, DifferentiableNetwork):
        return route
    if any(norm.statistics is not None for norm in route.network.norms.values()):
        return _Refusal("keeps running statistics, which a transform changes as PyTorch does, or refuses")
    if route.network.counts:
        return _Refusal("counts its calls, which a transform makes as many of as PyTorch does")
    return transforms.Transformed(route)


def _made(model: nn.Module, x: reference.Inputs) -> _Route:
    if type(model).__call__ is not nn.Module.__call__:
        return _Refusal("its class has a __call__ of its own, which is around what is served")
    own = list(nn.Module.parameters(model))  # one's own may return others, or a list
    if not own:
        return _Refusal("expected parameters, there are none")
    for t in (*own, *model.buffers()):
        if type(t) not in (Tensor, nn.Parameter) or t.layout is not torch.strided:
            return _Refusal(
                f"a parameter or buffer is no plain tensor, but a {type(t).__name__} of {t.layout}"
            )
    tensors = [*own, *(b for b in model.buffers() if b.is_floating_point())]
    given = tensors_of(x)
    if any(t.dtype != tensors[0].dtype for t in tensors) or len({t.device for t in (*tensors, *given)}) > 1:
        return _Refusal("expected parameters and buffers of one type on the examples' device")
    if tensors[0].dtype not in (torch.float32, torch.float64):
        return _Refusal(f"expected parameters in float32 or float64, got {tensors[0].dtype}")
    for t in given:
        if t.dtype != tensors[0].dtype and t.is_floating_point():
            return _Refusal(f"expected examples of the parameters' {tensors[0].dtype}, got {t.dtype}")
    if sum(t.requires_grad for t in given) > 1:
        return _Refusal("expected at most one argument that takes a gradient, got several")
    if any(
        getattr(m, "plain", False) for m in model.modules() if isinstance(m, reference.PerStepBatchNorm2d)
    ):
        return _Refusal("its batch norms are to run PyTorch's own operations")
    for name, value in ((n, t) for m in model.modules() for n, t in vars(m).items() if n not in _OWN):
        if any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(value)):
            return _Refusal(f"the attribute {name} is no parameter and takes a gradient")
    try:
        return differentiable(model, x)
    except Unsupported as error:
        return _Refusal(str(error), passing=isinstance(error, UncheckedError))
