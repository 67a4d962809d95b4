"""A model adapted to one support set, kept for inference."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mamlpp_fast._modes import undisturbed
from mamlpp_fast.copying import copy_of
from mamlpp_fast.engine.deterministic import one_thread
from mamlpp_fast.episodes import as_input
from mamlpp_fast.inputs import as_given
from mamlpp_fast.reference import EvalStats, Inputs, called, predicted, set_eval_stats, set_step

__all__ = ["Predictor"]


class Predictor:
    """What :meth:`mamlpp_fast.MAMLPlusPlus.adapt` returns: inputs [m, ...] to predictions [m, ...].

    A snapshot: it keeps a copy of the model with the adapted weights in evaluation mode, so that nothing done to the
    learner later changes it. It can be pickled and copied (where the model can), and called by several threads at once.
    A model that no copy stands for (see :func:`mamlpp_fast.copying.copy_of`) is called itself, with tensors of the
    predictor's own. ``torch.export`` and ``torch.onnx`` take ``predictor.model``.

    Args:
        model: copied.
        weights: adapted parameters, by name; the others are the model's.
        step: the inner step whose batch-norm rows are used.
        stats: the statistics that per-step batch norms normalise with.
        dtype: of floating-point inputs.
        deterministic: computes on one thread.

    Attributes:
        model: the adapted copy; the learner's own where there is no copy.
        tensors: what it is called with then, else None.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        *,
        step: int,
        stats: EvalStats,
        dtype: torch.dtype,
        deterministic: bool = False,
    ) -> None:
        self.step, self.stats = step, stats
        self.tensors: dict[str, Tensor] | None = None
        try:
            self.model = copy_of(model)
            self.model.eval()  # a `train` of one's own may return nothing
        except ValueError:
            self.model = model
            own = dict(model.named_parameters()) | dict(model.named_buffers())
            self.tensors = {name: t.detach().clone() for name, t in (own | dict(weights)).items()}
        else:
            own = dict(self.model.named_parameters(remove_duplicate=False))
            with torch.no_grad():
                for name, value in weights.items():
                    own[name].copy_(value)
                    own[name].__dict__.clear()  # a fast weight has no attributes of its own
            set_step(self.model, step)
            set_eval_stats(self.model, stats)
        self.device = next(self.model.parameters()).device
        self.dtype = dtype
        self.deterministic = deterministic

    def __call__(self, x: Inputs) -> Tensor:
        """Predictions for ``x`` [m, ...], without gradients; moved to the model's device and dtype.

        Of a model that takes several inputs ``x`` is a tuple or a dict of them.
        """
        x = as_input(as_given("x", x), self.device, self.dtype)
        with undisturbed(), torch.no_grad(), one_thread(self.deterministic):
            if self.tensors is not None:
                return self._called(x, self.tensors)
            prediction: Tensor = called(self.model, x)
        return prediction

    def _called(self, x: Inputs, tensors: dict[str, Tensor]) -> Tensor:
        self.model.eval()
        set_step(self.model, self.step)
        set_eval_stats(self.model, self.stats)
        try:
            prediction: Tensor = predicted(self.model, tensors, x)
        finally:
            set_eval_stats(self.model, "batch")
        return prediction
