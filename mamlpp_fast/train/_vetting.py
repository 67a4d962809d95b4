"""Looks a checkpoint through before torch reads it: tensors within storages that are there, and plain values."""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import torch

from mamlpp_fast.data.archives import shown
from mamlpp_fast.data.pickles import NUMBERS, DataUnpickler, plain_dict

__all__ = ["vet_archive", "vet_legacy"]

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001

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


class _Storage(NamedTuple):
    dtype: torch.dtype
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
    **NUMBERS,  # torch itself refuses them where they are not expected
    ("collections", "OrderedDict"): plain_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch", "Size"): tuple,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _Vetting(DataUnpickler):
    """Reads as torch would, but keeps only what must be known to judge."""

    def __init__(
        self, stream: IO[bytes], size: Callable[[str], int | None] | None = None, *, legacy: bool = False
    ) -> None:
        super().__init__(stream, _ALLOWED)
        self._size = size
        self._legacy = legacy
        self.storages: dict[str, _Storage] = {}

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, location, elements, *view = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(key) is not str:
            raise pickle.UnpicklingError("persistent id of other than a storage")
        if type(location) is not str or view != [None] * self._legacy:
            raise pickle.UnpicklingError("storage in another form")
        if type(elements) is not int or elements < 0:
            raise pickle.UnpicklingError("storage of no size")
        if self._size is not None and self._size(key) != elements * dtype.itemsize:
            raise pickle.UnpicklingError("storage of another size than its record")
        storage = _Storage(dtype, elements)
        if self.storages.setdefault(key, storage) != storage:
            raise pickle.UnpicklingError("storage of two types or sizes")
        return storage

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


def vet_archive(content: bytes, refused: Callable[[str], Exception]) -> io.BytesIO:
    """Looks through a checkpoint that is a zip archive.

    Args:
        content: the file.
        refused: makes the error.

    Returns:
        an archive of what was looked through, for torch to read: it finds the parts of an archive in other ways than
        :mod:`zipfile`, and could be led to others than these.

    Raises:
        ``refused(reason)`` for a checkpoint that is damaged, or that holds more than :func:`torch.save` makes of plain
        content.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED for m in members):
            raise refused("expected parts stored as they are, got compressed ones")
        pickles = [m.filename for m in members if m.filename.endswith("/data.pkl")]
        # torch does not tell capital letters from small ones.
        if len(pickles) != 1 or len({m.filename.lower() for m in members}) != len(members):
            raise refused(
                f"expected one data.pkl and each part once, got {len(pickles)} in {len(members)} parts"
            )
        folder = pickles[0].removesuffix("/data.pkl")
        if outside := [m.filename for m in members if not m.filename.startswith(f"{folder}/")]:
            raise refused(f"expected parts in one folder, got {shown(outside[0])} beside {shown(pickles[0])}")
        parts = {}
        for m in members:
            try:
                parts[m.filename] = archive.read(m)
            except zipfile.BadZipFile as error:
                raise refused(
                    f"expected a whole checkpoint, its part {shown(m.filename)} is damaged"
                ) from error
    sizes = {name: len(part) for name, part in parts.items()}
    _Vetting(io.BytesIO(parts[pickles[0]]), lambda key: sizes.get(f"{folder}/data/{key}")).load()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, part in parts.items():
            archive.writestr(zipfile.ZipInfo(name), part)
    stream.seek(0)
    return stream


def vet_legacy(content: bytes) -> io.BytesIO:
    """Looks through a checkpoint in the format of PyTorch before 1.6: five pickles, then the storages' bytes.

    Returns:
        ``content``, for torch to read.

    Raises:
        pickle.UnpicklingError: for one that is damaged, or that holds more than :func:`torch.save` makes of plain
            content; so may any exception be raised of a damaged pickle.
    """
    stream = io.BytesIO(content)
    magic, protocol, system = (_Vetting(stream).load() for _ in range(3))
    if magic != _MAGIC or protocol != _PROTOCOL or not isinstance(system, dict):
        raise pickle.UnpicklingError("no magic number of torch.save")
    vetting = _Vetting(stream, legacy=True)
    vetting.load()
    keys = _Vetting(stream).load()
    if not isinstance(keys, list) or sorted(keys) != sorted(vetting.storages):
        raise pickle.UnpicklingError("other storages than the tensors'")
    for key in keys:
        dtype, elements = vetting.storages[key]
        count = int.from_bytes(stream.read(8), "little")
        if count != elements or stream.seek(elements * dtype.itemsize, os.SEEK_CUR) > len(content):
            raise pickle.UnpicklingError("storage of another size than its bytes")
    stream.seek(0)
    return stream
