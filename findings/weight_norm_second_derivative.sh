#!/usr/bin/env bash
# The second derivative of weight normalisation.
#
# Guessed: torch.nn.utils.parametrizations.weight_norm, a product of a vector's direction and its length, can be differentiated twice
# like any module of PyTorch, as MAML and gradient penalties do.
# Seen: its first derivative is right. The second one, taken through autograd.grad(..., create_graph=True), is wrong for the
# direction, by twice its largest value here, without an error or a warning; written out as g v / |v| it is right.
#
# Version: torch 2.13.0. Output seen:
#   torch 2.13.0: relative error of the first derivative 1e-16, of the second 2.10
#
# Exits 0 while PyTorch behaves so, 1 when it no longer does.
set -euo pipefail
cd "$(mktemp -d)" && trap 'rm -rf "$PWD"' EXIT
python3 -m venv . && bin/pip install -q torch==2.13.0
bin/python -W ignore - <<'PYTHON'
import sys

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

torch.manual_seed(0)
layer = weight_norm(nn.Linear(3, 4, bias=False).double())
length, direction = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
x = torch.randn(5, 3, dtype=torch.float64)


def derivatives(output):
    first = torch.autograd.grad(output.tanh().square().sum(), (length, direction), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (length, direction))
    return torch.cat([g.detach().flatten() for g in first]), torch.cat([g.flatten() for g in second])


def error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


written_out = length * direction / direction.norm(dim=1, keepdim=True)
of_module, of_formula = derivatives(layer(x)), derivatives(x @ written_out.T)
first, second = (error(a, b) for a, b in zip(of_module, of_formula))
print(f"torch {torch.__version__.partition('+')[0]}: relative error of the first derivative {first:.0e}, of the second {second:.2f}")
sys.exit(not (first < 1e-12 and second > 0.01))
PYTHON
