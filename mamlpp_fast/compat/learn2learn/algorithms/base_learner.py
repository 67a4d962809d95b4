"""The base of learn2learn's learners."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["Adapting", "BaseLearner"]


def given(learner: object, **options: bool | None) -> dict[str, Any]:
    """Each option as it is given, or as the learner has it where that is None."""
    return {name: getattr(learner, name) if value is None else value for name, value in options.items()}


class Adapting:
    """The ``adapt`` of learners that take a gradient step with these options, which ``_step`` makes."""

    _step: Any

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> None:
        """One gradient step on ``loss``, in place; what is not given is as the learner has it.

        Raises:
            AdaptationError: a RuntimeError; a parameter is unused or takes no gradient, and that is not allowed.
        """
        options = given(self, first_order=first_order, allow_unused=allow_unused, allow_nograd=allow_nograd)
        self._step(loss, not options.pop("first_order"), options)


class BaseLearner(nn.Module):
    """Wraps a module; calls it, and answers with its attributes where it has none of its own."""

    module: Any

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, attr: str) -> Any:
        try:
            return super().__getattr__(attr)
        except AttributeError:
            return getattr(self.__dict__["_modules"]["module"], attr)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)
