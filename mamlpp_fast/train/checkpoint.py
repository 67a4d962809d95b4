"""Checkpoints: whole files of tensors and plain values, loaded without running anything they contain."""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mamlpp_fast._version import __version__
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
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or "it is truncated or something else"
        raise CheckpointError(f"{path}: expected a whole checkpoint, {reason}") from error
    if damaged is not None:
        raise CheckpointError(f"{path}: expected a whole checkpoint, its part {damaged} is damaged")
    content = load_tensors(path, device)
    expected = f"mamlpp_fast {kind}"
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != expected:
        raise CheckpointError(f"{path}: expected a {expected!r} checkpoint, got {found!r}")
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
        raise CheckpointError(
            f"{path}: expected tensors and plain values only, got {found}; refused, nothing was run"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: expected a checkpoint, {error.strerror}") from error
    except (RuntimeError, EOFError, KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: expected a checkpoint, {_first_line(error)}") from error


def check_fits(path: Path, what: str, own: Mapping[str, Any], loaded: Mapping[str, Any]) -> None:
    """Compares names and shapes before anything is loaded.

    Args:
        path: the checkpoint, for the message.
        what: ``"model"`` or ``"rates"``, for the message.
        own: the state dict it is to be loaded into.
        loaded: the state dict it holds.

    Raises:
        CheckpointError: names the first parameter that differs.
    """
    for name in [*own, *loaded]:
        ours = _shape(own.get(name))
        theirs = _shape(loaded.get(name))
        if ours != theirs:
            raise CheckpointError(f"{path}: expected {what} {name} {ours}, got {theirs}")


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"of shape {list(value.shape)}"
    return "absent" if value is None else type(value).__name__


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
