"""Image files, whatever they hold, as 8-bit grey or colour on white."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

from mamlpp_fast._modes import quiet
from mamlpp_fast.data.archives import one_line
from mamlpp_fast.data.errors import DataError

__all__ = ["decode_image", "is_grey", "largest_integer", "to_pixels"]

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
        # PIL warns of pixels by the hundred million, which the limit below is about, and of damaged headers.
        with quiet():
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


def is_grey(image: Image.Image) -> bool:
    """Whether an image is of greys by its mode, or by every colour that it takes from a palette."""
    if image.mode in ("P", "PA"):
        used = image.histogram()[:256]
        colours = np.reshape(image.getpalette() or (), (-1, 3))
        return all(len(set(colour)) == 1 for colour, n in zip(colours.tolist(), used, strict=False) if n)
    return image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")


def largest_integer(image: Image.Image) -> int:
    """The largest value of an image of 32-bit integers, 0 of any other."""
    return int(np.asarray(image).max()) if image.mode == "I" else 0


def to_pixels(
    image: Image.Image, source: str, size: int | None, channels: int, largest: Callable[[], int]
) -> NDArray[np.uint8]:
    """[channels, H, W] uint8, on white where the image lets light through.

    Values of 16 bits are divided by 65535, of floating point taken as 0 .. 1. A file of 32-bit integers does not tell
    its range: they are taken as 8 bits where the whole data set has none above 255, else as 16 bits.

    Args:
        image: as opened.
        source: what a message calls it.
        size: side of the square to resize to (bicubic) unless it is that already.
        channels: 1 or 3.
        largest: the largest value of the data set's images of 32-bit integers; called where this is one of them.

    Raises:
        DataError: for floating-point values outside 0 .. 1, or 32-bit integers outside 0 .. 65535.
    """
    if image.mode.startswith("I;16"):
        image = _scaled(_on_white_paper(image), 65535)
    elif image.mode == "I":
        white = 255 if largest() <= 255 else 65535  # before this one is decoded too
        image = _scaled(_within(image, source, "32-bit integers", 65535), white)
    elif image.mode == "F":
        image = _scaled(_within(image, source, "floating-point values", 1), 1)
    clear = None
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        clear = ImageChops.invert(image.convert("RGBA").getchannel("A"))
        image.info.pop("transparency", None)  # Pillow would carry it along, or warn
    image = image.convert("L" if channels == 1 else "RGB")
    if clear is not None:
        image.paste("white", mask=clear)
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, np.uint8)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _on_white_paper(image: Image.Image) -> NDArray[Any]:
    """16-bit values, white in place of the one value that a PNG file may call transparent."""
    values: NDArray[Any] = np.asarray(image)
    clear = image.info.get("transparency")
    return values if clear is None else np.where(values == clear, np.uint16(65535), values)


def _within(image: Image.Image, source: str, kind: str, white: int) -> NDArray[Any]:
    values: NDArray[Any] = np.asarray(image)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):  # nor are NaNs
        raise DataError(
            f"{source}: expected {kind} in 0 .. {white}, got {low:g} .. {high:g}; "
            "scale them, or give arrays to data.from_arrays"
        )
    return values


def _scaled(values: NDArray[Any], white: int) -> Image.Image:
    """Grey levels of 8 bits."""
    levels = np.multiply(values, np.float32(255 / white), dtype=np.float32, casting="unsafe")
    return Image.fromarray(np.rint(levels, out=levels).astype(np.uint8))
