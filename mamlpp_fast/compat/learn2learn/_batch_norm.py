"""Batch norm of cloned modules on the fused operation: PyTorch's class, arguments and results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from mamlpp_fast import ops
from mamlpp_fast.engine.fused.derivatives import RECORDED_UNDER, plainly

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

    plain: ClassVar[bool] = False
    dims: ClassVar[int]

    def forward(self, input: Tensor) -> Tensor:
        return self.fused(input, None)

    def fused(self, x: Tensor, slope: float | None) -> Tensor:
        """The normalised x, with a leaky ReLU of this slope behind it if there is one."""
        if self._takes(x):
            try:
                return self._batch_statistics(x, slope)
            except NotImplementedError:  # under torch.func
                pass
        y = super().forward(x)
        return y if slope is None else nn.functional.leaky_relu(y, slope)

    def _takes(self, x: Tensor) -> bool:
        return (
            not _Fused.plain
            and (self.training or self.running_mean is None)
            and self.weight is not None
            and self.bias is not None
            and x.dim() == self.dims
            and x.shape[1] == self.num_features
            and x.is_floating_point()
            and x.numel() > x.shape[1]
        )

    def _batch_statistics(self, x: Tensor, slope: float | None) -> Tensor:
        if not (self.training and self.track_running_stats) or self.running_mean is None:
            return ops.per_step_batch_norm(x, self.weight, self.bias, eps=self.eps, negative_slope=slope)
        y, mean, var = ops.per_step_batch_norm_with_stats(
            x, self.weight, self.bias, eps=self.eps, negative_slope=slope
        )
        assert self.running_var is not None
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        count = x.numel() // x.shape[1]
        ops.update_running_stats(
            self.running_mean, self.running_var, mean, var, count=count, momentum=momentum or 0.0
        )
        return y


class FusedBatchNorm1d(_Fused, nn.BatchNorm1d):
    """``nn.BatchNorm1d``, fused for inputs [N, C]."""

    dims = 2

    def _get_name(self) -> str:
        return "BatchNorm1d"


class FusedBatchNorm2d(_Fused, nn.BatchNorm2d):
    """``nn.BatchNorm2d``, fused for inputs [N, C, H, W]."""

    dims = 4

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


def _slope(norm: nn.Module, relu: nn.Module | None) -> float | None:
    """The slope of ``relu`` if it can be fused with ``norm``."""
    if not isinstance(norm, _Fused) or relu is None or _hooked(norm) or _hooked(relu):
        return None
    return 0.0 if type(relu) is nn.ReLU else relu.negative_slope if type(relu) is nn.LeakyReLU else None


class FusedSequential(nn.Sequential):
    """``nn.Sequential`` that runs a batch norm and the (leaky) ReLU right behind it as one operation."""

    def _get_name(self) -> str:
        return "Sequential"

    def forward(self, input: Any) -> Any:
        children = list(self)
        skip = False
        for child, following in zip(children, [*children[1:], None], strict=True):
            if skip:
                skip = False
            elif _slope(child, following) is not None:
                assert following is not None
                input, skip = normalise_relu(child, following, input), True
            else:
                input = child(input)
        return input


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FusedBatchNorm1d,
    nn.BatchNorm2d: FusedBatchNorm2d,
    nn.Sequential: FusedSequential,
}


def fused_class(module: nn.Module) -> type[nn.Module]:
    """The class of a clone of ``module``: fused for PyTorch's own batch norms and sequences, else the same."""
    return _CLASSES.get(type(module), type(module))


def _hooked(module: nn.Module) -> bool:
    return bool(
        _has_any_global_hook()
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


@contextmanager
def plain_batch_norm() -> Iterator[None]:
    """Within it, cloned modules run PyTorch's own operations (for a third derivative, say)."""
    before, _Fused.plain = _Fused.plain, True
    try:
        with plainly():
            yield
    finally:
        _Fused.plain = before


RECORDED_UNDER.append(plain_batch_norm)
