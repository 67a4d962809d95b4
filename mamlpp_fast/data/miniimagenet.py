"""mini-ImageNet: from the .npz triple, the common pickles, images with the CSV split, or split folders."""

from __future__ import annotations

import csv
import hashlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mamlpp_fast.data import folder
from mamlpp_fast.data.archives import one_line, read_npz, shown
from mamlpp_fast.data.authors import read_index
from mamlpp_fast.data.classes import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SPLITS,
    FewShotData,
    ImageClasses,
    from_arrays,
)
from mamlpp_fast.data.errors import DataError, check_protocol, side_of
from mamlpp_fast.data.locate import cache_folder, find, progress, write_atomically
from mamlpp_fast.data.pickles import read_pickle
from mamlpp_fast.data.pictures import decode_image, to_pixels

__all__ = ["PROTOCOLS", "load_miniimagenet"]

PROTOCOLS = {
    "ravi-larochelle": "64/16/20 classes, 84x84, /255, ImageNet mean and deviation",
    "unnormalised": "the same without mean and deviation",
}
_NPZ = "mini_imagenet_{}.npz"
_INDEX = "mini_imagenet_full_size.json"
_COLUMNS = (("filename", "label"), ("image_name", "class_name"))  # image and class
_PICKLES = {
    "train": ("mini-imagenet-cache-train.pkl", "miniImageNet_category_split_train_phase_train.pickle"),
    "val": (
        "mini-imagenet-cache-val.pkl",
        "mini-imagenet-cache-validation.pkl",  # learn2learn's
        "miniImageNet_category_split_val.pickle",
    ),
    "test": ("mini-imagenet-cache-test.pkl", "miniImageNet_category_split_test.pickle"),
}
_EXPECTED = (
    "mini_imagenet_{train,val,test}.npz, mini-imagenet-cache-{train,val,test}.pkl, "
    "miniImageNet_category_split_*.pickle, {train,val,test}.csv with images/, or folders train/, val/, test/"
)


def load_miniimagenet(
    path: str | os.PathLike[str] | None = None,
    *,
    protocol: str = "ravi-larochelle",
    image_size: int | None = None,
) -> FewShotData:
    """Loads mini-ImageNet (Vinyals et al. 2016) in the class split of Ravi & Larochelle (2017).

    Images decoded from .npz files are kept in the cache folder and mapped into memory from there.

    Args:
        path: a folder, or one file of a triple.
        protocol: a key of ``PROTOCOLS``.
        image_size: side in pixels, 84 without it; images of another size are resized (bicubic).

    Raises:
        DataError: nothing found, a damaged or incomplete archive, a pickle that names more than arrays.
    """
    check_protocol("miniimagenet", protocol, PROTOCOLS)
    size = side_of("miniimagenet", image_size, 84)
    place = find("miniimagenet", path, _probe, _EXPECTED)
    reader = _reader(place)
    assert reader is not None
    train, val, test = (reader(place, split, size) for split in SPLITS)
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if protocol == "ravi-larochelle" else ((), ())
    return FewShotData("miniimagenet", protocol, train, val, test, mean=mean, std=std)


def _probe(root: Path) -> Path | None:
    base = root.parent if root.is_file() else root
    for inner in (
        "",
        "mini-imagenet",
        "miniimagenet",
        "mini_imagenet",
        "mini_imagenet_full_size",
        "MiniImagenet",
    ):
        if (base / inner).is_dir() and _reader(base / inner) is not None:
            return base / inner
    return None


def _reader(place: Path) -> Callable[[Path, str, int], ImageClasses] | None:
    """The reader for what lies in ``place``; one file of a triple settles its kind."""
    if any((place / _NPZ.format(s)).is_file() for s in SPLITS):
        return _read_npz
    if any((place / name).is_file() for s in SPLITS for name in _PICKLES[s]):
        return _read_pickle
    if any((place / f"{s}.csv").is_file() for s in SPLITS):
        return _read_csv
    if all((place / s).is_dir() for s in SPLITS):
        return _read_folders
    return None


