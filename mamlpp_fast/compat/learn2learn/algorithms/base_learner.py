"""The base of learn2learn's learners."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["BaseLearner"]


def given(learner: nn.Module, **options: bool | None) -> dict[str, Any]:
    """Each option as it is given, or as the learner has it where that is None."""
    return {name: getattr(learner, name) if value is None else value for name, value in options.items()}


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
