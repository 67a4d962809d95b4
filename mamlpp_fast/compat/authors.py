"""Names and order of the tensors of the MAML++ authors' code (HowToTrainYourMAMLPytorch), and ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mamlpp_fast.learner import MAMLPlusPlus

if TYPE_CHECKING:
    from mamlpp_fast.train.config import TrainConfig

__all__ = [
    "Entry",
    "from_authors",
    "layout",
    "load_authors_state",
    "our_name",
    "our_order",
    "our_trainables",
    "to_authors",
]

_NETWORK = "classifier."
_RATES = "inner_loop_optimizer.names_learning_rates_dict."


class Entry(NamedTuple):
    """A tensor of the authors' state dict.

    Attributes:
        name: their name, of a run on one GPU.
        kind: ``"model"``, or ``"rates"`` for the inner rates of a parameter.
        ours: our name of the parameter or buffer.
        trained: whether their Adam trains it.
    """

    name: str
    kind: str
    ours: str
    trained: bool


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


def _their_name(kind: str, ours: str) -> str:
    """The inverse of :func:`our_name`."""
    if match := re.fullmatch(r"blocks\.(\d+)\.(conv|norm)\.(\w+)", ours):
        layer = {"conv": "conv", "norm": "norm_layer"}[match[2]]
        path = f"layer_dict.conv{match[1]}.{layer}.{match[3]}"
    else:
        path = {"head.weight": "layer_dict.linear.weights", "head.bias": "layer_dict.linear.bias"}[ours]
    return _RATES + path.replace(".", "-") if kind == "rates" else _NETWORK + path


def layout(config: TrainConfig) -> list[Entry]:
    """Their tensors in the order in which their code registers, and their Adam numbers, them.

    Raises:
        ValueError: for settings that their code does not have.
    """
    for setting, expected in (("model", "conv4"), ("rates", "tensor"), ("adapt", "all")):
        if (found := getattr(config, setting)) != expected:
            raise ValueError(f"{setting}: expected {expected}, all that the authors' code has, got {found!r}")
    network: list[tuple[str, bool]] = []
    for i in range(config.stages):
        network += [(f"blocks.{i}.conv.weight", True), (f"blocks.{i}.conv.bias", True)]
        norm = f"blocks.{i}.norm."
        if config.norm == "batch":
            network += [(f"{norm}running_mean", False), (f"{norm}running_var", False)]
            network += [(f"{norm}bias", config.learn_beta), (f"{norm}weight", config.learn_gamma)]
        else:
            network += [(f"{norm}weight", False), (f"{norm}bias", True)]
    network += [("head.weight", True), ("head.bias", True)]
    adapted = [name for name, trained in network if trained and (config.adapt_norm or ".norm." not in name)]
    entries = [("model", name, trained) for name, trained in network]
    entries += [("rates", name, config.lslr) for name in adapted]
    return [Entry(_their_name(kind, name), kind, name, trained) for kind, name, trained in entries]


def our_order(names: Iterable[str]) -> list[str]:
    """Names in their order, in ours: every weight before its bias."""
    by_module = groupby(names, key=lambda name: name.rpartition(".")[0])
    return [n for _, module in by_module for n in sorted(module, key=lambda name: name.endswith("bias"))]


def our_trainables(entries: Sequence[Entry]) -> list[str]:
    """Names of the parameters that our Adam numbers, in its order; the inner rates are one, ``"rates"``."""
    names = our_order(e.ours for e in entries if e.kind == "model" and e.trained)
    return [*names, "rates"] if any(e.kind == "rates" and e.trained for e in entries) else names


def from_authors(state: Mapping[str, Tensor], learner: MAMLPlusPlus) -> tuple[dict[str, Tensor], Tensor]:
    """Their state dict as ours: the model's state, and the rates [L, K].

    Their rate vectors have a last entry (index K) that no step uses; it is dropped.

    Raises:
        ValueError: for names that are not theirs, and rates that are missing or of another number of steps.
    """
    model: dict[str, Tensor] = {}
    rates: dict[str, Tensor] = {}
    for name, value in state.items():
        kind, ours = our_name(name)
        (model if kind == "model" else rates)[ours] = value
    steps = learner.config.steps
    for name in learner.rates.names:
        shape = list(rates[name].shape) if name in rates else "none"
        if shape != [steps + 1]:
            raise ValueError(f"state: expected inner rates of {name} of shape [{steps + 1}], got {shape}")
    if extra := rates.keys() - set(learner.rates.names):
        raise ValueError(f"state: expected no inner rates of {min(extra)}, which does not adapt, got some")
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


def to_authors(
    entries: Sequence[Entry],
    model: Mapping[str, Tensor],
    rates: Mapping[str, Tensor],
    unused: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Our tensors under their names, in their order.

    Args:
        entries: their :func:`layout`.
        model: our model's state, or anything by its names.
        rates: a row [K] of every parameter that adapts, by its name.
        unused: the entries [] that follow it in their vectors.
    """
    return {
        e.name: model[e.ours]
        if e.kind == "model"
        else torch.cat([rates[e.ours], unused[e.ours].view(1).to(rates[e.ours])])
        for e in entries
    }
