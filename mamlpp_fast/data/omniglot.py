"""Omniglot: from .npz files, PNG folders, the original zips or a download, under the published protocols."""

from __future__ import annotations

import hashlib
import os
import re
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mamlpp_fast.data.archives import DAMAGED_ZIP, check_expansion, one_line, read_npz
from mamlpp_fast.data.authors import authors_class_split, read_index
from mamlpp_fast.data.classes import FewShotData, ImageClasses
from mamlpp_fast.data.errors import DataError, check_protocol, side_of
from mamlpp_fast.data.locate import cache_folder, find, progress, write_atomically
from mamlpp_fast.data.pictures import decode_image

__all__ = ["PROTOCOLS", "download_omniglot", "load_omniglot"]

ZIPS = {
    "images_background.zip": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation.zip": "6b91aef0f799c5bb55b94e3f2daec811",
}
URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
# The characters' path in every layout: [images_background/]Alphabet/character07/0815_03.png
_MEMBER = re.compile(r"(?:^|/)([^/]+)/(character\d+)/(\d+_\d+)\.png$", re.IGNORECASE)
_INDEX = "omniglot_dataset.json"
_EXPECTED = (
    "omniglot.npz, omniglot_105.npz, images_background.zip + images_evaluation.zip or folders of PNG files"
)


@dataclass(frozen=True)
class _Protocol:
    antialiased: bool
    ink_high: bool
    split: str
    about: str


PROTOCOLS = {
    "maml++": _Protocol(False, False, "authors", "MAML++: 1150/50/423 shuffled, binary, paper 1, ink 0"),
    "maml++-antialiased": _Protocol(True, True, "authors", "the same classes, grey levels, ink 1"),
    "lake": _Protocol(
        True, True, "lake", "background (50 classes kept for validation) / evaluation alphabets"
    ),
    "lake-binary": _Protocol(False, False, "lake", "the same, binary pixels, paper 1, ink 0"),
    "vinyals": _Protocol(
        True, True, "vinyals", "1200 classes to train (50 of them kept for validation) / 423"
    ),
}


@dataclass(frozen=True)
class _Drawings:
    """All classes by sorted "alphabet/character": images [classes, 20, size, size] uint8, ink = 255.

    ``drawers`` has the number of who drew each, with which the file's name ends, as text.
    """

    images: NDArray[np.uint8]
    names: list[str]
    drawers: list[list[str]]
    background: NDArray[np.bool_]
    source: str


def load_omniglot(
    path: str | os.PathLike[str] | None = None,
    *,
    protocol: str = "maml++",
    image_size: int | None = None,
    download: bool = False,
) -> FewShotData:
    """Loads Omniglot (Lake et al. 2015): 1623 characters of 50 alphabets, 20 drawings each.

    Drawings of a character are in the order of their names; for the protocols ``maml++`` in that of the authors' index
    ``omniglot_dataset.json`` where it lies in the data's folder or beside it.

    Args:
        path: a file or folder, see :func:`mamlpp_fast.data.load`.
        protocol: a key of ``PROTOCOLS``.
        image_size: side in pixels, 28 without it.
        download: fetch the two original zips into the cache folder where nothing is found.

    Raises:
        DataError: nothing found, a damaged archive, a failed download, an unknown protocol.
    """
    check_protocol("omniglot", protocol, PROTOCOLS)
    p = PROTOCOLS[protocol]
    size = side_of("omniglot", image_size, 28, 1, 105)
    try:
        place = find("omniglot", path, _probe, _EXPECTED)
    except DataError:
        if not download:
            raise
        place = download_omniglot()
    drawings = _read(place, size, p.antialiased)
    if p.split == "authors":
        _sort_as_authors(drawings, place if place.is_dir() else place.parent)
    parts = _split(drawings, p.split)

    pixels = drawings.images if p.ink_high else 255 - drawings.images
    number, drawers = pixels.shape[:2]
    everything = ImageClasses(
        torch.from_numpy(np.ascontiguousarray(pixels).reshape(-1, 1, size, size)),
        torch.arange(number) * drawers,
        torch.full((number,), drawers),
        tuple(drawings.names),
        "all",
        drawings.source,
    )
    train, val, test = (everything.select(c, s) for c, s in zip(parts, ("train", "val", "test"), strict=True))
    return FewShotData("omniglot", protocol, train, val, test, rotate_train_classes=True)


