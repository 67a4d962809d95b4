"""learn2learn's ``vision.models.resnet12``: the residual network of the few-shot literature."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamlpp_fast.compat.learn2learn._batch_norm import FusedBatchNorm2d, normalise_relu
from mamlpp_fast.compat.learn2learn.nn import Flatten, Lambda
from mamlpp_fast.compat.learn2learn.vision.models.cnn4 import Classifier, same

__all__ = ["BasicBlock", "DropBlock", "ResNet12", "ResNet12Backbone"]

_SLOPE = 0.1
_ANNEALING = 40_000  # calls over which DropBlock's rate rises to drop_rate


class BasicBlock(nn.Module):
    """Three 3x3 convolutions beside a shortcut, leaky ReLU, max-pooling, dropout.

    Args:
        inplanes, planes: channels in and out.
        stride: of the max-pooling.
        downsample: the shortcut, the identity without it.
        drop_rate: share dropped.
        drop_block: drop blocks (:class:`DropBlock`), a share that rises over the first calls; else elements.
        block_size: side of a block.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        drop_rate: float = 0.0,
        drop_block: bool = False,
        block_size: int = 1,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, padding=1, bias=False)
        self.bn1 = FusedBatchNorm2d(planes)
        self.relu = nn.LeakyReLU(_SLOPE)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = FusedBatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn3 = FusedBatchNorm2d(planes)
        self.maxpool = nn.MaxPool2d(stride)
        self.downsample = downsample
        self.stride = stride
        self.drop_rate = drop_rate
        self.num_batches_tracked = 0
        self.drop_block = drop_block
        self.block_size = block_size
        self.DropBlock = DropBlock(block_size)

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked += 1
        y = normalise_relu(self.bn1, self.relu, self.conv1(x))
        y = normalise_relu(self.bn2, self.relu, self.conv2(y))
        y = self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x))
        out: Tensor = self.maxpool(self.relu(y))
        if self.drop_rate <= 0:
            return out
        if not self.drop_block:
            return F.dropout(out, self.drop_rate, self.training)
        rate = min(self.drop_rate / _ANNEALING * self.num_batches_tracked, self.drop_rate)
        size, block = out.shape[2], self.block_size
        dropped: Tensor = self.DropBlock(out, rate / block**2 * size**2 / (size - block + 1) ** 2)
        return dropped


class DropBlock(nn.Module):
    """Drops square blocks in training (Ghiasi et al. 2018), keeping the scale.

    Args:
        block_size: side of a block.
    """

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size

    def forward(self, x: Tensor, gamma: float) -> Tensor:
        """x [N, C, H, W] with a block dropped from each corner with probability ``gamma``."""
        if not self.training:
            return x
        height, width = x.shape[-2:]
        edge = self.block_size - 1
        corners = torch.distributions.Bernoulli(gamma).sample((*x.shape[:2], height - edge, width - edge))
        padded = F.pad(corners.to(x.device), [edge] * 4)
        keep = 1 - F.max_pool2d(padded, self.block_size, stride=1)
        return keep * x * (keep.numel() / keep.sum())


class ResNet12Backbone(nn.Module):
    """:class:`ResNet12` without its last layer: features [N, elements]; arguments as there."""

    def __init__(
        self,
        avg_pool: bool = True,
        wider: bool = True,
        embedding_dropout: float = 0.0,
        dropblock_dropout: float = 0.1,
        dropblock_size: int = 5,
        channels: int = 3,
    ) -> None:
        super().__init__()
        widths = (64, 160, 320, 640) if wider else (64, 128, 256, 512)
        self.inplanes = channels
        for i, planes in enumerate(widths, 1):
            blocks = i > 2
            layer = self._layer(planes, dropblock_dropout, blocks, dropblock_size if blocks else 1)
            setattr(self, f"layer{i}", layer)
        self.avgpool = nn.AvgPool2d(5, stride=1) if avg_pool else Lambda(same)
        self.flatten = Flatten()
        self.embedding_dropout = embedding_dropout
        self.keep_avg_pool = avg_pool
        self.dropout = nn.Dropout(embedding_dropout)
        self.dropblock_dropout = dropblock_dropout
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")

    def _layer(self, planes: int, drop_rate: float, drop_block: bool, block_size: int) -> nn.Sequential:
        shortcut = nn.Sequential(nn.Conv2d(self.inplanes, planes, 1, bias=False), FusedBatchNorm2d(planes))
        block = BasicBlock(self.inplanes, planes, 2, shortcut, drop_rate, drop_block, block_size)
        self.inplanes = planes
        return nn.Sequential(OrderedDict([("0", block)]))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        features: Tensor = self.dropout(self.flatten(self.avgpool(x)))
        return features


class ResNet12(Classifier):
    """The 12-layer residual network (Mishra et al. 2018; widths of Lee et al. 2019).

    Args:
        output_size: ways.
        hidden_size: elements of the features; 640 for 84x84 pixels, 16000 there without ``avg_pool``.
        avg_pool: average the last feature map.
        wider: channels 64, 160, 320, 640, else 64, 128, 256, 512.
        embedding_dropout: share of the features dropped.
        dropblock_dropout: share dropped after each block.
        dropblock_size: side of the blocks dropped after the last two.
        channels: of the images.
    """

    def __init__(
        self,
        output_size: int,
        hidden_size: int = 640,
        avg_pool: bool = True,
        wider: bool = True,
        embedding_dropout: float = 0.0,
        dropblock_dropout: float = 0.1,
        dropblock_size: int = 5,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.features = ResNet12Backbone(
            avg_pool, wider, embedding_dropout, dropblock_dropout, dropblock_size, channels
        )
        self.classifier = nn.Linear(hidden_size, output_size)
