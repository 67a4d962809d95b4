"""Archives from anywhere: .npz arrays and zip members, with no more memory than their size lets expect."""

from __future__ import annotations

import math
import os
import reprlib
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mamlpp_fast.data.errors import DataError

__all__ = ["DAMAGED_ZIP", "check_expansion", "one_line", "read_npz", "shown"]

# What zipfile raises for an archive that is none, is cut short, encrypted or compressed in a way it does not know.
DAMAGED_ZIP = (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)
# An archive may unpack to so many bytes, or to so many times its own size: deflate reaches a thousandfold only on
# what was made to be unpacked.
_ALWAYS_ALLOWED = 256 << 20
_EXPANSION = 100


def read_npz(file: Path, keys: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
    """The arrays ``keys`` of an .npz file, all without them; nothing is ever unpickled.

    Raises:
        DataError: for a file that is no whole archive, that lacks a key, holds other than plain arrays, or whose sizes
            do not agree with its headers.
    """
    try:
        with open(file, "rb") as stream:
            if stream.read(6) == np.lib.format.MAGIC_PREFIX:
                raise DataError(f"{file}: expected an .npz archive, got a single array")
            with zipfile.ZipFile(stream) as archive:
                check_expansion(archive, str(file))
                found = {n.removesuffix(".npy"): n for n in archive.namelist()}
                wanted = list(found) if keys is None else list(keys)
                missing = [k for k in wanted if k not in found]
                if missing:
                    expected = ", ".join(wanted)
                    raise DataError(f"{file}: expected arrays {expected}; missing {', '.join(missing)}")
                return {k: _array(archive, found[k], f"{file}: {k}") for k in wanted}
    except DataError:
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise DataError(f"{file}: expected an .npz archive that can be read, {error.strerror}") from error
    except Exception as error:  # a damaged header may raise anything at all
        raise DataError(
            f"{file}: expected a whole .npz archive, got a damaged one ({one_line(error)})"
        ) from error


def check_expansion(archive: zipfile.ZipFile, source: str) -> None:
    """Refuses an archive that would unpack to far more than it is, or whose parts claim to be more than it is.

    Raises:
        DataError: names the sizes.
    """
    members = archive.infolist()
    unpacked = sum(m.file_size for m in members)
    packed = sum(m.compress_size for m in members)
    assert archive.fp is not None
    size = archive.fp.seek(0, os.SEEK_END)
    if packed > size:
        raise DataError(
            f"{source}: expected parts within the {size} bytes of the archive, got {packed} bytes"
        )
    if unpacked > max(_ALWAYS_ALLOWED, _EXPANSION * packed):
        raise DataError(
            f"{source}: expected an archive that unpacks to at most {_EXPANSION} times its size, "
            f"got {unpacked} bytes in {packed}"
        )


def shown(value: Any) -> str:
    """A value that came from outside, in part of a line: of a tensor or array its form."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype!s:.50} {list(value.shape)}"
    return " ".join(f"{reprlib.repr(value):.100}".split())


def one_line(error: BaseException) -> str:
    """The kind and the text of an error, cut where it is long."""
    text = " ".join(f"{error!s:.300}".split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _array(archive: zipfile.ZipFile, member: str, source: str) -> NDArray[Any]:
    size = archive.getinfo(member).file_size
    with archive.open(member) as stream:
        shape, dtype = _header(stream)
        # Of a type of no size a header of a hundred bytes makes as many elements as it likes.
        if dtype.hasobject or dtype.fields is not None or dtype.itemsize == 0:
            raise DataError(f"{source}: expected an array of numbers or texts, got {dtype!s:.100}")
        promised = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or promised != size - stream.tell():
            raise DataError(
                f"{source}: expected {size - stream.tell()} bytes as there are, got {dtype} {list(shape)!s:.100}"
            )
    with archive.open(member) as stream:
        array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
        while stream.read(1 << 16):  # to the end, where the checksum is compared
            pass
    if array.dtype.kind == "U":
        points = np.frombuffer(array.astype(array.dtype.newbyteorder("=")).tobytes(), np.uint32)
        if points.size and int(points.max()) > 0x10FFFF:  # numpy makes a SystemError of reading one
            raise DataError(f"{source}: expected texts, got a character {int(points.max()):#x}")
    return array


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"format version {version}")
    shape, _, dtype = readers[version](stream)
    return shape, dtype
