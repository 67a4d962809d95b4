"""Episodes drawn on the device: episode i of split s under seed z is a pure function of (s, z, i)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mamlpp_fast import _native
from mamlpp_fast.data.archives import shown
from mamlpp_fast.data.authors import authors_episode, authors_seed
from mamlpp_fast.data.classes import ImageClasses
from mamlpp_fast.data.errors import DataError
from mamlpp_fast.episodes import EpisodeBatch

__all__ = ["EpisodeSampler"]


def _signed(value: int) -> int:
    """``value`` modulo 2**64 as a two's complement int64, the only 64-bit integer torch computes with."""
    return ((value + 2**63) % 2**64) - 2**63


_PASSES = 4  # over the pixels of a batch: taken, turned, converted, divided
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLY_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = _signed(0x94D049BB133111EB)
_TURN_STREAM = _signed(0xD1B54A32D192ED03)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finalizer of splitmix64 (Steele, Lea & Flood 2014) on int64, with wrap-around products."""
    x = (x ^ _shift_right(x, 30)) * _MULTIPLY_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLY_2
    return x ^ _shift_right(x, 31)


def _distinct_keys(hashed: Tensor, index: Tensor, bits: int) -> Tensor:
    """Non-negative keys whose low ``bits`` are ``index``: no ties, so topk has one answer on every device."""
    return (_shift_right(hashed, 1) & ~((1 << bits) - 1)) | index


class EpisodeSampler:
    """Draws few-shot classification tasks of one split.

    A task has ``ways`` distinct classes and ``shots + targets`` distinct images of each; images are
    class-major and labels are positions 0 .. ways - 1. Task ``i`` depends on the split's name, ``seed`` and
    ``i`` alone: batches may be split, skipped and repeated at will, on any device, with the same result.

    With ``sampling="counter"`` everything happens on the device with a counter-based hash and without waiting
    for it. With ``sampling="authors"`` the host repeats the draws of the MAML++ authors' code
    (:func:`mamlpp_fast.data.authors_episode`).

    Args:
        split: the classes to draw from.
        ways: classes of a task.
        shots: support images of a class.
        targets: target images of a class.
        seed: any integer. For ``sampling="authors"`` the authors' ``train_seed`` or ``val_seed`` (0, 1 or 2
            in their runs), which is hashed as they do.
        rotations: turn all images of a class by the same random multiple of 90 degrees in each task.
        divisor: pixels are divided by it.
        mean: subtracted after the division, a value a channel; empty for none.
        std: divided by last, a value a channel; empty for none.
        device: where the images are kept and the episodes made.
        dtype: floating point type of the images of an episode.
        sampling: ``"counter"`` or ``"authors"``.

    Raises:
        DataError: more ways than classes, a class with fewer than ``shots + targets`` images, a count below
            1, ``rotations`` of images that are not square, a mean that does not fit the channels.
    """

    def __init__(
        self,
        split: ImageClasses,
        *,
        ways: int,
        shots: int,
        targets: int,
        seed: int,
        rotations: bool = False,
        divisor: float = 255.0,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        sampling: Literal["counter", "authors"] = "counter",
    ) -> None:
        where = f"{split.source}, split '{split.split}'"
        for name, value in (("ways", ways), ("shots", shots), ("targets", targets)):
            if value < 1:
                raise DataError(f"{name}: expected at least 1, got {value}")
        if ways > split.num_classes:
            raise DataError(f"ways: expected at most the {split.num_classes} classes of {where}, got {ways}")
        fewest = int(split.class_count.argmin())
        if int(split.class_count[fewest]) < shots + targets:
            raise DataError(
                f"shots + targets: expected at most the {int(split.class_count[fewest])} images of class "
                f"{shown(split.names[fewest])} of {where}, got {shots} + {targets}"
            )
        channels, height, width = split.image_shape
        if rotations and height != width:
            raise DataError(f"rotations: expected square images in {where}, got {height}x{width}")
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (0, channels):
                raise DataError(f"{name}: expected {channels} values for {where}, got {len(values)}")
        if sampling not in ("counter", "authors"):
            raise DataError(f"sampling: expected 'counter' or 'authors', got '{sampling}'")
        if not dtype.is_floating_point:
            raise DataError(f"dtype: expected a floating point type, got {dtype}")

        self.split = split.on(device)
        self.ways, self.shots, self.targets, self.seed = ways, shots, targets, seed
        self.rotations, self.sampling, self.dtype = rotations, sampling, dtype
        self.device = self.split.images.device
        self._divisor = divisor
        self._mean = (
            torch.tensor(tuple(mean), device=self.device, dtype=dtype).view(-1, 1, 1) if mean else None
        )
        self._std = torch.tensor(tuple(std), device=self.device, dtype=dtype).view(-1, 1, 1) if std else None
        stream = int.from_bytes(hashlib.sha256(split.split.encode()).digest()[:8], "little")
        mixed_seed = int(_mix(torch.tensor(_signed(seed))))
        self._base = int(_mix(torch.tensor(mixed_seed ^ _signed(stream))))
        self._class_index = torch.arange(split.num_classes, device=self.device)
        self._image_index = torch.arange(int(split.class_count.max()), device=self.device)
        self._class_bits = split.num_classes.bit_length()
        self._image_bits = len(self._image_index).bit_length()
        pixels = torch.arange(height * width, device=self.device).view(height, width)
        turned = [torch.rot90(pixels, k).flatten() for k in range(4)] if rotations else []
        self._turned_pixels = torch.stack(turned) if rotations else None
        self._labels = torch.arange(ways, device=self.device)

    def batch(self, start: int, count: int) -> EpisodeBatch:
        """Tasks ``start`` .. ``start + count - 1``.

        Args:
            start: number of the first task, from 0.
            count: number of tasks T.

        Returns:
            support_x [T, ways * shots, C, H, W], support_y [T, ways * shots], target_x
            [T, ways * targets, C, H, W], target_y [T, ways * targets].

        Raises:
            DataError: for a negative start or a count below 1.
        """
        if start < 0 or count < 1:
            raise DataError(f"start, count: expected start >= 0 and count >= 1, got {start} and {count}")
        pixels = count * self.ways * (self.shots + self.targets) * math.prod(self.split.image_shape)
        with _native.few(_PASSES * pixels if self.device.type == "cpu" else 0):
            return self._gather(*self.draws(start, count))

    def batch_from(self, counter: Tensor, count: int) -> EpisodeBatch:
        """As :meth:`batch`, the start being read on the device: nothing waits, so a CUDA graph can hold it.

        Args:
            counter: int64 with one element, on the sampler's device.
            count: number of tasks.

        Raises:
            DataError: for ``sampling="authors"``, whose draws are made on the host.
        """
        if self.sampling == "authors":
            raise DataError("batch_from: expected sampling='counter', got 'authors', which draws on the host")
        return self._gather(*self._indices(counter.reshape(()) + torch.arange(count, device=self.device)))

    def draws(self, start: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the tasks are made of, without their pixels.

        Returns:
            classes [count, ways], images [count, ways, shots + targets] (numbers within their class) and
            quarter-turns [count, ways], int64.
        """
        if self.sampling == "authors":
            return self._authors_draws(start, count)
        return self._indices(torch.arange(start, start + count, device=self.device))

    def _indices(self, task: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Mixed twice: the streams below step by the same constant, so task keys must not be a progression.
        task_key = _mix(_mix(self._base + (task + 1) * _GOLDEN) + _GOLDEN)
        class_hash = _mix(task_key[:, None] + (self._class_index + 1) * _GOLDEN)
        class_keys = _distinct_keys(class_hash, self._class_index, self._class_bits)
        classes = class_keys.topk(self.ways).values & ((1 << self._class_bits) - 1)
        chosen = class_hash.gather(1, classes)

        image_hash = _mix(chosen[..., None] + (self._image_index + 1) * _GOLDEN)
        image_keys = _distinct_keys(image_hash, self._image_index, self._image_bits)
        absent = self._image_index >= self.split.class_count[classes][..., None]
        image_keys = image_keys.masked_fill(absent, -1)
        images = image_keys.topk(self.shots + self.targets).values & ((1 << self._image_bits) - 1)

        turns = _shift_right(_mix(chosen ^ _TURN_STREAM), 62)
        return classes, images, turns

    def _authors_draws(self, start: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        base = authors_seed(self.seed)
        sizes = self.split.class_count.tolist()
        wanted = self.shots + self.targets
        drawn = [authors_episode(sizes, self.ways, wanted, base + start + i) for i in range(count)]
        classes, images, turns = (torch.tensor([d[j].tolist() for d in drawn]) for j in range(3))
        return classes.to(self.device), images.to(self.device), turns.to(self.device)

    def _gather(self, classes: Tensor, images: Tensor, turns: Tensor) -> EpisodeBatch:
        tasks = classes.shape[0]
        rows = self.split.class_start[classes][..., None] + images
        channels, height, width = self.split.image_shape

        def side(rows: Tensor) -> tuple[Tensor, Tensor]:
            per_class = rows.shape[2]
            x = self.split.images.index_select(0, rows.flatten())
            if self._turned_pixels is not None:
                x = x.view(tasks, self.ways, per_class * channels, height * width)
                order = self._turned_pixels[turns][:, :, None].expand(-1, -1, x.shape[2], -1)
                x = x.gather(3, order)
            x = x.view(tasks, self.ways * per_class, channels, height, width).to(self.dtype)
            if self._divisor != 1.0:
                x.div_(self._divisor)
            if self._mean is not None:
                x.sub_(self._mean)
            if self._std is not None:
                x.div_(self._std)
            y = self._labels[:, None].expand(tasks, self.ways, per_class).reshape(tasks, -1)
            return x, y

        support_x, support_y = side(rows[:, :, : self.shots])
        target_x, target_y = side(rows[:, :, self.shots :])
        return EpisodeBatch(support_x, support_y, target_x, target_y)
