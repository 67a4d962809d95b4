"""learn2learn's ``optim``: differentiable updates with learned transforms of gradients."""

from mamlpp_fast.compat.learn2learn.optim.learnable_optimizer import LearnableOptimizer
from mamlpp_fast.compat.learn2learn.optim.parameter_update import ParameterUpdate
from mamlpp_fast.compat.learn2learn.optim.transforms import (
    KroneckerTransform,
    MetaCurvatureTransform,
    ModuleTransform,
    ReshapedTransform,
    TransformDictionary,
)
from mamlpp_fast.compat.learn2learn.optim.update_rules import DifferentiableSGD

__all__ = [
    "DifferentiableSGD",
    "KroneckerTransform",
    "LearnableOptimizer",
    "MetaCurvatureTransform",
    "ModuleTransform",
    "ParameterUpdate",
    "ReshapedTransform",
    "TransformDictionary",
]
