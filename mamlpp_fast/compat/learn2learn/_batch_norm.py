"""Batch norm of cloned modules on the fused operation: PyTorch's class, arguments and results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mamlpp_fast._modes import plainly
from mamlpp_fast.compat._batch_norm import by_batch, hooked, in_turn, normalises_by_batch
from mamlpp_fast.reference import norms_of_any_order

__all__ = [
    "FusedBatchNorm1d",
    "FusedBatchNorm2d",
    "FusedSequential",
    "fused_class",
    "normalise_relu",
    "plain_batch_norm",
]


class _Fused(_BatchNorm):
    """A batch norm whose forward, backward and double backward with batch statistics are one operation each.

    What the operation does not take (running statistics, no weights, one value a channel, ``torch.func``) goes
    PyTorch's way.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self.fused(input, None)

    def fused(self, x: Tensor, slope: float | None) -> Tensor:
        """The normalised x, with a leaky ReLU of this slope behind it if there is one."""
        if normalises_by_batch(self, x):
            try:
                return by_batch(self, x, slope)
            except NotImplementedError:  # under torch.func
                pass
        y = super().forward(x)
        return y if slope is None else nn.functional.leaky_relu(y, slope)


class FusedBatchNorm1d(_Fused, nn.BatchNorm1d):
    """``nn.BatchNorm1d``, fused for inputs [N, C]."""

    def _get_name(self) -> str:
        return "BatchNorm1d"


class FusedBatchNorm2d(_Fused, nn.BatchNorm2d):
    """``nn.BatchNorm2d``, fused for inputs [N, C, H, W]."""

    def _get_name(self) -> str:
        return "BatchNorm2d"


def normalise_relu(norm: nn.Module, relu: nn.Module, x: Tensor) -> Tensor:
    """``relu(norm(x))``, in one operation where ``norm`` is fused, ``relu`` a (leaky) ReLU and neither has hooks."""
    slope = _slope(norm, relu)
    if slope is not None:
        assert isinstance(norm, _Fused)
        return norm.fused(x, slope)
    y: Tensor = relu(norm(x))
    return y


def _slope(norm: nn.Module, relu: nn.Module, x: Any = None) -> float | None:
    """The slope of ``relu`` if it can be fused with ``norm``."""
    if not isinstance(norm, _Fused) or hooked(norm, relu):
        return None
    return 0.0 if type(relu) is nn.ReLU else relu.negative_slope if type(relu) is nn.LeakyReLU else None


class FusedSequential(nn.Sequential):
    """``nn.Sequential`` that runs a batch norm and the (leaky) ReLU right behind it as one operation."""

    def _get_name(self) -> str:
        return "Sequential"

    def forward(self, input: Any) -> Any:
        return in_turn(list(self), input, _slope)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FusedBatchNorm1d,
    nn.BatchNorm2d: FusedBatchNorm2d,
    nn.Sequential: FusedSequential,
}


def fused_class(module: nn.Module) -> type[nn.Module]:
    """The class of a clone of ``module``: fused for PyTorch's own batch norms and sequences, else the same."""
    return _CLASSES.get(type(module), type(module))


@contextmanager
def plain_batch_norm() -> Iterator[None]:
    """Within it, the calling thread's cloned modules run PyTorch's own operations, for a third derivative, say.

    Its batch, instance and layer norms are written out, since their own third derivative is wrong.
    """
    with plainly(), norms_of_any_order():
        yield
