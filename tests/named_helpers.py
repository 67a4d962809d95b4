"""A module that models and losses of `test_following_reached.py` reach by its name."""

from __future__ import annotations

import torch
from torch import Tensor

scale = 1.0
settings = {"scale": 1.0}


class Settings:
    """A namespace."""

    scale = 1.0


def factor() -> float:
    return scale


def act(x: Tensor) -> Tensor:
    return torch.tanh(x)
