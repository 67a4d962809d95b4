"""MAML++ as a textbook writes it, in plain PyTorch: the witness for the random models. Imports nothing of the package.

Settings are the keywords of ``MAMLConfig``, read here anew: a defect in the package's own reference would not be
repeated. Tasks one after another, steps one after another, the support pass of a step before its target pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Batch = tuple[Any, Tensor, Any, Tensor]
"""Support x [tasks, n, ...] and y [tasks, n, ...], target x [tasks, m, ...] and y [tasks, m, ...].

Of several inputs x is a list: of each task the tuple or the dict of the model's arguments.
"""

LOSSES = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}
SETTINGS: dict[str, Any] = {
    "steps": 2, "inner_lr": 0.1, "lslr": True, "rates": "tensor", "second_order": True, "msl": True, "bnwb": True,
    "bnrs": True, "adapt": "all", "adapt_norm": False, "loss": "cross_entropy", "meta_lr": 1e-3,
}  # fmt: skip
"""MAML++ in few steps; what a test of its own wants otherwise, it changes."""
CONVERTED = (nn.BatchNorm1d, nn.BatchNorm2d)
"""Norms that get a row for each inner step."""


class _WeightNorm(TorchFunctionMode):
    """Weight norm by its formula: the second derivative of PyTorch's operation is wrong."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            v, g, dim = args
            axes = [axis for axis in range(v.ndim) if axis != dim]
            return g * v / v.square().sum(axes, keepdim=True).sqrt()
        return func(*args, **(kwargs or {}))


class StepNorm(nn.Module):
    """A batch norm with rows: weights [K, C] with ``bnwb``, running statistics [K, C] with ``bnrs``, else [C]."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, old: nn.BatchNorm1d | nn.BatchNorm2d, steps: int, bnwb: bool, bnrs: bool) -> None:
        super().__init__()
        self.eps, self.momentum = old.eps, old.momentum
        self.rows, self.bnwb, self.bnrs = steps, bnwb, bnrs
        self.step, self.batch_statistics = 0, True
        for name in ("weight", "bias"):
            value = getattr(old, name)
            if value is None:
                self.register_parameter(name, None)
                continue
            rows = value.detach().expand(steps, -1) if bnwb else value.detach()
            setattr(self, name, nn.Parameter(rows.clone(), requires_grad=value.requires_grad))
        for name in ("running_mean", "running_var"):
            value = getattr(old, name)
            self.register_buffer(name, (value.expand(steps, -1) if bnrs else value).clone())
        self.training = old.training
        # A hook on the old norm is part of the model.
        self._forward_hooks, self._forward_pre_hooks = old._forward_hooks, old._forward_pre_hooks

    def forward(self, x: Tensor) -> Tensor:
        row = min(self.step, self.rows - 1)
        weight, bias = self.weight, self.bias
        if self.bnwb:
            weight, bias = (None if p is None else p[row] for p in (weight, bias))
        mean, var = self.running_mean, self.running_var
        if self.bnrs:
            mean, var = mean[row], var[row]
        if self.training:
            return F.batch_norm(x, mean, var, weight, bias, True, cast(float, self.momentum), self.eps)
        if self.batch_statistics:
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)


_NORMS = (
    StepNorm,
    nn.modules.batchnorm._NormBase,  # batch and instance norms
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def _convert(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Gives every batch norm its rows; one that is held in several places stays one, tied weights stay tied."""
    new: dict[nn.Module, StepNorm] = {}
    for old in list(model.modules()):
        if isinstance(old, CONVERTED):
            new[old] = StepNorm(old, settings["steps"], settings["bnwb"], settings["bnrs"])
    first: dict[int, nn.Parameter] = {}
    for old, norm in new.items():
        for name in ("weight", "bias"):
            setattr(norm, name, first.setdefault(id(getattr(old, name)), getattr(norm, name)))
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]


def _adapting(model: nn.Module, settings: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """What the inner loop moves: trainable, not of a norm unless ``adapt_norm``, and of the prefixes asked for."""
    of_norms = {id(p) for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)}
    prefixes = settings["adapt"]
    every = model.named_parameters(
        remove_duplicate=False
    )  # a tied parameter is asked for by any of its names
    asked = {id(p) for name, p in every if prefixes == "all" or name.startswith(prefixes)}
    return {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) in asked and (settings["adapt_norm"] or id(p) not in of_norms)
    }


