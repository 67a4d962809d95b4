"""Whether a model has changed since it was last looked at."""

from __future__ import annotations

from torch import nn

from mamlpp_fast.engine.fingerprint import Fingerprint, fingerprint

__all__ = ["Watch"]


class Watch:
    """Tells whether a model has changed since it was last looked at, in training and in evaluation mode.

    Both are looked at together: a module may set other attributes in one than in the other.

    Args:
        model: left in the mode it is in.
        beside: what else counts, the loss say.
    """

    def __init__(self, model: nn.Module, *beside: object) -> None:
        self._beside = beside
        self._known: dict[bool, Fingerprint] = {}
        self.look(model)

    def look(self, model: nn.Module) -> None:
        """Takes the model as it is for what is known."""
        flags, mode = [(module, module.training) for module in model.modules()], model.training
        for training in (not mode, mode):  # back by its own `train`, which may do more than set flags
            model.train(training)
            self._known[training] = fingerprint(model, *self._beside, counts=False)
        for module, training in flags:
            module.training = training

    def changed(self, model: nn.Module) -> bool:
        """Whether the model is another than when it was last looked at."""
        return self._known[model.training] != fingerprint(model, *self._beside, counts=False)
