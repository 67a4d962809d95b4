"""Episodes: the few-shot tasks that every engine, data set and training loop exchanges."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mamlpp_fast.inputs import as_given, form_of_inputs, mapped, named, tensors_of
from mamlpp_fast.reference import Inputs

__all__ = ["Episode", "EpisodeBatch", "as_input", "as_label"]

# Integers of these types are values of pixels; all others are token ids.
_PIXELS = (torch.uint8, torch.bool)


@dataclass(frozen=True)
class Episode:
    """One task: a support set to adapt on and a target (query) set to be judged on.

    Args:
        support_x: inputs, [n, ...] (images [n, C, H, W]), class-major for classification; several as
            :class:`EpisodeBatch` takes them.
        support_y: integer labels [n] (or [n, L], one a token), or float targets [n, ...].
        target_x: inputs, [m, ...].
        target_y: like ``support_y``, [m] or [m, ...].

    Raises:
        TypeError: for anything but tensors among several inputs.
        ValueError: when leading sizes of inputs and labels disagree.
    """

    support_x: Inputs
    support_y: Tensor
    target_x: Inputs
    target_y: Tensor

    def __post_init__(self) -> None:
        for side in ("support", "target"):
            x, y = as_given(f"{side}_x", getattr(self, f"{side}_x")), getattr(self, f"{side}_y")
            object.__setattr__(self, f"{side}_x", x)
            if any(t.shape[:1] != y.shape[:1] for t in tensors_of(x)):
                raise ValueError(_disagree(side, x, y, "the same leading size", 1))


@dataclass(frozen=True)
class EpisodeBatch:
    """A meta-batch: the fields of :class:`Episode` with a leading [tasks] axis.

    Class-structured tensors ([tasks, ways, shots, C, H, W] with labels [tasks, ways, shots], the
    form of recorded runs) are accepted too and flattened to [tasks, ways * shots, ...]. Integer labels of three axes
    are taken for that where the inputs share these axes and have more behind them. Where they have none, [tasks, n, L]
    both, there is a label for each of L tokens. Inputs [tasks, n, L, D] with a label for each of L vectors look like
    the former: say ``by_class=False``.

    A model of several arguments takes a tuple of inputs, ``model(*inputs)``, or a dict, ``model(**inputs)``; an
    argument may itself be a tuple, list or dict. All tensors in them begin with the same [tasks, n]: what all examples
    share (a graph) is given as often, ``expand`` copies nothing. Class-structured ones all have axes behind [tasks,
    ways, shots].

    Args:
        support_x: inputs, [tasks, n, ...]: floating point; pixels (uint8, bool), which become floating point as they
            are, 0 to 255; or token ids (other integers). Among several inputs bool is no pixel but a mask, and stays.
        support_y: integer labels [tasks, n], or one a token [tasks, n, L]; or float targets [tasks, n, ...].
        target_x: inputs, [tasks, m, ...].
        target_y: like ``support_y``, [tasks, m] or [tasks, m, ...].
        by_class: whether inputs and labels are [tasks, ways, shots, ...], to be flattened; None: see above.

    Raises:
        TypeError: for anything but tensors; for keys of a dict of inputs that are no names of arguments.
        ValueError: when leading sizes of inputs, labels or sides disagree.
    """

    support_x: Inputs
    support_y: Tensor
    target_x: Inputs
    target_y: Tensor
    _: KW_ONLY
    by_class: InitVar[bool | None] = None

    def __post_init__(self, by_class: bool | None) -> None:
        for side in ("support", "target"):
            x, y = as_given(f"{side}_x", getattr(self, f"{side}_x")), getattr(self, f"{side}_y")
            if not isinstance(y, Tensor):
                raise TypeError(f"{side}_y: expected a tensor, got {type(y).__name__}")
            inputs = tensors_of(x)
            structured = y.ndim >= 3 and all(t.shape[:3] == y.shape[:3] for t in inputs)
            if by_class and not structured:
                raise ValueError(_disagree(side, x, y, "the same [tasks, ways, shots] leading sizes", 3))
            if by_class is None:
                behind = all(t.ndim > y.ndim for t in inputs)
                structured = structured and not y.is_floating_point() and behind and y.ndim == 3
            if structured and by_class is not False:
                x, y = mapped(lambda t: t.flatten(1, 2), x), y.flatten(1, 2)
            object.__setattr__(self, f"{side}_x", x)
            object.__setattr__(self, f"{side}_y", y)
            if y.ndim < 2 or any(t.shape[:2] != y.shape[:2] for t in tensors_of(x)):
                raise ValueError(_disagree(side, x, y, "the same [tasks, examples] leading sizes", 2))
        if len(self.support_y) != len(self.target_y):
            raise ValueError(
                f"support_x and target_x: expected the same number of tasks, "
                f"got {len(self.support_y)} and {len(self.target_y)}"
            )

    @classmethod
    def of(cls, task: Episode) -> EpisodeBatch:
        """One task as a batch, whatever axes it has."""
        return cls(*(mapped(lambda t: t.unsqueeze(0), part) for part in _fields(task)[0]), by_class=False)

    @property
    def num_tasks(self) -> int:
        return len(self.support_y)

    def __len__(self) -> int:
        return self.num_tasks

    def __getitem__(self, index: int) -> Episode:
        return Episode(*(mapped(lambda t: t[index], part) for part in self.fields))

    def __iter__(self) -> Iterator[Episode]:
        return (self[i] for i in range(self.num_tasks))

    def tasks(self, start: int, stop: int) -> EpisodeBatch:
        """Tasks ``start`` .. ``stop - 1``, as views."""
        return EpisodeBatch(*(mapped(lambda t: t[start:stop], part) for part in self.fields), by_class=False)

    @property
    def fields(self) -> tuple[Inputs, Tensor, Inputs, Tensor]:
        """``support_x``, ``support_y``, ``target_x`` and ``target_y``."""
        return self.support_x, self.support_y, self.target_x, self.target_y

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors in :attr:`fields`, in order."""
        return [t for part in self.fields for t in tensors_of(part)]

    @property
    def form(self) -> tuple[Hashable, ...]:
        """What batches that the same program serves have in common: how inputs are held, shapes and types."""
        return tuple(form_of_inputs(part) for part in self.fields)

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        label_dtype: torch.dtype | None = None,
    ) -> EpisodeBatch:
        """Moves to ``device``, and to the types that a model computes in where ``dtype`` is given.

        Then inputs that are floating point or pixels (uint8, bool) become ``dtype``, values as they are; other integer
        inputs, token ids, become int64. Float targets become ``dtype``, integer labels int64; with ``label_dtype``
        integer and boolean labels become that. Among several inputs booleans, masks, stay. Copies what was made under
        ``torch.inference_mode``.
        """
        xs = (as_input(x, device, dtype) for x in (self.support_x, self.target_x))
        ys = (as_label(y, device, dtype, label_dtype) for y in (self.support_y, self.target_y))
        (support_x, target_x), (support_y, target_y) = xs, ys
        return EpisodeBatch(support_x, support_y, target_x, target_y, by_class=False)


