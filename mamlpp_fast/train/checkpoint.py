"""Checkpoints: whole files of tensors and plain values, loaded without running anything they contain."""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mamlpp_fast._version import __version__
from mamlpp_fast.data.archives import DAMAGED_ZIP, one_line, shown
from mamlpp_fast.data.pickles import Refused
from mamlpp_fast.train._vetting import vet
from mamlpp_fast.train.files import write_whole

__all__ = [
    "FORMAT_VERSION",
    "CheckpointError",
    "check_fits",
    "load_checkpoint",
    "load_tensors",
    "save_checkpoint",
]

FORMAT_VERSION = 1
Kind = Literal["training", "model", "authors"]
_EXPECTED = "expected tensors and plain values only"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, what was expected and what came."""


def save_checkpoint(path: Path, kind: Kind, content: Mapping[str, Any]) -> None:
    """Writes a checkpoint whole or not at all.

    Args:
        path: the file; an older one stays as it is until the new one is complete on disk.
        kind: ``"training"`` (everything a run goes on from), ``"model"`` (parameters and inner rates) or ``"authors"``
            (what an imported checkpoint of the authors' code has beyond these).
        content: tensors and plain values in dictionaries and lists.

    Raises:
        OSError: when it cannot be written.
    """
    buffer = io.BytesIO()
    header = {"format": f"mamlpp_fast {kind}", "version": FORMAT_VERSION, "package": __version__}
    torch.save(header | dict(content), buffer)
    write_whole(path, buffer.getvalue())


def load_checkpoint(path: Path, kind: Kind, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint that :func:`save_checkpoint` wrote.

    Only tensors and plain values are admitted: a pickle that would run code is refused before it can.

    Raises:
        CheckpointError: for a file that is missing, truncated, damaged, of another kind, written by a newer version,
            or that holds anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            if damaged is None:
                _vet(path, archive)
    except DAMAGED_ZIP as error:
        reason = getattr(error, "strerror", None) or "it is truncated or something else"
        raise CheckpointError(f"{path}: expected a whole checkpoint, {reason}") from error
    if damaged is not None:
        raise CheckpointError(f"{path}: expected a whole checkpoint, its part {shown(damaged)} is damaged")
    content = load_tensors(path, device)
    expected = f"mamlpp_fast {kind}"
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != expected:
        raise CheckpointError(f"{path}: expected a {expected!r} checkpoint, got {shown(found)}")
    if type(content.get("version")) is not int:
        raise CheckpointError(f"{path}: expected a format version, got {shown(content.get('version'))}")
    if content["version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: expected format {FORMAT_VERSION} or older, got {content['version']} "
            f"(written by mamlpp_fast {content.get('package')}, this is {__version__})"
        )
    result: dict[str, Any] = content
    return result


def load_tensors(path: Path, device: torch.device | str = "cpu") -> Any:
    """What ``torch.save`` wrote, in either of its formats, provided it is tensors and plain values.

    Raises:
        CheckpointError: for a file that is missing or damaged, or that holds anything else, which is never run.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other pickle protocols
            return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        found = f"a pickle that asks for {asked[1]}" if asked else "something else"
        raise CheckpointError(f"{path}: {_EXPECTED}, got {found}; refused, nothing was run") from error
    except OSError as error:
        raise CheckpointError(f"{path}: expected a checkpoint, {error.strerror}") from error
    except (RuntimeError, EOFError, KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: expected a checkpoint, {one_line(error)}") from error


def check_fits(path: Path, what: str, own: Mapping[str, Any], loaded: Any) -> None:
    """Compares names and shapes before anything is loaded.

    Args:
        path: the checkpoint, for the message.
        what: ``"model"`` or ``"rates"``, for the message.
        own: the state dict it is to be loaded into.
        loaded: the state dict it holds.

    Raises:
        CheckpointError: names the first parameter that differs.
    """
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: expected {what} by name, got {type(loaded).__name__}")
    for name in [*own, *loaded]:
        ours = _shape(own.get(name))
        theirs = _shape(loaded.get(name))
        if ours != theirs:
            raise CheckpointError(f"{path}: expected {what} {name!s:.100} {ours}, got {theirs}")


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"of shape {list(value.shape)}"
    return "absent" if value is None else type(value).__name__


def _vet(path: Path, archive: zipfile.ZipFile) -> None:
    try:
        vet(archive, lambda reason: CheckpointError(f"{path}: {reason}"))
    except CheckpointError:
        raise
    except Refused as refused:
        raise CheckpointError(
            f"{path}: {_EXPECTED}, got a pickle that asks for {refused}; refused, nothing was run"
        ) from None
    except Exception as error:  # a damaged pickle may raise anything at all
        raise CheckpointError(f"{path}: {_EXPECTED}, got a damaged pickle ({one_line(error)})") from error
