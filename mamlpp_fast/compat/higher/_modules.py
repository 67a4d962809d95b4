"""A tree of modules that runs the original's forward code on fast weights.

Every module is copied shallowly: same attributes, its own parameter and buffer dictionaries, of a subclass made once
per class. New fast weights are written straight into those dictionaries, once per update; a forward pass then costs
what the original's does. Nothing refers back to the root but weakly, so a finished inner loop, graph and all, is
freed at once and not when the garbage collector comes by.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from mamlpp_fast.accelerated import as_left, served
from mamlpp_fast.compat.higher._batch_norm import FUSED

__all__ = ["FunctionalModule", "functional_tree", "plain_tree"]

OWN = ("_fast_", "_track_higher_grads")
"""How the attributes begin that a module of a functional tree has beside the original's."""


class InnerModule(nn.Module):
    """What every module of a functional tree can do beyond its own class."""

    _fast_root_ref: Callable[[], FunctionalModule | None]
    _mamlpp_fast_routed = True  # computes what the class behind it does
    _fast_indices: dict[str, int]
    """Where in the root's fast weights each of the module's own parameters is."""

    @property
    def _fast_root(self) -> FunctionalModule:
        root = self._fast_root_ref()
        if root is None:
            raise RuntimeError("root: the functional module that this is part of no longer exists")
        return root

    def forward(self, *args: Any, params: Iterable[Tensor] | None = None, **kwargs: Any) -> Any:
        """The original's forward; ``params``, all of the root's, become the latest fast weights first."""
        if params is not None:
            self._fast_root.update_params(params)
        elif self._fast_root._fast_params is None:
            raise ValueError("params: expected the parameters of a module without fast weights, got none")
        return super().forward(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_fast_indices", ()):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a tensor as fast weight, got {type(value).__name__}")
            root = self._fast_root
            if root.fast_params is None:
                raise RuntimeError(
                    f"{name}: expected a module with fast weights to assign to, got one without"
                )
            changed = list(root.fast_params)
            changed[self._fast_indices[name]] = value
            root.update_params(changed)
        elif name in self.__dict__.get("_parameters", ()) and isinstance(value, Tensor):
            self._parameters[name] = value  # type: ignore[assignment]
        else:
            super().__setattr__(name, value)

    def flatten_parameters(self) -> None:
        """Recurrent layers would copy their weights into one buffer; fast weights stay where the graph has them."""


class FunctionalModule(InnerModule):
    """The root: the user's module, of a subclass of its class, over fast weights."""

    _fast_params: list[list[Tensor]] | None
    _fast_places: list[tuple[dict[str, Any], str, int]]
    _fast_recurrent: list[nn.Module]
    _fast_fused: bool
    _mamlpp_fast_routed = True
    _track_higher_grads: bool

    def forward(self, *args: Any, params: Iterable[Tensor] | None = None, **kwargs: Any) -> Any:
        if params is not None:
            self.update_params(params)
        if self._fast_fused and self._fast_params is not None:
            made = served(self, args, kwargs, lambda: plain_tree(self))
            if made is not None:
                return made
        forward = super().forward
        return as_left(self, lambda: forward(*args, **kwargs))

    @property
    def fast_params(self) -> list[Tensor] | None:
        """The latest fast weights, in the order of the original's ``parameters()``; setting adds a step."""
        return None if self._fast_params is None else self._fast_params[-1]

    @fast_params.setter
    def fast_params(self, value: Iterable[Tensor]) -> None:
        params = list(value)
        if len(params) != self._fast_count:
            raise ValueError(f"params: expected {self._fast_count} tensors, got {len(params)}")
        if self._fast_params is None or not self.track_higher_grads:
            self._fast_params = [params]
        else:
            self._fast_params.append(params)

    @property
    def init_fast_params(self) -> list[Tensor]:
        """The fast weights before the first step.

        Raises:
            RuntimeError: when only the latest are kept, or there are none yet.
        """
        if not self.track_higher_grads or self._fast_params is None:
            raise RuntimeError(
                "init_fast_params: expected a module that tracks higher gradients, got one that does not"
            )
        return self._fast_params[0]

    @property
    def track_higher_grads(self) -> bool:
        return self._track_higher_grads

    @track_higher_grads.setter
    def track_higher_grads(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"track_higher_grads: expected a bool, got {type(value).__name__}")
        self._track_higher_grads = value

    def parameters(self, recurse: bool = True, time: int | None = None) -> Iterator[Tensor]:  # type: ignore[override]
        """Fast weights of the whole tree.

        Args:
            recurse: False warns and changes nothing.
            time: how many updates after the beginning; by default the latest.

        Raises:
            ValueError: for an earlier time where only the latest are kept.
            RuntimeError: without fast weights.
        """
        if self._fast_params is None:
            raise RuntimeError("parameters: expected a module with fast weights, got one without")
        if not recurse:
            warnings.warn(
                "parameters(recurse=False) of a functional module still gives all fast weights", stacklevel=2
            )
        if not self.track_higher_grads and time not in (None, -1, 0):
            raise ValueError(f"time: expected None where higher gradients are not tracked, got {time}")
        return iter(self._fast_params[-1 if time is None else time])

    def update_params(self, params: Iterable[Tensor]) -> None:
        """Makes these the latest fast weights, one for each of the original's parameters."""
        self.fast_params = list(params)
        self._fast_write()

    def _fast_write(self) -> None:
        latest = self.fast_params
        assert latest is not None
        for parameters, name, index in self._fast_places:
            parameters[name] = latest[index]
        for layer in self._fast_recurrent:
            names: list[str] = layer.__dict__["_flat_weights_names"]
            layer.__dict__["_flat_weights"] = [layer._parameters.get(name) for name in names]

    @property
    def _fast_count(self) -> int:
        return 1 + max((index for *_, index in self._fast_places), default=-1)


