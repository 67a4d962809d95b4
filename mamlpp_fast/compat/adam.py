"""Adam's state under the authors' numbering of parameters and ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mamlpp_fast.compat.authors import Entry, layout, our_order, our_trainables, to_authors
from mamlpp_fast.train.config import TrainConfig

__all__ = ["MOMENTS", "adam_from_authors", "adam_to_authors"]

MOMENTS = ("exp_avg", "exp_avg_sq")
_EPS = 1e-8


def adam_from_authors(
    optimizer: Mapping[str, Any], config: TrainConfig, entries: Sequence[Entry], network: Mapping[str, Tensor]
) -> tuple[dict[int, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """Their ``optimizer.state_dict()`` as the ``state`` of ours.

    Args:
        optimizer: theirs.
        config: the run's settings.
        entries: their :func:`mamlpp_fast.compat.authors.layout`, in the order of their numbers.
        network: their tensors, by kind and our name joined by a slash.

    Returns:
        the state, and of each moment the last entries of the rate vectors, which no step uses, by our names.

    Raises:
        ValueError: for another optimiser, other parameters or other shapes.
    """
    trained = [e for e in entries if e.trained]
    try:
        (group,) = optimizer["param_groups"]
        numbers, states = list(group["params"]), dict(optimizer["state"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("optimizer: expected the state of an Adam with one group of parameters") from error
    if len(numbers) != len(trained):
        raise ValueError(f"optimizer: expected {len(trained)} trained parameters, got {len(numbers)}")
    expected = {
        "betas": config.adam_betas,
        "eps": _EPS,
        "weight_decay": 0,
        "amsgrad": False,
        "maximize": False,
    }
    for key, value in expected.items():
        found = group.get(key, value)
        if (tuple(found) if isinstance(found, list) else found) != value:
            raise ValueError(f"optimizer: expected Adam with {key}={value}, got {found}")
    found_states = {
        e: _checked(e, states[n], network[f"{e.kind}/{e.ours}"])
        for e, n in zip(trained, numbers, strict=True)
        if n in states
    }
    ours: dict[int, dict[str, Tensor]] = {}
    canonical = layout(config)
    order = our_trainables(canonical)
    for e, state in found_states.items():
        if e.kind == "model":
            ours[order.index(e.ours)] = state
    of_rates = {e.ours: found_states[e] for e in trained if e.kind == "rates" and e in found_states}
    rates = our_order(e.ours for e in canonical if e.kind == "rates")
    if not of_rates:
        return dict(sorted(ours.items())), {}
    if missing := set(rates) - of_rates.keys():
        raise ValueError(f"optimizer: expected the state of all inner rates, got none of {min(missing)}")
    ours[order.index("rates")] = {"step": of_rates[rates[0]]["step"].clone()} | {
        m: torch.stack([of_rates[name][m][:-1] for name in rates]) for m in MOMENTS
    }
    return dict(sorted(ours.items())), {
        m: {name: of_rates[name][m][-1].clone() for name in rates} for m in MOMENTS
    }


def _checked(entry: Entry, state: Mapping[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    for moment in MOMENTS:
        value = state.get(moment)
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"optimizer: expected {moment} of {entry.name} of shape {list(parameter.shape)}, got {found}"
            )
    step = torch.as_tensor(state.get("step", 0), dtype=torch.float32).clone()
    return {"step": step} | {moment: state[moment] for moment in MOMENTS}


def adam_to_authors(
    optimizer: Mapping[str, Any], entries: Sequence[Entry], unused: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Any]:
    """The ``state_dict()`` of our Adam under their numbering.

    Args:
        optimizer: ours.
        entries: their :func:`mamlpp_fast.compat.authors.layout`.
        unused: what :func:`adam_from_authors` returned beside the state; zeros where it lacks a name.
    """
    states, (group,) = optimizer["state"], optimizer["param_groups"]
    order = our_trainables(entries)
    trained = [e for e in entries if e.trained]
    rates = our_order(e.ours for e in trained if e.kind == "rates")
    present = {name: states[i] for i, name in enumerate(order) if i in states}
    moments = {}
    for m in MOMENTS:
        rows = dict(zip(rates, present["rates"][m], strict=True)) if "rates" in present else {}
        last = {name: unused.get(m, {}).get(name, row.new_zeros(())) for name, row in rows.items()}
        model = {name: state[m] for name, state in present.items()}
        kept = [e for e in trained if e.ours in (rows if e.kind == "rates" else model)]
        moments[m] = to_authors(kept, model, rows, last)
    return {
        "state": {
            i: {"step": present[e.ours if e.kind == "model" else "rates"]["step"].clone()}
            | {m: moments[m][e.name] for m in MOMENTS}
            for i, e in enumerate(trained)
            if e.name in moments["exp_avg"]
        },
        "param_groups": [
            {
                "lr": float(group["lr"]),
                "betas": tuple(group["betas"]),
                "eps": group["eps"],
                "weight_decay": 0,
                "amsgrad": False,
                "params": list(range(len(trained))),
            }
        ],
    }
