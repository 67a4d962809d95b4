"""The update formulas of ``torch.optim``, differentiable in parameters, gradients, state and settings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mamlpp_fast.compat.higher._base import ElementwiseOptimizer
from mamlpp_fast.ops.stepped import stepped

Scalar = float | Tensor


def _add(x: Tensor, factor: Scalar, y: Tensor) -> Tensor:
    """x + factor·y."""
    return x + factor * y if isinstance(factor, Tensor) else torch.add(x, y, alpha=factor)


def _addcmul(x: Tensor, factor: Scalar, y: Tensor, z: Tensor) -> Tensor:
    """x + factor·y·z."""
    return x + factor * y * z if isinstance(factor, Tensor) else torch.addcmul(x, y, z, value=factor)


def _addcdiv(x: Tensor, factor: Scalar, y: Tensor, z: Tensor) -> Tensor:
    """x + factor·y/z."""
    return x + factor * (y / z) if isinstance(factor, Tensor) else torch.addcdiv(x, y, z, value=factor)


def _mean(old: Tensor, decay: Scalar, new: Tensor) -> Tensor:
    """decay·old + (1 - decay)·new."""
    return _add(old * decay, 1 - decay, new)


def _root(x: Tensor) -> Tensor:
    """√x, whose derivative at 0 is taken as 0: nothing that x is made of moves it there."""
    return x.clamp_min(torch.finfo(x.dtype).tiny).sqrt()


def _set(setting: Scalar) -> bool:
    """Whether a term with this factor takes part."""
    return bool((setting != 0).any()) if isinstance(setting, Tensor) else setting != 0


def _decayed(group: dict[str, Any], p: Tensor, g: Tensor) -> Tensor:
    """The gradient with that of the L2 penalty."""
    decay = group["weight_decay"]
    return _add(g, decay, p) if _set(decay) else g


def _count(state: dict[str, Any]) -> int:
    state["step"] = int(state.get("step", 0)) + 1
    return int(state["step"])


def _zeros(state: dict[str, Any], p: Tensor, *names: str) -> None:
    for name in names:
        if state.get(name) is None:
            state[name] = torch.zeros_like(p, requires_grad=False)


class DifferentiableSGD(ElementwiseOptimizer):
    """``torch.optim.SGD``."""

    buffers = ("momentum_buffer",)

    def at_once(
        self, group: dict[str, Any], params: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> list[Tensor] | None:
        rate, *settings = group["lr"], group["momentum"], group["weight_decay"]
        if not isinstance(rate, int | float) or any(isinstance(s, Tensor) or _set(s) for s in settings):
            return None  # of NumPy's numbers float64 alone is a float
        return stepped(params, grads, rate)

    def formula(self, group: dict[str, Any], p: Tensor, g: Tensor, state: dict[str, Any]) -> Tensor:
        g = _decayed(group, p, g)
        momentum = group["momentum"]
        if _set(momentum):
            before = state.get("momentum_buffer")
            buffer = g if before is None else _add(before * momentum, 1 - group["dampening"], g)
            state["momentum_buffer"] = buffer
            g = _add(g, momentum, buffer) if group["nesterov"] else buffer
        return _add(p, -group["lr"], g)


class DifferentiableAdam(ElementwiseOptimizer):
    """Adam as its paper's last paragraph of section 2 orders it: ε is added before the bias correction, as in higher.

    ``torch.optim.Adam`` adds it after: its ε is ours divided by √(1 - β₂ᵗ).
    """

    buffers = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    decoupled = False

    def formula(self, group: dict[str, Any], p: Tensor, g: Tensor, state: dict[str, Any]) -> Tensor:
        step = _count(state)
        _zeros(state, p, "exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * bool(group["amsgrad"]))
        beta1, beta2 = group["betas"]
        if not (self.decoupled or group.get("decoupled_weight_decay")):
            g = _decayed(group, p, g)
        elif _set(group["weight_decay"]):
            p = p * (1 - group["lr"] * group["weight_decay"])
        state["exp_avg"] = _mean(state["exp_avg"], beta1, g)
        second = state["exp_avg_sq"] = _addcmul(state["exp_avg_sq"] * beta2, 1 - beta2, g, g)
        if group["amsgrad"]:
            second = state["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], second)
        correction = 1 - beta2**step
        root = correction.sqrt() if isinstance(correction, Tensor) else math.sqrt(correction)
        size = group["lr"] * root / (1 - beta1**step)
        return _addcdiv(p, -size, state["exp_avg"], _root(second) + group["eps"])


class DifferentiableAdamW(DifferentiableAdam):
    """:class:`DifferentiableAdam` with decoupled weight decay."""

    decoupled = True


class DifferentiableAdadelta(ElementwiseOptimizer):
    """``torch.optim.Adadelta``."""

    buffers = ("square_avg", "acc_delta")

    def formula(self, group: dict[str, Any], p: Tensor, g: Tensor, state: dict[str, Any]) -> Tensor:
        _count(state)
        _zeros(state, p, *self.buffers)
        rho, eps = group["rho"], group["eps"]
        g = _decayed(group, p, g)
        state["square_avg"] = _addcmul(state["square_avg"] * rho, 1 - rho, g, g)
        delta = (state["acc_delta"] + eps).sqrt() / (state["square_avg"] + eps).sqrt() * g
        state["acc_delta"] = _addcmul(state["acc_delta"] * rho, 1 - rho, delta, delta)
        return _add(p, -group["lr"], delta)


class DifferentiableAdagrad(ElementwiseOptimizer):
    """``torch.optim.Adagrad``."""

    buffers = ("sum",)

    def formula(self, group: dict[str, Any], p: Tensor, g: Tensor, state: dict[str, Any]) -> Tensor:
        step = _count(state)
        _zeros(state, p, "sum")
        g = _decayed(group, p, g)
        state["sum"] = torch.addcmul(state["sum"], g, g)
        rate = group["lr"] / (1 + (step - 1) * group["lr_decay"])
        return _addcdiv(p, -rate, g, _root(state["sum"]) + group["eps"])


class DifferentiableAdamax(ElementwiseOptimizer):
    """``torch.optim.Adamax``."""

    buffers = ("exp_avg", "exp_inf")

    def formula(self, group: dict[str, Any], p: Tensor, g: Tensor, state: dict[str, Any]) -> Tensor:
        step = _count(state)
        _zeros(state, p, *self.buffers)
        beta1, beta2 = group["betas"]
        g = _decayed(group, p, g)
        state["exp_avg"] = _mean(state["exp_avg"], beta1, g)
        state["exp_inf"] = torch.maximum(state["exp_inf"] * beta2, g.abs() + group["eps"])
        return _addcdiv(p, -(group["lr"] / (1 - beta1**step)), state["exp_avg"], state["exp_inf"])


class DifferentiableASGD(ElementwiseOptimizer):
    """``torch.optim.ASGD``; ``ax`` of the state is the averaged parameter."""

    buffers = ("ax",)

    def formula(self, group: dict[str, Any], p: Tensor, g: Tensor, state: dict[str, Any]) -> Tensor:
        step = _count(state)
        _zeros(state, p, "ax")
        eta, mu = state.get("eta", group["lr"]), state.get("mu", 1)
        g = _decayed(group, p, g)
        p = _add(p * (1 - group["lambd"] * eta), -eta, g)
        state["ax"] = p if mu == 1 else _add(state["ax"], mu, p - state["ax"])
        state["eta"] = group["lr"] / (1 + group["lambd"] * group["lr"] * step) ** group["alpha"]
        state["mu"] = 1 / max(1, step - group["t0"])
        return p


class DifferentiableRMSprop(ElementwiseOptimizer):
    """``torch.optim.RMSprop``."""

    buffers = ("square_avg", "momentum_buffer", "grad_avg")

    def formula(self, group: dict[str, Any], p: Tensor, g: Tensor, state: dict[str, Any]) -> Tensor:
        _count(state)
        _zeros(state, p, "square_avg")
        alpha, momentum = group["alpha"], group["momentum"]
        g = _decayed(group, p, g)
        square = state["square_avg"] = _addcmul(state["square_avg"] * alpha, 1 - alpha, g, g)
        if group["centered"]:
            _zeros(state, p, "grad_avg")
            mean = state["grad_avg"] = _mean(state["grad_avg"], alpha, g)
            square = torch.addcmul(square, mean, mean, value=-1)
        root = _root(square) + group["eps"]
        if not _set(momentum):
            return _addcdiv(p, -group["lr"], g, root)
        _zeros(state, p, "momentum_buffer")
        state["momentum_buffer"] = torch.addcdiv(state["momentum_buffer"] * momentum, g, root)
        return _add(p, -group["lr"], state["momentum_buffer"])


class DifferentiableRprop(ElementwiseOptimizer):
    """``torch.optim.Rprop``: its steps depend on signs alone, so the gradient of a step is that of p."""

    buffers = ("prev", "step_size")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        warnings.warn(
            "Rprop uses only signs of gradients: no second derivative passes through its steps", stacklevel=2
        )

    def formula(self, group: dict[str, Any], p: Tensor, g: Tensor, state: dict[str, Any]) -> Tensor:
        _count(state)
        _zeros(state, p, "prev")
        if "step_size" not in state:
            state["step_size"] = torch.ones_like(p, requires_grad=False) * group["lr"]
        (shrink, grow), (least, most) = group["etas"], group["step_sizes"]
        agreement = torch.sign(g.detach() * state["prev"])
        factor = (
            torch.ones_like(agreement).masked_fill(agreement > 0, grow).masked_fill(agreement < 0, shrink)
        )
        size = state["step_size"] = (state["step_size"] * factor).clamp(least, most)
        g = g.detach().masked_fill(agreement < 0, 0.0)
        state["prev"] = g
        return torch.addcmul(p, g.sign(), size, value=-1)
