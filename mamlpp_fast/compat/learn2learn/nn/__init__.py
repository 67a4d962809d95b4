"""learn2learn's ``nn``: modules that meta-learning scripts use."""

from mamlpp_fast.compat.learn2learn.nn.kroneckers import KroneckerLinear, KroneckerLSTM, KroneckerRNN
from mamlpp_fast.compat.learn2learn.nn.misc import Flatten, Lambda, Scale, freeze, unfreeze
from mamlpp_fast.compat.learn2learn.nn.protonet import PrototypicalClassifier

__all__ = [
    "Flatten",
    "KroneckerLSTM",
    "KroneckerLinear",
    "KroneckerRNN",
    "Lambda",
    "PrototypicalClassifier",
    "Scale",
    "freeze",
    "unfreeze",
]
