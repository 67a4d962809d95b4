#!/usr/bin/env bash
# torch.func.functional_call on a module that holds one submodule under two names.
#
# Guessed: the call leaves the module as it was. It is documented as temporary, and tie_weights=True, the default, as the
# careful setting for tensors under several names.
# Seen: tie_weights=True writes the given tensor under both names, so twice into the one submodule, remembers it as the
# original of the second name, and puts the originals back in the same order: the module keeps the given tensor in
# place of its parameter, and every later call computes with it. With tie_weights=False it does not happen.
# (pytorch issue 164759.)
#
# Version: torch 2.13.0; the same in 2.11.0 and 2.14.1. Output seen:
#   torch 2.13.0: parameter kept: False; first weight now 7.0, was 1.0
#
# Exits 0 while PyTorch behaves so, 1 when it no longer does.
set -euo pipefail
cd "$(mktemp -d)" && trap 'rm -rf "$PWD"' EXIT
python3 -m venv . && bin/pip install -q torch==2.13.0
bin/python -W ignore - <<'PYTHON'
import sys

import torch
from torch import nn


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(1, 1, bias=False)
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x))


model = Twice()
nn.init.ones_(model.first.weight)
before = model.first.weight
torch.func.functional_call(model, {"first.weight": torch.full((1, 1), 7.0)}, torch.ones(1, 1))
after = model.first.weight
print(
    f"torch {torch.__version__.partition('+')[0]}: parameter kept: {after is before}; "
    f"first weight now {after.item()}, was {before.item()}"
)
sys.exit(after is before)
PYTHON
