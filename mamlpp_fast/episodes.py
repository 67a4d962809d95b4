"""Episodes: the few-shot tasks that every engine, data set and training loop exchanges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Episode", "EpisodeBatch"]


@dataclass(frozen=True)
class Episode:
    """One task: a support set to adapt on and a target (query) set to be judged on.

    Args:
        support_x: inputs, [n, ...] (images [n, C, H, W]), class-major for classification.
        support_y: int64 labels [n], or float regression targets [n, ...].
        target_x: inputs, [m, ...].
        target_y: like ``support_y``, [m] or [m, ...].
    """

    support_x: Tensor
    support_y: Tensor
    target_x: Tensor
    target_y: Tensor

    def __post_init__(self) -> None:
        for side in ("support", "target"):
            x, y = getattr(self, f"{side}_x"), getattr(self, f"{side}_y")
            if x.shape[:1] != y.shape[:1]:
                raise ValueError(
                    f"{side}_x and {side}_y: expected the same leading size, "
                    f"got {tuple(x.shape)} and {tuple(y.shape)}"
                )


@dataclass(frozen=True)
class EpisodeBatch:
    """A meta-batch: the fields of :class:`Episode` with a leading [tasks] axis.

    Class-structured tensors ([tasks, ways, shots, C, H, W] with labels [tasks, ways, shots], the
    form of recorded runs) are accepted too and flattened to [tasks, ways * shots, ...].

    Args:
        support_x: inputs, [tasks, n, ...].
        support_y: int64 labels [tasks, n], or float regression targets [tasks, n, ...].
        target_x: inputs, [tasks, m, ...].
        target_y: like ``support_y``, [tasks, m] or [tasks, m, ...].

    Raises:
        ValueError: when leading sizes of inputs, labels or sides disagree.
    """

    support_x: Tensor
    support_y: Tensor
    target_x: Tensor
    target_y: Tensor

    def __post_init__(self) -> None:
        for side in ("support", "target"):
            x, y = getattr(self, f"{side}_x"), getattr(self, f"{side}_y")
            if y.ndim == 3 and not y.is_floating_point() and x.shape[:3] == y.shape:
                x, y = x.flatten(1, 2), y.flatten(1, 2)
                object.__setattr__(self, f"{side}_x", x)
                object.__setattr__(self, f"{side}_y", y)
            if x.ndim < 2 or x.shape[:2] != y.shape[:2]:
                raise ValueError(
                    f"{side}_x and {side}_y: expected the same [tasks, examples] leading sizes, "
                    f"got {tuple(x.shape)} and {tuple(y.shape)}"
                )
        if self.support_x.shape[0] != self.target_x.shape[0]:
            raise ValueError(
                f"support_x and target_x: expected the same number of tasks, "
                f"got {self.support_x.shape[0]} and {self.target_x.shape[0]}"
            )

    @property
    def num_tasks(self) -> int:
        return self.support_x.shape[0]

    def __len__(self) -> int:
        return self.num_tasks

    def __getitem__(self, index: int) -> Episode:
        return Episode(
            self.support_x[index], self.support_y[index], self.target_x[index], self.target_y[index]
        )

    def __iter__(self) -> Iterator[Episode]:
        return (self[i] for i in range(self.num_tasks))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> EpisodeBatch:
        """Moves to ``device``; inputs (and float targets) become ``dtype``, integer labels stay."""

        def move(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype if t.is_floating_point() else None)

        return EpisodeBatch(
            move(self.support_x), move(self.support_y), move(self.target_x), move(self.target_y)
        )


def _fields(episode: Episode | EpisodeBatch) -> tuple[list[Tensor], None]:
    return [episode.support_x, episode.support_y, episode.target_x, episode.target_y], None


# So that a captured step (:func:`mamlpp_fast.graphed`) sees the tensors in them.
pytree.register_pytree_node(Episode, _fields, lambda tensors, _: Episode(*tensors))
pytree.register_pytree_node(EpisodeBatch, _fields, lambda tensors, _: EpisodeBatch(*tensors))
