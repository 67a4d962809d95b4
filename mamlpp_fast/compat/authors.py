"""Parameter names of the MAML++ authors' code (HowToTrainYourMAMLPytorch) and ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from mamlpp_fast.learner import MAMLPlusPlus

__all__ = ["from_authors", "load_authors_state", "our_name"]

_NETWORK = "classifier."
_RATES = "inner_loop_optimizer.names_learning_rates_dict."


def our_name(authors: str) -> tuple[str, str]:
    """Translates one of the authors' state-dict names.

    Returns:
        ``("model", name)`` of a parameter or buffer of :class:`mamlpp_fast.Conv4`, or ``("rates", name)`` of the
        parameter whose inner rates it holds.

    Raises:
        ValueError: for a name that is not theirs.
    """
    kind, rest = "model", authors
    if authors.startswith(_RATES):
        kind, rest = "rates", authors.removeprefix(_RATES).replace("-", ".")
    elif authors.startswith(_NETWORK):
        rest = authors.removeprefix(_NETWORK).removeprefix("module.")
    rest = rest.removeprefix("layer_dict.")
    if match := re.fullmatch(r"conv(\d+)\.(conv|norm_layer)\.(\w+)", rest):
        layer = {"conv": "conv", "norm_layer": "norm"}[match[2]]
        return kind, f"blocks.{match[1]}.{layer}.{match[3]}"
    if rest in ("linear.weights", "linear.bias"):
        return kind, "head.weight" if rest.endswith("weights") else "head.bias"
    raise ValueError(f"name: expected a parameter name of the authors' code, got {authors!r}")


def from_authors(state: Mapping[str, Tensor], learner: MAMLPlusPlus) -> tuple[dict[str, Tensor], Tensor]:
    """Their state dict as ours: the model's state, and the rates [L, K].

    Their rate vectors have a last entry (index K) that no step uses; it is dropped.
    """
    model: dict[str, Tensor] = {}
    rates: dict[str, Tensor] = {}
    for name, value in state.items():
        kind, ours = our_name(name)
        (model if kind == "model" else rates)[ours] = value
    missing = [name for name in learner.rates.names if name not in rates]
    if missing:
        raise ValueError(f"state: expected inner rates of {missing[0]}, got none")
    steps = learner.config.steps
    for name in learner.rates.names:
        if rates[name].ndim != 1 or len(rates[name]) < steps:
            raise ValueError(
                f"state: expected at least {steps} inner rates of {name}, got {list(rates[name].shape)}"
            )
    return model, torch.stack([rates[name][:steps] for name in learner.rates.names])


def load_authors_state(learner: MAMLPlusPlus, state: Mapping[str, Tensor]) -> None:
    """Loads a state dict of the authors' code (tensors by their names) into a learner of the same network.

    Raises:
        ValueError: when names or shapes do not fit.
    """
    model, rates = from_authors(state, learner)
    try:
        learner.model.load_state_dict(model)
    except RuntimeError as error:
        raise ValueError(
            f"state: expected the network of this learner, {' '.join(str(error).split())}"
        ) from error
    with torch.no_grad():
        learner.rates.rates.copy_(rates)
