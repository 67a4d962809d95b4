#!/usr/bin/env bash
# A batch norm's call in training between another one's call in evaluation and its backward pass, as of a model that is
# switched back and forth on the way to one loss.
#
# Guessed: what an operator writes to, its schema marks (`Tensor(a!)`) and the tensor's version counts, so that autograd
# refuses a backward pass whose saved tensors were written to since, as it does after `running_var.mul_(2)`.
# Seen: the running statistics are written to by `F.batch_norm` and `F.instance_norm` although the schema of
# `aten.batch_norm` has no mutable argument, and their versions stay. The evaluation's graph has saved them: its gradient
# is then made with the new ones, silently.
#
# Version: torch 2.13.0; the same in 2.11.0 and 2.14.1. Output seen:
#   torch 2.13.0: schema mutable False, version 0 before and 0 after, written to True
#   torch 2.13.0: gradient of the evaluation, relative error: alone 2e-16, with a call in training before its backward 3e-01
#   torch 2.13.0: with running_var.mul_(2) before it: RuntimeError
#
# Exits 0 while PyTorch behaves so, 1 when it no longer does.
set -euo pipefail
cd "$(mktemp -d)" && trap 'rm -rf "$PWD"' EXIT
python3 -m venv . && bin/pip install -q torch=="${TORCH:-2.13.0}"
bin/python -W ignore - <<'PYTHON'
import sys

import torch
import torch.nn.functional as F

torch.manual_seed(0)
x = torch.randn(8, 3, dtype=torch.float64) * 3
at = f"torch {torch.__version__.partition('+')[0]}"


def gradient(between=lambda mean, var: None):
    """Of the squares of what an evaluation gives, after `between`."""
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    given = x.clone().requires_grad_()
    y = F.batch_norm(given, mean, var, training=False)
    between(mean, var)
    return torch.autograd.grad(y.square().sum(), given)[0]


def error(found):
    exact = 2 * x / (1 + 1e-5)
    return float((found - exact).norm() / exact.norm())


mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
before = var._version
F.batch_norm(x, mean, var, training=True)
marked = torch.ops.aten.batch_norm.default._schema.is_mutable
written = not torch.equal(var, torch.ones_like(var))
print(f"{at}: schema mutable {marked}, version {before} before and {var._version} after, written to {written}")
alone = error(gradient())
between = error(gradient(lambda mean, var: F.batch_norm(x, mean, var, training=True)))
print(
    f"{at}: gradient of the evaluation, relative error: alone {alone:.0e}, "
    f"with a call in training before its backward {between:.0e}"
)
try:
    gradient(lambda mean, var: var.mul_(2))
    refused = "no error"
except RuntimeError as fault:
    refused = type(fault).__name__
print(f"{at}: with running_var.mul_(2) before it: {refused}")
same = not marked and before == var._version and written and alone < 1e-12 < 0.01 < between
sys.exit(not (same and refused == "RuntimeError"))
PYTHON
