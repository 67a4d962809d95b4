"""What the tests of recordings share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mamlpp_fast.engine.record import Recording, record

draw_array = np.random.rand  # from NumPy's global generator, as a user's forward may


class Net(nn.Module):
    """Two layers, and in between what a test says: ``between(self, hidden [n, 4])``."""

    def __init__(self, between: Callable[[Any, Tensor], Any] = lambda net, h: h) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("scale", torch.ones(4))
        self.offset = torch.zeros(4)
        self.calls = 0
        self.between = between

    def forward(self, x: Tensor) -> Any:
        return self.head(self.between(self, self.body(x)))


def recorded(model: nn.Module, *example: int, counts: tuple[int, int] = (3, 4)) -> Recording:
    x, other = (torch.randn(n, *(example or (3,))) for n in counts)
    return record(model, x, other)
