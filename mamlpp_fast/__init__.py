"""mamlpp_fast: fast, exact meta-training with MAML++ in PyTorch."""

from mamlpp_fast import ops, reference
from mamlpp_fast._version import __version__
from mamlpp_fast.accelerated import accelerate, acceleration, functional_call
from mamlpp_fast.adaptation import adapt
from mamlpp_fast.config import MAMLConfig
from mamlpp_fast.engine.graph import graphed
from mamlpp_fast.episodes import Episode, EpisodeBatch
from mamlpp_fast.learner import Evaluation, MAMLPlusPlus, NonFiniteLossError, StepMetrics
from mamlpp_fast.lslr import LSLR
from mamlpp_fast.models import Conv4, ResNet12
from mamlpp_fast.nn import InertBiasConv2d, PerStepBatchNorm2d, convert_batch_norm, set_eval_stats, set_step
from mamlpp_fast.predictor import Predictor
from mamlpp_fast.side_by_side import map_tasks

__all__ = [
    "LSLR",
    "Conv4",
    "Episode",
    "EpisodeBatch",
    "Evaluation",
    "InertBiasConv2d",
    "MAMLConfig",
    "MAMLPlusPlus",
    "NonFiniteLossError",
    "PerStepBatchNorm2d",
    "Predictor",
    "ResNet12",
    "StepMetrics",
    "__version__",
    "accelerate",
    "acceleration",
    "adapt",
    "convert_batch_norm",
    "functional_call",
    "graphed",
    "map_tasks",
    "ops",
    "reference",
    "set_eval_stats",
    "set_step",
]
