"""What a fingerprint follows beyond plain attributes: deeper in objects, and PyTorch's own settings."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from mamlpp_fast.engine.objects import attributes_held
from mamlpp_fast.reference.code import attributes_of, functions_of, globals_of

if TYPE_CHECKING:
    from mamlpp_fast.engine.fingerprint import _Reader

__all__ = ["ITERATOR", "REFERENCE", "SETTINGS", "reach", "settings_of"]

REFERENCE = "reads a weak reference, behind which changes are not followed"
ITERATOR = "reads an iterator, which goes on at every call"

SETTINGS: dict[str, Callable[[], Any]] = {
    function.__name__: function
    for function in (
        *(torch.are_deterministic_algorithms_enabled, torch.is_deterministic_algorithms_warn_only_enabled),
        *(torch.get_deterministic_debug_mode, torch.get_float32_matmul_precision, torch.get_num_threads),
        *(torch.get_num_interop_threads, torch.initial_seed, torch.is_anomaly_enabled),
    )
}
"""Questions that a forward may ask PyTorch, of which the answer counts."""


@functools.lru_cache(maxsize=1000)
def settings_of(code: types.CodeType) -> tuple[str, ...]:
    """Those questions that a function may ask."""
    return tuple(name for name in (*globals_of(code), *attributes_of(code)) if name in SETTINGS)


def reach(reader: _Reader) -> None:
    """Reads the attributes of objects and tensors, however deep, of which any function that is followed reads the name.

    What they are leads to further objects, and their methods to further names.
    """
    done: set[tuple[int, str]] = set()
    before = -1
    while before != len(done):
        before = len(done)
        for value in reader.objects:  # grows meanwhile
            held, own = attributes_held(value), functions_of(type(value))
            for name in (*held, *own):
                if name not in reader.called or (id(value), name) in done:
                    continue
                done.add((id(value), name))
                if name in held:
                    reader.key.append(name)
                    reader.value(held[name], 1)
                for method in own.get(name, ()):
                    reader.names(method)
