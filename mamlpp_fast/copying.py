"""Copies of models that compute on their own."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["copy_of", "detached_memo", "tied_function"]

_M = TypeVar("_M", bound=nn.Module)
_DEPTH = 4


def copy_of(model: _M) -> _M:
    """A deep copy of a model, of one too that holds results of computations (old ``weight_norm``), which is detached.

    Raises:
        ValueError: when something in the model cannot be copied, or a function in it (a hook, a ``forward`` set on a
            module) closes over a part of it: a copied model would go on calling the original's.
    """
    if (name := tied_function(model)) is not None:
        raise ValueError(f"model: expected functions that do not close over parts of it, {name} does")
    memo = detached_memo(model)
    try:
        copied = copy.deepcopy(model, memo)
        # PyTorch copies what is set on a tensor, but not on a parameter.
        both = map(nn.Module.parameters, (model, copied))  # one's own `parameters` may return others
        for p, own in zip(*both, strict=False):
            own.__dict__.update(copy.deepcopy(p.__dict__, memo))
        return copied
    except Exception as error:  # whatever a class of the user's raises
        reason = " ".join(str(error).split())
        raise ValueError(f"model: expected one that copy.deepcopy can copy, {reason}") from error


def detached_memo(model: nn.Module) -> dict[int, object]:
    """The memo for ``copy.deepcopy`` with which tensors that carry a graph become constants; else it refuses them."""
    memo: dict[int, object] = {}
    for module in model.modules():
        for value in module.__dict__.values():
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, Tensor) and not leaf.is_leaf:
                    memo[id(leaf)] = leaf.detach().clone()
    return memo


def tied_function(model: nn.Module) -> str | None:
    """Where a function lies in a model that closes over a module or tensor of it; None where there is none."""
    own: set[int] = {id(m) for m in model.modules()}
    own |= {id(t) for t in (*nn.Module.parameters(model), *model.buffers())}
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, (types.FunctionType, functools.partial)) and _reaches(leaf, own, _DEPTH):
                    return f"{path}.{attribute}".removeprefix(".")
    return None


def _reaches(value: Any, own: set[int], depth: int) -> bool:
    if id(value) in own:
        return True
    return depth > 0 and any(_reaches(part, own, depth - 1) for part in _held(value))


def _held(value: Any) -> Iterator[Any]:
    """What a function, method, partial or container holds."""
    if isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # an empty cell
                continue
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, (list, tuple, set)):
        yield from value
    elif isinstance(value, dict):
        yield from value.values()