def _file(place: Path, *names: str) -> Path:
    """The first of these files that is there."""
    for name in names:
        if (place / name).is_file():
            return place / name
    raise DataError(f"miniimagenet: expected '{place / names[0]}' beside the other splits, found none")


def _read_npz(place: Path, split: str, size: int) -> ImageClasses:
    file = _file(place, _NPZ.format(split))
    a = read_npz(file, ("label", "wnid"))
    number = len(a["label"])
    cached = cache_folder() / f"mini_imagenet_{split}_{size}_{_content(file)}.npy"
    images = _open_cached(cached, (number, 3, size, size))
    if images is None:
        a |= read_npz(file, ("jpeg_header", "scan", "offset"))
        images = _decode_npz(a, f"mini-ImageNet {split}: decoding", str(file), size)
        try:
            write_atomically(cached, lambda temporary: _save(temporary, images))
            images = _open_cached(cached, images.shape)
        except OSError as error:
            progress(f"mini-ImageNet {split}: not cached ({error})", 1, 1)
    names = [str(w) for w in a["wnid"]]
    return from_arrays(images, a["label"].astype(np.int64), split, names=names, source=str(file))


def _content(file: Path) -> str:
    """A digest of the archive's directory, which holds each array's checksum: no array is read."""
    with zipfile.ZipFile(file) as archive:
        entries = [(i.filename, i.CRC, i.file_size) for i in archive.infolist()]
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:16]


def _open_cached(file: Path, shape: tuple[int, ...]) -> Any:
    try:
        # Copy on write: torch takes no array that cannot be written.
        images = np.load(file, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return images if images.shape == shape and images.dtype == np.uint8 else None


def _save(file: Path, images: NDArray[np.uint8]) -> None:
    with open(file, "wb") as stream:
        np.save(stream, images, allow_pickle=False)


def _decode_npz(a: dict[str, NDArray[Any]], label: str, source: str, size: int) -> NDArray[np.uint8]:
    header, scan, offset = a["jpeg_header"].tobytes(), a["scan"], a["offset"]
    number = len(a["label"])
    rising = len(offset) == number + 1 and number > 0 and not bool((np.diff(offset) < 0).any())
    if not rising or offset[0] != 0 or offset[-1] != len(scan):
        raise DataError(
            f"{source}: offset: expected {number + 1} rising numbers from 0 to {len(scan)}, "
            f"got {len(offset)} up to {int(offset[-1]) if len(offset) else 'none'}"
        )
    images = np.empty((number, 3, size, size), np.uint8)
    for i in range(number):
        data = header + scan[offset[i] : offset[i + 1]].tobytes() + b"\xff\xd9"
        images[i] = _decode(data, f"{source}, image {i}", size)
        if (i + 1) % 500 == 0 or i + 1 == number:
            progress(label, i + 1, number)
    return images


def _decode(data: bytes, source: str, size: int) -> NDArray[np.uint8]:
    return decode_image(
        data, source, "JPEG image", lambda image: to_pixels(image, source, size, 3, lambda: 0)
    )


def _read_pickle(place: Path, split: str, size: int) -> ImageClasses:
    file = _file(place, *_PICKLES[split])
    images, labels, names = _pickled(file, read_pickle(file))
    if images.shape[1:3] != (size, size):
        resized = [
            np.asarray(Image.fromarray(i).resize((size, size), Image.Resampling.BICUBIC)) for i in images
        ]
        images = np.stack(resized)
    channels_first = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return from_arrays(channels_first, labels, split, names=[str(n) for n in names], source=str(file))


def _pickled(file: Path, content: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[str]]:
    """Images [n, H, W, 3], their labels and the names of the classes, from either form of the pickles."""
    if isinstance(content, dict):
        content = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in content.items()}
    if isinstance(content, dict) and {"image_data", "class_dict"} <= content.keys():
        images, rows = _pickled_images(file, content["image_data"]), content["class_dict"]
        if not isinstance(rows, dict) or not rows:
            raise DataError(
                f"{file}: class_dict: expected a dict of image numbers, got {type(rows).__name__}"
            )
        order = sorted(rows, key=str)
        labels = np.full(len(images), -1, np.int64)
        for c, name in enumerate(order):
            index = _numbers(f"{file}: class_dict['{name!s:.50}']", rows[name])
            if len(index) and (index.min() < 0 or index.max() >= len(images)):
                raise DataError(
                    f"{file}: class_dict['{name!s:.50}']: expected 0 .. {len(images) - 1}, "
                    f"got {index.min()} .. {index.max()}"
                )
            labels[index] = c
        return images[labels >= 0], labels[labels >= 0], [str(n) for n in order]
    if isinstance(content, dict) and {"data", "labels"} <= content.keys():
        images = _pickled_images(file, content["data"])
        values = _numbers(f"{file}: labels", content["labels"])
        if len(values) != len(images):
            raise DataError(f"{file}: labels: expected {len(images)} numbers, got {list(values.shape)}")
        unique, labels = np.unique(values, return_inverse=True)
        return images, labels, [str(v) for v in unique]
    keys = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
    raise DataError(f"{file}: expected keys image_data and class_dict, or data and labels, got {keys!s:.200}")


