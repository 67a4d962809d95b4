"""Ways to damage an input: bytes of any kind, then arrays, JSON, pictures and pickles from the inside."""

from __future__ import annotations

import json
import pickle
import random
import struct
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]
NUMBERS = (  # around what integers of every width hold
    *(0, 1, 2, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1),
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 5, 10**6, 10**12, 10**30, -(10**30), 0.5, -0.0, 1e308, 1e-308),
    *(float("nan"), float("inf"), "", "0", "x" * 2000, "../../../etc/passwd", "\x00", "\ud800", "a\nb"),
    *([], {}, [1], [[[]]], {"a": {}}, [0.9, 0.999], ["head", 3]),
)


class Canary:
    """Unpickled by an unpickler that runs code, makes the folder ``path``."""

    path = ""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (self.path,)


def bytes_of(rng: random.Random, data: bytes) -> bytes:
    """One to four changes: bits, bytes, numbers of every width, pieces cut, doubled or moved, the end cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        size = len(changed)
        if size == 0:
            return bytes(rng.randbytes(rng.randrange(16)))
        # Headers and directories lie at the ends.
        at = rng.choice(
            (rng.randrange(size), rng.randrange(min(size, 200)), size - 1 - rng.randrange(min(size, 200)))
        )
        kind = rng.randrange(7)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at] = rng.randrange(256)
        elif kind == 2:
            width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
            number = rng.choice(NUMBERS) % 256**width
            changed[at : at + width] = number.to_bytes(width, order)  # type: ignore[arg-type]
        elif kind == 3:
            del changed[at : at + rng.choice((1, 4, 64, 1000))]
        elif kind == 4:
            changed[at:at] = changed[at : at + rng.choice((1, 16, 200))]
        elif kind == 5:
            changed[at:at] = rng.randbytes(rng.choice((1, 4, 30)))
        else:
            del changed[at:]
    return bytes(changed)


def npy_of(rng: random.Random, data: bytes) -> bytes:
    """An array with another header: sizes, types, order; else changed bytes."""
    if rng.random() < 0.4 or not data.startswith(b"\x93NUMPY\x01"):
        return bytes_of(rng, data)
    length = int.from_bytes(data[8:10], "little")
    header, body = data[10 : 10 + length].decode("latin1"), data[10 + length :]
    sizes = ", ".join(str(rng.choice((*NUMBERS[:8], 10**6, 10**12, -1))) for _ in range(rng.randrange(5)))
    types = (
        *("|u1", "<f8", ">i4", "|O", "|S0", "<U0", "|V0", "|b1", "<f2", "<c16", "|S1000000", "<M8[s]"),
        "[('a','<f8')]",
    )
    kind = rng.randrange(4)
    if kind == 0:
        header = header[: header.index("'shape':")] + f"'shape': ({sizes},), }}"
    elif kind == 1:
        start = header.index("'descr':") + 8
        kept = header[header.index("'fortran_order'") :]
        chosen = rng.choice(types)
        header = f"{header[:start]} {chosen if chosen[0] == '[' else repr(chosen)}, {kept}"
    elif kind == 2:
        header = header.replace("False", "True", 1)
    else:
        header = rng.choice(
            ("{", "()", "__import__('os').mkdir('x')", "{'descr': [" * 50, "1" * 5000, header * 2)
        )
    text = header.rstrip().encode("latin1") + b"\n"
    if kind < 3 and rng.random() < 0.5:  # as much as it promises, or so
        body = (body * 4)[: rng.choice((len(body), 8 * len(body) // 2, len(body) // 2))]
    return data[:8] + len(text).to_bytes(2, "little") + text + body


def json_value(rng: random.Random, value: Any) -> Any:
    """A value somewhere inside replaced, dropped or added."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.randrange(6)
        changed = dict(value)
        if kind == 0:
            del changed[key]
        elif kind == 1:
            changed[rng.choice(("x", f"{key}s", "", "__class__"))] = changed.pop(key)
        else:
            changed[key] = json_value(rng, value[key])
        return changed
    if isinstance(value, list | tuple) and value and rng.random() < 0.6:
        at = rng.randrange(len(value))
        return [*value[:at], json_value(rng, value[at]), *value[at + rng.randrange(2) :]]
    return rng.choice(_VALUES)


