"""Looks a checkpoint through before torch reads it: tensors within storages that are there, and plain values."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch

from mamlpp_fast.data.pickles import DataUnpickler, plain_dict

__all__ = ["vet"]

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class _Storage:
    elements: int


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> object:
    """Stands in for a tensor that lies within its storage, no element of it in two places."""
    sizes = [offset, *size, *stride]
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in sizes):
        raise pickle.UnpicklingError("tensor of other than a storage and sizes")
    if len(size) != len(stride):
        raise pickle.UnpicklingError("tensor with other strides than dimensions")
    elements = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if elements else 0
    if elements > storage.elements or last >= max(storage.elements, 1):
        raise pickle.UnpicklingError("tensor outside its storage")
    return object()


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): plain_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch", "Size"): tuple,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _Vetting(DataUnpickler):
    """Reads as torch would, but keeps only what must be known to judge."""

    def __init__(self, stream: IO[bytes], folder: str, sizes: Mapping[str, int]) -> None:
        super().__init__(stream, _ALLOWED)
        self._folder = folder
        self._sizes = sizes

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, elements = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError("persistent id of other than a storage")
        if (
            type(elements) is not int
            or self._sizes.get(f"{self._folder}/data/{key}") != elements * dtype.itemsize
        ):
            raise pickle.UnpicklingError("storage of another size than its record")
        return _Storage(elements)

    def _got(self) -> None:
        """Nothing that holds parts is there twice: parts that share parts spell out to a power of two."""
        if type(self.stack[-1]) in (list, tuple, dict, set) and self.stack[-1]:  # type: ignore[attr-defined]
            raise pickle.UnpicklingError("containers in two places")


def _checked(load: Callable[[Any], None]) -> Callable[[Any], None]:
    def loaded(unpickler: _Vetting) -> None:
        load(unpickler)
        unpickler._got()

    return loaded


_Vetting.dispatch = DataUnpickler.dispatch | {
    code[0]: _checked(DataUnpickler.dispatch[code[0]])
    for code in (pickle.GET, pickle.BINGET, pickle.LONG_BINGET, pickle.DUP)
}


def vet(archive: zipfile.ZipFile, refused: Callable[[str], Exception]) -> None:
    """Raises ``refused(reason)`` for a checkpoint that holds more than :func:`torch.save` makes of plain content.

    Args:
        archive: the checkpoint.
        refused: makes the error.
    """
    members = archive.infolist()
    if any(m.compress_type != zipfile.ZIP_STORED for m in members):
        raise refused("expected parts stored as they are, got compressed ones")
    pickles = [m.filename for m in members if m.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or len({m.filename for m in members}) != len(members):
        raise refused(f"expected one data.pkl and each part once, got {len(pickles)} in {len(members)} parts")
    with archive.open(pickles[0]) as stream:
        sizes = {m.filename: m.file_size for m in members}
        _Vetting(stream, pickles[0].removesuffix("/data.pkl"), sizes).load()
