"""The settings of the MAML++ learner, one dataclass, validated where it is made."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

__all__ = ["MAMLConfig", "check_kind", "check_value", "type_hints"]

_MOST = 1e18  # more than any setting needs, and what every type of tensor holds


@functools.cache
def type_hints(cls: type[Any]) -> dict[str, Any]:
    """:func:`typing.get_type_hints`, which compiles the texts of annotations anew at each call."""
    return get_type_hints(cls)


@dataclass(frozen=True)
class MAMLConfig:
    """Every part of MAML++ by its own switch; the defaults are MAML++ for Omniglot as its authors' code runs it.

    MAML is ``MAMLConfig.maml()``; first-order MAML, Meta-SGD and ANIL are ``second_order=False``,
    ``rates="element"`` and ``adapt="head"``.

    Attributes:
        steps: inner updates K in training.
        eval_steps: inner updates in evaluation; None for ``steps``. Steps beyond ``steps`` use the last rate and the
            last batch-norm row again.
        inner_lr: initial inner learning rate of every tensor and step.
        lslr: learn the inner rates (per layer and per step).
        rates: one rate a parameter ``"tensor"`` (LSLR) or one a parameter ``"element"`` (Meta-SGD).
        second_order: differentiate through the inner updates.
        da_epoch: derivative-order annealing: second order only in epochs after this one; -1 for all.
        msl: multi-step loss, for the first ``msl_epochs`` epochs.
        msl_epochs: epochs over which its weights move to the last step.
        bnwb: batch-norm weights and biases per inner step.
        bnrs: batch-norm running statistics per inner step.
        adapt: ``"all"``, ``"head"`` (ANIL), or a parameter-name prefix or a tuple of them: what the inner loop adapts.
        adapt_norm: adapt batch-norm weights too (needs ``bnwb=False``).
        eval_stats: normalise target passes in evaluation with ``"batch"`` (published numbers, transductive) or
            ``"running"`` statistics.
        loss: ``"cross_entropy"`` or ``"mse"``.
        meta_lr: Adam's learning rate at epoch 0.
        min_meta_lr: where cosine annealing ends.
        cosine_annealing: anneal the meta learning rate by epoch (CA).
        adam_betas: Adam's betas.
        epochs: epochs of the whole training (the period of the cosine).
        iterations_per_epoch: meta-updates an epoch.
        clamp_meta_gradient: clamp the network's meta-gradients (not those of rates) to plus or minus this; None: no.
    """

    steps: int = 5
    eval_steps: int | None = None
    inner_lr: float = 0.1
    lslr: bool = True
    rates: Literal["tensor", "element"] = "tensor"
    second_order: bool = True
    da_epoch: int = -1
    msl: bool = True
    msl_epochs: int = 10
    bnwb: bool = True
    bnrs: bool = True
    adapt: str | tuple[str, ...] = "all"
    adapt_norm: bool = False
    eval_stats: Literal["batch", "running"] = "batch"
    loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    meta_lr: float = 1e-3
    min_meta_lr: float = 1e-5
    cosine_annealing: bool = True
    adam_betas: tuple[float, float] = (0.9, 0.999)
    epochs: int = 100
    iterations_per_epoch: int = 500
    clamp_meta_gradient: float | None = None

    def __post_init__(self) -> None:
        hints = type_hints(type(self))  # type: ignore[arg-type]  # a class has a hash, which mypy takes for its instances'
        for field in dataclasses.fields(self):
            check_value(field.name, getattr(self, field.name), hints[field.name])
        for name, least in self.least().items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if self.da_epoch < -1:
            raise ValueError(f"da_epoch: expected -1 (off) or an epoch, got {self.da_epoch}")
        for name in ("meta_lr", "clamp_meta_gradient"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if not 0 <= self.min_meta_lr <= self.meta_lr:
            raise ValueError(f"min_meta_lr: expected 0 to meta_lr ({self.meta_lr}), got {self.min_meta_lr}")
        if len(self.adam_betas) != 2 or not all(0 <= b < 1 for b in self.adam_betas):
            raise ValueError(f"adam_betas: expected two numbers in [0, 1), got {self.adam_betas}")
        if self.adapt_norm and self.bnwb:
            raise ValueError(
                "adapt_norm: expected bnwb=False with it (per-step weights cannot adapt), got bnwb=True"
            )

    @classmethod
    def least(cls) -> dict[str, int]:
        """The smallest value of each setting that has one."""
        return {"steps": 1, "eval_steps": 1, "epochs": 1, "iterations_per_epoch": 1, "msl_epochs": 0}

    @classmethod
    def maml(cls, **changes: Any) -> MAMLConfig:
        """Plain second-order MAML: every part of MAML++ off but the cosine annealing, as the authors ran it."""
        off: dict[str, Any] = {"lslr": False, "msl": False, "bnwb": False, "bnrs": False}
        return cls(**(off | changes))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds from plain values (JSON).

        Raises:
            ValueError: for an unknown key or a value out of range.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise ValueError(f"{key}: expected one of {', '.join(sorted(known))}")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
    list: ((list,), "a list"),
}


def check_value(name: str, value: Any, hint: Any) -> None:
    """Raises unless a value is of the type that a setting has; of texts and tuples in it only choices are known.

    Raises:
        ValueError: names the setting, what was expected and what came.
    """
    options = get_args(hint)
    if options and all(isinstance(o, str) for o in options):
        if value not in options:
            raise ValueError(f"{name}: expected one of {', '.join(options)}, got {value!r}")
        return
    kind = next((o for o in options or (hint,) if o in (bool, int, float)), None)
    if kind is None or (value is None and type(None) in options) or get_origin(hint) is tuple:
        return
    check_kind(name, value, kind)


def check_kind(name: str, value: Any, kind: Any) -> None:
    """Raises unless a value is of a plain type; whole numbers are numbers, truth values are not."""
    kinds, words = _KINDS[kind]
    fits = isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
    if not fits or (kind in (int, float) and not -_MOST < value < _MOST):
        raise ValueError(f"{name}: expected {words}, got {value!r}")
