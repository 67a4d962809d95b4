#!/usr/bin/env bash
# The third derivative through PyTorch's norms in training mode, as a gradient penalty within MAML or a curvature term takes.
#
# Guessed: a norm's double backward is made of operations that autograd knows, so that every further derivative is right,
# or an error says that there is none.
# Seen: value, first and second derivative agree with the same norm written out. The third of batch, instance and layer
# norm is wrong, silently: the double backward reads the saved mean and deviation, through which nothing is differentiated
# further. It does not vanish along a shift of the input either, of which these norms are independent. Group norm is
# right. torch 2.14.1 has an error in its place for batch and instance norm ("does not support 3rd+ order derivatives"),
# and layer norm as it was.
#
# Version: torch 2.13.0; the same in 2.11.0. Output seen, relative errors, and the third derivative along a shift of all
# that a norm goes over, as a part of its largest value:
#   torch 2.13.0 batch_norm: first 4e-16, second 7e-16, third 3e-01; along a shift 3e-01
#   torch 2.13.0 instance_norm: first 1e-15, second 1e-15, third 9e-01; along a shift 4e-01
#   torch 2.13.0 layer_norm: first 8e-16, second 2e-15, third 9e-01; along a shift 4e-01
#   torch 2.13.0 group_norm: first 5e-16, second 7e-16, third 1e-15; along a shift 2e-16
#
# Exits 0 while PyTorch behaves so, 1 when it no longer does.
set -euo pipefail
cd "$(mktemp -d)" && trap 'rm -rf "$PWD"' EXIT
python3 -m venv . && bin/pip install -q torch==2.13.0
bin/python -W ignore - <<'PYTHON'
import sys

import torch
import torch.nn.functional as F
from torch.autograd import grad

torch.manual_seed(0)
x = torch.randn(6, 4, 5, dtype=torch.float64)
target = torch.randn_like(x)


def written_out(axes):
    def norm(x):
        x = x - x.mean(axes, keepdim=True)
        return x / (x.square().mean(axes, keepdim=True) + 1e-5).sqrt()

    return norm


norms = {  # PyTorch's, the axes that it goes over, and whether its third derivative is wrong
    "batch_norm": (lambda x: F.batch_norm(x, None, None, training=True), (0, 2), True),
    "instance_norm": (F.instance_norm, (2,), True),
    "layer_norm": (lambda x: F.layer_norm(x, x.shape[2:]), (2,), True),
    "group_norm": (lambda x: F.group_norm(x, 1), (1, 2), False),
}


def derivatives(norm):
    """Of the loss, of its gradient's square, and of that one's gradient's."""
    at = x.clone().requires_grad_()
    value, found = (norm(at) - target).pow(3).mean(), []
    for order in (1, 2, 3):
        found.append(grad(value, at, create_graph=order < 3)[0])
        value = found[-1].square().sum()
    return [f.detach() for f in found]


def off(found, expected):
    """Largest difference as a part of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


as_seen = True
for name, (norm, axes, wrong) in norms.items():
    right, found = derivatives(written_out(axes)), derivatives(norm)
    first, second, third = (off(f, r) for f, r in zip(found, right))
    shift = (found[2].sum(axes).abs().max() / found[2].abs().max()).item()
    print(
        f"torch {torch.__version__.partition('+')[0]} {name}: first {first:.0e}, second {second:.0e}, "
        f"third {third:.0e}; along a shift {shift:.0e}"
    )
    as_seen &= first < 1e-12 and second < 1e-12 and (third > 0.01 if wrong else third < 1e-10)
sys.exit(not as_seen)
PYTHON
