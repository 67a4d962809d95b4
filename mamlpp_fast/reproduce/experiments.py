"""The rows of the tables as presets, and what a smaller budget makes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from mamlpp_fast.reproduce.published import PUBLISHED, Published
from mamlpp_fast.train.config import TrainConfig, suggestion
from mamlpp_fast.train.presets import preset

__all__ = ["TABLES", "Cell", "cells", "scaled"]

# Fewer would say nothing.
_LEAST_VAL_TASKS, _LEAST_TEST_TASKS, _LEAST_EPOCHS = 50, 100, 4

# Of a row: label, preset without its protocol, settings.
Rows: TypeAlias = dict[str, tuple[str, str, dict[str, Any]]]

_OMNIGLOT = {
    "maml": ("MAML", "-maml"),
    "maml-msl": ("MAML + MSL", "-maml-msl"),
    "maml-lslr": ("MAML + LSLR", "-maml-lslr"),
    "maml-bnwb-bnrs": ("MAML + BNWB + BNRS", "-maml-bnwb-bnrs"),
    "maml-ca": ("MAML + CA", "-maml-ca"),
    "maml-da": ("MAML + DA", "-maml-da"),
    "maml++": ("MAML++", ""),
    "meta-sgd": ("Meta-SGD", "-meta-sgd"),
}
_STEPS = {
    f"maml++-{k}step{'s' if k > 1 else ''}": (f"MAML++, {k} inner step{'s' if k > 1 else ''}", k)
    for k in range(1, 6)
}
TABLES: dict[str, str] = {
    "omniglot-20w": "Omniglot, 20-way",
    "mini-imagenet": "mini-ImageNet, 5-way, by number of inner steps",
    "instability": "Stride-2 convolutions instead of max-pooling, Omniglot, 1-shot",
}
# Rows that run unless others are asked for: cosine annealing and derivative-order annealing are whole runs more.
_DEFAULT_ROWS = {"omniglot-20w": [row for row in _OMNIGLOT if row not in ("maml-ca", "maml-da")]}


@dataclass(frozen=True)
class Cell:
    """One row of a table at one number of shots.

    Attributes:
        row: its key.
        label: its name in print.
        shots: support images of a class.
        preset: the preset it is at scale 1.
        config: what runs, but for the seed.
        changes: how ``config`` differs from the preset, in words.
        published: what others printed.
    """

    row: str
    label: str
    shots: int
    preset: str
    config: TrainConfig
    changes: tuple[str, ...]
    published: tuple[Published, ...]

    @property
    def name(self) -> str:
        return f"{self.row}-{self.shots}shot"


def _rows(table: str, shots: int) -> Rows:
    """The rows that the table has at this number of shots."""
    if table == "omniglot-20w":
        rows: Rows = {key: (label, f"omniglot-20w{shots}s{v}", {}) for key, (label, v) in _OMNIGLOT.items()}
        few = ("maml", "maml++", "meta-sgd")
        return rows if shots == 1 else {key: rows[key] for key in few}
    if table == "mini-imagenet":
        base = f"miniimagenet-5w{shots}s"
        steps: Rows = {
            key: (label, f"{base}-{key.removeprefix('maml++-')}", {})
            for key, (label, k) in _STEPS.items()
            if shots == 1 or k == 5
        }
        return {"maml": ("MAML, 5 inner steps", f"{base}-maml", {})} | steps
    strided = {"max_pool": False}
    keys = ("maml", "maml-msl", "maml++") if shots == 1 else ()
    return {k: (_OMNIGLOT[k][0], f"omniglot-20w1s{_OMNIGLOT[k][1]}", strided) for k in keys}


def cells(
    table: str,
    *,
    scale: float = 1.0,
    shots: Sequence[int] = (1,),
    rows: Sequence[str] | None = None,
    protocol: str = "paper",
    settings: Mapping[str, Any] | None = None,
) -> list[Cell]:
    """The cells of a table.

    Args:
        table: one of ``TABLES``.
        scale: share of the budget, above 0 and at most 1; see :func:`scaled`.
        shots: 1, 5 or both.
        rows: keys of rows; all but single annealings without it.
        protocol: ``"paper"``, ``"authors-code"`` or ``"default"``.
        settings: changes to every row, after the scaling.

    Raises:
        ValueError: for a table, scale or row that there is not, or settings out of range.
    """
    if table not in TABLES:
        hint = suggestion(table, TABLES)
        raise ValueError(f"TABLE: expected one of {', '.join(TABLES)}, got {table!r}{hint}")
    if not 0 < scale <= 1:
        raise ValueError(f"--scale: expected above 0 and at most 1, got {scale:g}")
    known = {key: None for s in (1, 5) for key in _rows(table, s)}
    for row in rows or ():
        if row not in known:
            hint = suggestion(row, known)
            raise ValueError(f"--rows: expected rows among {', '.join(known)}, got {row!r}{hint}")
    wanted = rows or _DEFAULT_ROWS.get(table, list(known))
    found = []
    for number in shots:
        for key, (label, base, own) in _rows(table, number).items():
            if key not in wanted:
                continue
            name = base if protocol == "default" else f"{base}-{protocol}"
            whole = preset(name, own)
            config = scaled(whole, scale)
            config = TrainConfig.from_dict(config.to_dict() | dict(settings or {}))
            before, after = whole.to_dict(), config.to_dict()
            changes = tuple(f"{k}={after[k]} (was {before[k]})" for k in after if after[k] != before[k])
            found.append(
                Cell(key, label, number, name, config, changes, PUBLISHED.get((table, key, number), ()))
            )
    if not found:
        raise ValueError(
            f"--shots: expected a number the rows asked for have, got {', '.join(map(str, shots))}"
        )
    return found


def scaled(config: TrainConfig, scale: float) -> TrainConfig:
    """The same experiment with ``scale`` of the meta-updates.

    Epochs and the tasks of validation and test shrink with its square root, and with the epochs the schedules
    that count in them; iterations an epoch make up the rest. At least 4 epochs, 50 validation and 100 test tasks,
    or as many as there were.
    """
    if scale == 1:
        return config
    root = math.sqrt(scale)
    epochs = max(min(_LEAST_EPOCHS, config.epochs), round(root * config.epochs))
    share = epochs / config.epochs
    return replace(
        config,
        epochs=epochs,
        iterations_per_epoch=max(1, round(scale * config.iterations / epochs)),
        msl_epochs=max(min(1, config.msl_epochs), round(share * config.msl_epochs)),
        da_epoch=-1 if config.da_epoch < 0 else round(share * config.da_epoch),
        val_tasks=max(min(_LEAST_VAL_TASKS, config.val_tasks), round(root * config.val_tasks)),
        test_tasks=max(min(_LEAST_TEST_TASKS, config.test_tasks), round(root * config.test_tasks)),
    )
