"""What an object holds, as far as it can be compared: records, settings, small tensors."""

from __future__ import annotations

import argparse
import array
import collections
import ctypes
import dataclasses
import functools
import pickle
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from mamlpp_fast.engine.fragments import PLAIN

__all__ = [
    "BUFFERS",
    "CONTAINERS",
    "ENTRIES",
    "attributes_held",
    "bytes_in",
    "is_record",
    "is_weak",
    "pickled",
    "place",
    "plain_settings",
    "small_values",
]

CONTAINERS = (list, tuple, dict, set, frozenset, collections.deque)
ENTRIES = 1000
"""Containers and tensors of more are compared by identity, and length or version."""
BUFFERS = (bytearray, memoryview, array.array, ctypes._SimpleCData, ctypes.Array, ctypes.Structure)
"""Of the interpreter's own: bytes that are written to."""
_RECORDS = (types.SimpleNamespace, argparse.Namespace)

_WEAK = (
    *(weakref.ReferenceType, weakref.ProxyType, weakref.CallableProxyType, weakref.WeakSet),
    *(weakref.WeakKeyDictionary, weakref.WeakValueDictionary, TensorWeakRef, WeakIdKeyDictionary),
)


def _refers_weakly(kind: type) -> bool:
    """Whether objects of this type refer to others without keeping them. A proxy says that it is of another type."""
    return issubclass(kind, _WEAK)


is_weak: Callable[[Any], bool] = functools.lru_cache(maxsize=1000)(_refers_weakly)


def pickled(value: object) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception:  # whatever a class of the user's raises
        return b""


def bytes_in(value: Any) -> bytes | int:
    """What is in a small buffer; of a large one how much it is."""
    view = memoryview(value)
    return view.tobytes() if view.nbytes <= 8 * ENTRIES else view.nbytes


def is_record(value: object) -> bool:
    return isinstance(value, _RECORDS) or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def attributes_held(value: object) -> dict[str, Any]:
    slots = [s for c in type(value).__mro__ for s in vars(c).get("__slots__", ()) if isinstance(s, str)]
    return {s: getattr(value, s) for s in slots if hasattr(value, s)} | getattr(value, "__dict__", {})


def plain_settings(value: object) -> dict[str, Any] | None:
    """The attributes of an object that holds plain values and containers alone, a configuration say."""
    held = attributes_held(value)
    plain = all(type(v) in PLAIN or isinstance(v, CONTAINERS) for v in held.values())
    return held if plain else None


def small_values(tensor: Tensor) -> bytes | None:
    """The values of a small tensor on a CPU: a write through ``.data`` or NumPy leaves its version as it was."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_complex():
        return None
    if tensor.device.type != "cpu" or tensor.numel() > ENTRIES:
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # of a transform, which tells no values
        return None
    with torch._C._DisableFuncTorch():
        return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def place(tensor: Tensor) -> tuple[Any, ...]:
    """How the values lie, and on a GPU where, for a captured graph reads them there."""
    if tensor.layout is not torch.strided:
        return (tensor.layout,)
    return tensor.data_ptr() if tensor.is_cuda else 0, *tensor.stride()
