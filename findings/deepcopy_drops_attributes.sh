#!/usr/bin/env bash
# A flag set on a model's parameters, for an optimizer's groups say (p.no_weight_decay = True), and copies of the model.
#
# Guessed: copy.deepcopy copies what pickle would carry, attributes included, of parameters as of other tensors.
# Seen: it drops whatever is set on an nn.Parameter, without a word; on buffers and plain tensors it stays, and pickle
# and torch.save keep it on both. So a teacher, an averaged model or a meta-learner's clone that is made by deepcopy
# has its parameters in the wrong group.
#
# Version: torch 2.13.0; the same in 2.11.0 and 2.14.1. Output seen:
#   torch 2.13.0: kept on a parameter by deepcopy False, pickle True, torch.save True; on a buffer True, True, True
#   AveragedModel: kept on a parameter False, on a buffer True
#
# Exits 0 while PyTorch behaves so, 1 when it no longer does.
set -euo pipefail
cd "$(mktemp -d)" && trap 'rm -rf "$PWD"' EXIT
python3 -m venv . && bin/pip install -q torch==2.13.0
bin/python -W ignore - <<'PYTHON'
import copy
import io
import pickle
import sys

import torch
from torch.optim.swa_utils import AveragedModel


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def kept(model):
    return hasattr(model.weight, "no_weight_decay"), hasattr(model.running_mean, "no_weight_decay")


norm = torch.nn.BatchNorm1d(2)
norm.weight.no_weight_decay = norm.running_mean.no_weight_decay = True
ways = [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved]
parameter, buffer = zip(*(kept(way(norm)) for way in ways))
averaged = kept(AveragedModel(norm).module)
print(
    f"torch {torch.__version__.partition('+')[0]}: kept on a parameter by deepcopy {parameter[0]}, pickle {parameter[1]}, "
    f"torch.save {parameter[2]}; on a buffer {', '.join(map(str, buffer))}"
)
print(f"AveragedModel: kept on a parameter {averaged[0]}, on a buffer {averaged[1]}")
sys.exit(not (parameter == (False, True, True) and buffer == (True, True, True) and averaged == (False, True)))
PYTHON
