"""Unpickling of data alone: numpy arrays and plain containers, no code, no more memory than the file has bytes for."""

from __future__ import annotations

import codecs
import math
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mamlpp_fast.data.errors import DataError

__all__ = ["NUMBERS", "DataUnpickler", "Refused", "plain_dict", "read_pickle"]


class Refused(Exception):
    """The pickle asks for what no data need; the message names it."""


def _latin1(text: str, encoding: str) -> bytes:
    """``_codecs.encode`` as array pickles use it: raw bytes written as latin1 text."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"encoding '{encoding}'")
    return codecs.latin_1_encode(text)[0]


def _dtype(name: str | bytes, *_: Any) -> np.dtype[Any]:
    """A dtype of its own by its short name; what follows in the pickle may give it a byte order."""
    if not isinstance(name, str | bytes):
        raise pickle.UnpicklingError(f"dtype of {type(name).__name__}")
    dtype = np.dtype(name.decode() if isinstance(name, bytes) else name)
    if dtype.fields is not None or dtype.subdtype is not None or dtype.itemsize == 0:
        raise pickle.UnpicklingError(f"dtype '{dtype}'")
    return np.dtype(dtype, copy=True)


def _array(subtype: object, shape: tuple[int, ...], typecode: str | bytes) -> NDArray[Any]:
    """``_reconstruct``: the empty array whose state follows in the pickle."""
    if subtype is not _NDARRAY:
        raise pickle.UnpicklingError(f"array type {type(subtype).__name__}")
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


def plain_dict(*args: Any) -> dict[Any, Any]:
    """Stands in for the kinds of dict; a defaultdict's factory is dropped."""
    if args and isinstance(args[0], list | tuple):
        return {_key(k): v for k, v in args[0]}
    return dict(args[0]) if args and isinstance(args[0], dict) else {}


def _list(items: Any = ()) -> list[Any]:
    if not isinstance(items, list | tuple):
        raise pickle.UnpicklingError(f"list of {type(items).__name__}")
    return list(items)


def _set(items: Any = ()) -> set[Any]:
    return {_key(item) for item in _list(items)}


def _frozenset(items: Any = ()) -> frozenset[Any]:
    return frozenset(_set(items))


def _key(value: Any) -> Any:
    """A key or member of a set: hashing nested tuples that share their parts would take for ever."""
    if value is not None and not isinstance(value, str | bytes | int | float | np.generic):
        raise pickle.UnpicklingError(f"key of {type(value).__name__}")
    return value


_SMALL = 1 << 16  # bytes that may be asked for in vain
# Stands for the class numpy.ndarray, which array pickles name but need not call.
_NDARRAY = object()
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _latin1,
    ("collections", "OrderedDict"): plain_dict,
    ("collections", "defaultdict"): plain_dict,
}
for _numpy in ("numpy.core", "numpy._core"):
    _ALLOWED[(f"{_numpy}.multiarray", "_reconstruct")] = _array
    _ALLOWED[(f"{_numpy}.multiarray", "scalar")] = _scalar
    _ALLOWED[(f"{_numpy}.numeric", "_frombuffer")] = _from_buffer
NUMBERS = {
    k: v for k, v in _ALLOWED.items() if k[1] in ("dtype", "scalar", "encode")
}  # numpy's, by themselves
for _builtins in ("builtins", "__builtin__"):
    for _name, _make in (
        ("list", _list),
        ("set", _set),
        ("frozenset", _frozenset),
        ("bytes", _bytes),
        ("bytearray", _bytearray),
    ):
        _ALLOWED[(_builtins, _name)] = _make


class _Clamped:
    """A stream that is asked for no more than it has: a buffered file sets aside as much as it is asked for."""

    def __init__(self, stream: IO[bytes]) -> None:
        at = stream.tell()
        self._stream, self._end = stream, stream.seek(0, os.SEEK_END)
        stream.seek(at)
        self.readline = stream.readline

    def read(self, size: int) -> bytes:
        return self._stream.read(size if size < _SMALL else min(size, self._end - self._stream.tell()))


