"""The steps a lowered network is made of, each with its rules."""

from mamlpp_fast.engine.fused.steps.base import Goal, Gradients, Pass, Rows, Slot, Step
from mamlpp_fast.engine.fused.steps.first_layer import FirstLayer
from mamlpp_fast.engine.fused.steps.head import Head, with_head
from mamlpp_fast.engine.fused.steps.linear import Add, AveragePool, Bias, Conv, Flatten, Linear
from mamlpp_fast.engine.fused.steps.loss import CrossEntropy, Loss, SquaredError
from mamlpp_fast.engine.fused.steps.norm import FrozenNorm, NormActPool
from mamlpp_fast.engine.fused.steps.pointwise import Activation, MaxPool, ScaleShift

__all__ = [
    "Activation",
    "Add",
    "AveragePool",
    "Bias",
    "Conv",
    "CrossEntropy",
    "FirstLayer",
    "Flatten",
    "FrozenNorm",
    "Goal",
    "Gradients",
    "Head",
    "Linear",
    "Loss",
    "MaxPool",
    "NormActPool",
    "Pass",
    "Rows",
    "ScaleShift",
    "Slot",
    "SquaredError",
    "Step",
    "with_head",
]
