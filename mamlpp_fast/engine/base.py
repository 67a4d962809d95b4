"""What engines have in common: their interface, the precisions, and the refusal that hands a model on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from mamlpp_fast.episodes import EpisodeBatch
from mamlpp_fast.reference import EvalStats, MetaResult

__all__ = [
    "ENGINES",
    "PRECISIONS",
    "Engine",
    "EngineName",
    "Precision",
    "Seldom",
    "UncheckedError",
    "Unsupported",
    "called_modules",
    "dtype_of",
    "first_line",
    "handed_over",
    "launches_cost",
]

EngineName = Literal["auto", "reference", "autograd", "fused"]
Precision = Literal["float64", "float32", "tf32", "bfloat16"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


class Unsupported(ValueError):
    """The fused engine cannot take a model or a batch; ``module`` is the part of it that is the reason."""

    def __init__(self, module: str, why: str) -> None:
        super().__init__(f"{module}: {why}")
        self.module = module
        self.why = why

    def __reduce__(self) -> tuple[type[Unsupported], tuple[str, str]]:
        return type(self), (self.module, self.why)


class UncheckedError(Unsupported):
    """These examples cannot be checked on; others may."""


class Seldom(Unsupported):
    """A form of batches that has not come often enough yet for a program; it may."""


class Engine(Protocol):
    """Computes meta-gradients and evaluations for one model, in the form it had when the engine was made."""

    name: str

    @property
    def generation(self) -> int:
        """Changes when the engine's memory moves: graphs captured before must not be replayed."""
        ...

    def prepare(self, batch: EpisodeBatch, multi_step: bool, second_order: bool) -> object:
        """Makes what meta-gradients of batches of this form need, memory above all, so that a capture finds it there.

        Raises:
            Unsupported: when the engine cannot take the model or this batch.
        """
        ...

    def meta_gradient(
        self, batch: EpisodeBatch, step_weights: Tensor | None, second_order: bool
    ) -> MetaResult:
        """Sets ``.grad`` of every trainable parameter of model and rates: the mean over tasks.

        Args:
            batch: the meta-batch, on the model's device, in its dtype.
            step_weights: multi-step-loss weights [K], or None for the last step's target loss alone.
            second_order: False for first-order MAML.

        Raises:
            Unsupported: when the engine cannot take the model or this batch.
        """
        ...

    def evaluate(self, batch: EpisodeBatch, *, steps: int, stats: EvalStats) -> Tensor:
        """Target predictions after every one of ``steps`` updates, [steps, tasks, m, ...]; changes no state.

        Raises:
            Unsupported: as :meth:`meta_gradient`.
        """
        ...

    def explain(self) -> str:
        """What the engine does for the batches seen so far, lines of text; empty where there is nothing to say."""
        ...


@contextlib.contextmanager
def handed_over(model: nn.Module) -> Iterator[None]:
    """Within it whatever goes wrong is a reason to let another engine serve: a fault of ours is no reason to stop.

    Raises:
        Unsupported: in place of any other error.
    """
    try:
        yield
    except Unsupported:
        raise
    except Exception as error:
        why = f"writing its program down failed, {type(error).__name__}: {first_line(error)}"
        raise Unsupported(type(model).__name__, why) from error


def dtype_of(precision: Precision) -> torch.dtype:
    """The dtype of parameters and inputs at a precision: bfloat16 and tf32 keep them in float32."""
    return torch.float64 if precision == "float64" else torch.float32


def first_line(error: Exception) -> str:
    """What an error says, in one line: its first, or its kind where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def called_modules(frames: Iterable[tuple[FrameType, int]]) -> Iterator[nn.Module]:
    """The modules whose calls are among ``frames``, in that order: of ``traceback.walk_stack`` or ``walk_tb``."""
    for frame, _ in frames:
        if frame.f_code is nn.Module._call_impl.__code__:
            yield frame.f_locals["self"]


def launches_cost(device: torch.device) -> bool:
    """Whether many small calls are better one large one: a GPU's launch takes longer than what most compute."""
    return device.type != "cpu"
