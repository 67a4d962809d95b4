"""From a batch to an engine that can take it: the one asked for, or under ``auto`` the fastest."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from mamlpp_fast import labels
from mamlpp_fast.engine import Engine, EngineChoice, EngineName
from mamlpp_fast.engine.base import Seldom
from mamlpp_fast.engine.deterministic import one_thread
from mamlpp_fast.engine.fused import Unsupported
from mamlpp_fast.engine.watch import Watch
from mamlpp_fast.episodes import EpisodeBatch
from mamlpp_fast.inputs import named
from mamlpp_fast.reference import LossFn, called

__all__ = ["Serving"]

_T = TypeVar("_T")
_FEW, _SHORT = 16, 8
"""Where a model changed so often in a row after fewer calls, its next form has to serve as many before the fused engine
writes it down."""


class Serving:
    """The engines for a model as it is now; to be made anew once :meth:`outdated`.

    Args:
        model: the network.
        loss_fn: the loss.
        asked: the engine asked for.
        make: builds an engine.
        dtype: what the model computes in.
        deterministic: whether all but the fused engine run on one thread.
        before: what this takes the place of, whose model changed.

    Attributes:
        engine: the engine that served last; the first choice before.
        reason: why it did.
        trained: the engine that computed the last meta-gradient, None before the first.

    Raises:
        ValueError: when the engine asked for cannot serve the model.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        asked: EngineName,
        make: Callable[[EngineName], EngineChoice],
        *,
        dtype: torch.dtype,
        deterministic: bool,
        before: Serving | None = None,
    ) -> None:
        self.calls: int = 0
        self.short: int = before.short + 1 if before is not None and before.calls < _FEW else 0
        self.model = model
        self.loss_fn = loss_fn
        self.asked = asked
        self.dtype = dtype
        self.device = next(model.parameters()).device
        self.deterministic = deterministic
        self._make = make
        self._first = make(asked)
        self._spare: Engine | None = None
        self._refused: dict[Hashable, str] = {}
        self._classes: int | None = None
        self._seen: set[Hashable] = set()
        self.trained: Engine | None = None
        self._gradients: dict[str, list[tuple[nn.Parameter, Tensor | None]]] = {}
        self.engine, self.reason = self._first
        self._watch = Watch(model, loss_fn)

    def outdated(self, model: nn.Module, loss_fn: LossFn) -> bool:
        """Whether model or loss are others, or the model has been changed since."""
        return model is not self.model or loss_fn is not self.loss_fn or self._watch.changed(model)

    def as_taken(self, batch: EpisodeBatch) -> EpisodeBatch:
        """A batch on the model's device, in the types that model and loss take."""
        return batch.to(self.device, self.dtype, labels.label_dtype(self.loss_fn, self.dtype))

    def serve(
        self, given: EpisodeBatch, kind: tuple[Hashable, ...], call: Callable[[Engine, EpisodeBatch], _T]
    ) -> _T:
        """Calls with an engine and the batch as it takes it.

        Args:
            given: the batch as it came.
            kind: what is asked for. With the shapes and types of a batch it is a form: the fused engine, once it has
                refused one, is not asked again.
            call: calls the engine.

        Raises:
            ValueError: when the fused engine was asked for and cannot take model or batch, or when labels do not
                fit the model's predictions.
        """
        if self._classes is not None and (why := labels.out_of_range(given, self.loss_fn, self._classes)):
            raise ValueError(why)
        self.calls += 1
        batch = self.as_taken(given)
        form = (*kind, *batch.form)
        with self.mistakes_named(batch):
            result = self._called(form, given, batch, call)
        if form not in self._seen or self.engine.name != "fused":  # a fused program does not call the model
            self._seen.add(form)
            self.settle()
        return result

    def settle(self) -> None:
        """Takes what a pass itself changed in the model (an activation kept, a count) for no change."""
        if self._watch.changed(self.model):
            self._watch.look(self.model)

    def _called(
        self,
        form: Hashable,
        given: EpisodeBatch,
        batch: EpisodeBatch,
        call: Callable[[Engine, EpisodeBatch], _T],
    ) -> _T:
        engine, reason = self._first
        if engine.name == "fused":
            why = self._refused.get(form) or labels.unsuited(batch, self.loss_fn, given)
            if why is None and self.asked == "auto" and self.short >= _SHORT and self.calls <= _FEW:
                why = "the model changes from call to call, so that no program would serve often"
            if why is None:
                self.engine, self.reason = engine, reason
                try:
                    return call(engine, batch)
                except Unsupported as error:
                    why = str(error)
                    if not isinstance(error, Seldom):
                        self._refused[form] = why
            if self.asked == "fused":
                raise ValueError(
                    f"engine: expected a model and a batch that the fused engine can take, {why}"
                )
            if self._spare is None:
                self._spare = self._make("autograd").engine
            engine, reason = self._spare, f"not fused: {why}"
        self.engine, self.reason = engine, reason
        with one_thread(self.deterministic and engine.name != "fused"):
            return call(engine, batch)

    @contextmanager
    def mistakes_named(self, batch: EpisodeBatch) -> Iterator[None]:
        """Turns what PyTorch says of unfitting labels and inputs into one line that names them."""
        try:
            yield
        except (AttributeError, IndexError, RuntimeError, TypeError, Warning) as error:
            if why := self._mistake(batch):
                raise ValueError(why) from error
            raise

    def _mistake(self, batch: EpisodeBatch) -> str | None:
        self.model.eval()
        try:
            with torch.no_grad():
                prediction = called(self.model, batch[0].support_x)
        except Exception as error:
            ids = [name for name, t in named("support_x", batch.support_x) if t.dtype == torch.int64]
            if not ids:
                return None
            reason = " ".join(str(error).split())
            return f"{ids[0]}: expected inputs that the model takes, got token ids (integers), {reason}"
        if not isinstance(prediction, Tensor):
            return f"model: expected a forward that returns a tensor, got {type(prediction).__name__}"
        return labels.mistake(batch, prediction, self.loss_fn)

    def check_prediction(self, prediction: Tensor, target: Tensor) -> None:
        """Checks predictions [tasks, m, ...] against targets: PyTorch would broadcast them, and only warn.

        Raises:
            ValueError: when a regression loss gets targets of another shape.
        """
        if labels.family(self.loss_fn) == "values" and prediction.shape != target.shape:
            raise ValueError(
                f"target_y: expected a target for each prediction, {list(prediction.shape)}, "
                f"got {list(target.shape)}"
            )
        self._classes = prediction.shape[2] if prediction.ndim > 2 else None

    def lend_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Where another engine has trained since, gives this one its own ``.grad`` tensors back.

        Captured graphs write to them.
        """
        engine, last = self.engine, self.trained
        if last is not None and last is not engine:
            self._gradients[last.name] = [(p, p.grad) for p in parameters]
            for p, gradient in self._gradients.get(engine.name, [(p, None) for p in parameters]):
                p.grad = gradient
        self.trained = engine
