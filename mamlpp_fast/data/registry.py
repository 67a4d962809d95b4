"""Data sets by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from mamlpp_fast.data import cifar, folder, miniimagenet, omniglot, strokes
from mamlpp_fast.data.classes import FewShotData
from mamlpp_fast.data.errors import DataError, check_protocol

__all__ = ["DATASETS", "load", "protocols"]

_LOADERS: dict[str, tuple[Callable[..., FewShotData], tuple[str, ...]]] = {
    "strokes": (strokes.load_strokes, tuple(strokes.PROTOCOLS)),
    "omniglot": (omniglot.load_omniglot, tuple(omniglot.PROTOCOLS)),
    "miniimagenet": (miniimagenet.load_miniimagenet, tuple(miniimagenet.PROTOCOLS)),
    "cifar-fs": (cifar.load_cifar_fs, tuple(cifar.PROTOCOLS)),
    "fc100": (cifar.load_fc100, tuple(cifar.PROTOCOLS)),
    "folder": (folder.load_folder, tuple(folder.PROTOCOLS)),
}
DATASETS = tuple(_LOADERS)


def protocols(name: str) -> tuple[str, ...]:
    """The protocols of a data set, the default one first.

    Raises:
        DataError: for an unknown data set.
    """
    if name not in _LOADERS:
        raise DataError(f"dataset: expected one of {', '.join(DATASETS)}, got '{name}'")
    return _LOADERS[name][1]


def load(
    name: str,
    path: str | os.PathLike[str] | None = None,
    *,
    protocol: str = "default",
    image_size: int | None = None,
    download: bool = False,
    **options: Any,
) -> FewShotData:
    """Loads a data set.

    Args:
        name: one of ``DATASETS``.
        path: file or folder that holds the data; without it the environment variable ``MAMLPP_FAST_DATA``,
            then the cache folder (``~/.cache/mamlpp_fast/data``). ``strokes`` needs none.
        protocol: ``"default"``, which is the published one, or one of ``protocols(name)``.
        image_size: side of the images in pixels; without it the published one.
        download: allow a download into the cache folder where nothing is found (omniglot).
        options: what else the data set's own loader takes (``seed`` of strokes, ``channels`` of folder).

    Returns:
        the three splits with scaling and augmentation.

    Raises:
        DataError: an unknown name or protocol, nothing found, or data that are not as expected.
    """
    known = protocols(name)
    if protocol == "default":
        protocol = known[0]
    check_protocol(name, protocol, known)
    if download:
        if name != "omniglot":
            raise DataError(
                f"download: expected omniglot, the one data set with a public address, got '{name}'"
            )
        options["download"] = True
    try:
        return _LOADERS[name][0](path, protocol=protocol, image_size=image_size, **options)
    except MemoryError as error:
        raise DataError(
            f"{name}: expected data and an image_size ({image_size}) that fit in memory, {error!s:.200}"
        ) from None
