"""Accuracy on a fixed set of tasks, for one model or the average of several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlpp_fast.data import EpisodeSampler
from mamlpp_fast.distributed import Ranks
from mamlpp_fast.learner import MAMLPlusPlus

__all__ = ["Predictions", "Score", "mean_and_interval", "predict", "score", "score_models"]


@dataclass(frozen=True)
class Score:
    """An accuracy and everything needed to compare it with another.

    Attributes:
        accuracy: share of target images named rightly, mean over tasks.
        ci95: half the width of its 95 % interval, 1.96 standard deviations of the mean over tasks (NaN for one task).
        loss: cross-entropy, mean over tasks.
        tasks: number of tasks.
        ways: classes of a task.
        shots: support images of a class.
        targets: target images of a class.
        models: 1, or the number of models whose logits were averaged.
        stats: ``"batch"`` (transductive) or ``"running"`` statistics normalised the target images.
        steps: inner updates.
    """

    accuracy: float
    ci95: float
    loss: float
    tasks: int
    ways: int
    shots: int
    targets: int
    models: int
    stats: str
    steps: int

    def describe(self) -> str:
        """``97.51 % ± 0.31 %`` with the conditions, on one line."""
        who = "single model" if self.models == 1 else f"ensemble of {self.models} models"
        images = "image" if self.targets == 1 else "images"
        return (
            f"{100 * self.accuracy:.2f} % ± {100 * self.ci95:.2f} % (95 % interval over {self.tasks} tasks; "
            f"{self.ways}-way {self.shots}-shot, {self.targets} target {images} a class, {who}, "
            f"{self.stats} statistics, {self.steps} steps)"
        )


class Predictions(NamedTuple):
    """Target predictions of tasks 0 .. T - 1.

    Attributes:
        logits: after the last inner step, [T, m, ways], on the learner's device.
        labels: the right classes, [T, m].
        step_accuracy: share of target images named rightly after every inner step, [steps].
    """

    logits: Tensor
    labels: Tensor
    step_accuracy: Tensor


def predict(
    learner: MAMLPlusPlus,
    sampler: EpisodeSampler,
    num_tasks: int,
    meta_batch: int,
    *,
    between: Callable[[], None] = lambda: None,
) -> Predictions:
    """Target logits after the last inner step on tasks 0 .. num_tasks - 1 of a sampler, shared by the learner's ranks.

    Args:
        learner: at the parameters to judge; unchanged.
        sampler: the tasks.
        num_tasks: number of tasks.
        meta_batch: tasks of a meta-batch; a rank takes those of five at once, for nothing is kept for a backward pass.
        between: called before every such batch, as often on every rank; may raise to stop.
    """
    batch_size = 5 * meta_batch
    ranks = learner.ranks
    rows: list[int] = []
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    accuracies: list[Tensor] = []
    for start in range(0, num_tasks, batch_size * ranks.size):
        between()
        share = ranks.share(min(batch_size * ranks.size, num_tasks - start))
        if len(share) == 0 and (rows or logits):
            continue
        # A rank that never gets a task computes one that nobody counts, for the shape.
        batch = sampler.batch(start + share.start, len(share)) if share else sampler.batch(0, 1)
        result = learner.evaluate(batch)
        rows += range(start + share.start, start + share.stop)
        logits.append(result.logits[-1].detach().clone()[: len(share)])
        accuracies.append(result.accuracy.double().T[: len(share)])
        labels.append(batch.target_y[: len(share)].to(logits[0].device))
    parts = (logits, labels, accuracies)
    whole = [_whole(ranks, torch.cat(own), rows, num_tasks) for own in parts]
    return Predictions(whole[0], whole[1], whole[2].mean(0))


def _whole(ranks: Ranks, own: Tensor, rows: list[int], total: int) -> Tensor:
    """All [total, ...] of which this rank has made ``rows``."""
    if ranks.size == 1:
        return own
    whole = own.new_zeros(total, *own.shape[1:])
    whole[rows] = own
    ranks.sum(whole)
    return whole


def score(
    logits: Tensor,
    labels: Tensor,
    *,
    ways: int,
    shots: int,
    targets: int,
    models: int,
    stats: str,
    steps: int,
) -> Score:
    """The score of target logits [tasks, m, ways] against labels [tasks, m].

    Args:
        logits: raw logits, the mean over models for an ensemble.
        labels: the right classes.
        ways: see :class:`Score`, as are the others.
        shots: ditto.
        targets: ditto.
        models: ditto.
        stats: ditto.
        steps: ditto.
    """
    right = (logits.argmax(-1) == labels).double().mean(1)
    losses = F.cross_entropy(logits.double().flatten(0, 1), labels.flatten())
    accuracy, ci95 = mean_and_interval(right)
    return Score(accuracy, ci95, float(losses), len(labels), ways, shots, targets, models, stats, steps)


def score_models(
    models: Iterable[Callable[[], object]],
    predictions: Callable[[], Predictions],
    conditions: Mapping[str, Any],
) -> tuple[Score, Score]:
    """The score of the first model, and that of the mean logits of all.

    Args:
        models: each puts a model's parameters into the learner.
        predictions: what the learner then predicts.
        conditions: the other arguments of :func:`score`.
    """
    logits = []
    for put in models:
        put()
        own, labels, _ = predictions()
        logits.append(own.double())
    single = score(logits[0], labels, models=1, **conditions)
    return single, score(sum(logits[1:], logits[0]) / len(logits), labels, models=len(logits), **conditions)


def mean_and_interval(values: Tensor) -> tuple[float, float]:
    """Mean of values [n] and half the width of its 95 % interval."""
    n = len(values)
    spread = 1.96 * float(values.std(correction=1)) / math.sqrt(n) if n > 1 else math.nan
    return float(values.mean()), spread
