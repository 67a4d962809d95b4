"""Training runs: presets, the loop, checkpoints, evaluation."""

from mamlpp_fast.train.build import build_learner, load_data, make_sampler
from mamlpp_fast.train.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from mamlpp_fast.train.config import TrainConfig, parse_settings
from mamlpp_fast.train.evaluate import Score
from mamlpp_fast.train.loop import train
from mamlpp_fast.train.presets import DEFAULT_PRESET, preset, preset_names
from mamlpp_fast.train.run_folder import evaluate_run
from mamlpp_fast.train.signals import Interrupted

__all__ = [
    "DEFAULT_PRESET",
    "CheckpointError",
    "Interrupted",
    "Score",
    "TrainConfig",
    "build_learner",
    "evaluate_run",
    "load_checkpoint",
    "load_data",
    "make_sampler",
    "parse_settings",
    "preset",
    "preset_names",
    "save_checkpoint",
    "train",
]
