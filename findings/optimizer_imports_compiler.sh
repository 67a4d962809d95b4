#!/usr/bin/env bash
# The first optimizer of a process, of whatever kind, over one number.
#
# Guessed: making torch.optim.SGD costs microseconds and no memory; torch.compile's machinery is loaded by who compiles.
# Seen: building a model, a forward and a backward pass load none of it. The first optimizer made then imports
# torch._dynamo, torch._inductor and sympy, 800 modules and more, and keeps tens of MiB: a method of every optimizer is
# marked as not to be compiled, and the mark imports the compiler when the method is first called. The second is free.
#
# Version: torch 2.13.0; the same in 2.11.0 and 2.14.1. Where NumPy and Triton are installed as well it was 886 to 898
# modules and 122, 152 and 159 MiB in the three. Output seen, without them:
#   torch 2.13.0 after a training pass: none of the compiler, first optimizer: 804 modules more, 68 MiB, second: 0 more
#
# Exits 0 while PyTorch behaves so, 1 when it no longer does.
set -euo pipefail
cd "$(mktemp -d)" && trap 'rm -rf "$PWD"' EXIT
python3 -m venv . && bin/pip install -q torch==2.13.0
bin/python -W ignore - <<'PYTHON'
import sys

import torch


def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 // 2**20


def compiler():
    return {"torch._dynamo", "torch._inductor", "sympy"} & sys.modules.keys()


layer = torch.nn.Linear(1, 1)
layer(torch.ones(1, 1)).sum().backward()
before, modules, memory = compiler(), len(sys.modules), resident_mib()
torch.optim.SGD(layer.parameters(), 0.1)
after, made, grown = compiler(), len(sys.modules) - modules, resident_mib() - memory
modules = len(sys.modules)
torch.optim.Adam(layer.parameters(), 0.1)
again = len(sys.modules) - modules
print(
    f"torch {torch.__version__.partition('+')[0]} after a training pass: {', '.join(sorted(before)) or 'none'} of the "
    f"compiler, first optimizer: {made} modules more, {grown} MiB, second: {again} more"
)
sys.exit(not (not before and len(after) == 3 and made > 300 and grown > 30 and again == 0))
PYTHON
