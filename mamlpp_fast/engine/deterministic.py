"""The same bits on any number of threads: what torch computes runs on one.

Each element that our kernels write is summed in one order, whichever thread does it. Torch's reductions and products
split their sums by the number of threads, and its elementwise loops round otherwise at the ends of a thread's share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["deterministic_algorithms", "one_thread"]


@contextmanager
def one_thread(wanted: bool = True) -> Iterator[None]:
    """Within it torch computes on one thread, where ``wanted``."""
    threads = torch.get_num_threads()
    if not wanted or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Torch's own switch, which learners follow, without the cost of filling fresh memory."""
    before = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before)
