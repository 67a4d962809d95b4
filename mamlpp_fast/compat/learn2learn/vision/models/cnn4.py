"""learn2learn's ``vision.models.cnn4``: the convolutional and fully-connected networks of the MAML papers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from mamlpp_fast.accelerated import accelerate
from mamlpp_fast.compat.learn2learn._batch_norm import FusedBatchNorm1d, FusedBatchNorm2d, normalise_relu
from mamlpp_fast.compat.learn2learn.nn import Flatten, Lambda

__all__ = [
    "CNN4",
    "CNN4Backbone",
    "ConvBase",
    "ConvBlock",
    "LinearBlock",
    "MiniImagenetCNN",
    "OmniglotCNN",
    "OmniglotFC",
    "fc_init_",
    "maml_init_",
]

M = TypeVar("M", bound=nn.Module)


def truncated_normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Normal values within two deviations, in place; drawn from NumPy's global generator, as SciPy draws them."""
    low, high = torch.special.ndtr(torch.tensor([-2.0, 2.0], dtype=torch.float64)).tolist()
    uniform = torch.from_numpy(np.random.uniform(size=tuple(tensor.shape)))  # noqa: NPY002 - the same numbers
    return tensor.copy_(mean + std * torch.special.ndtri(low + uniform * (high - low)))


def fc_init_(module: M) -> M:
    """Weights truncated normal with deviation 0.01, biases 0."""
    for name in ("weight", "bias"):
        tensor = getattr(module, name, None)
        if tensor is not None:
            with torch.no_grad():
                truncated_normal_(tensor, std=0.01) if name == "weight" else tensor.zero_()
    return module


def maml_init_(module: M) -> M:
    """Weights Xavier-uniform, biases 0."""
    nn.init.xavier_uniform_(module.get_parameter("weight"))
    nn.init.zeros_(module.get_parameter("bias"))
    return module


class Classifier(nn.Module):
    """Features, and logits of them."""

    features: nn.Module
    classifier: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x))
        return logits


class LinearBlock(nn.Module):
    """Linear, batch norm without running statistics, ReLU."""

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.normalize = FusedBatchNorm1d(output_size, eps=1e-3, momentum=0.999, track_running_stats=False)
        self.linear = nn.Linear(input_size, output_size)
        fc_init_(self.linear)

    def forward(self, x: Tensor) -> Tensor:
        return normalise_relu(self.normalize, self.relu, self.linear(x))


class ConvBlock(nn.Module):
    """Convolution with padding 1, batch norm, ReLU, then max-pooling or, without it, a stride.

    Args:
        in_channels, out_channels, kernel_size: of the convolution.
        max_pool: max-pooling, else a stride of as many pixels.
        max_pool_factor: of 2 pixels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        max_pool: bool = True,
        max_pool_factor: float = 1.0,
    ) -> None:
        super().__init__()
        side = int(2 * max_pool_factor)
        self.max_pool = nn.MaxPool2d((side, side), (side, side)) if max_pool else same
        self.normalize = FusedBatchNorm2d(out_channels)
        nn.init.uniform_(self.normalize.weight)
        self.relu = nn.ReLU()
        stride = 1 if max_pool else side
        self.conv = maml_init_(nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.max_pool(normalise_relu(self.normalize, self.relu, self.conv(x)))
        return y


def same(x: Tensor) -> Tensor:
    return x


class ConvBase(nn.Sequential):
    """Stages of :class:`ConvBlock`.

    Args:
        hidden: channels of every stage.
        channels: of the images.
        max_pool, max_pool_factor: as there.
        layers: number of stages.
    """

    def __init__(
        self,
        hidden: int = 64,
        channels: int = 1,
        max_pool: bool = False,
        layers: int = 4,
        max_pool_factor: float = 1.0,
    ) -> None:
        widths = [channels] + [hidden] * layers
        super().__init__(*(ConvBlock(i, o, (3, 3), max_pool, max_pool_factor) for i, o in pairwise(widths)))
        accelerate(self)  # for where it stands alone, ANIL's body say: no clone holds it, which would be


class OmniglotFC(Classifier):
    """The fully-connected network for Omniglot (Santoro et al. 2016).

    Args:
        input_size: elements of an image.
        output_size: ways.
        sizes: of the hidden layers, 256, 128, 64 and 64 by default.
    """

    def __init__(self, input_size: int, output_size: int, sizes: Sequence[int] | None = None) -> None:
        super().__init__()
        sizes = (256, 128, 64, 64) if sizes is None else sizes
        blocks = [LinearBlock(i, o) for i, o in pairwise((input_size, *sizes))]
        self.features = nn.Sequential(Flatten(), nn.Sequential(*blocks))
        self.classifier = fc_init_(nn.Linear(sizes[-1], output_size))
        self.input_size = input_size


class OmniglotCNN(Classifier):
    """The convolutional network for Omniglot (Finn et al. 2017), on images of 28x28 pixels.

    Args:
        output_size: ways.
        hidden_size: channels of every stage.
        layers: number of stages.
    """

    def __init__(self, output_size: int = 5, hidden_size: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.base = ConvBase(hidden=hidden_size, channels=1, max_pool=False, layers=layers)
        self.features = nn.Sequential(Lambda(_as_images), self.base, Lambda(_average), Flatten())
        self.classifier = nn.Linear(hidden_size, output_size)
        nn.init.normal_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)


def _as_images(x: Tensor) -> Tensor:
    return x.view(-1, 1, 28, 28)


def _average(x: Tensor) -> Tensor:
    return x.mean(dim=[2, 3])


class CNN4Backbone(ConvBase):
    """:class:`CNN4` without its last layer: features [N, elements].

    Args:
        hidden_size, layers, channels, max_pool: as there.
        max_pool_factor: of 2 pixels; by default 4 divided by ``layers``.
    """

    def __init__(
        self,
        hidden_size: int = 64,
        layers: int = 4,
        channels: int = 3,
        max_pool: bool = True,
        max_pool_factor: float | None = None,
    ) -> None:
        factor = 4 // layers if max_pool_factor is None else max_pool_factor
        super().__init__(
            hidden=hidden_size, layers=layers, channels=channels, max_pool=max_pool, max_pool_factor=factor
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x.flatten(1)


class CNN4(Classifier):
    """The convolutional network for mini-ImageNet (Ravi & Larochelle 2017).

    Args:
        output_size: ways.
        hidden_size: channels of every stage.
        layers: number of stages.
        channels: of the images.
        max_pool: max-pooling, else strides.
        embedding_size: elements of the features, 25·hidden_size by default, which images of 84x84 pixels have.
    """

    def __init__(
        self,
        output_size: int,
        hidden_size: int = 64,
        layers: int = 4,
        channels: int = 3,
        max_pool: bool = True,
        embedding_size: int | None = None,
    ) -> None:
        super().__init__()
        self.features = CNN4Backbone(hidden_size, layers, channels, max_pool)
        size = 25 * hidden_size if embedding_size is None else embedding_size
        self.classifier = maml_init_(nn.Linear(size, output_size))
        self.hidden_size = hidden_size


MiniImagenetCNN = CNN4
