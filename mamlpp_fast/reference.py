"""MAML++ in plain PyTorch: the specification that every faster path is held against.

"How to train your MAML", Antoniou, Edwards, Storkey, ICLR 2019 (arXiv:1810.09502). One task at a time, nested
autograd, any ``nn.Module``. Section and equation numbers below are the paper's. Nothing of the package is imported
here, so that this file is an independent witness.

Read in order: the schedules (multi-step loss, derivative order, meta learning rate), the per-step batch norm, calling a
model with other tensors, which parameters adapt, the inner loop, the meta-gradient, evaluation.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import handle_torch_function, has_torch_function_unary

__all__ = [
    "LossFn",
    "MetaResult",
    "PerStepBatchNorm2d",
    "adapted_names",
    "check_recomputation",
    "cosine_annealing",
    "evaluate_task",
    "functional_call",
    "inner_loop",
    "is_second_order",
    "math_attention",
    "meta_gradient",
    "msl_weights",
    "per_step_norm",
    "set_eval_stats",
    "set_step",
    "swapped",
]

LossFn = Callable[[Tensor, Tensor], Tensor]
EvalStats = Literal["batch", "running"]


class Task(Protocol):
    """What the functions below read of an episode."""

    @property
    def support_x(self) -> Tensor: ...
    @property
    def support_y(self) -> Tensor: ...
    @property
    def target_x(self) -> Tensor: ...
    @property
    def target_y(self) -> Tensor: ...


# Schedules -----------------------------------------------------------------------------------------------------------


def msl_weights(epoch: int, steps: int, msl_epochs: int) -> list[float] | None:
    """Weights of the target losses after each inner update (multi-step loss, section 4, MSL).

    Equal at epoch 0, then moved linearly to the last step. None from epoch ``msl_epochs`` on: the target loss of the
    last step alone counts, with weight exactly 1.
    """
    if epoch >= msl_epochs:
        return None
    floor = 0.03 / steps
    early = max(1 / steps - epoch / (steps * msl_epochs), floor)
    last = min(1 / steps + epoch * (steps - 1) / (steps * msl_epochs), 1 - (steps - 1) * floor)
    return [early] * (steps - 1) + [last]


def is_second_order(epoch: int, second_order: bool, da_epoch: int) -> bool:
    """Derivative-order annealing (section 4, DA): second order only in epochs after ``da_epoch``."""
    return second_order and epoch > da_epoch


def cosine_annealing(epoch: int, epochs: int, lr: float, min_lr: float) -> float:
    """Meta learning rate of an epoch (section 4, CA), constant within it: lr at epoch 0, min_lr at ``epochs``."""
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * epoch / epochs)) / 2


# Per-step batch norm -------------------------------------------------------------------------------------------------


class PerStepBatchNorm2d(nn.Module):
    """Batch norm with weights, biases (BNWB) and running statistics (BNRS) of their own for every inner step.

    Despite its name it stands for PyTorch's batch norm of one and three dimensions as well.

    Row ``step`` is used by the support pass of inner step ``step`` and by the target pass that follows its update;
    steps beyond the last row use the last row. In training mode the statistics of the batch normalise, and the running
    statistics are updated as PyTorch does. In evaluation mode ``eval_stats`` decides: ``"batch"`` (the published
    numbers; no update) or ``"running"`` (the answer for an image does not depend on the others).

    Args:
        num_features: channels C of the input [N, C] or [N, C, ...]: [N, C, H, W], [N, C, L], [N, C, D, H, W].
        num_steps: rows K.
        eps: added to the variance.
        momentum: share of the new statistics in the running ones; None makes them means over all passes so far, which
            a buffer ``num_batches_tracked``, [K] or [], counts.
        affine: False leaves out weight and bias (both are None).
        bias: False leaves out the bias.
        per_step_affine: weight and bias [K, C]; otherwise [C], shared by all steps.
        per_step_stats: running statistics [K, C]; otherwise [C].
        negative_slope: when given, a leaky ReLU of that slope follows (0.0: a ReLU).
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        num_steps: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        bias: bool = True,
        per_step_affine: bool = True,
        per_step_stats: bool = True,
        negative_slope: float | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1 or num_steps < 1:
            raise ValueError(
                f"num_features and num_steps: expected at least 1, got {num_features} and {num_steps}"
            )
        self.num_features = num_features
        self.num_steps = num_steps
        self.eps = eps
        self.momentum = momentum
        self.per_step_affine = affine and per_step_affine
        self.per_step_stats = per_step_stats
        self.negative_slope = negative_slope
        self.step = 0
        self.eval_stats: EvalStats = "batch"
        affine_shape = (num_steps, num_features) if per_step_affine else (num_features,)
        stats_shape = (num_steps, num_features) if per_step_stats else (num_features,)
        if affine:
            self.weight = nn.Parameter(torch.ones(affine_shape))
        else:
            self.register_parameter("weight", None)
        if affine and bias:
            self.bias = nn.Parameter(torch.zeros(affine_shape))
        else:
            self.register_parameter("bias", None)
        self.register_buffer("running_mean", torch.zeros(stats_shape))
        self.register_buffer("running_var", torch.ones(stats_shape))
        if momentum is None:
            self.register_buffer("num_batches_tracked", torch.zeros(stats_shape[:-1], dtype=torch.long))

    @property
    def row(self) -> int:
        """The row of this step: steps beyond the last trained one use the last."""
        return min(self.step, self.num_steps - 1)

    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias [C] of the current step, None where there is none."""
        weight, bias = (
            p[self.row] if self.per_step_affine and p is not None else p for p in (self.weight, self.bias)
        )
        return weight, bias

    def running_stats(self) -> tuple[Tensor, Tensor]:
        """Running mean and variance [C] of the current step (views)."""
        if self.per_step_stats:
            return self.running_mean[self.row], self.running_var[self.row]
        return self.running_mean, self.running_var

    def forward(self, x: Tensor) -> Tensor:
        if has_torch_function_unary(x):
            # To a tensor subclass or a torch-function mode the whole norm is one operation.
            y: Tensor = handle_torch_function(per_step_norm, (x,), self, x)
            return y
        return self.normalise(x)

    def normalise(self, x: Tensor) -> Tensor:
        """What :meth:`forward` computes: the mathematics, for subclasses to compute otherwise."""
        weight, bias = self.affine()
        mean, var = self.running_stats()
        if not self.training and self.eval_stats == "running":
            y = F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
        elif not self.training:
            y = F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        elif self.momentum is not None:
            y = F.batch_norm(x, mean, var, weight, bias, True, self.momentum, self.eps)
        else:
            new = torch.zeros_like(mean), torch.zeros_like(var)
            y = F.batch_norm(
                x, *new, weight, bias, True, 1.0, self.eps
            )  # momentum 1: new is the batch's alone
            self.accumulate(*new)
        return y if self.negative_slope is None else F.leaky_relu(y, self.negative_slope)

    def accumulate(self, mean: Tensor, var: Tensor) -> None:
        """Takes mean and unbiased variance [C] of one more pass into the running ones of ``momentum=None``."""
        count = self.num_batches_tracked[self.row] if self.per_step_stats else self.num_batches_tracked
        count.add_(1)
        for running, new in zip(self.running_stats(), (mean, var), strict=True):
            running.add_((new - running) / count)

    def extra_repr(self) -> str:
        text = f"{self.num_features}, num_steps={self.num_steps}, eps={self.eps}, momentum={self.momentum}"
        for part in ("weight", "bias"):
            text += f", no {part}" if getattr(self, part) is None else ""
        for flag in ("per_step_affine", "per_step_stats"):
            text += "" if getattr(self, flag) else f", {flag}=False"
        return text if self.negative_slope is None else text + f", negative_slope={self.negative_slope}"


def per_step_norm(module: PerStepBatchNorm2d, x: Tensor) -> Tensor:
    """``module(x)`` as a function: what torch-function modes and tensor subclasses see of a per-step batch norm."""
    return module.normalise(x)


def set_step(model: nn.Module, step: int) -> None:
    """Tells every per-step batch norm of ``model`` which inner step (from 0) the next passes belong to."""
    for module in model.modules():
        if isinstance(module, PerStepBatchNorm2d):
            module.step = step


def set_eval_stats(model: nn.Module, stats: EvalStats) -> None:
    """Chooses the statistics that norms normalise with in evaluation mode.

    Per-step batch norms obey, and so do those norms with running statistics that
    :func:`mamlpp_fast.convert_batch_norm` left in place. Of a model that was not converted, PyTorch's own norms are
    left alone: in evaluation mode they use their running statistics.
    """
    for module in model.modules():
        if isinstance(module, (PerStepBatchNorm2d, _NormBase)) and "eval_stats" in vars(module):
            vars(module)["eval_stats"] = stats


# Calling a model with other tensors ----------------------------------------------------------------------------------


def functional_call(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    args: tuple[Any, ...] | Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Calls ``model`` with ``tensors`` in place of its parameters and buffers of those names, and leaves it as it was.

    Like ``torch.func.functional_call``, but right for a submodule that is held under two names: torch 2.11 to 2.14 swap
    it twice and leave the given tensors in the model (pytorch issue 164759). A tensor is replaced wherever the model
    holds it, so one name of a tied weight is enough.

    Args:
        model: any module; not to be called by another thread meanwhile.
        tensors: by the names of ``model.named_parameters()`` or ``named_buffers()``, every alias of a name included.
        args: positional arguments, or the only one.
        kwargs: keyword arguments.

    Raises:
        KeyError: for a name that ``model`` lacks.
        ValueError: for two different values of one tied tensor.
    """
    with swapped(model, tensors):
        return model(*(args if isinstance(args, tuple) else (args,)), **(kwargs or {}))


