#!/usr/bin/env bash
# A matrix product x^T y in Triton for an H100, whose left operand is scaled on its way: two ways to write one load.
#
# Guessed: tl.trans of a loaded tile only renames its axes; loaded with the axes' pointers exchanged, the compiler sees
# the same addresses and makes the same copies.
# Seen: what is transposed after the load goes from memory to shared memory by 4 bytes, each copy with an address of its
# own; loaded the other way round, x comes by 16 bytes. Without the scaling both are alike, by 4 bytes throughout: the
# tensor cores want tf32 operands in shared memory with the summed axis innermost, as y's are in either.
#
# Version: triton 3.7.1; the same in 3.6.0 and 3.8.0. Nothing runs: the code is compiled for sm_90, no GPU is needed.
# Output seen:
#   tl.trans(tl.load(...)): 96 copies of 4 bytes, 0 of 16
#   tl.load(transposed):    48 copies of 4 bytes, 12 of 16
#
# Exits 0 while Triton compiles it so, 1 when it no longer does.
set -euo pipefail
cd "$(mktemp -d)" && trap 'rm -rf "$PWD"' EXIT
python3 -m venv . && bin/pip install -q triton==3.7.1
cat > product.py <<'PYTHON'
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(x, y, out, n, TURNED: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr):
    c = tl.arange(0, C)
    total = tl.zeros((C, C), tl.float32)
    for first in range(0, n, STEP):
        row = first + tl.arange(0, STEP)
        if TURNED:
            left = tl.trans(tl.load(x + row[:, None] * C + c[None, :]))
        else:
            left = tl.load(x + row[None, :] * C + c[:, None])
        right = tl.load(y + row[:, None] * C + c[None, :])
        total = tl.dot(left * 2.0, right, total, input_precision="tf32")
    tl.store(out + c[:, None] * C + c[None, :], total)


def copies(turned):
    constants = {"TURNED": turned, "C": 64, "STEP": 32}
    types = {"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32"} | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    source = ASTSource(product, types, constants, aligned)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 3})
    sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global[^\[]*\[[^]]*\], \[[^]]*\], 0x(\w+)", code.asm["ptx"])
    return sizes.count("4"), sizes.count("10")


after, written = copies(True), copies(False)
print(f"tl.trans(tl.load(...)): {after[0]} copies of 4 bytes, {after[1]} of 16")
print(f"tl.load(transposed):    {written[0]} copies of 4 bytes, {written[1]} of 16")
sys.exit(not (after[1] == 0 and 0 < written[0] < after[0] and written[1] > 0))
PYTHON
TRITON_CACHE_DIR="$PWD/cache" bin/python product.py
