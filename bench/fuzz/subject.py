"""What every kind of input has."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from pathlib import Path


class Subject(ABC):
    """One kind of input.

    Attributes:
        name: what the figures call it.
        share: of all inputs.
    """

    name: str
    share: float

    @abstractmethod
    def prepare(self, folder: Path) -> None:
        """Writes what stays the same into ``folder``, and keeps the valid inputs, which are the same each time."""

    @abstractmethod
    def make(self, rng: random.Random) -> bytes:
        """A damaged input."""

    @abstractmethod
    def read(self, content: bytes) -> None:
        """Reads it as a user's command would; raises what a user would see."""
