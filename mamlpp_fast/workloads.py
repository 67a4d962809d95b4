"""The named workloads that benchmarks time: network, task and batch sizes, random data of the right kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mamlpp_fast._seeded import seeded
from mamlpp_fast.config import MAMLConfig
from mamlpp_fast.engine import EngineName, Precision
from mamlpp_fast.episodes import EpisodeBatch
from mamlpp_fast.learner import MAMLPlusPlus
from mamlpp_fast.models import Conv4

__all__ = ["WORKLOADS", "Workload"]


@dataclass(frozen=True)
class Workload:
    """One meta-training step's sizes; second order, MAML++ with everything on, Conv4 with max-pooling.

    Attributes:
        name: as given to ``mamlpp-fast bench``.
        tasks: tasks of a batch.
        ways: classes of a task.
        shots: support images of a class.
        targets: target images of a class.
        image_size: height and width in pixels.
        channels: channels of the images.
        filters: channels of every stage.
        steps: inner steps.
        final: the target loss of the last step alone, instead of after every step.
    """

    name: str
    tasks: int
    ways: int
    shots: int
    targets: int
    image_size: int
    channels: int
    filters: int
    steps: int = 5
    final: bool = False

    def learner(
        self,
        engine: EngineName = "auto",
        precision: Precision = "float32",
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> MAMLPlusPlus:
        """A learner of this workload at seeded random parameters."""
        config = MAMLConfig(
            steps=self.steps,
            inner_lr=0.1 if self.channels == 1 else 0.01,
            msl=not self.final,
            clamp_meta_gradient=None if self.channels == 1 else 10.0,
        )
        with seeded(seed):
            model = Conv4(
                self.channels,
                self.ways,
                image_size=self.image_size,
                filters=self.filters,
                num_steps=self.steps,
            )
        return MAMLPlusPlus(model, config, engine=engine, precision=precision, device=device)

    def batch(self, seed: int = 0) -> EpisodeBatch:
        """A seeded batch of float32 tasks whose classes can be told apart: noisy copies of one image a class.

        One-channel images are binary with a tenth of their pixels ink, colour ones normalised.
        """
        generator = torch.Generator().manual_seed(seed)
        shape = (self.tasks, self.ways, 1, self.channels, self.image_size, self.image_size)

        def images(per_class: int) -> Tensor:
            noise = torch.randn(self.tasks, self.ways, per_class, *shape[3:], generator=generator)
            x = 0.7 * prototype + 0.7 * noise
            return (x < 1.28).float() if self.channels == 1 else x

        def labels(per_class: int) -> Tensor:
            return (
                torch.arange(self.ways).view(1, -1, 1).expand(self.tasks, self.ways, per_class).contiguous()
            )

        prototype = torch.randn(shape, generator=generator)
        return EpisodeBatch(
            images(self.shots), labels(self.shots), images(self.targets), labels(self.targets)
        )

    def gflop(self) -> float:
        """Convolution work of one meta-iteration in GFLOP (1e9 multiplications and additions).

        A support step of a layer is 9 convolutions (forward, 2 backward, 6 in the Hessian-vector product; 4 in the
        first layer, which needs no gradient to its input), a target pass 3 (2).
        """
        support = target = 0.0
        size, channels = self.image_size, self.channels
        for stage in range(4):
            per_image = 2 * 9 * size * size * channels * self.filters
            first = stage == 0
            support += per_image * (4 if first else 9)
            target += per_image * (2 if first else 3)
            size, channels = size // 2, self.filters
        support *= self.tasks * self.ways * self.shots * self.steps
        target *= self.tasks * self.ways * self.targets * (1 if self.final else self.steps)
        return (support + target) / 1e9


def _workloads() -> dict[str, Workload]:
    table = [
        Workload("omniglot-20w1s", 8, 20, 1, 1, 28, 1, 64),
        Workload("omniglot-20w5s", 8, 20, 5, 1, 28, 1, 64),
        Workload("omniglot-5w1s", 8, 5, 1, 1, 28, 1, 64),
        Workload("omniglot-5w5s", 8, 5, 5, 1, 28, 1, 64),
        Workload("miniimagenet-5w1s", 2, 5, 1, 15, 84, 3, 48),
        Workload("miniimagenet-5w5s", 2, 5, 5, 15, 84, 3, 48),
    ]
    both = [
        w
        for row in table
        for w in (row, Workload(**(vars(row) | {"name": f"{row.name}-final", "final": True})))
    ]
    return {w.name: w for w in both}


WORKLOADS: Mapping[str, Workload] = _workloads()
