"""Placeholder until the real one is merged."""

from typing import Any
from torch import nn


def fingerprint(model: nn.Module) -> Any:
    return tuple((id(m), m.training, tuple(k for k in m.__dict__)) for m in model.modules())