@contextlib.contextmanager
def _swapped(model: nn.Module, new: Mapping[int, Tensor]) -> Iterator[None]:
    """Within it, each parameter whose id is in ``new`` is that tensor wherever the model holds it."""
    held: list[tuple[dict[str, Any], str, Any]] = []
    for module in model.modules():
        table: dict[str, Any] = module._parameters
        held += [(table, name, p) for name, p in table.items() if id(p) in new]
    for table, name, p in held:
        table[name] = new[id(p)]
    try:
        yield
    finally:
        for table, name, p in held:
            table[name] = p


class Textbook:
    """One model in float64 with its inner rates and Adam.

    Attributes:
        model: with its batch norms converted.
        rates: by name of the parameter that adapts, [K] or [K, *shape].
    """

    def __init__(self, model: nn.Module, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        _convert(model, settings)
        self.model = model.double()
        self.loss = LOSSES[settings["loss"]]
        self.steps: int = settings["steps"]
        lead = (self.steps,)
        element = settings["rates"] == "element"
        self.rates = {
            name: torch.full(
                lead + (p.shape if element else ()),
                settings["inner_lr"],
                dtype=torch.float64,
                requires_grad=settings["lslr"] or element,
            )
            for name, p in _adapting(model, settings).items()
        }
        trainable = [p for p in (*self.model.parameters(), *self.rates.values()) if p.requires_grad]
        self.adam = torch.optim.Adam(trainable, lr=settings["meta_lr"])

    def _call(self, fast: Mapping[str, Tensor], step: int, x: Any, *, batch: bool = True) -> Tensor:
        for m in self.model.modules():
            if isinstance(m, StepNorm):
                m.step, m.batch_statistics = step, batch
        own = dict(self.model.named_parameters())
        with _swapped(self.model, {id(own[name]): t for name, t in fast.items()}), _WeightNorm():
            args, kwargs = (x if isinstance(x, tuple) else (x,), {}) if not isinstance(x, dict) else ((), x)
            return cast(Tensor, self.model(*args, **kwargs))

    def _update(
        self, fast: dict[str, Tensor], step: int, x: Any, y: Tensor, second_order: bool
    ) -> dict[str, Tensor]:
        loss = self.loss(self._call(fast, step, x), y)
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=second_order, allow_unused=True)
        row = min(step, self.steps - 1)
        return {
            name: p if g is None else p - self.rates[name][row] * g
            for (name, p), g in zip(fast.items(), grads, strict=True)
        }

    def gradient(self, batch: Batch) -> Tensor:
        """Sets every ``.grad``, zero where nothing depends on the parameter; returns the task losses [tasks]."""
        self.model.train()
        tasks, losses = len(batch[0]), []
        self.adam.zero_grad()
        own = dict(self.model.named_parameters())
        for sx, sy, tx, ty in zip(*batch, strict=True):
            fast: dict[str, Tensor] = {name: own[name] for name in self.rates}
            total = torch.zeros((), dtype=torch.float64)
            for k in range(self.steps):
                fast = self._update(fast, k, sx, sy, self.settings["second_order"])
                if self.settings["msl"]:  # of the first epoch: all steps alike
                    total = total + self.loss(self._call(fast, k, tx), ty) / self.steps
                elif k == self.steps - 1:
                    total = self.loss(self._call(fast, k, tx), ty)
            (total / tasks).backward()
            losses.append(total.detach())
        for group in self.adam.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return torch.stack(losses)

    def evaluate(self, batch: Batch, statistics: str, steps: int) -> Tensor:
        """Target predictions after every one of ``steps`` first-order updates, [steps, tasks, m, ...]."""
        self.model.eval()
        own = dict(self.model.named_parameters())
        tasks = []
        for sx, sy, tx, _ in zip(*batch, strict=True):
            fast = {name: own[name].detach().requires_grad_() for name in self.rates}
            after = []
            for k in range(steps):
                fast = {
                    name: p.detach().requires_grad_()
                    for name, p in self._update(fast, k, sx, sy, False).items()
                }
                with torch.no_grad():
                    after.append(self._call(fast, k, tx, batch=statistics == "batch"))
            tasks.append(torch.stack(after))
        return torch.stack(tasks, dim=1)
