"""Episodes: the few-shot tasks that every engine, data set and training loop exchanges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, InitVar, dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Episode", "EpisodeBatch", "as_input", "as_label"]

# Integers of these types are values of pixels; all others are token ids.
_PIXELS = (torch.uint8, torch.bool)


@dataclass(frozen=True)
class Episode:
    """One task: a support set to adapt on and a target (query) set to be judged on.

    Args:
        support_x: inputs, [n, ...] (images [n, C, H, W]), class-major for classification.
        support_y: integer labels [n] (or [n, L], one a token), or float targets [n, ...].
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
    form of recorded runs) are accepted too and flattened to [tasks, ways * shots, ...]. Integer labels of three axes
    are taken for that where the inputs share these axes and have more behind them. Where they have none, [tasks, n, L]
    both, there is a label for each of L tokens. Inputs [tasks, n, L, D] with a label for each of L vectors look like
    the former: say ``by_class=False``.

    Args:
        support_x: inputs, [tasks, n, ...]: floating point; pixels (uint8, bool), which become floating point as they
            are, 0 to 255; or token ids (other integers).
        support_y: integer labels [tasks, n], or one a token [tasks, n, L]; or float targets [tasks, n, ...].
        target_x: inputs, [tasks, m, ...].
        target_y: like ``support_y``, [tasks, m] or [tasks, m, ...].
        by_class: whether inputs and labels are [tasks, ways, shots, ...], to be flattened; None: see above.

    Raises:
        TypeError: for anything but tensors.
        ValueError: when leading sizes of inputs, labels or sides disagree.
    """

    support_x: Tensor
    support_y: Tensor
    target_x: Tensor
    target_y: Tensor
    _: KW_ONLY
    by_class: InitVar[bool | None] = None

    def __post_init__(self, by_class: bool | None) -> None:
        for side in ("support", "target"):
            x, y = getattr(self, f"{side}_x"), getattr(self, f"{side}_y")
            for name, t in ((f"{side}_x", x), (f"{side}_y", y)):
                if not isinstance(t, Tensor):
                    raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
            structured = y.ndim >= 3 and x.shape[:3] == y.shape[:3]
            if by_class and not structured:
                raise ValueError(
                    f"{side}_x and {side}_y: expected the same [tasks, ways, shots] leading sizes, "
                    f"got {tuple(x.shape)} and {tuple(y.shape)}"
                )
            if by_class is None:
                structured = structured and not y.is_floating_point() and x.ndim > y.ndim == 3
            if structured and by_class is not False:
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

    @classmethod
    def of(cls, task: Episode) -> EpisodeBatch:
        """One task as a batch, whatever axes it has."""
        fields = (task.support_x, task.support_y, task.target_x, task.target_y)
        return cls(*(t.unsqueeze(0) for t in fields), by_class=False)

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

    def tasks(self, start: int, stop: int) -> EpisodeBatch:
        """Tasks ``start`` .. ``stop - 1``, as views."""
        return EpisodeBatch(*(t[start:stop] for t in self.fields), by_class=False)

    @property
    def fields(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``support_x``, ``support_y``, ``target_x`` and ``target_y``."""
        return self.support_x, self.support_y, self.target_x, self.target_y

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        label_dtype: torch.dtype | None = None,
    ) -> EpisodeBatch:
        """Moves to ``device``, and to the types that a model computes in where ``dtype`` is given.

        Then inputs that are floating point or pixels (uint8, bool) become ``dtype``, values as they are; other integer
        inputs, token ids, become int64. Float targets become ``dtype``, integer labels int64; with ``label_dtype``
        integer and boolean labels become that. Copies what was made under ``torch.inference_mode``.
        """
        xs = (as_input(x, device, dtype) for x in (self.support_x, self.target_x))
        ys = (as_label(y, device, dtype, label_dtype) for y in (self.support_y, self.target_y))
        (support_x, target_x), (support_y, target_y) = xs, ys
        return EpisodeBatch(support_x, support_y, target_x, target_y, by_class=False)


def as_input(x: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """An input as a model of ``dtype`` takes it; see :meth:`EpisodeBatch.to`."""
    wanted = None
    if dtype is not None and not x.is_complex():
        wanted = dtype if x.is_floating_point() or x.dtype in _PIXELS else torch.int64
    return _usable(x.to(device=device, dtype=wanted))


def as_label(
    y: Tensor,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    label_dtype: torch.dtype | None = None,
) -> Tensor:
    """Labels as a loss of ``dtype`` takes them; see :meth:`EpisodeBatch.to`."""
    wanted = None
    if dtype is not None and not y.is_complex():
        if y.is_floating_point():
            wanted = dtype
        elif label_dtype is not None:
            wanted = label_dtype
        elif y.dtype != torch.bool:
            wanted = torch.int64
    return _usable(y.to(device=device, dtype=wanted))


def _usable(t: Tensor) -> Tensor:
    """A tensor that autograd takes: one made under ``torch.inference_mode`` is copied."""
    return t.clone() if t.is_inference() and not torch.is_inference_mode_enabled() else t


def _fields(episode: Episode | EpisodeBatch) -> tuple[list[Tensor], None]:
    return [episode.support_x, episode.support_y, episode.target_x, episode.target_y], None


# So that a captured step (:func:`mamlpp_fast.graphed`) sees the tensors in them.
pytree.register_pytree_node(Episode, _fields, lambda tensors, _: Episode(*tensors))
pytree.register_pytree_node(EpisodeBatch, _fields, lambda tensors, _: EpisodeBatch(*tensors, by_class=False))
