"""What of PyTorch loads all of ``torch.compile`` when it is first called, without that."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.optim import Adam

from mamlpp_fast.adam import LeanAdam

# In a process of its own: the suite's has loaded the compiler long before.
TRAINS = """
import sys, torch
from torch import nn
import mamlpp_fast as mf
from mamlpp_fast.workloads import WORKLOADS

dropout = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.Dropout(), nn.Linear(8, 5))
workload = WORKLOADS["omniglot-5w1s"]
batch = workload.batch(0)
for model in (mf.Conv4(1, 5, image_size=28, filters=4), dropout):
    learner = mf.MAMLPlusPlus(model, mf.MAMLConfig(), engine=sys.argv[1])
    learner.meta_step(batch)
    learner.evaluate(batch)
    learner.load_state_dict(learner.state_dict())
print(sorted({"torch._dynamo", "torch._inductor", "sympy"} & sys.modules.keys()))
"""


@pytest.mark.parametrize("engine", ["fused", "autograd", "reference"])
def test_training_leaves_the_compiler_unloaded(engine: str) -> None:
    done = subprocess.run([sys.executable, "-c", TRAINS, engine], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_adam_is_pytorchs(options: dict[str, bool]) -> None:
    made = []
    for kind in (Adam, LeanAdam):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        optimizer = kind(layer.parameters(), 0.1, **options)
        called: list[str] = []
        optimizer.register_step_pre_hook(lambda *_, called=called: called.append("before"))
        optimizer.register_step_post_hook(lambda *_, called=called: called.append("after"))
        for _ in range(3):

            def closure(layer: nn.Module = layer, optimizer: Adam = optimizer) -> torch.Tensor:
                optimizer.zero_grad()
                loss: torch.Tensor = layer(torch.ones(4, 3)).square().sum()
                loss.backward()
                return loss

            loss = optimizer.step(closure)
        again = kind(layer.parameters(), 0.3, **options)
        again.load_state_dict(optimizer.state_dict())
        made.append((loss, layer.weight, again.state_dict()["state"][0]["exp_avg_sq"], called))
        assert again.param_groups[0]["lr"] == 0.1
        assert called == ["before", "after"] * 3
    for ours, theirs in zip(*made, strict=True):
        assert ours == theirs if isinstance(ours, list) else torch.equal(ours, theirs)