@contextlib.contextmanager
def swapped(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it ``model`` holds ``tensors`` in place of its own; see :func:`functional_call`."""
    new: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        held = _held(model, name)
        if new.setdefault(id(held), tensor) is not tensor:
            raise ValueError(f"tensors: expected one value for a tied tensor, got another for {name!r}")
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in model.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for leaf, old in table.items():
                    if id(old) in new:
                        replaced.append((table, leaf, old))
                        table[leaf] = new[id(old)]
        yield
    finally:
        for table, leaf, old in replaced:
            table[leaf] = old


def _held(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of this name."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    tables = () if module is None else (module._parameters, module._buffers)
    held = next((table[leaf] for table in tables if leaf in table), None)
    if held is None:
        raise KeyError(f"tensors: expected names of parameters or buffers of the model, got {name!r}")
    return held


# What adapts ---------------------------------------------------------------------------------------------------------

# _NormBase: PyTorch's batch and instance norms.
NORMS = (PerStepBatchNorm2d, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def adapted_names(
    model: nn.Module, adapt: str | Sequence[str] = "all", adapt_norm: bool = False
) -> tuple[str, ...]:
    """Names of the parameters that the inner loop adapts, in registration order.

    Args:
        model: any module.
        adapt: ``"all"``, ``"head"`` (ANIL: the last module that holds parameters of its own, in the order they are
            registered in; a learner goes by what its first batch passes through), or names of modules and parameters,
            one string or several. What is no name is a prefix of names.
        adapt_norm: whether weights and biases of normalisation layers adapt too (per-step ones never can).

    Raises:
        ValueError: when nothing is left to adapt, or ``adapt_norm`` meets per-step weights.
    """
    chosen: dict[int, str] = {}
    named = {n: id(p) for n, p in nn.Module.named_parameters(model, remove_duplicate=False)}
    known = {n for n, _ in model.named_modules(remove_duplicate=False)} | named.keys()
    wanted = (adapt,) if isinstance(adapt, str) else tuple(adapt)
    # "layer1" is the module of that name, not "layer10" too.
    prefixes = tuple(f"{name}." if name in known else name for name in wanted)
    asked = {p for n, p in named.items() if adapt == "all" or n in wanted or n.startswith(prefixes)}
    # A tied parameter has several names: it adapts by any of them, under the first.
    first = {id(p): name for name, p in nn.Module.named_parameters(model)}
    owners = [n for n, m in model.named_modules() if any(p is not None for p in m._parameters.values())]
    for owner in owners:
        module = model.get_submodule(owner)
        if isinstance(module, NORMS):
            if not adapt_norm:
                continue
            if isinstance(module, PerStepBatchNorm2d) and module.per_step_affine:
                raise ValueError(
                    f"adapt_norm: expected one weight shared by all steps, {owner} has one per step"
                )
        for p in module._parameters.values():
            if p is None or not p.requires_grad:
                continue
            if owner == owners[-1] if adapt == "head" else id(p) in asked:
                chosen.setdefault(id(p), first[id(p)])
    if not chosen:
        raise ValueError(f"adapt: expected a choice that leaves parameters to adapt, got {adapt!r}")
    return tuple(chosen.values())


# The inner loop ------------------------------------------------------------------------------------------------------


_SDP = torch.backends.cuda  # its switches hold on a CPU too
_ATTENTION: tuple[tuple[Callable[[], bool], Callable[[bool], None]], ...] = (
    (_SDP.math_sdp_enabled, _SDP.enable_math_sdp),
    (_SDP.flash_sdp_enabled, _SDP.enable_flash_sdp),
    (_SDP.mem_efficient_sdp_enabled, _SDP.enable_mem_efficient_sdp),
    (_SDP.cudnn_sdp_enabled, _SDP.enable_cudnn_sdp),
)
_TURN = threading.Lock()
_BEFORE: list[list[bool]] = []  # once for every thread within


@contextlib.contextmanager
def math_attention(wanted: bool = True) -> Iterator[None]:
    """Within it ``F.scaled_dot_product_attention`` is made of plain operations, as a second derivative needs.

    Its fused kernels have none. As ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``, at a fifth of its cost; but the
    switches are the process's, so the last of the threads within puts them back.
    """
    if not wanted:
        yield
        return
    with _TURN:
        _BEFORE.append(_BEFORE[0] if _BEFORE else [enabled() for enabled, _ in _ATTENTION])
        for (_, enable), on in zip(_ATTENTION, (True, False, False, False), strict=True):
            enable(on)
    try:
        yield
    finally:
        with _TURN:
            before = _BEFORE.pop()
            for (_, enable), on in zip(_ATTENTION, before, strict=True):
                if not _BEFORE:
                    enable(on)


def check_recomputation(loss: Tensor) -> None:
    """Raises where the graph of ``loss`` holds what ``torch.utils.checkpoint`` will compute again.

    It does so in the backward pass, when the model holds its own parameters again and not the fast weights: torch would
    give other gradients without a word.

    Raises:
        ValueError: for a checkpoint anywhere in the graph.
    """
    seen, ahead = set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for name in _saved(type(node)):
            saved = getattr(node, name)
            for one in saved if isinstance(saved, tuple) else (saved,):
                if type(getattr(one, "data", None)).__module__ == "torch.utils.checkpoint":
                    raise ValueError(
                        "model: expected a forward without torch.utils.checkpoint, which computes again with other "
                        f"weights than the adapted ones, {node.name()} is in one"
                    )
        ahead += [following for following, _ in node.next_functions]


@functools.cache
def _saved(kind: type) -> tuple[str, ...]:
    """Names of what a kind of node keeps for its backward pass, as kept."""
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


def inner_loop(
    model: nn.Module,
    params: Mapping[str, Tensor],
    rates: Mapping[str, Tensor],
    support_x: Tensor,
    support_y: Tensor,
    *,
    steps: int,
    loss_fn: LossFn,
    second_order: bool,
) -> Iterator[dict[str, Tensor]]:
    """Yields the fast weights after each of ``steps`` gradient steps on the support set (eq. 1, LSLR).

    Args:
        model: called with ``params`` in place of its own parameters of those names.
        params: the parameters to adapt, by name.
        rates: inner learning rates by the same names: [K] (a rate per tensor and step: LSLR) or [K, *shape]
            (a rate per element: Meta-SGD). Steps beyond the last rate use the last.
        support_x: inputs [n, ...].
        support_y: labels or targets [n, ...].
        steps: number of updates.
        loss_fn: (prediction, target) to a scalar.
        second_order: whether the updates can be differentiated.
    """
    fast = dict(params)
    for k in range(steps):
        set_step(model, k)
        with math_attention(second_order):
            loss = loss_fn(functional_call(model, fast, (support_x,)), support_y)
            if k == 0:
                check_recomputation(loss)
            grads = torch.autograd.grad(
                loss, list(fast.values()), create_graph=second_order, allow_unused=True
            )
        fast = {
            name: p if g is None else p - rates[name][min(k, len(rates[name]) - 1)] * g
            for (name, p), g in zip(fast.items(), grads, strict=True)
        }
        yield fast


# The meta-gradient ---------------------------------------------------------------------------------------------------


class MetaResult(NamedTuple):
    """What one meta-batch gave, besides the gradients.

    Attributes:
        loss: mean over tasks of the weighted target loss, scalar.
        task_losses: the same before the mean, [tasks].
        target_logits: predictions after the last update, [tasks, m, ...].
    """

    loss: Tensor
    task_losses: Tensor
    target_logits: Tensor


def task_loss(
    model: nn.Module,
    params: Mapping[str, Tensor],
    rates: Mapping[str, Tensor],
    task: Task,
    *,
    steps: int,
    step_weights: Sequence[float] | Tensor | None,
    loss_fn: LossFn,
    second_order: bool,
) -> tuple[Tensor, Tensor]:
    """Weighted target loss of one task (eq. 3, MSL; eq. 2 without weights) and the last step's predictions."""
    total: Tensor | None = None
    logits: Tensor | None = None
    loop = inner_loop(
        model,
        params,
        rates,
        task.support_x,
        task.support_y,
        steps=steps,
        loss_fn=loss_fn,
        second_order=second_order,
    )
    for k, fast in enumerate(loop):
        if step_weights is None and k < steps - 1:
            continue
        logits = functional_call(model, fast, (task.target_x,))
        loss = loss_fn(logits, task.target_y)
        if step_weights is not None:
            loss = step_weights[k] * loss
        total = loss if total is None else total + loss
    assert total is not None and logits is not None
    return total, logits


def meta_gradient(
    model: nn.Module,
    rates: Mapping[str, Tensor],
    tasks: Sequence[Task],
    *,
    steps: int,
    step_weights: Sequence[float] | Tensor | None,
    loss_fn: LossFn = F.cross_entropy,
    second_order: bool = True,
) -> MetaResult:
    """Adds the meta-gradient of a batch of tasks (mean over tasks) to ``.grad`` of parameters and rates.

    Args:
        model: the network at its meta-parameters, in training mode.
        rates: inner learning rates; its names say which parameters adapt (see :func:`inner_loop`).
        tasks: the meta-batch.
        steps: inner updates K.
        step_weights: K multi-step-loss weights, or None for the last step's target loss alone.
        loss_fn: (prediction, target) to a scalar.
        second_order: False gives first-order MAML: inner gradients are constants, rates still learn.
    """
    own = dict(model.named_parameters())
    params = {name: own[name] for name in rates}
    losses, logits = [], []
    for task in tasks:
        loss, prediction = task_loss(
            model,
            params,
            rates,
            task,
            steps=steps,
            step_weights=step_weights,
            loss_fn=loss_fn,
            second_order=second_order,
        )
        (loss / len(tasks)).backward()
        losses.append(loss.detach())
        logits.append(prediction.detach())
    task_losses = torch.stack(losses)
    return MetaResult(task_losses.mean(), task_losses, torch.stack(logits))


# Evaluation ----------------------------------------------------------------------------------------------------------


def evaluate_task(
    model: nn.Module,
    rates: Mapping[str, Tensor],
    task: Task,
    *,
    steps: int,
    loss_fn: LossFn = F.cross_entropy,
    eval_stats: EvalStats = "batch",
) -> Tensor:
    """Target predictions after every one of ``steps`` updates, [steps, m, ...], for a model in evaluation mode.

    Adaptation always normalises with the statistics of the support set, as in training; ``eval_stats`` chooses those
    of the target passes. ``steps`` may exceed the number of rates and of batch-norm rows: the last ones are used again.
    """
    own = dict(model.named_parameters())
    # Its own where they can be: hooks on their gradients act as in training.
    params = {
        name: own[name] if own[name].requires_grad else own[name].detach().requires_grad_() for name in rates
    }
    predictions = []
    with torch.enable_grad():
        loop = inner_loop(
            model,
            params,
            {name: r.detach() for name, r in rates.items()},
            task.support_x,
            task.support_y,
            steps=steps,
            loss_fn=loss_fn,
            second_order=False,
        )
        for fast in loop:
            set_eval_stats(model, eval_stats)
            with torch.no_grad():
                predictions.append(functional_call(model, fast, (task.target_x,)))
            set_eval_stats(model, "batch")
    return torch.stack(predictions)
