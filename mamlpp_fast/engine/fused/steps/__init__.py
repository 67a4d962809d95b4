"""The steps a lowered network is made of, each with its rules."""

from mamlpp_fast.engine.fused.steps.attention import Attention
from mamlpp_fast.engine.fused.steps.base import Goal, Gradients, Pass, Rows, Scaling, Slot, Step
from mamlpp_fast.engine.fused.steps.first_layer import FirstLayer
from mamlpp_fast.engine.fused.steps.generic import Generic
from mamlpp_fast.engine.fused.steps.head import Head
from mamlpp_fast.engine.fused.steps.layout import Relayout
from mamlpp_fast.engine.fused.steps.linear import Add, Bias, Conv, Detach, Flatten, Linear, TransposedConv
from mamlpp_fast.engine.fused.steps.loss import CrossEntropy, Loss, SquaredError, loss_of
from mamlpp_fast.engine.fused.steps.norm import FrozenNorm, NormActPool
from mamlpp_fast.engine.fused.steps.pointwise import Activation, Dropout, Noise, ScaleShift, Smooth, Times
from mamlpp_fast.engine.fused.steps.pool import AveragePool, MaxPool

__all__ = [
    "Activation",
    "Add",
    "Attention",
    "AveragePool",
    "Bias",
    "Conv",
    "CrossEntropy",
    "Detach",
    "Dropout",
    "FirstLayer",
    "Flatten",
    "FrozenNorm",
    "Generic",
    "Goal",
    "Gradients",
    "Head",
    "Linear",
    "Loss",
    "MaxPool",
    "Noise",
    "NormActPool",
    "Pass",
    "Relayout",
    "Rows",
    "ScaleShift",
    "Scaling",
    "Slot",
    "Smooth",
    "SquaredError",
    "Step",
    "Times",
    "TransposedConv",
    "loss_of",
]
