"""CIFAR-FS and FC100 from the subset archive: 100 classes, 80 images each, 32x32 RGB."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mamlpp_fast.data.archives import read_npz, shown
from mamlpp_fast.data.classes import SPLITS, FewShotData, ImageClasses
from mamlpp_fast.data.errors import DataError, check_protocol, side_of
from mamlpp_fast.data.locate import find
from mamlpp_fast.data.pictures import decode_image

__all__ = ["PROTOCOLS", "load_cifar_fs", "load_fc100"]

PROTOCOLS = {"normalised": "/255, CIFAR-100 training mean and deviation", "unnormalised": "/255"}
CIFAR_MEAN = (0.5071, 0.4865, 0.4409)
CIFAR_STD = (0.2673, 0.2564, 0.2762)
_FILE = "cifar_fs_subset.npz"


def load_cifar_fs(
    path: str | os.PathLike[str] | None = None, *, protocol: str = "normalised", image_size: int | None = None
) -> FewShotData:
    """Loads CIFAR-FS (Bertinetto et al. 2019), 64/16/20 classes, from ``cifar_fs_subset.npz``.

    The subset has 80 of each class's 600 images: its results are not comparable with published ones.

    Args:
        path: the file or its folder.
        protocol: a key of ``PROTOCOLS``.
        image_size: side in pixels, 32 without it; another one resizes (bicubic).

    Raises:
        DataError: nothing found, a damaged archive, an unknown protocol.
    """
    return _load("cifar-fs", "split_cifar_fs", path, protocol, image_size)


def load_fc100(
    path: str | os.PathLike[str] | None = None, *, protocol: str = "normalised", image_size: int | None = None
) -> FewShotData:
    """Loads FC100 (Oreshkin et al. 2018), 60/20/20 classes by superclass; otherwise as CIFAR-FS."""
    return _load("fc100", "split_fc100", path, protocol, image_size)


def _probe(root: Path) -> Path | None:
    file = root if root.is_file() else root / _FILE
    return file if file.is_file() else None


def _load(
    name: str, key: str, path: str | os.PathLike[str] | None, protocol: str, image_size: int | None
) -> FewShotData:
    check_protocol(name, protocol, PROTOCOLS)
    size = side_of(name, image_size, 32)
    file = find(name, path, _probe, _FILE)
    a = read_npz(file, ("webp", "offset", "name", key))
    names = [str(n) for n in a["name"]]
    offset = a["offset"]
    if len(offset) != len(names) + 1 or int(offset[-1]) != len(a["webp"]):
        raise DataError(
            f"{file}: offset: expected {len(names) + 1} numbers up to {len(a['webp'])}, got {len(offset)}"
        )
    splits = {}
    for split in SPLITS:
        classes = np.flatnonzero(a[key] == split).tolist()
        if not classes:
            raise DataError(f"{file}: {key}: expected classes of split '{split}', found none")
        strips = [
            _decode(a["webp"][offset[c] : offset[c + 1]].tobytes(), f"{file}, class {shown(names[c])}", size)
            for c in classes
        ]
        count = torch.tensor([len(s) for s in strips])
        splits[split] = ImageClasses(
            torch.cat(strips),
            torch.cumsum(count, 0) - count,
            count,
            tuple(names[c] for c in classes),
            split,
            str(file),
        )
    train, val, test = (splits[s] for s in SPLITS)
    mean, std = (CIFAR_MEAN, CIFAR_STD) if protocol == "normalised" else ((), ())
    return FewShotData(name, protocol, train, val, test, mean=mean, std=std)


def _decode(data: bytes, source: str, size: int) -> torch.Tensor:
    """A strip of images, one under the other, as [n, 3, size, size]."""
    image = decode_image(data, source, "WebP image", lambda strip: strip.convert("RGB"))
    side = image.width
    if image.height % side:
        raise DataError(f"{source}: expected a strip of square images, got {image.width}x{image.height}")
    pixels = np.array(image, np.uint8).reshape(-1, side, side, 3)
    if size != side:
        pixels = np.stack(
            [np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC)) for p in pixels]
        )
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