def as_input(x: Inputs, device: torch.device | str | None, dtype: torch.dtype | None) -> Inputs:
    """Inputs as a model of ``dtype`` takes them; see :meth:`EpisodeBatch.to`."""
    several = not isinstance(x, Tensor)

    def taken(t: Tensor) -> Tensor:
        wanted = None
        if dtype is not None and not t.is_complex() and not (several and t.dtype == torch.bool):
            wanted = dtype if t.is_floating_point() or t.dtype in _PIXELS else torch.int64
        return _usable(t.to(device=device, dtype=wanted))

    return mapped(taken, x)


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


def _disagree(side: str, x: Inputs, y: Tensor, expected: str, lead: int) -> str:
    """Names the first input whose leading sizes are not the labels'."""
    name, t = next(
        ((n, t) for n, t in named(f"{side}_x", x) if t.shape[:lead] != y.shape[:lead]),
        named(f"{side}_x", x)[0],
    )
    return f"{name} and {side}_y: expected {expected}, got {tuple(t.shape)} and {tuple(y.shape)}"


def _fields(episode: Episode | EpisodeBatch) -> tuple[list[Any], None]:
    return [episode.support_x, episode.support_y, episode.target_x, episode.target_y], None


# So that a captured step (:func:`mamlpp_fast.graphed`) sees the tensors in them.
pytree.register_pytree_node(Episode, _fields, lambda tensors, _: Episode(*tensors))
pytree.register_pytree_node(EpisodeBatch, _fields, lambda tensors, _: EpisodeBatch(*tensors, by_class=False))
