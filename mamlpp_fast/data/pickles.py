"""Unpickling of data alone: numpy arrays and plain containers, no code."""

from __future__ import annotations

import codecs
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamlpp_fast.data.errors import DataError

__all__ = ["read_pickle"]


def _latin1(text: str, encoding: str) -> bytes:
    """``_codecs.encode`` as array pickles use it: raw bytes written as latin1 text."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"encoding '{encoding}'")
    return codecs.latin_1_encode(text)[0]


def _array(subtype: object, shape: tuple[int, ...], typecode: str | bytes) -> NDArray[Any]:
    """``_reconstruct``: the empty array whose state follows in the pickle."""
    if subtype is not _NDARRAY:
        raise pickle.UnpicklingError(f"array type {subtype}")
    return np.empty(0, np.uint8)


def _from_buffer(data: Any, dtype: np.dtype[Any], shape: tuple[int, ...], order: Any) -> NDArray[Any]:
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _scalar(dtype: np.dtype[Any], data: bytes | str = b"") -> Any:
    if dtype.hasobject:
        raise pickle.UnpicklingError("object scalar")
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype)[0]


def _bytes(data: bytes | str = b"", encoding: str = "latin1") -> bytes:
    """``bytes`` of given content; ``bytes(10**12)`` would be an allocation by a number in the file."""
    if isinstance(data, str):
        return _latin1(data, encoding)
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError(f"bytes of {type(data).__name__}")
    return data


def _bytearray(data: bytes | str = b"", encoding: str = "latin1") -> bytearray:
    return bytearray(_bytes(data, encoding))


def _plain_dict(*args: Any) -> dict[Any, Any]:
    """Stands in for the kinds of dict; a defaultdict's factory is dropped."""
    return dict(args[0]) if args and isinstance(args[0], list | dict) else {}


# Stands for the class numpy.ndarray, which array pickles name but need not call.
_NDARRAY = object()
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
    ("collections", "OrderedDict"): _plain_dict,
    ("collections", "defaultdict"): _plain_dict,
}
for _numpy in ("numpy.core", "numpy._core"):
    _ALLOWED[(f"{_numpy}.multiarray", "_reconstruct")] = _array
    _ALLOWED[(f"{_numpy}.multiarray", "scalar")] = _scalar
    _ALLOWED[(f"{_numpy}.numeric", "_frombuffer")] = _from_buffer
for _builtins in ("builtins", "__builtin__"):
    _ALLOWED.update({(_builtins, t.__name__): t for t in (frozenset, set, list)})
    _ALLOWED[(_builtins, "bytes")] = _bytes
    _ALLOWED[(_builtins, "bytearray")] = _bytearray


class _Refused(Exception):
    pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[(module, name)]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused(f"persistent id {pid!r}")


def read_pickle(file: Path) -> Any:
    """What ``file`` holds, provided it is made of numpy arrays, numbers, strings and plain containers.

    Pickles of Python 2 are read with latin1 text, and those of numpy 1 and 2 alike.

    Raises:
        DataError: when the pickle names anything else (which is never imported), or is damaged.
    """
    try:
        with open(file, "rb") as stream:
            return _Unpickler(stream, encoding="latin1").load()
    except _Refused as refused:
        raise DataError(
            f"{file}: expected a pickle of arrays and plain containers, got one that asks for {refused}"
        ) from None
    except MemoryError:
        raise DataError(
            f"{file}: expected a pickle that fits in memory, got a larger or damaged one"
        ) from None
    except Exception as error:  # a damaged pickle may raise anything at all
        text = " ".join(str(error).split())
        raise DataError(
            f"{file}: expected a whole pickle, got a damaged one ({type(error).__name__}: {text})"
        ) from error
