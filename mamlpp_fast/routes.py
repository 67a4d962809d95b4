"""What serves the calls of a model, by their form: made once, kept, and looked for again only where it may pay."""

from __future__ import annotations

import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import mamlpp_fast.engine.fused.rules  # noqa: F401 - fills the table of the lowering
from mamlpp_fast import reference
from mamlpp_fast.engine.base import UncheckedError, Unsupported
from mamlpp_fast.engine.counts import kind_of, known_counts
from mamlpp_fast.engine.fingerprint import look
from mamlpp_fast.engine.fused import transforms
from mamlpp_fast.engine.fused.differentiable import DifferentiableNetwork, differentiable
from mamlpp_fast.engine.glances import Seen, traits
from mamlpp_fast.inputs import form_of_inputs, tensors_of
from mamlpp_fast.ops._library import transformed

__all__ = ["Refusal", "described", "kept", "looked_up", "unasked"]

_OWN = ("_parameters", "_modules", "_flat_weights")  # the last are a recurrent layer's parameters again
_KEPT = 64
"""Forms of models whose programs are kept, those used last."""
_FREE, _CALLS = 8, 64
"""So many forms of a model are written as they come, and a further one for each so many calls that they served."""
_MOST = 1024
"""Calls that are left one after the other without a look, which takes some ms of a model of one's own classes."""
_TRIES = 3
"""Refused forms of examples of one shape, after which a model is left alone."""
_UNASKED = 15
"""To ask for the kind takes some 20 us, of a layer or two a tenth of the time."""


class Refusal:
    """Why a form of a model runs plain PyTorch."""

    def __init__(self, why: str, *, passing: bool = False, of_all: bool = False) -> None:
        self.why = why
        self.passing = passing  # of these examples alone
        self.of_all = of_all  # of whatever form that was not served before

    def __str__(self) -> str:
        return f"plain PyTorch: {self.why}"


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


class _Idle:
    """Calls of one kind that were refused one after the other, of which few are looked at then; none: it was served."""

    def __init__(self) -> None:
        self.refused = self.left = 0
        self.refusal: Refusal | None = None


class _Alone:
    """A model of which no kind of calls is served, and how many more of its calls are not even asked for their kind."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.left = weakref.ref(model), _UNASKED


_Route = DifferentiableNetwork | transforms.Transformed | Refusal
_Shapes = list[tuple[str, tuple[object, ...]]]
kept: OrderedDict[tuple[Any, ...], _Route] = OrderedDict()
_holders: dict[tuple[Any, ...], _Shapes] = {}
"""The parameters' shapes by the key of a route, which tell a model and its copies from others of the class."""
_lock = threading.RLock()
_unsettled: weakref.WeakKeyDictionary[nn.Module, Counter[Any]] = weakref.WeakKeyDictionary()
"""In how many forms a model was refused on examples of each shape: one that changes at each call, by a count of its
calls say, is not looked at for ever, for that runs its forward."""
_changing: weakref.WeakKeyDictionary[nn.Module, _Turnover] = weakref.WeakKeyDictionary()
"""Of models for which programs were written."""
_idle: weakref.WeakKeyDictionary[nn.Module, dict[object, _Idle]] = weakref.WeakKeyDictionary()
"""Of models the kinds of calls that were refused."""
_alone: dict[type, _Alone] = {}


def _shapes(model: nn.Module) -> _Shapes:
    return [(name, traits(p)[:2]) for name, p in model.named_parameters()]


