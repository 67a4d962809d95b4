"""learn2learn's ``vision.models``: same parameters, names and initial values."""

from mamlpp_fast.compat.learn2learn.vision.models import cnn4
from mamlpp_fast.compat.learn2learn.vision.models.cnn4 import *  # noqa: F403
from mamlpp_fast.compat.learn2learn.vision.models.resnet12 import ResNet12, ResNet12Backbone

__all__ = [*cnn4.__all__, "ResNet12", "ResNet12Backbone"]
