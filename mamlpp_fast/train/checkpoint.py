"""Checkpoints: whole files of tensors and plain values, loaded without running anything they contain."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from mamlpp_fast._modes import quiet
from mamlpp_fast._version import __version__
from mamlpp_fast.data.archives import DAMAGED_ZIP, one_line, shown
from mamlpp_fast.data.pickles import Refused
from mamlpp_fast.train._vetting import vet_archive, vet_legacy
from mamlpp_fast.train.files import write_whole

__all__ = [
    "FORMAT_VERSION",
    "CheckpointError",
    "checkpoint_bytes",
    "load_checkpoint",
    "load_tensors",
    "save_checkpoint",
]

FORMAT_VERSION = 1
Kind = Literal["training", "model", "authors"]
_ZIP = b"PK\x03\x04"  # what torch tells its two formats apart by
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
    write_whole(path, checkpoint_bytes(kind, content))


def checkpoint_bytes(kind: Kind, content: Mapping[str, Any]) -> bytes:
    """The file that :func:`save_checkpoint` writes."""
    buffer = io.BytesIO()
    header = {"format": f"mamlpp_fast {kind}", "version": FORMAT_VERSION, "package": __version__}
    torch.save(header | dict(content), buffer)
    return buffer.getvalue()


def load_checkpoint(path: Path, kind: Kind, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint that :func:`save_checkpoint` wrote.

    Only tensors and plain values are admitted: a pickle that would run code is refused before it can.

    Raises:
        CheckpointError: for a file that is missing, truncated, damaged, of another kind, written by a newer version,
            or that holds anything else.
    """
    content = _load(path, device, legacy=False)
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


def load_tensors(path: Path) -> Any:
    """What ``torch.save`` wrote, in either of its formats, provided it is tensors and plain values.

    Raises:
        CheckpointError: for a file that is missing or damaged, or that holds anything else, which is never run.
    """
    return _load(path, "cpu", legacy=True)


def _load(path: Path, device: torch.device | str, *, legacy: bool) -> Any:
    stream = _vetted(path, legacy)
    try:
        with quiet():  # about other pickle protocols
            return torch.load(stream, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        found = f"a pickle that asks for {asked[1]}" if asked else "something else"
        raise CheckpointError(f"{path}: {_EXPECTED}, got {found}; refused, nothing was run") from error
    except Exception as error:  # a damaged pickle may raise anything at all
        raise CheckpointError(f"{path}: expected a checkpoint, {one_line(error)}") from error


def _vetted(path: Path, legacy: bool) -> io.BytesIO:
    """What torch may read of the file, once it has been looked through."""
    try:
        content = path.read_bytes()
        if legacy and not content.startswith(_ZIP):
            return vet_legacy(content)
        return vet_archive(content, lambda reason: CheckpointError(f"{path}: {reason}"))
    except CheckpointError:
        raise
    except DAMAGED_ZIP as error:
        reason = getattr(error, "strerror", None) or "it is truncated or something else"
        raise CheckpointError(f"{path}: expected a whole checkpoint, {reason}") from error
    except Refused as refused:
        raise CheckpointError(
            f"{path}: {_EXPECTED}, got a pickle that asks for {refused}; refused, nothing was run"
        ) from None
    except Exception as error:  # a damaged pickle may raise anything at all
        raise CheckpointError(f"{path}: {_EXPECTED}, got a damaged pickle ({one_line(error)})") from error
