#!/usr/bin/env bash
# A mean of losses written into a tensor that is given: the out variants of ATen's loss operators.
#
# Guessed: aten.binary_cross_entropy.out writes what binary_cross_entropy returns, as aten.mse_loss.out does.
# Seen: with a mean or a sum it makes the scalar that it is given larger, to one loss a value, which it says in a warning,
# and leaves the first value's loss as the result. Whoever swaps operators for their out variants, to place results in
# memory of their own, gets another loss from this one alone.
#
# Version: torch 2.13.0; the same in 2.11.0 and 2.14.1. Output seen:
#   torch 2.13.0 binary_cross_entropy mean: returned 0.8684, out 0.6959, first value's 0.6959
#   torch 2.13.0 binary_cross_entropy sum: returned 17.3687, out 0.6959, first value's 0.6959
#   torch 2.13.0 mse_loss mean: returned 0.1587, out 0.1587, first value's 0.0344
#   torch 2.13.0 mse_loss sum: returned 3.1738, out 3.1738, first value's 0.0344
#
# Exits 0 while PyTorch behaves so, 1 when it no longer does.
set -euo pipefail
cd "$(mktemp -d)" && trap 'rm -rf "$PWD"' EXIT
python3 -m venv . && bin/pip install -q torch==2.13.0
bin/python -W ignore - <<'PYTHON'
import sys

import torch
import torch.nn.functional as F

torch.manual_seed(0)
x, y = torch.rand(4, 5), torch.rand(4, 5)
as_seen = True
for name, given in (("binary_cross_entropy", (x, y, None)), ("mse_loss", (x, y))):
    first = getattr(F, name)(x, y, reduction="none")[0, 0]
    for number, reduction in ((1, "mean"), (2, "sum")):
        returned = getattr(F, name)(x, y, reduction=reduction)
        out = getattr(torch.ops.aten, name).out(*given, number, out=torch.empty(()))
        print(
            f"torch {torch.__version__.partition('+')[0]} {name} {reduction}: returned {returned:.4f}, "
            f"out {out:.4f}, first value's {first:.4f}"
        )
        as_seen &= bool(torch.isclose(out, first if name == "binary_cross_entropy" else returned))
sys.exit(not as_seen)
PYTHON
