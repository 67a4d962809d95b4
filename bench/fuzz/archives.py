"""Ways to damage a zip archive from the inside, with sizes and checksums that agree, and bombs."""

from __future__ import annotations

import functools
import io
import random
import struct
import zipfile
import zlib
from collections.abc import Iterable
from typing import NamedTuple

from bench.fuzz.mutations import NUMBERS, Mutation

_BLOCK = 1 << 20
# Few are large: one of 30 MiB is allowed and takes long to read, one of 2000 MiB must be refused for its size.
_BOMBS = (1, 1, 1, 1, 30, 2000)
_CHECKED = 30  # the checksum of a larger one is never reached


class _Member(NamedTuple):
    name: str
    content: bytes
    size: int
    crc: int
    method: int
    packed: bytes


def zip_of(rng: random.Random, data: bytes, inside: Mutation) -> bytes:
    """A member changed by ``inside`` with right sizes and checksum, dropped, doubled, renamed or made a bomb."""
    members = _members(data)
    at = rng.randrange(len(members))
    kind = rng.randrange(12)
    victim = members[at]
    name = victim.name
    if kind == 0:
        changed = []
    elif kind == 1:
        other = rng.choice((name[:-1], "../" + name, name.upper(), "a" * 300, name + "\x01"))
        changed = [victim._replace(name=other)]
    elif kind == 2:
        stored = victim.method == zipfile.ZIP_STORED
        changed = [_member(name, victim.content, zipfile.ZIP_DEFLATED if stored else zipfile.ZIP_STORED)]
    elif kind == 3:
        changed = [_bomb(name, victim.content[:128], rng.choice(_BOMBS))]
    elif kind == 4:
        changed = [rng.choice(members)._replace(name=name)]
    else:
        changed = [_member(name, inside(rng, victim.content), victim.method)]
    whole = _archive((*members[:at], *changed, *members[at + 1 :]))
    if kind == 11:  # directory entries that claim sizes of their own
        at = whole.rfind(b"PK\x01\x02")
        whole = whole[: at + 20] + struct.pack("<II", *rng.choices(NUMBERS[:12], k=2)) + whole[at + 28 :]
    return whole


@functools.lru_cache(64)
def _members(archive: bytes) -> tuple[_Member, ...]:
    """Packed once for all the inputs that are made of ``archive``."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return tuple(_member(m.filename, opened.read(m), m.compress_type) for m in opened.infolist())


def _member(name: str, content: bytes, method: int) -> _Member:
    packed = _deflate(content, zlib.Z_FINISH) if method == zipfile.ZIP_DEFLATED else content
    return _Member(name, content, len(content), zlib.crc32(content), method, packed)


def _deflate(content: bytes, end: int, level: int = 1) -> bytes:
    packing = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packing.compress(content) + packing.flush(end)


@functools.lru_cache(256)
def _bomb(name: str, head: bytes, mebibytes: int) -> _Member:
    """``head`` and so many MiB of zeros: one block of them packed, over and over."""
    zeros = bytes(_BLOCK)
    crc = zlib.crc32(head)
    for _ in range(mebibytes if mebibytes <= _CHECKED else 0):
        crc = zlib.crc32(zeros, crc)
    packed = _deflate(head, zlib.Z_FULL_FLUSH)
    packed += _deflate(zeros, zlib.Z_FULL_FLUSH, 9) * mebibytes + _deflate(b"", zlib.Z_FINISH)
    return _Member(name, head, len(head) + mebibytes * _BLOCK, crc, zipfile.ZIP_DEFLATED, packed)


def _archive(members: Iterable[_Member]) -> bytes:
    """The archive of members that are packed already, which :mod:`zipfile` does not write."""
    body, directory, count = bytearray(), bytearray(), 0
    for m in members:
        name = m.name.encode()
        # Version, flags, method, time, date (1980-01-01), checksum, sizes, lengths of name and extra field.
        fields = struct.pack(
            "<HHHHHIIIHH", 20, 0, m.method, 0, 33, m.crc, len(m.packed), m.size, len(name), 0
        )
        directory += b"PK\x01\x02" + struct.pack("<H", 20) + fields
        directory += struct.pack("<HHHII", 0, 0, 0, 0, len(body)) + name
        body += b"PK\x03\x04" + fields + name + m.packed
        count += 1
    end = struct.pack("<HHHHIIH", 0, 0, count, count, len(directory), len(body), 0)
    return bytes(body + directory + b"PK\x05\x06" + end)
