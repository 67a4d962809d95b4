"""Lightning without its files and its advice, for the tests that train under it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@contextmanager
def lightning_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # Lightning's advice about worker processes; episodes are drawn in this one.
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        # Lightning's own use of a class that torch 2.13 deprecates.
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", ".*`IterableDataset` has `__len__` defined.*")
        yield