def json_of(rng: random.Random, data: bytes) -> bytes:
    """JSON with other values, changed bytes, or brackets without end."""
    if rng.random() < 0.25:
        return bytes_of(rng, data)
    if rng.random() < 0.02:
        return rng.choice((b"[", b'{"a":')) * 20000
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = json_value(rng, value)
    return json.dumps(value).encode()


def png_of(rng: random.Random, data: bytes) -> bytes:
    """A PNG whose header lies about its size and kind, with a right checksum; else changed bytes."""
    if rng.random() < 0.7 or not data.startswith(b"\x89PNG"):
        return bytes_of(rng, data)
    width, height = rng.choices((0, 1, 2, 105, 10**4, 10**5, 2**31 - 1), k=2)
    header = b"IHDR" + struct.pack(
        ">IIBBBBB", width, height, rng.choice((1, 8, 16)), rng.choice((0, 2, 3, 6)), 0, 0, 0
    )
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


_NAMES = (
    ("os", "mkdir"),
    ("posix", "mkdir"),
    ("builtins", "eval"),
    ("builtins", "bytearray"),
    ("builtins", "list"),
    ("builtins", "frozenset"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch", "FloatStorage"),
)


def _each(codes: bytes) -> list[bytes]:
    return [bytes([code]) for code in codes]


def program(rng: random.Random, canary: str) -> bytes:
    """A pickle of random operations on a stack that mostly has what they need."""
    parts = [b"\x80\x04"]
    for _ in range(rng.randrange(1, 60)):
        module, name = rng.choice(_NAMES)
        number = partial(rng.choice, NUMBERS)
        parts.append(
            rng.choice(
                (
                    *_each(b"(N\x88"),
                    b"K" + bytes([rng.randrange(256)]),
                    *_each(b"]})\x8f20t\x85\x86\x87ldaesuRb\x90\x91\x81\x92oQ\x94"),
                    b"h" + bytes([rng.randrange(4)]),
                    b"J" + struct.pack("<I", number() % 2**32),
                    b"r" + struct.pack("<I", number() % 2**32),
                    b"\x8a\x08" + struct.pack("<Q", number()),
                    *(code + struct.pack("<Q", number()) for code in _each(b"\x8e\x95\x96")),
                    b"X" + struct.pack("<I", len(canary)) + canary.encode(),
                    b"U\x02" + rng.choice((b"u1", b"f8", b"O8", b"S0", b"V9", b"|O")),
                    *(b"c" + f"{module}\n{name}\n".encode() for _ in range(4)),
                )
            )
        )
    return b"".join(parts) + b"."


def _doubling(rng: random.Random) -> Any:
    """Nested parts that share their parts: a few lines that spell out to a power of two."""
    value: Any = rng.choice(((1,), [1]))
    for _ in range(rng.choice((3, 12, 40))):
        value = type(value)((value, value))
    return value


def pickle_of(rng: random.Random, data: bytes, content: Any) -> bytes:
    """A pickle of changed content, of hostile parts among it, of random operations, or with changed bytes."""
    kind = rng.randrange(10)
    if kind < 3:
        return bytes_of(rng, data)
    if kind < 5:
        return program(rng, Canary.path)
    changed = dict(content)
    key = rng.choice(list(changed))
    hostile = _doubling(rng)
    changed[key] = rng.choice(
        (Canary(), hostile, json_value(rng, changed[key]), [changed[key]], {"a": hostile})
    )
    if rng.random() < 0.1:  # the same as the key of a dictionary or member of a set, which is hashed
        start, end = rng.choice((b"}", b"\x8f(")), b")" + b"2\x86" * rng.choice((3, 40))
        return b"\x80\x04" + start + end + rng.choice((b"Ns.", b"\x90."))
    return pickle.dumps(changed, rng.randrange(6))
