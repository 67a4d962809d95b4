#!/usr/bin/env bash
# MAML's meta-gradient by torch.func, through the norms of torch.nn.functional whose weight the inner step adapts.
#
# Guessed: the gradient of vmap over the tasks is that of one task after the other, as for any other function.
# Seen: loss and inner gradient agree. The meta-gradient silently does not for batch, layer and instance norm, once it is
# taken outside vmap: the batching rule of their backward makes the weight's gradient from the saved mean and deviation,
# through which nothing is differentiated further. With the whole meta-gradient taken inside vmap it is right; so it is
# for group norm and RMS norm.
#
# Version: torch 2.13.0; the same in 2.11.0 and 2.14.1. Output seen, relative errors:
#   torch 2.13.0 batch_norm: loss 3e-16, meta-gradient inside vmap 3e-16, outside 0.41
#   torch 2.13.0 layer_norm: loss 0e+00, meta-gradient inside vmap 3e-16, outside 1.07
#   torch 2.13.0 instance_norm: loss 2e-16, meta-gradient inside vmap 6e-16, outside 3.04
#   torch 2.13.0 group_norm: loss 2e-16, meta-gradient inside vmap 3e-16, outside 0.00
#   torch 2.13.0 rms_norm: loss 0e+00, meta-gradient inside vmap 0e+00, outside 0.00
#
# Exits 0 while PyTorch behaves so, 1 when it no longer does.
set -euo pipefail
cd "$(mktemp -d)" && trap 'rm -rf "$PWD"' EXIT
python3 -m venv . && bin/pip install -q torch==2.13.0
bin/python -W ignore - <<'PYTHON'
import sys

import torch
import torch.nn.functional as F
from torch.func import grad, vmap

torch.manual_seed(0)
x = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
weight, bias = torch.rand(2, 3, dtype=torch.float64) + 0.5, torch.randn(2, 3, dtype=torch.float64)
norms = {
    "batch_norm": lambda x, weight, bias: F.batch_norm(x, None, None, weight, bias, True),
    "layer_norm": lambda x, weight, bias: F.layer_norm(x.movedim(1, -1), (3,), weight, bias),
    "instance_norm": lambda x, weight, bias: F.instance_norm(x, None, None, weight, bias),
    "group_norm": lambda x, weight, bias: F.group_norm(x, 1, weight, bias),
    "rms_norm": lambda x, weight, bias: F.rms_norm(x.movedim(1, -1), (3,), weight),
}
wrong_ones = {"batch_norm", "layer_norm", "instance_norm"}


def one_by_one(function):
    return lambda *batch: torch.stack([function(*arguments) for arguments in zip(*batch)])


def off(found, expected):
    """Largest difference as a part of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


as_seen = True
for name, norm in norms.items():

    def loss(x, weight, bias):
        return norm(x, weight, bias).pow(3).sum()

    def task(x, weight, bias):
        adapted = weight - 0.01 * grad(loss, 1)(x, weight, bias)
        return loss(x, adapted, bias)

    batch = (x, weight, bias)
    right = one_by_one(grad(task))(*batch)
    value = off(vmap(task)(*batch), one_by_one(task)(*batch))
    inside = off(vmap(grad(task))(*batch), right)
    outside = off(grad(lambda *b: vmap(task)(*b).sum())(*batch), right)
    print(
        f"torch {torch.__version__.partition('+')[0]} {name}: loss {value:.0e}, "
        f"meta-gradient inside vmap {inside:.0e}, outside {outside:.2f}"
    )
    as_seen &= value < 1e-12 and inside < 1e-12
    as_seen &= outside > 0.01 if name in wrong_ones else outside < 1e-12
sys.exit(not as_seen)
PYTHON
