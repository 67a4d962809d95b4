#!/usr/bin/env bash
# MAML's meta-gradient by torch.func, through torch.nn.functional.batch_norm whose weight the inner step adapts.
#
# Guessed: the gradient of vmap over the tasks is that of one task after the other, as for any other function.
# Seen: loss and inner gradient agree, the meta-gradient silently does not, once it is taken outside vmap: the batching rule
# of the backward makes the weight's gradient from the saved mean and deviation, through which nothing is differentiated
# further. With the whole meta-gradient taken inside vmap it is right.
#
# Version: torch 2.13.0; the same in 2.11.0 and 2.14.1. Output seen:
#   torch 2.13.0: relative error of the loss 1e-15, of the meta-gradient inside vmap 3e-16, outside 0.23
#
# Exits 0 while PyTorch behaves so, 1 when it no longer does.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
import torch.nn.functional as F
from torch.func import grad, vmap

torch.manual_seed(0)
x = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
weight, bias = torch.rand(2, 3, dtype=torch.float64) + 0.5, torch.randn(2, 3, dtype=torch.float64)


def loss(x, weight, bias):
    return F.batch_norm(x, None, None, weight, bias, True).pow(3).sum()


def task(x, weight, bias):
    adapted = weight - 0.1 * grad(loss, 1)(x, weight, bias)
    return loss(x, adapted, bias)


def one_by_one(function):
    return lambda *batch: torch.stack([function(*arguments) for arguments in zip(*batch)])


def off(found, expected):
    """Largest difference as a part of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


batch = (x, weight, bias)
right = one_by_one(grad(task))(*batch)
value = off(vmap(task)(*batch), one_by_one(task)(*batch))
inside = off(vmap(grad(task))(*batch), right)
outside = off(grad(lambda *b: vmap(task)(*b).sum())(*batch), right)
print(
    f"torch {torch.__version__.partition('+')[0]}: relative error of the loss {value:.0e}, "
    f"of the meta-gradient inside vmap {inside:.0e}, outside {outside:.2f}"
)
sys.exit(not (value < 1e-12 and inside < 1e-12 and outside > 0.01))
PYTHON
