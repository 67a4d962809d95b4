"""The networks of the few-shot literature, with per-step batch norm."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamlpp_fast.nn import InertBiasConv2d, PerStepBatchNorm2d

__all__ = ["Conv4", "DropBlock", "ResNet12"]

_SLOPE = 0.01  # nn.LeakyReLU's default, which the authors' code uses


class Conv4(nn.Module):
    """The four-stage convolutional network of the MAML papers ("VGG" in the authors' code).

    A stage is convolution 3x3 with padding 1, normalisation, leaky ReLU (slope 0.01), then max-pooling 2x2; or, with
    ``max_pool=False``, stride-2 convolutions and one global average pool at the end. Weights are Xavier-uniform, biases
    zero.

    Args:
        in_channels: channels of the images.
        num_classes: ways.
        image_size: height and width of the images in pixels.
        filters: channels of every stage.
        stages: number of stages.
        num_steps: inner steps, rows of the batch norms.
        max_pool: max-pooling after each stage, else stride-2 convolutions.
        norm: ``"batch"`` (per-step batch norm) or ``"layer"`` (over [C, H, W], scale fixed at 1, shift learned).
        per_step_affine: batch-norm weights and biases per step (BNWB).
        per_step_stats: batch-norm running statistics per step (BNRS).

    Shape:
        [N, in_channels, image_size, image_size] to logits [N, num_classes].

    Raises:
        ValueError: when the image is too small for the stages, or an argument is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        image_size: int = 28,
        filters: int = 64,
        stages: int = 4,
        num_steps: int = 5,
        max_pool: bool = True,
        norm: Literal["batch", "layer"] = "batch",
        per_step_affine: bool = True,
        per_step_stats: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_channels", in_channels),
            ("num_classes", num_classes),
            ("filters", filters),
            ("stages", stages),
        ):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if norm not in ("batch", "layer"):
            raise ValueError(f"norm: expected 'batch' or 'layer', got {norm!r}")
        blocks, size, channels = [], image_size, in_channels
        for _ in range(stages):
            after_conv = size if max_pool else (size + 1) // 2
            blocks.append(
                _conv_block(
                    channels,
                    filters,
                    after_conv,
                    max_pool,
                    norm,
                    num_steps=num_steps,
                    per_step_affine=per_step_affine,
                    per_step_stats=per_step_stats,
                )
            )
            size, channels = after_conv // 2 if max_pool else after_conv, filters
            if size < 1:
                raise ValueError(
                    f"image_size: expected at least {2**stages} for {stages} stages, got {image_size}"
                )
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.Identity() if max_pool else nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(filters * (size * size if max_pool else 1), num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.blocks(x)).flatten(1))
        return logits


def _conv_block(
    channels: int,
    filters: int,
    size: int,
    max_pool: bool,
    norm: str,
    *,
    num_steps: int,
    per_step_affine: bool,
    per_step_stats: bool,
) -> nn.Sequential:
    """One stage; ``size`` is the height after its convolution."""
    stride = 1 if max_pool else 2
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if norm == "batch":
        parts["conv"] = InertBiasConv2d(channels, filters, 3, stride, 1)
        parts["norm"] = PerStepBatchNorm2d(
            filters,
            num_steps,
            per_step_affine=per_step_affine,
            per_step_stats=per_step_stats,
            negative_slope=_SLOPE,
        )
    else:
        parts["conv"] = nn.Conv2d(channels, filters, 3, stride, 1)
        parts["norm"] = nn.LayerNorm([filters, size, size])
        parts["norm"].weight.requires_grad_(False)
        parts["act"] = nn.LeakyReLU(_SLOPE)
    if max_pool:
        parts["pool"] = nn.MaxPool2d(2)
    return nn.Sequential(parts)


class DropBlock(nn.Module):
    """Drops square blocks of a feature map in training (Ghiasi et al. 2018), keeping the expected scale.

    Args:
        rate: share of activations dropped, in [0, 1).
        block_size: side of a block in pixels.
    """

    def __init__(self, rate: float, block_size: int = 5) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"rate: expected a number in [0, 1), got {rate}")
        self.rate = rate
        self.block_size = block_size

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        height, width = x.shape[-2:]
        block = min(self.block_size, height, width)
        valid = (height - block + 1) * (width - block + 1)
        gamma = self.rate * height * width / (block * block * valid)
        seeds = (torch.rand(*x.shape[:2], height - block + 1, width - block + 1, device=x.device) < gamma).to(
            x
        )
        dropped = F.max_pool2d(F.pad(seeds, [block - 1] * 4), block, stride=1)
        keep = 1 - dropped
        return x * keep * (keep.numel() / keep.sum().clamp_min(1))


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, filters: int, num_steps: int, drop_block: float, **flags: bool) -> None:
        super().__init__()

        def norm(slope: float | None) -> PerStepBatchNorm2d:
            return PerStepBatchNorm2d(filters, num_steps, negative_slope=slope, **flags)

        self.conv1 = nn.Conv2d(channels, filters, 3, padding=1, bias=False)
        self.norm1 = norm(0.1)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.norm2 = norm(0.1)
        self.conv3 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.norm3 = norm(None)
        self.shortcut = nn.Conv2d(channels, filters, 1, bias=False)
        self.shortcut_norm = norm(None)
        self.act = nn.LeakyReLU(0.1)
        self.pool = nn.MaxPool2d(2)
        self.drop = DropBlock(drop_block) if drop_block else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        y = self.norm3(self.conv3(y)) + self.shortcut_norm(self.shortcut(x))
        out: Tensor = self.drop(self.pool(self.act(y)))
        return out


class ResNet12(nn.Module):
    """The residual network of the few-shot literature (Oreshkin et al. 2018; widths of Lee et al. 2019).

    Four residual blocks of three 3x3 convolutions with a 1x1 shortcut, leaky ReLU (slope 0.1) and max-pooling 2x2,
    then a global average pool and a linear head.

    Args:
        in_channels: channels of the images.
        num_classes: ways.
        filters: channels of the four blocks.
        num_steps: inner steps, rows of the batch norms.
        drop_block: share dropped by DropBlock after each block; 0 turns it off.
        per_step_affine: batch-norm weights and biases per step (BNWB).
        per_step_stats: batch-norm running statistics per step (BNRS).

    Shape:
        [N, in_channels, H, W], H and W at least 16, to logits [N, num_classes].
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        filters: tuple[int, int, int, int] = (64, 160, 320, 640),
        num_steps: int = 5,
        drop_block: float = 0.0,
        per_step_affine: bool = True,
        per_step_stats: bool = True,
    ) -> None:
        super().__init__()
        widths = (in_channels, *filters)
        self.blocks = nn.Sequential(
            *(
                _ResidualBlock(
                    before,
                    after,
                    num_steps,
                    drop_block,
                    per_step_affine=per_step_affine,
                    per_step_stats=per_step_stats,
                )
                for before, after in pairwise(widths)
            )
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(filters[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=0.1, mode="fan_out", nonlinearity="leaky_relu")
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.blocks(x)).flatten(1))
        return logits
