"""The settings of the MAML++ learner, one dataclass, validated where it is made."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

__all__ = ["TRUTH", "MAMLConfig", "read_value", "type_hints"]

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
            read_value(field.name, getattr(self, field.name), hints[field.name])
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

    def evaluation_steps(self, steps: int | None = None) -> int:
        """Inner updates in evaluation: ``steps``, by default ``eval_steps``; where that is None too, the training's.

        Raises:
            ValueError: for fewer than one.
        """
        if steps is None:
            steps = self.steps if self.eval_steps is None else self.eval_steps
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        return steps

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


TRUTH = {"true": True, "1": True, "false": False, "0": False}
_SPOKEN = TRUTH | {"yes": True, "on": True, "no": False, "off": False}
_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text", list: "a list"}


def read_value(name: str, value: Any, hint: Any, *, text: bool = False) -> Any:
    """A value of the type that a setting has.

    Args:
        name: the setting, for the message.
        value: a plain value (JSON), or what was written of it.
        hint: the type: plain, a choice of texts, a tuple of one type, or a union of these and None.
        text: whether ``value`` is a text of a command line, to be read as that type.

    Raises:
        ValueError: names the setting, what was expected and what came.
    """
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    found = _from_text(value, options) if text else value
    if not any(_fits(found, option) for option in options):
        raise ValueError(f"{name}: expected {_words(options[0])}, got {value!r}")
    return found


def _from_text(text: str, options: tuple[Any, ...]) -> Any:
    """What a text says, as the first type that takes it; as it is where none does."""
    if NoneType in options and text.lower() in ("none", "null"):
        return None
    for option in options:
        if option is bool:
            return _SPOKEN.get(text.lower(), text)
        if option in (int, float):
            with suppress(ValueError):
                return option(text)
        if get_origin(option) is tuple and ("," in text or len(options) == 1):
            return tuple(_from_text(part.strip(), get_args(option)) for part in text.split(","))
    return text


def _fits(value: Any, option: Any) -> bool:
    """Whether a value is of a type; whole numbers are numbers, truth values are not."""
    if get_origin(option) is Literal:
        return value in get_args(option)
    if get_origin(option) is tuple:
        return isinstance(value, tuple | list) and all(_fits(v, get_args(option)[0]) for v in value)
    if isinstance(value, bool):
        return option is bool
    if option in (int, float):
        return isinstance(value, int if option is int else int | float) and -_MOST < value < _MOST
    return isinstance(value, option)


def _words(option: Any) -> str:
    if get_origin(option) is Literal:
        return f"one of {', '.join(get_args(option))}"
    return "numbers separated by commas" if get_origin(option) is tuple else _WORDS[option]
