"""The differentiable inner loop for any module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamlpp_fast import accelerated
from mamlpp_fast.inputs import as_given, mapped
from mamlpp_fast.lslr import LSLR
from mamlpp_fast.reference import Inputs, LossFn, support_gradients

__all__ = ["adapt", "inner_steps"]

SupportGradients = Callable[[Mapping[str, Tensor], Inputs, Tensor, int, bool], tuple[Tensor | None, ...]]
"""From fast weights, inputs, labels, the inner step and whether it is differentiated again."""


def adapt(
    model: nn.Module,
    support_x: Inputs,
    support_y: Tensor,
    rates: LSLR | float,
    *,
    steps: int | None = None,
    loss_fn: LossFn = F.cross_entropy,
    first_order: bool = False,
) -> dict[str, Tensor]:
    """Adapts ``model`` to a support set by gradient steps that can be differentiated.

    Equivalent to K times ``theta = theta - rate * autograd.grad(loss, theta, create_graph=True)``. Use the result with
    ``mf.functional_call(model, fast, target_x)`` (``mf.functional_call(model, fast, (), target_x)`` for a dict of
    inputs); the inner step of per-step batch norms is left at the last one, where the target pass belongs. Under
    ``torch.no_grad`` or ``inference_mode`` it adapts as well, and returns constants.

    Args:
        model: any module; its parameters named in ``rates`` adapt, the others take part as they are.
        support_x: inputs [n, ...]; a tuple or a dict of them where the model takes several (``model(*support_x)``,
            ``model(**support_x)``).
        support_y: labels [n] or targets [n, ...].
        rates: inner learning rates, ``LSLR(model, num_steps=5)`` say, which name the parameters that adapt; or a fixed
            rate for all parameters but those of normalisation layers.
        steps: number of updates; by default one per step of ``rates`` (1 for a fixed rate). Later steps use the last
            rate again.
        loss_fn: (prediction, target) to a scalar.
        first_order: treat inner gradients as constants (first-order MAML).

    Returns:
        The fast weights by parameter name.

    Raises:
        TypeError: when ``rates`` is neither an ``LSLR`` nor a number, or an input no tensor.
        ValueError: when ``rates`` names a parameter that ``model`` lacks or has in another shape, or ``steps`` is
            below 1; for a forward that uses ``torch.utils.checkpoint``.
    """
    differentiable = torch.is_grad_enabled()
    fast: dict[str, Tensor] = {}
    with torch.inference_mode(False), torch.enable_grad():
        for fast in inner_steps(  # noqa: B007
            model,
            mapped(_normal, as_given("support_x", support_x)),
            _normal(support_y),
            rates,
            steps=steps,
            loss_fn=loss_fn,
            first_order=first_order or not differentiable,
        ):
            pass
    if differentiable:
        return fast
    # A parameter without part in the loss is still the model's own, which constants must not follow.
    return {name: p.detach().clone() if p.is_leaf else p.detach() for name, p in fast.items()}


def _normal(t: Tensor) -> Tensor:
    """A tensor that autograd may keep; those made in ``torch.inference_mode`` are not."""
    return t.clone() if t.is_inference() else t


def inner_steps(
    model: nn.Module,
    support_x: Inputs,
    support_y: Tensor,
    rates: LSLR | float,
    *,
    steps: int | None = None,
    loss_fn: LossFn = F.cross_entropy,
    first_order: bool = False,
    gradients: SupportGradients | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Like :func:`adapt`, but yields the fast weights after every update (for a multi-step loss).

    Args:
        gradients: takes the support gradients in place of :func:`mamlpp_fast.reference.support_gradients`.
    """
    if not isinstance(rates, LSLR):
        if isinstance(rates, bool) or not isinstance(rates, (int, float)):
            raise TypeError(f"rates: expected mf.LSLR or a number, got {type(rates).__name__}")
        rates = LSLR(model, 1, rates, learnable=False)
    steps = rates.num_steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    fast = _own(model, rates)
    second_order = not first_order
    for k in range(steps):
        if gradients is None:
            grads = support_gradients(
                model, fast, support_x, support_y, k, loss_fn, second_order, call=accelerated.predicted
            )
        else:
            grads = gradients(fast, support_x, support_y, k, second_order)
        fast = rates(fast, dict(zip(fast, grads, strict=True)), k)
        yield fast


def _own(model: nn.Module, rates: LSLR) -> dict[str, Tensor]:
    """The parameters that ``rates`` names: the model's very own, so that hooks on their gradients run."""
    own = dict(model.named_parameters(remove_duplicate=False))
    fast = {}
    for name, shape in zip(rates.names, rates.shapes, strict=True):
        if name not in own:
            raise ValueError(f"rates: expected names of parameters of the model, got {name!r}")
        p = own[name]
        if p.shape != shape:
            raise ValueError(
                f"rates: expected {name!r} of shape {tuple(shape)}, the model has {tuple(p.shape)}"
            )
        # What is frozen but named adapts all the same, from a constant.
        fast[name] = p if p.requires_grad else p.detach().requires_grad_()
    return fast
