"""What a compiled kernel spends its innermost loops on: instructions by name, from the machine code.

``python -m bench.launches`` prints it for the products that a meta-step launches.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton

__all__ = ["loops", "products", "read"]

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);")
_MATRIX = ("HGMMA", "HMMA", "UTCHMMA", "DMMA")


def loops(cubin: bytes) -> list[Counter[str]]:
    """Instructions of every loop that has no other inside, by their first name (``FFMA``, ``HGMMA.64x32``)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-sass", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return read(text)


def read(text: str) -> list[Counter[str]]:
    """The same from a disassembly."""
    code = [(int(m[1], 16), _name(m[2]), m[3]) for m in map(_LINE.match, text.splitlines()) if m]
    spans = []
    for address, name, operands in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", operands.strip())
        if name == "BRA" and target and int(target[1], 16) < address:
            spans.append((int(target[1], 16), address))
    inner = [
        (begin, end)
        for begin, end in spans
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in spans)
    ]
    return [
        Counter(name for address, name, _ in code if begin <= address <= end and name != "NOP")
        for begin, end in inner
    ]


def _name(instruction: str) -> str:
    """The first name; of a warp group's product with what it multiplies, 64 by so many columns (``HGMMA.64x32``)."""
    shape = re.match(r"HGMMA\.64x\d+", instruction)
    return shape[0] if shape else instruction.split(".")[0]


def _matrix(name: str) -> bool:
    return name.split(".")[0] in _MATRIX


def _clocks(name: str) -> float:
    """Of tensor cores of sm_90 for one of four warps, 64 x N x 8 of TF32 or x 16 of bfloat16; 0 of other kinds."""
    return int(name.rpartition("x")[2]) / 2 if name.startswith("HGMMA.") else 0


def products(cubin: bytes) -> dict[str, float] | None:
    """Of the innermost loop of products that spends the most instructions beside them: all, and what of them they are.

    Every loop with instructions of tensor cores is one of products: one that is unrolled does not hide the other.
    Where there is none, it is the loop with the most FFMA.

    Returns:
        ``instructions``; ``matrix``, the tensor cores', ``instructions per 4 matrix`` and, on sm_90, ``clocks`` that
        they take; or ``ffma`` and ``ffma share``; None where no loop has either.
    """

    def spent(loop: Counter[str]) -> float:
        count = sum(loop[name] for name in loop if _matrix(name))
        return sum(loop.values()) / count if count else 0

    found = loops(cubin)
    loop = max(found, key=lambda loop: (spent(loop), loop["FFMA"]), default=Counter[str]())
    total, matrix = sum(loop.values()), sum(loop[name] for name in loop if _matrix(name))
    if matrix:
        clocks = sum(_clocks(name) * count for name, count in loop.items())
        of_all = {"instructions": total, "matrix": matrix, "instructions per 4 matrix": 4 * total / matrix}
        return of_all | ({"clocks": clocks} if clocks else {})
    if loop["FFMA"]:
        return {"instructions": total, "ffma": loop["FFMA"], "ffma share": loop["FFMA"] / total}
    return None
