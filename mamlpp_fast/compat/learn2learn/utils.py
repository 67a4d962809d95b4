"""learn2learn's ``utils``: differentiable copies and updates of modules, and small helpers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mamlpp_fast.compat.learn2learn._batch_norm import fused_class
from mamlpp_fast.ops.stepped import copied

__all__ = [
    "accuracy",
    "clone_distribution",
    "clone_module",
    "clone_named_parameters",
    "clone_parameters",
    "detach_distribution",
    "detach_module",
    "magic_box",
    "update_module",
    "warn_once",
]

T = TypeVar("T")


def magic_box(x: T) -> T | Tensor:
    """DiCE's operator: 1 in value, the gradient of ``x`` (Foerster et al. 2018); what is no tensor comes back as is."""
    return torch.exp(x - x.detach()) if isinstance(x, Tensor) else x


def clone_parameters(param_list: Iterable[Tensor]) -> list[Tensor]:
    """Differentiable copies."""
    return [p.clone() for p in param_list]


def clone_named_parameters(param_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Differentiable copies by name."""
    return {name: p.clone() for name, p in param_dict.items()}


def clone_module(module: Any, memo: dict[int, Any] | None = None) -> Any:
    """A copy of a module whose parameters are differentiable copies: gradients flow to the originals.

    Buffers that take a gradient are copied likewise; the others (running statistics) are shared with ``module``. A
    parameter, or a submodule, used in several places is copied once. A ``nn.BatchNorm1d`` or ``nn.BatchNorm2d``
    becomes a subclass of it that computes the same in one operation, in a ``nn.Sequential`` with the ReLU behind it;
    see :func:`plain_batch_norm`.

    Args:
        module: the module; anything else is returned as is.
        memo: copies of tensors and modules made so far, by ``id`` of the original.
    """
    if not isinstance(module, nn.Module):
        return module
    memo = {} if memo is None else memo
    places: list[tuple[dict[str, Any], str, Tensor]] = []
    clone = _structure(module, memo, places)
    own = {id(t): t for *_, t in places if id(t) not in memo}
    memo.update(zip(own, copied(list(own.values())), strict=True))
    for tensors, name, tensor in places:
        tensors[name] = memo[id(tensor)]
    return clone


def _structure(
    module: nn.Module, memo: dict[int, Any], places: list[tuple[dict[str, Any], str, Tensor]]
) -> Any:
    """A copy of a module that holds the module's tensors; to ``places`` is added where copies of them belong."""
    if id(module) in memo:
        return memo[id(module)]
    kind = fused_class(module)
    clone = memo[id(module)] = kind.__new__(kind)
    clone.__dict__ = module.__dict__.copy()
    for group in ("_parameters", "_buffers", "_modules"):
        clone.__dict__[group] = module.__dict__[group].copy()
    parameters, buffers, children = _parts(clone)
    for tensors, always in ((parameters, True), (buffers, False)):
        for name, tensor in tensors.items():
            if tensor is not None and (always or tensor.requires_grad):
                places.append((tensors, name, tensor))
    for name, child in children.items():
        if isinstance(child, nn.Module):
            children[name] = _structure(child, memo, places)
    return clone


def _parts(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Parameters, buffers and children, to be written to without nn.Module's checks."""
    own = module.__dict__
    return own["_parameters"], own["_buffers"], own["_modules"]


def detach_module(module: Any, keep_requires_grad: bool = False) -> None:
    """Cuts the parameters and buffers of a cloned module off their graph, in place.

    Args:
        module: the module; anything else is left as is.
        keep_requires_grad: those that took a gradient take one again, as leaves; without it none does.
    """
    if not isinstance(module, nn.Module):
        return
    parameters, buffers, children = _parts(module)
    for tensor in (*parameters.values(), *(b for b in buffers.values() if b is not None and b.requires_grad)):
        if tensor is not None:
            requires_grad = tensor.requires_grad
            tensor.detach_()
            if keep_requires_grad and requires_grad:
                tensor.requires_grad_()
    for child in children.values():
        detach_module(child, keep_requires_grad)


def clone_distribution(dist: Any) -> Any:
    """A copy of a distribution whose tensors that take a gradient, and modules, are differentiable copies."""
    clone = copy.deepcopy(dist)
    for name, value in dist.__dict__.items():
        if isinstance(value, Tensor):
            if value.requires_grad:
                clone.__dict__[name] = value.clone()
        elif isinstance(value, nn.Module):
            clone.__dict__[name] = clone_module(value)
        elif isinstance(value, torch.distributions.Distribution):
            clone.__dict__[name] = clone_distribution(value)
    return clone


def detach_distribution(dist: Any) -> Any:
    """Cuts a distribution's tensors and modules off their graph; returns it."""
    for name, value in dist.__dict__.items():
        if isinstance(value, Tensor):
            if value.requires_grad:
                dist.__dict__[name] = value.detach()
        elif isinstance(value, nn.Module):
            detach_module(value)
        elif isinstance(value, torch.distributions.Distribution):
            dist.__dict__[name] = detach_distribution(value)
    return dist


def warn_of_lengths(caller: str, parameters: Sequence[Any], others: Sequence[Any], what: str) -> None:
    """Prints learn2learn's warning when there are not as many as parameters."""
    if len(parameters) != len(others):
        print(
            f"WARNING:{caller}(): Parameters and {what} have different length. "
            f"({len(parameters)} vs {len(others)})"
        )


def update_module(
    module: nn.Module,
    updates: Sequence[Tensor | None] | None = None,
    memo: dict[Tensor, Tensor] | None = None,
) -> nn.Module:
    """Replaces every parameter p of a module by p + its update, differentiably; returns the module.

    Args:
        module: changed in place; its tensors are not.
        updates: one a parameter, None for what stays. Without it each parameter's (and buffer's) attribute ``update``.
        memo: tensors replaced so far and what by, which holds for every place that uses one.
    """
    memo = {} if memo is None else memo
    if updates is not None:
        given = list(module.parameters())
        warn_of_lengths("update_module", given, updates, "updates")
        for p, update in zip(given, updates, strict=False):
            p.update = update  # type: ignore[attr-defined]
    replaced = replace_tensors(module, {id(t): (t, new) for t, new in memo.items()})
    memo.update(replaced.values())
    return module


Replaced = dict[int, tuple[Tensor, Tensor]]
"""Tensors and what takes their place, by ``id`` of the former; a Tensor's own hash is a function in Python."""


def replace_tensors(
    module: nn.Module, replaced: Replaced, modules: Sequence[nn.Module] | None = None
) -> Replaced:
    """Replaces parameters and buffers of a module, in every place; those beside by themselves and their ``update``.

    Args:
        module: changed in place; its tensors are not, but that an ``update`` which was added is gone.
        replaced: is added to.
        modules: :func:`modules_of` the module, where they are known.
    """
    for own in modules_of(module) if modules is None else modules:
        for tensors in (own.__dict__["_parameters"], own.__dict__["_buffers"]):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if (found := replaced.get(id(tensor))) is None:
                    update = getattr(tensor, "update", None)
                    if update is None:
                        continue
                    found = replaced[id(tensor)] = tensor, tensor + update
                    tensor.update = None
                tensors[name] = found[1]
    return replaced


def modules_of(module: nn.Module) -> list[nn.Module]:
    """Every module in a module, itself first, in the order of ``nn.Module.modules``, without its names' cost."""
    found: dict[int, nn.Module] = {}

    def add(module: nn.Module) -> None:
        found[id(module)] = module
        for child in module.__dict__["_modules"].values():
            if child is not None and id(child) not in found:
                add(child)

    add(module)
    return list(found.values())


_PARAMETERS = ("parameters", "named_parameters", "named_modules")


def parameters_of(module: nn.Module, modules: Sequence[nn.Module] | None = None) -> list[Tensor]:
    """What ``module.parameters()`` gives; ``modules`` as in :func:`replace_tensors`."""
    if any(getattr(type(module), name) is not getattr(nn.Module, name) for name in _PARAMETERS):
        return list(module.parameters())
    own = modules_of(module) if modules is None else modules
    found = {id(p): p for m in own for p in m.__dict__["_parameters"].values() if p is not None}
    return list(found.values())


def accuracy(preds: Tensor, targets: Tensor) -> Tensor:
    """Share of rows of ``preds`` [N, classes] whose largest entry is the target's [N]."""
    return (preds.argmax(dim=1).long() == targets.long()).sum().float() / preds.size(0)


class _WarnOnce:
    """Warns, but of each message once."""

    def __init__(self) -> None:
        self.warned_messages: list[str] = []

    def __call__(self, message: str, severity: str | type[Warning] | None = None) -> None:
        if message in self.warned_messages:
            return
        if severity == "error":
            raise RuntimeError(message)
        categories: dict[Any, type[Warning]] = {
            None: UserWarning,
            "default": UserWarning,
            "deprecation": DeprecationWarning,
        }
        category = severity if isinstance(severity, type) else categories[severity]
        self.warned_messages.append(message)
        warnings.warn(message, category=category, stacklevel=3)


warn_once = _WarnOnce()
