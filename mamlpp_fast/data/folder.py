"""Any folder of images, ``class/image`` or ``split/class/image``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mamlpp_fast.data.classes import SPLITS, FewShotData, ImageClasses
from mamlpp_fast.data.errors import DataError
from mamlpp_fast.data.locate import find, progress
from mamlpp_fast.data.pictures import decode_image

__all__ = ["PROTOCOLS", "classes_from_files", "load_folder", "read_classes", "to_pixels"]

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

    Without split folders the classes are ranked by the SHA-256 of their names and cut 64 : 16 : 20 into
    train, val and test: the same names always give the same split.

    Args:
        path: the folder; without it ``MAMLPP_FAST_DATA``, then the cache folder.
        protocol: a key of ``PROTOCOLS``.
        image_size: side in pixels to resize to (bicubic); without it all images must have one size.
        channels: 1 for grey or 3 for RGB; without it 1 where every image is grey.

    Raises:
        DataError: no such layout, a damaged image, images of different sizes, fewer than three classes.
    """
    if protocol not in PROTOCOLS:
        raise DataError(f"protocol: expected one of {', '.join(PROTOCOLS)} for folder, got '{protocol}'")
    if channels not in (None, 1, 3):
        raise DataError(f"channels: expected 1 or 3, got {channels}")
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size: expected at least 1, got {image_size}")
    root = find(
        "folder", path, lambda r: r if r.is_dir() else None, "a folder class/image or split/class/image"
    )
    present = {s: next((root / a for a in _ALIASES[s] if (root / a).is_dir()), None) for s in SPLITS}
    files: dict[str, dict[str, list[Path]]]
    if present["train"] is not None:
        missing = [s for s in SPLITS if present[s] is None]
        if missing:
            raise DataError(
                f"folder: '{root}': expected train/, val/ and test/, missing {', '.join(missing)}"
            )
        files = {s: _class_files(p) for s, p in present.items() if p is not None}
    else:
        files = _split_by_name(_class_files(root), root)
    if channels is None:
        channels = (
            1
            if all(_is_grey(p) for by_class in files.values() for ps in by_class.values() for p in ps)
            else 3
        )
    splits = {s: classes_from_files(files[s], s, image_size, channels, f"{root}") for s in SPLITS}
    return FewShotData(
        "folder",
        protocol,
        splits["train"],
        splits["val"],
        splits["test"],
        rotate_train_classes=protocol == "rotated",
    )


def read_classes(root: Path, split: str, size: int | None, channels: int) -> ImageClasses:
    """The split in ``root``, a folder of class folders."""
    return classes_from_files(_class_files(root), split, size, channels, str(root))


def classes_from_files(
    files: Mapping[str, Sequence[Path]], split: str, size: int | None, channels: int, source: str
) -> ImageClasses:
    """Reads the images of each class, classes by name and files as given.

    Raises:
        DataError: a damaged image, images of different sizes where ``size`` is None.
    """
    images: list[NDArray[np.uint8]] = []
    names = sorted(files)
    total = sum(len(files[n]) for n in names)
    for name in names:
        for file in files[name]:
            pixels = decode_image(file, str(file), "image", lambda image: to_pixels(image, size, channels))
            if images and pixels.shape != images[0].shape:
                (_, h0, w0), (_, h, w) = images[0].shape, pixels.shape
                raise DataError(f"{file}: expected {h0}x{w0} like the others (or an image_size), got {h}x{w}")
            images.append(pixels)
            if len(images) % 1000 == 0:
                progress(f"{source} {split}: reading images", len(images), total)
    count = torch.tensor([len(files[n]) for n in names], dtype=torch.int64)
    if not images:
        raise DataError(f"{source}, split '{split}': expected class folders with images, found none")
    return ImageClasses(
        torch.from_numpy(np.stack(images)), torch.cumsum(count, 0) - count, count, tuple(names), split, source
    )


def to_pixels(image: Image.Image, size: int | None, channels: int) -> NDArray[np.uint8]:
    """[channels, H, W] uint8, resized to a square of side ``size`` unless it is that already."""
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, np.uint8)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _class_files(root: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        files = sorted(f for f in folder.iterdir() if f.suffix.lower() in _SUFFIXES)
        if files:
            found[folder.name] = files
    if not found:
        raise DataError(f"folder: '{root}': expected class folders with images, found none")
    return found


def _split_by_name(files: dict[str, list[Path]], root: Path) -> dict[str, dict[str, list[Path]]]:
    if len(files) < 3:
        raise DataError(f"folder: '{root}': expected at least 3 classes to split, got {len(files)}")
    ranked = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())
    val = max(1, int(FRACTIONS[1] * len(ranked)))
    test = max(1, int(FRACTIONS[2] * len(ranked)))
    cuts = {"train": ranked[: -val - test], "val": ranked[-val - test : -test], "test": ranked[-test:]}
    return {split: {name: files[name] for name in names} for split, names in cuts.items()}


def _is_grey(file: Path) -> bool:
    return decode_image(file, str(file), "image", lambda image: image.mode in ("1", "L", "LA", "I;16"))
