"""Any folder of images, ``class/image`` or ``split/class/image``."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mamlpp_fast.data.classes import SPLITS, FewShotData, ImageClasses
from mamlpp_fast.data.errors import DataError, check_protocol
from mamlpp_fast.data.locate import find, progress
from mamlpp_fast.data.pictures import decode_image, is_grey, largest_integer, to_pixels

__all__ = ["PROTOCOLS", "class_files", "classes_from_files", "load_folder"]

PROTOCOLS = {
    "plain": "/255, no rotation",
    "rotated": "/255, training turns each class by multiples of 90 degrees",
}
FRACTIONS = (0.64, 0.16, 0.20)
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
_ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def load_folder(
    path: str | os.PathLike[str] | None = None,
    *,
    protocol: str = "plain",
    image_size: int | None = None,
    channels: int | None = None,
) -> FewShotData:
    """Loads ``split/class/image`` (splits train, val, test) or ``class/image``.

    A folder ``train``, ``val`` or ``test`` that holds images itself is a class by that name. Without split folders the
    classes are ranked by the SHA-256 of their names and cut 64 : 16 : 20 into train, val and test: the same names
    always give the same split. Hidden files are left out, and so are folders without images.

    Images stand upright as their EXIF data say, on white where they are transparent. Values of 16 bits are divided by
    65535, floating-point ones taken as 0 .. 1, 32-bit integers as 8 bits where none of any image is above 255, else as
    16 bits.

    Args:
        path: the folder; without it ``MAMLPP_FAST_DATA``, then the cache folder.
        protocol: a key of ``PROTOCOLS``.
        image_size: side in pixels to resize to (bicubic); without it all images must have one size.
        channels: 1 for grey or 3 for RGB; without it 1 where every image is grey.

    Raises:
        DataError: no such layout, a damaged image, one with values outside the ranges above, images of different
            sizes, fewer than three classes.
    """
    check_protocol("folder", protocol, PROTOCOLS)
    if channels not in (None, 1, 3):
        raise DataError(f"channels: expected 1 or 3, got {channels}")
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size: expected at least 1, got {image_size}")
    root = find(
        "folder", path, lambda r: r if r.is_dir() else None, "a folder class/image or split/class/image"
    )
    present = {s: next((root / a for a in _ALIASES[s] if (root / a).is_dir()), None) for s in SPLITS}
    files: dict[str, dict[str, list[Path]]]
    named = [p for p in present.values() if p is not None]
    if any(map(_is_split, named)) or (named and set(named) == set(_folders(root))):
        missing = [s for s in SPLITS if present[s] is None]
        if missing:
            raise DataError(
                f"folder: '{root}': expected train/, val/ and test/, missing {', '.join(missing)}"
            )
        files = {s: class_files(p) for s, p in present.items() if p is not None}
    else:
        files = _split_by_name(class_files(root), root)
    every = [p for by_class in files.values() for ps in by_class.values() for p in ps]
    if channels is None:
        channels = 1 if all(decode_image(p, str(p), "image", is_grey) for p in every) else 3
    largest = functools.cache(lambda: _largest(every))
    train, val, test = (
        classes_from_files(files[s], s, image_size, channels, f"{root}", upright=True, largest=largest)
        for s in SPLITS
    )
    return FewShotData("folder", protocol, train, val, test, rotate_train_classes=protocol == "rotated")


def classes_from_files(
    files: Mapping[str, Sequence[Path]],
    split: str,
    size: int | None,
    channels: int,
    source: str,
    *,
    upright: bool = False,
    largest: Callable[[], int] | None = None,
) -> ImageClasses:
    """Reads the images of each class, classes by name and files as given.

    Args:
        files: the files of each class.
        split: name of the split.
        size: side in pixels to resize to; without it all images must have one size.
        channels: 1 or 3.
        source: for messages.
        upright: turn images as their EXIF data say, as no published protocol does.
        largest: see :func:`mamlpp_fast.data.pictures.to_pixels`; without it that of these files.

    Raises:
        DataError: a damaged image, images of different sizes where ``size`` is None.
    """
    images: list[NDArray[np.uint8]] = []
    names = sorted(files)
    total = sum(len(files[n]) for n in names)
    if largest is None:
        largest = functools.cache(lambda: _largest([file for n in names for file in files[n]]))
    for name in names:
        for file in files[name]:
            pixels = _read(file, size, channels, upright, largest)
            if images and pixels.shape != images[0].shape:
                (_, h0, w0), (_, h, w) = images[0].shape, pixels.shape
                raise DataError(f"{file}: expected {h0}x{w0} like the others (or an image_size), got {h}x{w}")
            images.append(pixels)
            if len(images) % 1000 == 0:
                progress(f"{source} {split}: reading images", len(images), total)
    count = torch.tensor([len(files[n]) for n in names], dtype=torch.int64)
    return ImageClasses(
        torch.from_numpy(np.stack(images)), torch.cumsum(count, 0) - count, count, tuple(names), split, source
    )


def _read(
    file: Path, size: int | None, channels: int, upright: bool, largest: Callable[[], int]
) -> NDArray[np.uint8]:
    def make(image: Image.Image) -> NDArray[np.uint8]:
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
        return to_pixels(image, str(file), size, channels, largest)

    return decode_image(file, str(file), "image", make)


def _largest(files: Sequence[Path]) -> int:
    return max(decode_image(file, str(file), "image", largest_integer) for file in files)


def class_files(root: Path) -> dict[str, list[Path]]:
    """The image files in each folder of ``root`` that has any, by name; nothing hidden.

    Raises:
        DataError: where there are none.
    """
    found = {folder.name: files for folder in _folders(root) if (files := _images(folder))}
    if not found:
        raise DataError(f"folder: '{root}': expected class folders with images, found none")
    return found


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    """Hidden files are left out: beside each picture macOS may keep a ``._`` one that is none."""
    return sorted(
        f
        for f in folder.iterdir()
        if f.suffix.lower() in _SUFFIXES and not f.name.startswith(".") and not f.is_dir()
    )


def _is_split(folder: Path) -> bool:
    """Whether a folder holds classes, not images: one called ``train`` may be a class."""
    return not _images(folder) and any(_images(inner) for inner in _folders(folder))


def _split_by_name(files: dict[str, list[Path]], root: Path) -> dict[str, dict[str, list[Path]]]:
    if len(files) < 3:
        raise DataError(f"folder: '{root}': expected at least 3 classes to split, got {len(files)}")
    ranked = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())
    val = max(1, int(FRACTIONS[1] * len(ranked)))
    test = max(1, int(FRACTIONS[2] * len(ranked)))
    cuts = {"train": ranked[: -val - test], "val": ranked[-val - test : -test], "test": ranked[-test:]}
    return {split: {name: files[name] for name in names} for split, names in cuts.items()}
