"""learn2learn's ``vision.benchmarks``, those that this package reads from local files."""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Callable, KeysView
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamlpp_fast.compat.learn2learn.data import FilteredMetaDataset, MetaDataset, OnDeviceDataset, Taskset
from mamlpp_fast.compat.learn2learn.data.transforms import (
    ConsecutiveLabels,
    FusedNWaysKShots,
    KShots,
    LoadData,
    NWays,
    RemapLabels,
)
from mamlpp_fast.compat.learn2learn.vision.datasets import FullOmniglot, MiniImagenet
from mamlpp_fast.compat.learn2learn.vision.transforms import RandomClassRotation

__all__ = ["BenchmarkTasksets", "get_tasksets", "list_tasksets"]

Parts = tuple[list[MetaDataset], list[list[Callable[[Any], Any]]]]


class BenchmarkTasksets(NamedTuple):
    """The three task sets of a benchmark."""

    train: Taskset
    validation: Taskset
    test: Taskset


def _ink(image: Any) -> Tensor:
    """A grey Pillow image as a tensor [1, H, W] with paper 0 and ink 1."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return 1.0 - pixels.view(1, image.height, image.width) / 255


def omniglot_tasksets(
    train_ways: int,
    train_samples: int,
    test_ways: int,
    test_samples: int,
    root: str,
    device: torch.device | str | None = None,
    *,
    disjoint: bool = False,
    **kwargs: Any,
) -> Parts:
    """Omniglot, 28x28, ink 1: 1100, 100 and 423 shuffled characters.

    As in learn2learn 0.2.0, the tasks of all three are drawn from all 1623 characters, and every image of a task is
    turned by the same multiple of 90 degrees. ``disjoint`` draws each set's tasks from its own characters.
    """
    dataset = MetaDataset(FullOmniglot(root, transform=_ink, download=True, image_size=28))
    classes = list(range(1623))
    random.shuffle(classes)
    parts = [classes[:1100], classes[1100:1200], classes[1200:]]
    datasets: list[MetaDataset] = [FilteredMetaDataset(dataset, labels=part) for part in parts]
    sizes = [(train_ways, train_samples), (test_ways, test_samples), (test_ways, test_samples)]
    transforms: list[list[Callable[[Any], Any]]] = [
        [
            FusedNWaysKShots(source, n=ways, k=samples),
            LoadData(source),
            RemapLabels(source),
            ConsecutiveLabels(source),
            RandomClassRotation(source, [0.0, 90.0, 180.0, 270.0]),
        ]
        for source, (ways, samples) in zip(datasets if disjoint else [dataset] * 3, sizes, strict=True)
    ]
    return datasets, transforms


def mini_imagenet_tasksets(
    train_ways: int = 5,
    train_samples: int = 10,
    test_ways: int = 5,
    test_samples: int = 10,
    root: str = "~/data",
    data_augmentation: str | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> Parts:
    """mini-ImageNet, 84x84, values 0 .. 255; 0 .. 1 with ``data_augmentation="normalize"``.

    ``"lee2019"`` needs torchvision.
    """
    augmented = _augmentation(data_augmentation)
    datasets = []
    for mode, transform in zip(("train", "validation", "test"), augmented, strict=True):
        images: Any = MiniImagenet(root, mode=mode, download=True)
        if device is not None:
            images = OnDeviceDataset(images, device=device)
        images.transform = transform
        datasets.append(MetaDataset(images))
    sizes = [(train_ways, train_samples), (test_ways, test_samples), (test_ways, test_samples)]
    last = [
        (RemapLabels, ConsecutiveLabels),
        (ConsecutiveLabels, RemapLabels),
        (RemapLabels, ConsecutiveLabels),
    ]
    transforms: list[list[Callable[[Any], Any]]] = [
        [
            NWays(dataset, ways),
            KShots(dataset, samples),
            LoadData(dataset),
            *(make(dataset) for make in order),
        ]
        for dataset, (ways, samples), order in zip(datasets, sizes, last, strict=True)
    ]
    return datasets, transforms


def _augmentation(name: str | None) -> tuple[Callable[[Any], Any] | None, ...]:
    """The transforms of the three sets' images."""
    if name is None:
        return None, None, None
    if name == "normalize":
        return (_unit,) * 3
    if name != "lee2019":
        raise ValueError("Invalid data_augmentation argument.")
    tv = importlib.import_module("torchvision.transforms")
    mean, std = (120.39586422, 115.59361427, 104.54012653), (70.68188272, 68.27635443, 72.54505529)
    normalize = tv.Normalize(mean=[m / 255 for m in mean], std=[s / 255 for s in std])
    train = tv.Compose(
        [
            tv.ToPILImage(),
            tv.RandomCrop(84, padding=8),
            tv.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4),
            tv.RandomHorizontalFlip(),
            tv.ToTensor(),
            normalize,
        ]
    )
    return train, normalize, normalize


def _unit(image: Tensor) -> Tensor:
    return image / 255.0


_TASKSETS: dict[str, Callable[..., Parts]] = {
    "omniglot": omniglot_tasksets,
    "mini-imagenet": mini_imagenet_tasksets,
}


def list_tasksets() -> KeysView[str]:
    """Names of the benchmarks."""
    return _TASKSETS.keys()


def get_tasksets(
    name: str,
    train_ways: int = 5,
    train_samples: int = 10,
    test_ways: int = 5,
    test_samples: int = 10,
    num_tasks: int = -1,
    root: str = "~/data",
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> BenchmarkTasksets:
    """The task sets of a benchmark.

    Args:
        name: one of :func:`list_tasksets`.
        train_ways, train_samples: classes, and samples of each, in a training task.
        test_ways, test_samples: those of a validation or test task.
        num_tasks: tasks in each set, -1 for ever new ones.
        root: folder of the data; where it does not exist, as :func:`mamlpp_fast.data.load` without a path.
        device: keep mini-ImageNet on it.
        kwargs: what else the benchmark takes.

    Raises:
        ValueError: for an unknown name.
        DataError: no data, or a damaged file.
    """
    if name not in _TASKSETS:
        raise ValueError(f"name: expected one of {', '.join(_TASKSETS)}, got {name!r}")
    datasets, transforms = _TASKSETS[name](
        train_ways=train_ways,
        train_samples=train_samples,
        test_ways=test_ways,
        test_samples=test_samples,
        root=os.path.expanduser(root),
        device=device,
        **kwargs,
    )
    return BenchmarkTasksets(
        *(Taskset(d, t, num_tasks=num_tasks) for d, t in zip(datasets, transforms, strict=True))
    )
