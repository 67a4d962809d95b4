"""What every reader returns: class-major uint8 images with class boundaries, three splits and a protocol."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from mamlpp_fast.data.archives import shown
from mamlpp_fast.data.errors import DataError

if TYPE_CHECKING:
    from mamlpp_fast.data.sampler import EpisodeSampler

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "SPLITS", "FewShotData", "ImageClasses", "from_arrays"]

SPLITS = ("train", "val", "test")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class ImageClasses:
    """One split: the images of its classes, one class after the other.

    Args:
        images: [num_images, C, H, W], class-major; uint8, or floating point for arrays of one's own.
        class_start: first image of each class, int64 [num_classes].
        class_count: images of each class, int64 [num_classes]; classes may differ in size.
        names: name of each class.
        split: ``"train"``, ``"val"``, ``"test"`` or a name of one's own.
        source: where the images came from, for messages.

    Raises:
        DataError: for tensors that do not fit together, a class without images, float images with NaN.
    """

    images: Tensor
    class_start: Tensor
    class_count: Tensor
    names: tuple[str, ...]
    split: str
    source: str
    _copies: dict[torch.device, ImageClasses] = field(default_factory=dict, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        where = f"{self.source}, split '{self.split}'"
        if self.images.ndim != 4:
            raise DataError(f"{where}: images: expected [num_images, C, H, W], got {list(self.images.shape)}")
        if self.images.dtype != torch.uint8 and not self.images.is_floating_point():
            raise DataError(f"{where}: images: expected uint8 or floating point, got {self.images.dtype}")
        shapes = (self.class_start.shape, self.class_count.shape, (len(self.names),))
        if self.class_start.ndim != 1 or len({tuple(s) for s in shapes}) != 1:
            raise DataError(
                f"{where}: class_start, class_count, names: expected one entry a class, "
                f"got {list(shapes[0])}, {list(shapes[1])}, {list(shapes[2])}"
            )
        if len(self.names) == 0:
            raise DataError(f"{where}: expected at least one class, got none")
        if int(self.class_count.min()) < 1:
            name = self.names[int(self.class_count.argmin())]
            raise DataError(f"{where}: class {shown(name)}: expected at least one image, got none")
        if int(self.class_start.min()) < 0 or int((self.class_start + self.class_count).max()) > len(
            self.images
        ):
            raise DataError(f"{where}: class_start, class_count: reach outside the {len(self.images)} images")
        if self.images.is_floating_point() and not bool(torch.isfinite(self.images).all()):
            bad = int((~torch.isfinite(self.images)).flatten(1).any(1).nonzero()[0])
            raise DataError(f"{where}: images: expected finite values, got NaN or infinity in image {bad}")

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.image_shape))
        count = int(self.class_count.sum())
        return f"ImageClasses({shown(self.split)}: {self.num_classes} classes, {count} images of {shape})"

    @property
    def num_classes(self) -> int:
        return len(self.names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        c, h, w = self.images.shape[1:]
        return int(c), int(h), int(w)

    def on(self, device: torch.device | str) -> ImageClasses:
        """The same split with its tensors on ``device``; moved once and kept, so samplers share it."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device == self.images.device:
            return self
        if device not in self._copies:
            moved = copy.copy(self)
            for name in ("images", "class_start", "class_count"):
                object.__setattr__(moved, name, getattr(self, name).to(device))
            self._copies[device] = moved
        return self._copies[device]

    def select(self, classes: Sequence[int], split: str | None = None) -> ImageClasses:
        """The split made of ``classes`` (indices), in that order, with images of its own."""
        index = torch.as_tensor(list(classes), dtype=torch.int64, device=self.class_start.device)
        start, count = self.class_start[index].tolist(), self.class_count[index]
        rows = [torch.arange(s, s + n) for s, n in zip(start, count.tolist(), strict=True)]
        return ImageClasses(
            self.images[torch.cat(rows).to(self.images.device)] if rows else self.images[:0],
            torch.cumsum(count, 0) - count,
            count,
            tuple(self.names[i] for i in classes),
            self.split if split is None else split,
            self.source,
        )


