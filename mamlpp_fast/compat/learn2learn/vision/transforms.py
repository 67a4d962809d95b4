"""learn2learn's ``vision.transforms``."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mamlpp_fast.compat.learn2learn.data.task_dataset import Description

__all__ = ["RandomClassRotation"]


class RandomClassRotation:
    """Rotates the images of a task by an angle at random.

    As in learn2learn 0.2.0, an angle is drawn for each class, but the last class's serves all of them.

    Args:
        dataset: the :class:`MetaDataset` that descriptions index.
        degrees: the angles to draw from, anticlockwise.
    """

    def __init__(self, dataset: Any, degrees: Sequence[float]) -> None:
        self.dataset = dataset
        self.degrees = degrees

    def __call__(self, task_description: Description) -> Description:
        angles: dict[Any, float] = {}
        angle = 0.0
        for described in task_description:
            label = self.dataset.indices_to_labels[described.index]
            if label not in angles:
                angles[label] = random.choice(self.degrees)
            angle = angles[label]
        for described in task_description:
            described.transforms.append(_Rotation(angle))
        return task_description


class _Rotation:
    def __init__(self, angle: float) -> None:
        self.angle = angle

    def __call__(self, sample: Sequence[Any]) -> tuple[Any, Any]:
        torch.empty(1).uniform_(self.angle, self.angle)  # torchvision draws the angle from its range of one
        return rotated(sample[0], self.angle), sample[1]


def rotated(image: Any, degrees: float) -> Any:
    """An image turned anticlockwise about its middle, nearest pixel, 0 outside.

    Args:
        image: a tensor [..., H, W] or a Pillow image.
        degrees: the angle.
    """
    if isinstance(image, Image.Image):
        return image.rotate(degrees)
    turns = degrees / 90
    if turns == int(turns) and (image.shape[-1] == image.shape[-2] or int(turns) % 2 == 0):
        return torch.rot90(image, int(turns) % 4, (-2, -1))
    return _sampled(image, math.radians(degrees))


def _sampled(image: Tensor, angle: float) -> Tensor:
    height, width = image.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij"
    )
    cos, sin = math.cos(angle), math.sin(angle)
    source = torch.stack([(cos * x - sin * y) * 2 / width, (sin * x + cos * y) * 2 / height], dim=-1)
    planes = image.reshape(1, -1, height, width)
    floating = planes if planes.is_floating_point() else planes.float()
    grid = source[None].to(floating)
    turned = F.grid_sample(floating, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return turned.to(image.dtype).reshape(image.shape)