def _sort_as_authors(drawings: _Drawings, folder: Path) -> None:
    index = read_index(folder, _INDEX)
    if index is None:
        return
    # Of file names only the drawer: archives of arrays have no more, and the rest is the class.
    listed = {
        label: [PurePath(n).stem.rpartition("_")[2] for n in names] for label, names in index.listed.items()
    }
    index = replace(index, listed=listed)
    for images, name, drawers in zip(drawings.images, drawings.names, drawings.drawers, strict=True):
        images[:] = images[index.order(name, drawers)]


def _split(drawings: _Drawings, kind: str) -> tuple[list[int], list[int], list[int]]:
    number = len(drawings.names)
    if kind == "authors":
        return authors_class_split(number)
    if kind == "lake":
        pool = np.flatnonzero(drawings.background)
        test = np.flatnonzero(~drawings.background)
        if len(pool) < 100 or len(test) == 0:
            raise DataError(
                f"{drawings.source}: protocol 'lake' expects images_background and images_evaluation, "
                f"got {len(pool)} and {len(test)} classes"
            )
    else:
        order = np.random.RandomState(0).permutation(number)
        cut = 1200 * number // 1623
        pool, test = order[:cut], np.sort(order[cut:])
    pool = np.random.RandomState(1).permutation(pool)
    return sorted(pool[50:].tolist()), sorted(pool[:50].tolist()), test.tolist()


def _probe(root: Path) -> Path | None:
    """The first form of Omniglot in or at ``root``."""
    if root.is_file():
        return root
    for inner in ("", "omniglot-py", "omniglot", "omniglot_dataset", "omniglot/python"):
        folder = root / inner
        if not folder.is_dir():
            continue
        for name in ("omniglot.npz", "omniglot_105.npz"):
            if (folder / name).is_file():
                return folder / name
        if (folder / "images_background").is_dir() or (folder / "images_evaluation").is_dir():
            return folder
        if all((folder / z).is_file() for z in ZIPS):
            return folder
        if any(folder.glob("*/character*/*_*.png")):
            return folder
    return None


def _read(place: Path, size: int, antialiased: bool) -> _Drawings:
    if place.is_dir():
        folders = [place / Path(z).stem for z in ZIPS if (place / Path(z).stem).is_dir()]
        if folders or not all((place / z).is_file() for z in ZIPS):
            return _from_pngs(str(place), _files(place), size, antialiased)
        return _from_pngs(str(place), _members([place / z for z in ZIPS]), size, antialiased)
    if place.suffix == ".zip":
        others = [place.parent / z for z in ZIPS]
        return _from_pngs(
            str(place),
            _members(others if place in others and all(o.exists() for o in others) else [place]),
            size,
            antialiased,
        )
    if place.suffix == ".npz":
        return _from_npz(place, size, antialiased)
    raise DataError(f"{place}: expected {_EXPECTED}")


def _from_npz(file: Path, size: int, antialiased: bool) -> _Drawings:
    with_105 = file.name.startswith("omniglot_105")
    key = "images_packed" if with_105 else ("images" if antialiased else "images_maml_packed")
    a = read_npz(file, (key, "split", "alphabet", "character"))
    raw = a[key]
    number = len(a["alphabet"])
    wanted = {"images_packed": (105, 14), "images": (28, 28), "images_maml_packed": (28, 4)}[key]
    if raw.ndim != 4 or raw.dtype != np.uint8 or raw.shape[0] != number or raw.shape[2:] != wanted:
        raise DataError(
            f"{file}: {key}: expected uint8 [{number}, 20, {wanted[0]}, {wanted[1]}], "
            f"got {raw.dtype} {list(raw.shape)}"
        )
    if size != 28 and not with_105:
        original = file.with_name("omniglot_105.npz")
        if original.is_file():
            return _from_npz(original, size, antialiased)
        raise DataError(
            f"image_size: {file} holds 28x28 alone (omniglot_105.npz has the original), "
            f"expected 28, got {size}"
        )
    if key == "images":
        images = raw
    else:
        images = np.unpackbits(raw, axis=-1, count=raw.shape[2]) * np.uint8(255)
        if with_105 and antialiased:
            flat = images.reshape(-1, 105, 105)
            images = np.stack([_antialias(i, size) for i in flat]).reshape(*images.shape[:2], size, size)
        elif with_105:
            images = _nearest(images, size)
    names = [
        f"{alphabet}/character{character:02d}"
        for alphabet, character in zip(a["alphabet"], a["character"], strict=True)
    ]
    order = sorted(range(number), key=lambda i: names[i])
    drawers = [[f"{d + 1:02d}" for d in range(images.shape[1])]] * number
    background = (a["split"] == "background")[order]
    return _Drawings(images[order], [names[i] for i in order], drawers, background, str(file))


