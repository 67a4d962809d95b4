"""Decoding of image files, whatever they hold."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from PIL import Image

from mamlpp_fast.data.archives import one_line
from mamlpp_fast.data.errors import DataError

__all__ = ["decode_image"]

_T = TypeVar("_T")


def decode_image(
    file: Path | bytes, source: str, kind: str, make: Callable[[Image.Image], _T], *, sides: int = 8192
) -> _T:
    """What ``make`` makes of an image.

    Args:
        file: the image file, or its content.
        source: what a message calls it.
        kind: what a message says was expected, such as ``"PNG file"``.
        make: takes the image as opened, not yet decoded.
        sides: most pixels that height and width multiply to, as the side of a square.

    Raises:
        DataError: for a file that is no whole image, or one of too many pixels.
    """
    try:
        with warnings.catch_warnings():
            # Of pixels by the hundred million, which the limit below is about, and of damaged headers.
            warnings.simplefilter("ignore")
            # In memory: of a file, a chunk's length in its header sets aside as much.
            content = file if isinstance(file, bytes) else file.read_bytes()
            with Image.open(io.BytesIO(content)) as image:
                if image.width * image.height > sides * sides:
                    raise DataError(
                        f"{source}: expected at most {sides}x{sides} pixels, got {image.width}x{image.height}"
                    )
                return make(image)
    except DataError:
        raise
    except Exception as error:  # a damaged image may raise anything at all
        raise DataError(f"{source}: expected a whole {kind}, got {one_line(error)}") from error
