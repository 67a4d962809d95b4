"""learn2learn's ``vision.datasets``, those that this package reads from local files."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mamlpp_fast.data import DataError, FewShotData, ImageClasses, load

__all__ = ["FullOmniglot", "MiniImagenet"]

Transform = Callable[[Any], Any]


class _Images(Dataset[Any]):
    """Images and labels of a sequence of splits, classes numbered in order."""

    def __init__(
        self, root: str | os.PathLike[str], transform: Transform | None, target_transform: Transform | None
    ) -> None:
        self.root = os.path.expanduser(root)
        self.transform = transform
        self.target_transform = target_transform

    def _take(self, images: Tensor, splits: list[ImageClasses]) -> None:
        self.images = images
        counts = torch.cat([split.class_count for split in splits])
        self.y = torch.arange(len(counts)).repeat_interleave(counts).tolist()

    def _image(self, item: int) -> Any:
        raise NotImplementedError

    def _label(self, item: int) -> Any:
        label = self.y[item]
        return label if self.target_transform is None else self.target_transform(label)

    def sample_labels(self) -> list[Any]:
        """The label of every sample."""
        return [self._label(i) for i in range(len(self))]

    def __getitem__(self, item: int) -> tuple[Any, Any]:
        image = self._image(item)
        return (image if self.transform is None else self.transform(image)), self._label(item)

    def __len__(self) -> int:
        return len(self.y)


def _first(name: str, root: str, choices: list[dict[str, Any]], download: bool) -> FewShotData:
    """What ``root`` has, else the usual places, by the first of the choices that will do; else the download.

    Raises:
        DataError: of the last attempt.
    """
    places = [root, None] if os.path.exists(root) else [None]
    attempts = [(place, choice) for place in places for choice in choices]
    for place, choice in attempts if download else attempts[:-1]:
        try:
            return load(name, place, **choice)
        except DataError:
            continue
    place, choice = (None, choices[0]) if download else attempts[-1]
    return load(name, place, download=download, **choice)


class FullOmniglot(_Images):
    """Omniglot's 1623 characters (Lake et al. 2015): the background set's first, each set by sorted name.

    Args:
        root: folder of the data: PNG folders, the original zips, ``omniglot_105.npz``, or ``omniglot.npz`` (28x28).
        transform: of the image, a grey Pillow image with paper 255 and ink 0.
        target_transform: of the class, 0 .. 1622.
        download: fetch the original zips where nothing is found.
        image_size: side of the images in pixels; 105 as they are, or 28 where only those are at hand.

    Raises:
        DataError: nothing found, or a damaged file.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        download: bool = False,
        *,
        image_size: int | None = None,
    ) -> None:
        super().__init__(root, transform, target_transform)
        sizes = (105, 28) if image_size is None else (image_size,)
        data = _first(
            "omniglot", self.root, [{"protocol": "lake", "image_size": size} for size in sizes], download
        )
        background = [(name, data.train, i) for i, name in enumerate(data.train.names)]
        background += [(name, data.val, i) for i, name in enumerate(data.val.names)]
        ordered = [split.select([i]) for _, split, i in sorted(background, key=lambda entry: entry[0])]
        splits = [*ordered, data.test]
        self._take(torch.cat([split.images for split in splits]), splits)

    def _image(self, item: int) -> Any:
        return Image.fromarray((255 - self.images[item, 0]).numpy())


@lru_cache(maxsize=1)
def _mini_imagenet(root: str) -> FewShotData:
    """All splits, which are read together: kept for the data sets of the others."""
    return _first("miniimagenet", root, [{"protocol": "unnormalised"}], download=False)


class MiniImagenet(_Images):
    """A split of mini-ImageNet (Ravi & Larochelle 2017); classes are numbered by sorted name.

    Args:
        root: folder of the data: ``mini-imagenet-cache-*.pkl``, ``mini_imagenet_*.npz``, or images with CSV files.
        mode: ``"train"``, ``"validation"`` or ``"test"``.
        transform: of the image, a float tensor [3, 84, 84] of values 0 .. 255.
        target_transform: kept; as in learn2learn, not applied.
        download: ignored; the data have no public address any more.

    Raises:
        ValueError: for another ``mode``.
        DataError: nothing found, or a damaged file.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        mode: str = "train",
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        download: bool = False,
    ) -> None:
        super().__init__(root, transform, target_transform)
        splits = {"train": "train", "validation": "val", "test": "test"}
        if mode not in splits:
            raise ValueError("Needs to be train, test or validation")
        self.mode = mode
        split = _mini_imagenet(self.root).split(splits[mode])
        self._take(split.images, [split])

    def _label(self, item: int) -> Any:
        return self.y[item]

    def _image(self, item: int) -> Tensor:
        return self.images[item].float()
