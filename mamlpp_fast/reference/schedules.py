"""Schedules over epochs: the multi-step loss, the derivative order, the meta learning rate."""

from __future__ import annotations

import math

__all__ = ["cosine_annealing", "is_second_order", "msl_weights"]


def msl_weights(epoch: int, steps: int, msl_epochs: int) -> list[float] | None:
    """Weights of the target losses after each inner update (multi-step loss, section 4, MSL).

    Equal at epoch 0, then moved linearly to the last step. None from epoch ``msl_epochs`` on: the target loss of the
    last step alone counts, with weight exactly 1.
    """
    if epoch >= msl_epochs:
        return None
    floor = 0.03 / steps
    early = max(1 / steps - epoch / (steps * msl_epochs), floor)
    last = min(1 / steps + epoch * (steps - 1) / (steps * msl_epochs), 1 - (steps - 1) * floor)
    return [early] * (steps - 1) + [last]


def is_second_order(epoch: int, second_order: bool, da_epoch: int) -> bool:
    """Derivative-order annealing (section 4, DA): second order only in epochs after ``da_epoch``."""
    return second_order and epoch > da_epoch


def cosine_annealing(epoch: int, epochs: int, lr: float, min_lr: float) -> float:
    """Meta learning rate of an epoch (section 4, CA), constant within it: lr at epoch 0, min_lr at ``epochs``."""
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * epoch / epochs)) / 2
