"""The inner loop: gradient steps on a support set that can be differentiated again."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mamlpp_fast.reference.calling import Inputs, predicted
from mamlpp_fast.reference.norms import set_step
from mamlpp_fast.reference.weights import right_weight_norm

__all__ = [
    "LossFn",
    "check_recomputation",
    "inner_loop",
    "math_attention",
    "right_second_order",
]

LossFn = Callable[[Tensor, Tensor], Tensor]

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


@contextlib.contextmanager
def right_second_order(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Within it a forward of ``model`` is made of operations that have a right second derivative.

    See :func:`math_attention` and :func:`right_weight_norm`.
    """
    with math_attention(wanted), right_weight_norm(model) if wanted else contextlib.nullcontext():
        yield


def check_recomputation(loss: Tensor) -> None:
    """Raises where the graph of ``loss`` holds what ``torch.utils.checkpoint`` will compute again.

    It does so in the backward pass, when the model holds its own parameters again and not the fast weights: torch would
    give other gradients without a word.

    Raises:
        ValueError: for a checkpoint anywhere in the graph.
    """
    ahead = [loss.grad_fn] if loss.grad_fn is not None else []
    seen = set(ahead)
    for node in ahead:  # grows meanwhile
        for name in _saved(type(node)):
            saved = getattr(node, name)
            for one in saved if isinstance(saved, tuple) else (saved,):
                if type(getattr(one, "data", None)).__module__ == "torch.utils.checkpoint":
                    raise ValueError(
                        "model: expected a forward without torch.utils.checkpoint, which computes again with other "
                        f"weights than the adapted ones, {node.name()} is in one"
                    )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                ahead.append(following)


@functools.cache
def _saved(kind: type) -> tuple[str, ...]:
    """Names of what a kind of node keeps for its backward pass, as kept."""
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


def support_gradients(
    model: nn.Module,
    fast: Mapping[str, Tensor],
    support_x: Inputs,
    support_y: Tensor,
    step: int,
    loss_fn: LossFn,
    second_order: bool,
    call: Callable[[nn.Module, Mapping[str, Tensor], Inputs], Any] = predicted,
) -> tuple[Tensor | None, ...]:
    """Gradients of the support loss by the fast weights, in their order; None for those without part in it.

    ``call`` gives the prediction, of the model, its fast weights and the inputs. Leaves the model's per-step norms at
    ``step``, whose target pass follows.

    Raises:
        ValueError: at step 0, for a forward that uses ``torch.utils.checkpoint``.
    """
    set_step(model, step)
    with right_second_order(model, second_order):
        loss = loss_fn(call(model, fast, support_x), support_y)
        if step == 0:
            check_recomputation(loss)
        return torch.autograd.grad(loss, list(fast.values()), create_graph=second_order, allow_unused=True)


def inner_loop(
    model: nn.Module,
    params: Mapping[str, Tensor],
    rates: Mapping[str, Tensor],
    support_x: Inputs,
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
        support_x: inputs [n, ...], or a tuple or a dict of them.
        support_y: labels or targets [n, ...].
        steps: number of updates.
        loss_fn: (prediction, target) to a scalar.
        second_order: whether the updates can be differentiated.
    """
    fast = dict(params)
    for k in range(steps):
        grads = support_gradients(model, fast, support_x, support_y, k, loss_fn, second_order)
        fast = {
            name: p if g is None else p - rates[name][min(k, len(rates[name]) - 1)] * g
            for (name, p), g in zip(fast.items(), grads, strict=True)
        }
        yield fast
