"""Initial parameters from a seed alone, whatever other threads draw."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["seeded"]

_lock = threading.Lock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it torch's global CPU generator starts at ``seed``; afterwards it goes on where it stood.

    One thread at a time: the generator is the process's.
    """
    with _lock, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