class DataUnpickler(pickle._Unpickler):
    """An unpickler that calls nothing but what ``allowed`` maps names to.

    Python's own, not C's: that one takes a memo's size from a number in the file, and sets attributes of whatever the
    pickle names.

    Args:
        stream: the pickle, in a file or in memory.
        allowed: (module, name) to what stands for it.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream: IO[bytes], allowed: Mapping[tuple[str, str], Any] = _ALLOWED) -> None:
        super().__init__(_Clamped(stream), encoding="latin1")
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[(module, name)]
        except KeyError:
            text = f"{module}.{name}"[:200]
            raise Refused(text if text.isprintable() else repr(text)) from None

    def persistent_load(self, pid: Any) -> Any:
        raise Refused(f"persistent id {pid!r:.100}")

    def _byte_array(self) -> None:
        size = int.from_bytes(self.read(8), "little")  # type: ignore[attr-defined]
        self.stack.append(bytearray(self.read(size)))  # type: ignore[attr-defined]

    def _marked(self) -> list[Any]:
        items: list[Any] = self.pop_mark()  # type: ignore[attr-defined]
        return items

    def _top(self, kind: type) -> Any:
        found = self.stack[-1]  # type: ignore[attr-defined]
        if type(found) is not kind:
            raise pickle.UnpicklingError(f"{kind.__name__} items of {type(found).__name__}")
        return found

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()  # type: ignore[attr-defined]
        self._top(dict)[_key(key)] = value

    def _setitems(self) -> None:
        items = self._marked()
        target = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def _dict(self) -> None:
        items = self._marked()
        self.stack.append({_key(k): v for k, v in zip(items[::2], items[1::2], strict=True)})  # type: ignore[attr-defined]

    def _append(self) -> None:
        value = self.stack.pop()  # type: ignore[attr-defined]
        self._top(list).append(value)

    def _appends(self) -> None:
        items = self._marked()
        self._top(list).extend(items)

    def _additems(self) -> None:
        items = self._marked()
        self._top(set).update(map(_key, items))

    def _frozenset(self) -> None:
        items = self._marked()
        self.stack.append(_frozenset(items))  # type: ignore[attr-defined]

    def _build(self) -> None:
        """Gives an array or dtype its state; attributes of dicts, which nothing reads, are dropped."""
        state = self.stack.pop()  # type: ignore[attr-defined]
        built = self.stack[-1]  # type: ignore[attr-defined]
        if isinstance(built, np.dtype):
            _set_dtype(built, state)
        elif type(built) is np.ndarray:
            _set_array(built, state)
        elif type(built) is not dict:
            raise pickle.UnpicklingError(f"state of {type(built).__name__}")


def _replaced(opcodes: Iterable[tuple[bytes, Callable[[DataUnpickler], None]]]) -> None:
    for code, method in opcodes:
        DataUnpickler.dispatch[code[0]] = method


_replaced(
    (
        (pickle.SETITEM, DataUnpickler._setitem),
        (pickle.SETITEMS, DataUnpickler._setitems),
        (pickle.DICT, DataUnpickler._dict),
        (pickle.APPEND, DataUnpickler._append),
        (pickle.APPENDS, DataUnpickler._appends),
        (pickle.ADDITEMS, DataUnpickler._additems),
        (pickle.FROZENSET, DataUnpickler._frozenset),
        (pickle.BUILD, DataUnpickler._build),
        (pickle.BYTEARRAY8, DataUnpickler._byte_array),
    )
)


def _set_dtype(dtype: np.dtype[Any], state: Any) -> None:
    """The byte order alone: fields, sizes and offsets of the file's making would reach outside an array."""
    if type(state) is not tuple or len(state) < 8 or any(part is not None for part in state[2:5]):
        raise pickle.UnpicklingError("dtype with fields")
    order = state[1].decode() if isinstance(state[1], bytes) else state[1]
    if order not in ("<", ">", "|", "="):
        raise pickle.UnpicklingError("byte order")
    flexible = dtype.kind in "SUV"
    size, alignment = (dtype.itemsize, dtype.alignment) if flexible else (-1, -1)
    # As the numpy that runs would write it: flags of the file's making could claim objects where there are bytes.
    flags = np.dtype(dtype.str).__reduce__()[2][7]
    dtype.__setstate__((3, order, None, None, None, size, alignment, flags))  # type: ignore[attr-defined]


def _set_array(array: NDArray[Any], state: Any) -> None:
    """An array as large as the data that come with it."""
    _, shape, dtype, _, data = state
    if not isinstance(dtype, np.dtype) or array.size or array.base is not None:
        raise pickle.UnpicklingError("array state")
    if type(shape) is not tuple or not all(type(n) is int and n >= 0 for n in shape):
        raise pickle.UnpicklingError("array shape")
    if dtype.hasobject:
        if type(data) is not list or len(data) != math.prod(shape):
            raise pickle.UnpicklingError("objects of an array")
    elif not isinstance(data, bytes | bytearray | str) or len(data) != math.prod(shape) * dtype.itemsize:
        raise pickle.UnpicklingError("bytes of an array")
    array.__setstate__(state)


def read_pickle(file: Path) -> Any:
    """What ``file`` holds, provided it is made of numpy arrays, numbers, strings and plain containers.

    Pickles of Python 2 are read with latin1 text, and those of numpy 1 and 2 alike.

    Raises:
        DataError: when the pickle names anything else (which is never imported), or is damaged.
    """
    try:
        with open(file, "rb") as stream:
            return DataUnpickler(stream).load()
    except Refused as refused:
        raise DataError(
            f"{file}: expected a pickle of arrays and plain containers, got one that asks for {refused}"
        ) from None
    except MemoryError:
        raise DataError(
            f"{file}: expected a pickle that fits in memory, got a larger or damaged one"
        ) from None
    except Exception as error:  # a damaged pickle may raise anything at all
        text = " ".join(f"{error!s:.200}".split())
        raise DataError(
            f"{file}: expected a whole pickle, got a damaged one ({type(error).__name__}: {text})"
        ) from error