def _nearest(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """What Pillow makes of a 1-bit image, whatever the filter: source pixel floor((k + 1/2) * n / size)."""
    rows, columns = (
        ((np.arange(size) + 0.5) * n / size).astype(np.int64) for n in (images.shape[-2], images.shape[-1])
    )
    return np.ascontiguousarray(images[..., rows, :][..., columns])


def _antialias(ink: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(ink).resize((size, size), Image.Resampling.LANCZOS))


def _files(folder: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for file in sorted(folder.rglob("*.png")):
        yield file.relative_to(folder).as_posix(), file.read_bytes


def _members(zips: list[Path]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for archive in zips:
        try:
            with zipfile.ZipFile(archive) as z:
                check_expansion(z, str(archive))
                for name in sorted(z.namelist()):
                    yield f"{archive.stem}/{name}", lambda z=z, name=name: z.read(name)  # type: ignore[misc]
        except DAMAGED_ZIP as error:
            raise DataError(
                f"{archive}: expected a whole zip archive, got a damaged one ({one_line(error)})"
            ) from error


def _from_pngs(
    source: str, files: Iterator[tuple[str, Callable[[], bytes]]], size: int, antialiased: bool
) -> _Drawings:
    classes: dict[str, list[tuple[str, NDArray[np.uint8]]]] = {}
    background: dict[str, bool] = {}
    done = 0
    for name, read in files:
        match = _MEMBER.search(name)
        if match is None:
            continue
        try:
            data = read()
        except DAMAGED_ZIP as error:
            raise DataError(
                f"{source}: expected a whole zip archive, got a damaged one ({one_line(error)})"
            ) from error
        ink = _decode(f"{source}/{name}", data)
        label = f"{match[1]}/{match[2]}"
        classes.setdefault(label, []).append(
            (match[3], _antialias(ink, size) if antialiased else _nearest(ink, size))
        )
        background[label] = "images_evaluation" not in name
        done += 1
        if done % 1000 == 0:
            progress("omniglot: reading drawings", done, 32460)
    if not classes:
        raise DataError(f"{source}: expected alphabet/character01/0001_01.png files, found none")
    names = sorted(classes)
    few = min(names, key=lambda n: len(classes[n]))
    many = max(names, key=lambda n: len(classes[n]))
    if len(classes[few]) != len(classes[many]):
        raise DataError(
            f"{source}: expected as many drawings of each character, got {len(classes[few])} of '{few}' "
            f"and {len(classes[many])} of '{many}'"
        )
    ordered = [sorted(classes[n], key=lambda t: t[0]) for n in names]
    images = np.stack([np.stack([image for _, image in drawings]) for drawings in ordered])
    drawers = [[file.rpartition("_")[2] for file, _ in drawings] for drawings in ordered]
    return _Drawings(images, names, drawers, np.array([background[n] for n in names]), source)


def _decode(name: str, data: bytes) -> NDArray[np.uint8]:
    """A PNG as ink = 255 on paper = 0."""
    paper: NDArray[Any] = decode_image(
        data, name, "PNG file", lambda image: np.asarray(image.convert("L")), sides=1024
    )
    return np.where(paper >= 128, 0, 255).astype(np.uint8)


def download_omniglot(folder: Path | None = None) -> Path:
    """Fetches the two original zips and checks them; those already there and whole are kept.

    Args:
        folder: where to, ``omniglot-py`` in the cache folder without it.

    Returns:
        the folder.

    Raises:
        DataError: no network, or a file whose MD5 is not the published one.
    """
    folder = cache_folder() / "omniglot-py" if folder is None else folder
    for name, md5 in ZIPS.items():
        file = folder / name
        if file.is_file() and _md5(file.read_bytes()) == md5:
            continue
        try:
            with urllib.request.urlopen(URL + name, timeout=60) as response:
                data = response.read()
        except (urllib.error.URLError, OSError) as error:
            raise DataError(f"download: expected {URL + name}, got {' '.join(str(error).split())}") from error
        if _md5(data) != md5:
            raise DataError(f"download: {URL + name}: expected MD5 {md5}, got {_md5(data)}")
        write_atomically(file, lambda temporary, data=data: _write(temporary, data))  # type: ignore[misc]
    return folder


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _write(file: Path, data: bytes) -> None:
    file.write_bytes(data)
