"""Every experiment of the paper by name: BASE[-VARIANT][-PROTOCOL], resolved to one :class:`TrainConfig`.

BASE is a data set with ways, shots and, for mini-ImageNet, inner steps; VARIANT a row of the paper's tables (MAML++
when absent); PROTOCOL who is followed: the authors' code with its documented inner rate (when absent),
``authors-code`` as it runs, or ``paper`` as published. ``docs/training.md`` has the table of differences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mamlpp_fast.train.config import TrainConfig, suggestion

__all__ = ["BASES", "DEFAULT_PRESET", "PROTOCOLS", "VARIANTS", "preset", "preset_names"]

DEFAULT_PRESET = "strokes"
PROTOCOLS = ("paper", "authors-code")

_OMNIGLOT: dict[str, Any] = {
    "dataset": "omniglot",
    "tasks": 8,
    "targets": 1,
    "filters": 64,
    "inner_lr": 0.1,
    "msl_epochs": 10,
    "min_meta_lr": 1e-5,
}
_MINI_IMAGENET: dict[str, Any] = {
    "dataset": "miniimagenet",
    "tasks": 2,
    "targets": 15,
    "filters": 48,
    "inner_lr": 0.01,
    "msl_epochs": 15,
    # The authors' configurations end where they start: no annealing.
    "min_meta_lr": 1e-3,
    "clamp_meta_gradient": 10.0,
}
_STROKES: dict[str, Any] = _OMNIGLOT | {"dataset": "strokes"}
# A few minutes on two CPU cores.
_QUICK: dict[str, Any] = _STROKES | {
    "ways": 5,
    "shots": 1,
    "filters": 32,
    "epochs": 10,
    "iterations_per_epoch": 50,
    "msl_epochs": 4,
    "val_tasks": 200,
}


def _bases() -> dict[str, dict[str, Any]]:
    bases: dict[str, dict[str, Any]] = {"strokes": _QUICK}
    for name, settings, ways in (
        ("omniglot", _OMNIGLOT, (20, 5)),
        ("miniimagenet", _MINI_IMAGENET, (5,)),
        ("strokes", _STROKES, (20, 5)),
    ):
        for way in ways:
            for shot in (1, 5):
                task = f"{name}-{way}w{shot}s"
                bases[task] = settings | {"ways": way, "shots": shot}
                if name == "miniimagenet":
                    for steps in range(1, 6):
                        text = f"{task}-{steps}step{'s' if steps > 1 else ''}"
                        bases[text] = bases[task] | {"steps": steps}
    return bases


BASES: Mapping[str, Mapping[str, Any]] = _bases()

_MAML: dict[str, Any] = {"msl": False, "lslr": False, "bnwb": False, "bnrs": False}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "": {},
    "maml": _MAML,
    "maml-msl": _MAML | {"msl": True},
    "maml-lslr": _MAML | {"lslr": True},
    "maml-bnwb-bnrs": _MAML | {"bnwb": True, "bnrs": True},
    "maml-ca": _MAML | {"cosine_annealing": True, "min_meta_lr": 1e-5},
    "maml-da": _MAML | {"da_epoch": 50},
    "fomaml": _MAML | {"second_order": False},
    "meta-sgd": _MAML | {"lslr": True, "rates": "element"},
    "anil": _MAML | {"adapt": "head"},
}


def preset_names() -> list[str]:
    """All names, MAML++ under the default protocol first."""
    names = []
    for protocol in ("", *PROTOCOLS):
        for variant in VARIANTS:
            for base, settings in BASES.items():
                if protocol and settings["dataset"] == "strokes":
                    continue
                names.append("-".join(part for part in (base, variant, protocol) if part))
    return names


def preset(name: str, settings: Mapping[str, Any] | None = None) -> TrainConfig:
    """The configuration of a preset, with ``settings`` in place of its own.

    Raises:
        ValueError: for an unknown preset, an unknown key or a value out of range.
    """
    parts = _split(name)
    if parts is None:
        raise ValueError(
            "preset: expected BASE[-VARIANT][-PROTOCOL] as `mamlpp-fast train --list` prints them, "
            f"got {name!r}{suggestion(name, preset_names())}"
        )
    base, variant, protocol = parts
    values = dict(BASES[base])
    if protocol:
        values |= _protocol_changes(protocol, values["dataset"], values["shots"], variant)
    values |= VARIANTS[variant]
    return TrainConfig.from_dict(values | dict(settings or {}))


def _split(name: str) -> tuple[str, str, str] | None:
    protocol = next((p for p in PROTOCOLS if name.endswith(f"-{p}")), "")
    rest = name.removesuffix(f"-{protocol}") if protocol else name
    for variant in sorted(VARIANTS, key=len, reverse=True):
        base = rest.removesuffix(f"-{variant}") if variant else rest
        if base in BASES and (not variant or base != rest):
            if protocol and BASES[base]["dataset"] == "strokes":
                return None
            return base, variant, protocol
    return None


def _protocol_changes(protocol: str, dataset: str, shots: int, variant: str) -> dict[str, Any]:
    """What a protocol changes; a variant's own settings come after it."""
    if protocol == "authors-code":
        # Their draws, their one initialisation seed, one seed for validation and test, and the inner rate that
        # argparse gives instead of the configured one.
        return {"inner_lr": 0.1, "sampling": "authors", "init_seed": 925765, "val_seed": 0, "test_seed": 0}
    changes: dict[str, Any] = {
        "tasks": 16 if dataset == "omniglot" else (4 if shots == 1 else 2),
        "epochs": 150,
        "adam_betas": (0.9, 0.99),
        "ensemble": 3,
        "clamp_meta_gradient": None,
    }
    if variant == "":
        return changes | {"da_epoch": 50, "cosine_annealing": True, "min_meta_lr": 1e-5}
    return changes | {"cosine_annealing": False}
