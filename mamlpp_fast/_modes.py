"""Modes of PyTorch that a caller may be in, and that meta-training must not follow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["undisturbed"]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Outside ``torch.inference_mode``, ``no_grad`` and ``autocast``, in which nothing could adapt as it should."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # turns gradients on as well
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
