#!/usr/bin/env bash
# One torch.compile of anything, and what torch.distributions says of wrong arguments afterwards.
#
# Guessed: compiling one function changes how that function runs, and nothing about the rest of the process.
# Seen: importing the compiler changes nothing, but the first function that is compiled switches the validation of
# torch.distributions off for the whole process, for good and without a word. Eager code far from it, which raised
# for a scale of -1 and for an observation outside the support, then computes on: -1 gives nan, an outcome of 2 in a
# Bernoulli a log-probability above 0.
#
# Version: torch 2.13.0 (by its source the same in 2.11.0 and 2.14.1). Output seen:
#   torch 2.13.0, before: ValueError, ValueError; compiler imported: ValueError, ValueError; after one compiled
#   function: nan, 0.025923
#
# Exits 0 while PyTorch behaves so, 1 when it no longer does.
set -euo pipefail
cd "$(mktemp -d)" && trap 'rm -rf "$PWD"' EXIT
python3 -m venv . && bin/pip install -q torch==2.13.0
bin/python -W ignore - <<'PYTHON'
import sys

import torch
from torch.distributions import Bernoulli, Normal


def answers():
    found = []
    for ask in (
        lambda: Normal(0.0, torch.tensor(-1.0)).log_prob(torch.tensor(0.5)),
        lambda: Bernoulli(logits=torch.tensor(0.5)).log_prob(torch.tensor(2.0)),
    ):
        try:
            found.append(f"{float(ask()):.6g}")
        except ValueError:
            found.append("ValueError")
    return found


before = answers()
import torch._dynamo  # noqa: E402

imported = answers()
torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
after = answers()
print(
    f"torch {torch.__version__.partition('+')[0]}, before: {', '.join(before)}; compiler imported: "
    f"{', '.join(imported)}; after one compiled function: {', '.join(after)}"
)
raised = ["ValueError", "ValueError"]
sys.exit(not (before == imported == raised and "ValueError" not in after))
PYTHON
