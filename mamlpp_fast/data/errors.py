"""The one error that bad data raises, and the arguments that every loader checks."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["DataError", "check_protocol", "side_of"]


class DataError(ValueError):
    """A data set, archive or episode request that cannot be served.

    The message is one line that names the argument or file, what was expected and what came.
    """


def check_protocol(name: str, protocol: str, known: Iterable[str]) -> None:
    if protocol not in known:
        raise DataError(f"protocol: expected one of {', '.join(known)} for {name}, got '{protocol}'")


def side_of(name: str, image_size: int | None, own: int, least: int = 1, most: int | None = None) -> int:
    """The side of a data set's images in pixels: ``image_size``, or its own where that is None."""
    size = own if image_size is None else image_size
    if size < least or (most is not None and size > most):
        limits = f"at least {least}" if most is None else f"{least} .. {most} for {name}"
        raise DataError(f"image_size: expected {limits}, got {size}")
    return size