@dataclass(frozen=True, eq=False)
class FewShotData:
    """A benchmark: three splits of classes and how its images become network inputs.

    Inputs are ``(pixel / divisor - mean) / std`` with one mean and deviation a channel.

    Args:
        name: name of the data set, as given to :func:`mamlpp_fast.data.load`.
        protocol: name of the protocol in force.
        train: classes to meta-train on.
        val: classes to choose checkpoints by.
        test: classes to report.
        divisor: what pixels are divided by.
        mean: subtracted after the division, one value a channel; empty for none.
        std: divided by last, one value a channel; empty for none.
        rotate_train_classes: whether training tasks turn each class by a random multiple of 90 degrees.
    """

    name: str
    protocol: str
    train: ImageClasses
    val: ImageClasses
    test: ImageClasses
    divisor: float = 255.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    rotate_train_classes: bool = False

    def __post_init__(self) -> None:
        shapes = {s: self.split(s).image_shape for s in SPLITS}
        if len(set(shapes.values())) != 1:
            raise DataError(f"{self.name}: expected images of one shape in all splits, got {shapes}")

    def __repr__(self) -> str:
        splits = ((s, self.split(s)) for s in SPLITS)
        counts = "; ".join(
            f"{s} {c.num_classes} classes, {int(c.class_count.sum())} images" for s, c in splits
        )
        shape = "x".join(map(str, self.train.image_shape))
        return f"FewShotData({shown(self.name)}, {shown(self.protocol)}: {counts}; each {shape})"

    @property
    def image_size(self) -> int:
        """Height of an image in pixels (images are square in all the benchmarks)."""
        return self.train.image_shape[1]

    @property
    def channels(self) -> int:
        return self.train.image_shape[0]

    def split(self, name: str) -> ImageClasses:
        """The split called ``name``.

        Raises:
            DataError: for a name that is not ``"train"``, ``"val"`` or ``"test"``.
        """
        if name not in SPLITS:
            raise DataError(f"split: expected one of {', '.join(SPLITS)}, got '{name}'")
        result: ImageClasses = getattr(self, name)
        return result

    def sampler(
        self,
        split: str,
        *,
        ways: int,
        shots: int,
        targets: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        sampling: Literal["counter", "authors"] = "counter",
    ) -> EpisodeSampler:
        """An :class:`EpisodeSampler` of ``split`` under this protocol (rotations in training only)."""
        from mamlpp_fast.data.sampler import EpisodeSampler

        return EpisodeSampler(
            self.split(split),
            ways=ways,
            shots=shots,
            targets=targets,
            seed=seed,
            rotations=self.rotate_train_classes and split == "train",
            divisor=self.divisor,
            mean=self.mean,
            std=self.std,
            device=device,
            dtype=dtype,
            sampling=sampling,
        )


def from_arrays(
    images: Tensor | np.ndarray[Any, Any],
    labels: Tensor | np.ndarray[Any, Any] | Sequence[int],
    split: str = "train",
    *,
    names: Sequence[str] | None = None,
    source: str = "arrays",
) -> ImageClasses:
    """Makes a split of one's own arrays.

    Args:
        images: [num_images, C, H, W] uint8 or floating point; [num_images, H, W] is taken as one channel.
        labels: int class of each image, [num_images], in 0 .. num_classes - 1, in any order.
        split: name of the split; episodes of different splits are drawn from different streams.
        names: name of each class; without it the number of classes is ``max(labels) + 1``.
        source: for messages.

    Raises:
        DataError: for lengths that differ, labels outside the range, images with NaN or infinity, a class
            without images.
    """
    where = f"{source}, split '{split}'"
    x = torch.as_tensor(images)
    y = torch.as_tensor(labels)
    if x.ndim == 3:
        x = x[:, None]
    if y.ndim != 1 or y.is_floating_point() or y.dtype == torch.bool:
        raise DataError(f"{where}: labels: expected integers [num_images], got {y.dtype} {list(y.shape)}")
    if len(x) != len(y) or len(y) == 0:
        raise DataError(f"{where}: images, labels: expected the same length > 0, got {len(x)} and {len(y)}")
    y = y.to(device=x.device, dtype=torch.int64)
    low, high = int(y.min()), int(y.max())
    classes = high + 1 if names is None else len(names)
    if low < 0 or high >= classes:
        bad = low if low < 0 else high
        raise DataError(f"{where}: labels: expected 0 .. {classes - 1}, got {bad}")
    order = torch.argsort(y, stable=True)
    count = torch.bincount(y, minlength=classes)
    if not torch.equal(y[order], y):
        x = x[order]
    return ImageClasses(
        x,
        torch.cumsum(count, 0) - count,
        count,
        tuple(str(i) for i in range(classes)) if names is None else tuple(names),
        split,
        source,
    )
