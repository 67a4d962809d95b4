"""Weight norm with a right second derivative."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

__all__ = ["WeightNormByFormula", "right_weight_norm", "weight_norm"]


class WeightNormByFormula(TorchFunctionMode):
    """Weight norm written out: the second derivative of PyTorch's operation is wrong (2.11 to 2.14).

    ``findings/weight_norm_second_derivative.sh``.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            return weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``torch._weight_norm``, written out."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _normalises_weights(model: nn.Module) -> bool:
    queue, seen = [model], {model}
    for module in queue:  # grows meanwhile; `Module.modules` takes three times as long, at every call
        if isinstance(module, parametrizations._WeightNorm):
            return True
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                return True
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                queue.append(child)
    return False


def right_weight_norm(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Within it weight norm in ``model``, where there is any, is made of operations with a right second derivative."""
    wanted = torch.is_grad_enabled() and not torch.compiler.is_compiling() and _normalises_weights(model)
    return WeightNormByFormula() if wanted else contextlib.nullcontext()
