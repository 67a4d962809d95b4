#!/usr/bin/env bash
# The gradient through torch.func.functional_call of a module that checkpoints a part of its forward.
#
# Guessed: torch.utils.checkpoint(use_reentrant=False), which PyTorch recommends, changes memory and time, not gradients.
# Seen: the part is computed again in the backward pass, when functional_call has put the module's own parameters back: the output is
# right and the gradient is that of other parameters, without an error or a warning. What is computed again has the shapes of
# what was computed first, which is all that is checked.
#
# Version: torch 2.13.0. Output seen:
#   torch 2.13.0: relative error of the output 0e+00, of the gradient 1.43
#
# Exits 0 while PyTorch behaves so, 1 when it no longer does.
set -euo pipefail
cd "$(mktemp -d)" && trap 'rm -rf "$PWD"' EXIT
python3 -m venv . && bin/pip install -q torch==2.13.0
bin/python -W ignore - <<'PYTHON'
import sys

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        self.checkpointed = checkpointed
        self.inner = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False) if self.checkpointed else self.inner(x)


plain, checkpointed = Block(False), Block(True)
checkpointed.load_state_dict(plain.state_dict())
x = torch.randn(5, 3, dtype=torch.float64)
adapted = {name: (-p).detach().requires_grad_() for name, p in plain.named_parameters()}


def results(module):
    y = functional_call(module, adapted, (x,))
    return y.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(y.sum(), list(adapted.values()))])


(output, gradient), (other_output, other_gradient) = results(plain), results(checkpointed)
of_output = ((other_output - output).abs().max() / output.abs().max()).item()
of_gradient = ((other_gradient - gradient).abs().max() / gradient.abs().max()).item()
print(
    f"torch {torch.__version__.partition('+')[0]}: relative error of the output {of_output:.0e}, of the gradient {of_gradient:.2f}"
)
sys.exit(not (of_output < 1e-12 and of_gradient > 0.01))
PYTHON
