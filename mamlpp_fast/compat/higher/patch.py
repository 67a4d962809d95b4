"""Stateless versions of modules: the same forward code over fast weights that are put in the parameters' places."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mamlpp_fast.compat.higher._modules import FunctionalModule, functional_tree
from mamlpp_fast.compat.higher.utils import get_func_params

__all__ = ["FunctionalModule", "buffer_sync", "make_functional", "monkeypatch"]

Encapsulator = Callable[[FunctionalModule, nn.Module], None]
_MonkeyPatchBase = FunctionalModule  # the name that isinstance checks written for higher use


def buffer_sync(module: nn.Module, fmodule: nn.Module, device: torch.device | str | None = None) -> None:
    """Copies the buffers of ``module`` and its submodules, detached, into ``fmodule``.

    Raises:
        KeyError: when ``fmodule`` lacks a submodule.
    """
    for key, value in module._buffers.items():
        copy = value.detach().clone() if isinstance(value, Tensor) else value
        fmodule._buffers[key] = copy if device is None or copy is None else copy.to(device)
    for name, child in module._modules.items():
        if name not in fmodule._modules:
            raise KeyError(f"fmodule: expected a submodule {name!r} as in {type(module).__name__}, got none")
        fchild = fmodule._modules[name]
        if child is not None and fchild is not None:
            buffer_sync(child, fchild, device)


def make_functional(
    module: nn.Module, encapsulator: Encapsulator | None = None, *, fused: bool = True
) -> FunctionalModule:
    """A stateless version of ``module``, without fast weights yet: call it with ``params=``.

    Args:
        module: any module; it is neither changed nor referred to by what acts on the result.
        encapsulator: called with the result and ``module`` before the result is returned.
        fused: compute batch norms by batch statistics in one operation, double backward included. It has no third
            derivative: call the model within :class:`mamlpp_fast.reference.norms_of_any_order` where the inner loss
            itself holds a second one.

    Raises:
        ValueError: when a module has been made functional before.
    """
    fmodule = functional_tree(module, fused)
    buffer_sync(module, fmodule)
    if encapsulator is not None:
        encapsulator(fmodule, module)
    return fmodule


def monkeypatch(
    module: nn.Module,
    device: torch.device | str | None = None,
    copy_initial_weights: bool = True,
    track_higher_grads: bool = True,
    *,
    fused: bool = True,
) -> FunctionalModule:
    """A stateless version of ``module`` that holds its own fast weights and buffers.

    Args:
        module: any module; its parameters and buffers stay as they are whatever is done to the result.
        device: where fast weights and buffers go; by default where the originals are.
        copy_initial_weights: True starts at detached copies of the parameters; False at the parameters themselves, so
            that meta-gradients reach them, as MAML needs.
        track_higher_grads: False keeps the latest fast weights alone, for adaptation at test time.
        fused: as in :func:`make_functional`.

    Returns:
        The module; ``fmodule(x)`` uses the latest fast weights, ``fmodule(x, params=[...])`` makes the given ones the
        latest first.

    Raises:
        ValueError: when ``module`` is functional already or ``track_higher_grads`` is no bool.
    """
    fmodule = functional_tree(module, fused)
    buffer_sync(module, fmodule, device)
    fmodule.track_higher_grads = track_higher_grads
    if copy_initial_weights:
        fmodule.update_params(get_func_params(module, device))
    else:
        clones = [p.clone() for p in module.parameters()]
        fmodule.update_params(clones if device is None else [p.to(device) for p in clones])
    return fmodule
