"""Settings: every value out of range is refused where it is given, in one line that names it."""

from __future__ import annotations

import json

import pytest

import mamlpp_fast as mf


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"steps": 2.5}, "steps: expected an integer, got 2.5"),
        ({"steps": True}, "steps: expected an integer, got True"),
        ({"eval_steps": 0}, "eval_steps: expected at least 1, got 0"),
        ({"da_epoch": -2}, "da_epoch: expected -1"),
        ({"msl_epochs": -1}, "msl_epochs: expected at least 0"),
        ({"meta_lr": 0.0}, "meta_lr: expected a positive number"),
        ({"meta_lr": float("nan")}, "meta_lr: expected a number"),
        ({"min_meta_lr": 1.0}, "min_meta_lr: expected 0 to meta_lr"),
        ({"inner_lr": "fast"}, "inner_lr: expected a number, got 'fast'"),
        ({"adam_betas": (0.9, 1.0)}, "adam_betas: expected two numbers"),
        ({"adam_betas": 0.9}, "adam_betas: expected numbers separated by commas, got 0.9"),
        ({"adam_betas": (0.9, "x")}, "adam_betas: expected numbers separated by commas"),
        ({"adapt": 3}, "adapt: expected a text, got 3"),
        ({"clamp_meta_gradient": -1.0}, "clamp_meta_gradient: expected a positive number"),
        ({"eval_stats": "none"}, "eval_stats: expected one of batch, running"),
        ({"rates": "layer"}, "rates: expected one of tensor, element"),
        ({"loss": "hinge"}, "loss: expected one of cross_entropy, mse"),
        ({"msl": 1}, "msl: expected true or false, got 1"),
        ({"adapt_norm": True}, "adapt_norm: expected bnwb=False"),
        ({"inner_learning_rate": 0.1}, "inner_learning_rate: expected one of"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_values_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        mf.MAMLConfig.from_dict(changes)
    assert "\n" not in str(error.value)


def test_round_trip_through_json() -> None:
    config = mf.MAMLConfig(adapt=("head.",), eval_steps=7, clamp_meta_gradient=10.0)
    assert mf.MAMLConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_maml_is_mamlpp_with_its_parts_off() -> None:
    maml = mf.MAMLConfig.maml()
    assert not (maml.lslr or maml.msl or maml.bnwb or maml.bnrs)
    assert mf.MAMLConfig.maml(lslr=True, msl=True, bnwb=True, bnrs=True) == mf.MAMLConfig()