def _pickled_images(file: Path, images: Any) -> NDArray[np.uint8]:
    kind = (
        f"{images.dtype!s:.50} {list(images.shape)}"
        if isinstance(images, np.ndarray)
        else type(images).__name__
    )
    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[3] != 3
    ):
        raise DataError(f"{file}: images: expected uint8 [n, H, W, 3], got {kind}")
    if 0 in images.shape:
        raise DataError(f"{file}: images: expected at least one pixel, got {list(images.shape)}")
    return images


def _numbers(what: str, value: Any) -> NDArray[np.int64]:
    """A list or array of integers; a list of lists may spell out to any size and is looked at no further."""
    fits = isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu"
    if isinstance(value, list | tuple) and all(isinstance(n, int | np.integer) for n in value):
        fits = all(-(2**63) <= n < 2**63 for n in value)
    if not fits:
        raise DataError(f"{what}: expected integers, got {type(value).__name__} of something else")
    return np.asarray(value, np.int64)


def _read_csv(place: Path, split: str, size: int) -> ImageClasses:
    """The split's list over one folder of images, flat or by class.

    Columns are ``filename,label`` (Ravi & Larochelle) or ``class_name,image_name`` (easy-few-shot-learning).
    """
    file = _file(place, f"{split}.csv")
    by_class: dict[str, list[Path]] = {}
    for name, label in _listed(file):
        places = [
            place / "images" / name,
            place / name,
            place / "images" / label / name,
            place / label / name,
        ]
        image = next((p for p in places if p.is_file()), None)
        if image is None:
            raise DataError(f"{file}: expected image {shown(name)} in '{place / 'images'}', found none")
        by_class.setdefault(label, []).append(image)
    return folder.classes_from_files(by_class, split, size, 3, str(file))


def _listed(file: Path) -> list[tuple[str, str]]:
    """Image and class of each row."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{file}: expected a list of images, got {one_line(error)}") from error
    columns = next((c for c in _COLUMNS if rows and rows[0].keys() >= set(c)), None)
    if columns is None:
        raise DataError(
            f"{file}: expected columns {' or '.join(map(','.join, _COLUMNS))} with at least one row"
        )
    listed = [(row[columns[0]], row[columns[1]]) for row in rows]
    if (short := next((i for i, pair in enumerate(listed) if None in pair), None)) is not None:
        raise DataError(f"{file}: expected {','.join(columns)} in every row, row {short + 1} is cut short")
    return listed


def _read_folders(place: Path, split: str, size: int) -> ImageClasses:
    """Split folders; in the order of the authors' index where there is one."""
    files = folder.class_files(place / split)
    index = read_index(place, _INDEX)
    if index is not None:
        files = {
            name: [f[i] for i in index.order(f"{split}/{name}", [p.name for p in f])]
            for name, f in files.items()
        }
    return folder.classes_from_files(files, split, size, 3, str(place / split))
