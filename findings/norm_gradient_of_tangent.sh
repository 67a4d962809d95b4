#!/usr/bin/env bash
# The gradient of a tangent (reverse over forward mode) through PyTorch's norms in training mode, as a Jacobian-vector
# penalty or `jacrev(jacfwd(f))` takes it.
#
# Guessed: forward and reverse mode compose in either order; a Hessian comes out the same, or an error says what has no
# formula.
# Seen: the tangent of batch, instance and layer norm is right, and so is the tangent of a gradient (forward over
# reverse). The gradient of a tangent is wrong, silently: the tangent is a formula of the saved mean and deviation, which
# are constants to the gradient. Two orders suffice, in every version to 2.14; group and RMS norm are right.
# `torch.func.hessian` is forward over reverse, and right.
#
# Version: torch 2.13.0; the same in 2.11.0 and 2.14.1. Output seen, relative errors:
#   torch 2.13.0 batch_norm: tangent 2e-16, tangent of gradient 5e-16, gradient of tangent 1e+00
#   torch 2.13.0 instance_norm: tangent 3e-16, tangent of gradient 4e-16, gradient of tangent 8e-01
#   torch 2.13.0 layer_norm: tangent 3e-16, tangent of gradient 6e-16, gradient of tangent 8e-01
#   torch 2.13.0 group_norm: tangent 3e-16, tangent of gradient 5e-16, gradient of tangent 8e-16
#   torch 2.13.0 layer_norm: jacrev(jacfwd) and jacfwd(jacrev) differ by 1e+00
#
# Exits 0 while PyTorch behaves so, 1 when it no longer does.
set -euo pipefail
cd "$(mktemp -d)" && trap 'rm -rf "$PWD"' EXIT
python3 -m venv . && bin/pip install -q torch==2.13.0
bin/python -W ignore - <<'PYTHON'
import sys

import torch
import torch.nn.functional as F
from torch.func import grad, jacfwd, jacrev, jvp

torch.manual_seed(0)
x, along, target = torch.randn(3, 6, 4, 5, dtype=torch.float64)


def written_out(axes):
    def norm(x):
        x = x - x.mean(axes, keepdim=True)
        return x / (x.square().mean(axes, keepdim=True) + 1e-5).sqrt()

    return norm


norms = {  # PyTorch's, the axes that it goes over, and whether the gradient of its tangent is wrong
    "batch_norm": (lambda x: F.batch_norm(x, None, None, training=True), (0, 2), True),
    "instance_norm": (F.instance_norm, (2,), True),
    "layer_norm": (lambda x: F.layer_norm(x, x.shape[2:]), (2,), True),
    "group_norm": (lambda x: F.group_norm(x, 1), (1, 2), False),
}


def values(norm):
    """The tangent, the tangent of a loss's gradient, and the gradient of a loss of the tangent."""

    def loss(y):
        return (y - target).pow(3).mean()

    return (
        jvp(norm, (x,), (along,))[1],
        jvp(grad(lambda x: loss(norm(x))), (x,), (along,))[1],
        grad(lambda x: loss(jvp(norm, (x,), (along,))[1]))(x),
    )


def off(found, expected):
    """Largest difference as a part of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


as_seen = True
version = f"torch {torch.__version__.partition('+')[0]}"
for name, (norm, axes, wrong) in norms.items():
    tangent, forward_over_reverse, reverse_over_forward = map(off, values(norm), values(written_out(axes)))
    print(
        f"{version} {name}: tangent {tangent:.0e}, tangent of gradient {forward_over_reverse:.0e}, "
        f"gradient of tangent {reverse_over_forward:.0e}"
    )
    as_seen &= max(tangent, forward_over_reverse) < 1e-12
    as_seen &= reverse_over_forward > 0.01 if wrong else reverse_over_forward < 1e-12


def energy(row):
    return F.layer_norm(row, row.shape).pow(3).sum()


row = x[0, 0]
difference = off(jacrev(jacfwd(energy))(row), jacfwd(jacrev(energy))(row))
print(f"{version} layer_norm: jacrev(jacfwd) and jacfwd(jacrev) differ by {difference:.0e}")
sys.exit(not (as_seen and difference > 0.01))
PYTHON