def _said(key: list[Any]) -> str:
    (_, *tensors), _, training, inputs, why = key
    shown = ", ".join(f"{list(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in tensors)
    kind = "training" if training else "evaluation"
    beside = ", examples with a gradient" if inputs else ""
    under = ", under torch.func" if why else ""
    return f"{shown}, {kind}{beside}{under}"


def described(model: nn.Module) -> list[str]:
    """A line for each form of calls seen so far: of the model, and of others of its class and parameters' shapes."""
    kind, shapes = kind_of(type(model)), _shapes(model)
    with _lock:
        return [
            f"{_said(key)}: {route}"
            for whole, route in kept.items()
            for cls, *key, _ in (whole,)
            if cls is kind and _holders[whole] == shapes
        ]


def unasked(model: nn.Module) -> bool:
    """Whether a call goes to PyTorch without a look at it, or at the form."""
    if (alone := _alone.get(type(model))) is None or alone.left <= 0 or alone.model() is not model:
        return False
    alone.left -= 1
    return True


def looked_up(
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
    if not isinstance(route, Refusal):
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
        if (known := kept.get(key)) is not None:
            kept.move_to_end(key)
            return known, seen
        refused = _unsettled.setdefault(model, Counter())
        if max(refused.values(), default=0) >= _TRIES:
            return Refusal("refused in too many forms", of_all=True), None
        turnover = _changing.setdefault(model, _Turnover())
        if not turnover.pays():
            why = "forms change from call to call, so that no program would serve often"
            return Refusal(why, of_all=True), None
        if transform:
            route = _under_transforms(model, x, plain, *transform)
        else:
            counts = known_counts()
            route = _made(model if plain is None else plain(), x)
            if known_counts() != counts:  # and the form another one
                if isinstance(route, Refusal):
                    return route, None
                key = (*key[:-1], look(model)[0])
        turnover.add(route)
        if isinstance(route, Refusal) and not transform:
            refused[key[:-1]] += 1
            if route.passing and refused[key[:-1]] < _TRIES:
                return route, None
        kept[key], _holders[key] = route, _shapes(model)
        while len(kept) > _KEPT:
            _holders.pop(kept.popitem(last=False)[0], None)
        return route, None


def _under_transforms(
    model: nn.Module, x: reference.Inputs, plain: Callable[[], nn.Module] | None, refusal: str | None
) -> _Route:
    if refusal is not None:
        return Refusal(refusal)
    with transforms.outside(model, x) as one:
        route, _ = _route(model, one, form_of_inputs(one), plain)
    if not isinstance(route, DifferentiableNetwork):
        return route
    if any(norm.statistics is not None for norm in route.network.norms.values()):
        return Refusal("keeps running statistics, which a transform changes as PyTorch does, or refuses")
    if route.network.counts:
        return Refusal("counts its calls, which a transform makes as many of as PyTorch does")
    return transforms.Transformed(route)


def _made(model: nn.Module, x: reference.Inputs) -> _Route:
    if type(model).__call__ is not nn.Module.__call__:
        return Refusal("its class has a __call__ of its own, which is around what is served")
    own = list(nn.Module.parameters(model))  # one's own may return others, or a list
    if not own:
        return Refusal("expected parameters, there are none")
    for t in (*own, *model.buffers()):
        if type(t) not in (Tensor, nn.Parameter) or t.layout is not torch.strided:
            return Refusal(
                f"a parameter or buffer is no plain tensor, but a {type(t).__name__} of {t.layout}"
            )
    tensors = [*own, *(b for b in model.buffers() if b.is_floating_point())]
    given = tensors_of(x)
    if any(t.dtype != tensors[0].dtype for t in tensors) or len({t.device for t in (*tensors, *given)}) > 1:
        return Refusal("expected parameters and buffers of one type on the examples' device")
    if tensors[0].dtype not in (torch.float32, torch.float64):
        return Refusal(f"expected parameters in float32 or float64, got {tensors[0].dtype}")
    for t in given:
        if t.dtype != tensors[0].dtype and t.is_floating_point():
            return Refusal(f"expected examples of the parameters' {tensors[0].dtype}, got {t.dtype}")
    if sum(t.requires_grad for t in given) > 1:
        return Refusal("expected at most one argument that takes a gradient, got several")
    if any(
        getattr(m, "plain", False) for m in model.modules() if isinstance(m, reference.PerStepBatchNorm2d)
    ):
        return Refusal("its batch norms are to run PyTorch's own operations")
    for name, value in ((n, t) for m in model.modules() for n, t in vars(m).items() if n not in _OWN):
        if any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(value)):
            return Refusal(f"the attribute {name} is no parameter and takes a gradient")
    try:
        return differentiable(model, x)
    except Unsupported as error:
        return Refusal(str(error), passing=isinstance(error, UncheckedError))
