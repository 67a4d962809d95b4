"""What of PyTorch loads all of ``torch.compile`` when it is first called, without that."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap
from torch.optim import Adam
from torch.testing import assert_close

from mamlpp_fast._compiler import lean_vjp
from mamlpp_fast.adam import LeanAdam

# In a process of its own: the suite's has loaded the compiler long before.
TRAINS = """
import sys, torch
from torch import nn
import mamlpp_fast as mf
from mamlpp_fast.workloads import WORKLOADS

dropout = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.Dropout(), nn.Linear(8, 5))
generic = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.Softplus(), nn.LogSoftmax(1), nn.Linear(8, 5))
workload = WORKLOADS["omniglot-5w1s"]
batch = workload.batch(0)
for model in (mf.Conv4(1, 5, image_size=28, filters=4), dropout, generic):
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


# PyTorch's own, where forward mode is first used.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
# Forward mode's: a DeprecationWarning in torch 2.13, a FutureWarning in 2.14.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_vjp_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of results that depend on some inputs only, over tasks, and differentiated itself in both modes."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(6)]

    def results(pulled: Any) -> Any:
        def f(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
            return (x * y).sin().sum(-1, keepdim=True), x.detach() + y.exp()

        def one(x: Tensor, y: Tensor, c: Tensor, d: Tensor, u: Tensor, v: Tensor) -> Any:
            def first(x: Tensor, y: Tensor) -> Any:
                made, pull = pulled(f, x, y, x)
                return made, pull((c[:1], d))

            made, back = pulled(lambda x, y: first(x, y)[1], x, y)
            return first(x, y), made, back((u, v, d)), jvp(first, (x, y), (u, v))

        return vmap(one)(*given)

    expected = results(vjp)
    with monkeypatch.context() as patched:
        patched.delitem(sys.modules, "torch._dynamo", raising=False)
        found = results(lean_vjp)
        assert "torch._dynamo" not in sys.modules
    assert_close(found, expected, rtol=0, atol=0)


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
