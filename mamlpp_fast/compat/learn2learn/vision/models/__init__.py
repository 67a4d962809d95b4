"""learn2learn's ``vision.models``: same parameters, names and initial values."""

from mamlpp_fast.compat.learn2learn.vision.models.cnn4 import (
    CNN4,
    CNN4Backbone,
    ConvBase,
    ConvBlock,
    LinearBlock,
    MiniImagenetCNN,
    OmniglotCNN,
    OmniglotFC,
    fc_init_,
    maml_init_,
)
from mamlpp_fast.compat.learn2learn.vision.models.resnet12 import ResNet12, ResNet12Backbone

__all__ = [
    "CNN4",
    "CNN4Backbone",
    "ConvBase",
    "ConvBlock",
    "LinearBlock",
    "MiniImagenetCNN",
    "OmniglotCNN",
    "OmniglotFC",
    "ResNet12",
    "ResNet12Backbone",
    "fc_init_",
    "maml_init_",
]
