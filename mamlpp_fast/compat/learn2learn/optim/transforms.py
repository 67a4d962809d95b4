"""learn2learn's ``optim.transforms``: modules that turn gradients into updates, made for one parameter each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "KroneckerTransform",
    "MetaCurvatureTransform",
    "ModuleTransform",
    "ReshapedTransform",
    "TransformDictionary",
]


class ReshapedTransform(nn.Module):
    """A transform that sees gradients in another shape, given back in their own."""

    def __init__(self, transform: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.transform = transform
        self.in_shape = shape

    def forward(self, grad: Tensor) -> Tensor:
        update: Tensor = self.transform(grad.view(self.in_shape))
        return update.view(grad.shape)


class ModuleTransform:
    """Makes transforms of a module class called with (elements, elements): gradients go in as [1, elements].

    Args:
        module_cls: ``nn.Linear``, say.
    """

    def __init__(self, module_cls: Callable[[int, int], nn.Module]) -> None:
        self.module_cls = module_cls

    def __call__(self, parameter: Tensor) -> ReshapedTransform:
        elements = parameter.numel()
        return ReshapedTransform(self.module_cls(elements, elements), (1, elements))


class KroneckerTransform:
    """Makes transforms that factorise over the two sides of a parameter (Arnold et al. 2019).

    Sides (n, m): a matrix's; (n, 1) of a vector; (input channels, height · width) of a 4-dimensional kernel.

    Args:
        kronecker_cls: called with ``n``, ``m``, ``bias`` and ``psd``; ``nn.KroneckerLinear``, say.
        bias: passed on.
        psd: passed on.
    """

    def __init__(self, kronecker_cls: Callable[..., nn.Module], bias: bool = False, psd: bool = True) -> None:
        self.kronecker_cls = kronecker_cls
        self.bias = bias
        self.psd = psd

    def __call__(self, param: Tensor) -> ReshapedTransform:
        n, m = _sides(param)
        made = self.kronecker_cls(n=n, m=m, bias=self.bias, psd=self.psd)
        return ReshapedTransform(made, (-1, n, m))


def _sides(param: Tensor) -> tuple[int, int]:
    match tuple(param.shape):
        case (n, m):
            return n, m
        case (n,):
            return n, 1
        case (_, n, height, width):
            return n, height * width
    raise NotImplementedError("Layer not supported. Please open an issue.")


class MetaCurvatureTransform(nn.Module):
    """Meta-Curvature (Park & Oliva 2019): learned matrices on every side of a gradient, the identity at first.

    Args:
        param: the parameter; a vector, a matrix or a 4-dimensional kernel.
        lr: fixed factor of the update.
    """

    def __init__(self, param: Tensor, lr: float = 1.0) -> None:
        super().__init__()
        self.lr = lr
        shape = param.shape
        self.dim = len(shape)
        if self.dim == 1:
            self.mc = nn.Parameter(torch.ones_like(param))
        elif self.dim in (2, 4):
            self.mc_in = nn.Parameter(torch.eye(shape[0]))
            self.mc_out = nn.Parameter(torch.eye(shape[1]))
            if self.dim == 4:
                self.n_in, self.n_out, self.n_f = shape[0], shape[1], shape[2] * shape[3]
                self.mc_f = nn.Parameter(torch.eye(self.n_f))
        else:
            raise NotImplementedError("Parameter with shape", shape, "is not supported by MetaCurvature.")

    def forward(self, grad: Tensor) -> Tensor:
        if self.dim == 1:
            return self.lr * (self.mc * grad)
        if self.dim == 2:
            return self.lr * (self.mc_in @ grad @ self.mc_out)
        sides = grad.flatten(2)
        update = torch.einsum("fg,ia,aog,op->ipf", self.mc_f, self.mc_in, sides, self.mc_out)
        return self.lr * update.reshape(grad.shape)


class TransformDictionary:
    """Makes the transform that a parameter, or a module it belongs to, is given; None for the others.

    Args:
        dictionary: by module or parameter, what makes the transform.

    Raises:
        ValueError: for a key that is neither.
    """

    def __init__(self, dictionary: Mapping[Any, Callable[..., nn.Module | None]]) -> None:
        self.param_to_transform: dict[Tensor, Callable[..., nn.Module | None]] = {}
        for key, transform in dictionary.items():
            if isinstance(key, nn.Module):
                self.param_to_transform |= dict.fromkeys(key.parameters(), transform)
            elif isinstance(key, nn.Parameter):
                self.param_to_transform[key] = transform
            else:
                raise ValueError("TransformDictionary only accepts Modules or Parameters as dictionary keys.")

    def __call__(self, param: Tensor, *args: Any, **kwargs: Any) -> nn.Module | None:
        transform = self.param_to_transform.get(param)
        return None if transform is None else transform(param, *args, **kwargs)