def functional_tree(module: nn.Module, fused: bool) -> FunctionalModule:
    """The tree of ``module``, without fast weights and with no copies of buffers yet.

    A module that occurs twice in the original occurs twice in it.

    Raises:
        ValueError: when part of ``module`` is functional.
    """
    copier = _Copier(module, fused)
    root = copier.copy(module, FunctionalModule)
    assert isinstance(root, FunctionalModule)
    reference = weakref.ref(root)
    for part in copier.made.values():
        part.__dict__["_fast_root_ref"] = reference
    recurrent = [part for part in copier.made.values() if "_flat_weights_names" in part.__dict__]
    root.__dict__.update(
        _fast_params=None,
        _fast_places=copier.places,
        _fast_recurrent=recurrent,
        _fast_fused=fused,
        _track_higher_grads=True,
    )
    return root


def plain_tree(module: nn.Module, made: dict[int, Any] | None = None) -> nn.Module:
    """The tree of the original classes behind a functional one, over constants of the latest fast weights' values."""
    made = {} if made is None else made
    if id(module) in made:
        known: nn.Module = made[id(module)]
        return known
    kind: Any = getattr(type(module), "_fast_original", type(module))
    new: nn.Module = kind.__new__(kind)
    made[id(module)] = new
    state = {name: value for name, value in vars(module).items() if not name.startswith(OWN)}
    new.__dict__.update(state)
    new.__dict__["_parameters"] = {
        name: None if p is None else _leaf(p, made) for name, p in module._parameters.items()
    }
    if "_flat_weights_names" in state:
        held = new._parameters
        new.__dict__["_flat_weights"] = [held.get(n) for n in state["_flat_weights_names"]]
    new.__dict__["_modules"] = {
        name: child if child is None else plain_tree(child, made) for name, child in module._modules.items()
    }
    return new


def _leaf(p: Tensor, made: dict[int, Any]) -> nn.Parameter:
    """A parameter of this value, the same one for a tensor that is held in two places."""
    if id(p) not in made:
        made[id(p)] = nn.Parameter(p.detach(), p.requires_grad)
    leaf: nn.Parameter = made[id(p)]
    return leaf


class _Copier:
    """Copies modules, each once. (A recursive closure would be a reference cycle that keeps the modules alive.)

    Attributes:
        made: the copies by the originals' ids.
        places: dictionary, name and index of every parameter to be filled.
    """

    def __init__(self, module: nn.Module, fused: bool) -> None:
        self.indices = {id(p): i for i, p in enumerate(module.parameters())}
        self.fused = fused
        self.made: dict[int, InnerModule] = {}
        self.places: list[tuple[dict[str, Any], str, int]] = []

    def copy(self, original: nn.Module, mixin: Any) -> InnerModule:
        if id(original) in self.made:
            return self.made[id(original)]
        if isinstance(original, InnerModule):
            raise ValueError("module: expected a module that is not functional, got one made by monkeypatch")
        base: Any = type(original)
        kind: Any = _functional_type(mixin, base, self.fused)
        new: InnerModule = kind.__new__(kind)
        self.made[id(original)] = new
        own = dict(original._parameters)
        state = dict(original.__dict__)
        # Hooks act on the module that they are called with, and so on this one; those of state dicts may hold the
        # original.
        state |= {
            key: copy.copy(value if "state_dict" in key else state.get(key, value))
            for key, value in _fresh_state().items()
            if "hook" in key
        }
        state |= {
            "_non_persistent_buffers_set": set(original._non_persistent_buffers_set),
            "_parameters": own,
            "_buffers": dict(original._buffers),
            "_fast_indices": {name: self.index(name, p) for name, p in own.items() if p is not None},
        }
        new.__dict__.update(state)
        self.places.extend((own, name, index) for name, index in new._fast_indices.items())
        new.__dict__["_modules"] = {
            name: child if child is None else self.copy(child, InnerModule)
            for name, child in original._modules.items()
        }
        return new

    def index(self, name: str, p: nn.Parameter) -> int:
        if id(p) not in self.indices:
            raise ValueError(f"module: expected parameters() to give every parameter, got all but {name!r}")
        return self.indices[id(p)]


@lru_cache(maxsize=1)
def _fresh_state() -> dict[str, Any]:
    return nn.Module().__dict__


@lru_cache(maxsize=512)
def _functional_type(mixin: Any, kind: Any, fused: bool) -> Any:
    """The functional subclass of a module's class."""
    prefix = "Functional" if mixin is FunctionalModule else "InnerFunctional"
    bases = (mixin, FUSED[kind], kind) if fused and kind in FUSED else (mixin, kind)
    return type(kind)(prefix + kind.__name__, bases, {"__module__": kind.__module__, "_fast_original": kind})
