"""Inner gradients as learn2learn's learners take them, refusals included."""

from __future__ import annotations

import traceback
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["AdaptationError", "inner_gradients"]


class AdaptationError(RuntimeError, UnboundLocalError):
    """The loss cannot be differentiated by all parameters: autograd's error, and the one learn2learn lets escape."""


def inner_gradients(
    loss: Tensor,
    parameters: Iterable[Tensor],
    *,
    create_graph: bool,
    retain_graph: bool,
    allow_unused: bool,
    allow_nograd: bool,
    hint: str,
) -> list[Tensor | None]:
    """The gradient of ``loss`` by each parameter; None for what is unused or takes none, where that is allowed.

    Raises:
        AdaptationError: autograd's refusal, after its traceback and ``hint`` have been printed; with ``allow_nograd``
            the refusal itself.
    """
    parameters = list(parameters)
    if allow_nograd:
        chosen = [p for p in parameters if p.requires_grad]
        gradients = iter(
            torch.autograd.grad(
                loss, chosen, retain_graph=create_graph, create_graph=create_graph, allow_unused=allow_unused
            )
        )
        return [next(gradients) if p.requires_grad else None for p in parameters]
    try:
        return list(
            torch.autograd.grad(
                loss,
                parameters,
                retain_graph=retain_graph,
                create_graph=create_graph,
                allow_unused=allow_unused,
            )
        )
    except RuntimeError as error:
        traceback.print_exc()
        print(hint)
        raise AdaptationError(str(error)) from error
