"""A GPU's way through a program, many small calls in one: the same results as a CPU's way, here by closed forms."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from helpers import gradients, random_batch, small_learner
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import mamlpp_fast as mf
from mamlpp_fast.engine import base
from mamlpp_fast.engine.fused.engine import FusedEngine


class Calls(TorchDispatchMode):
    """Counts the calls that compute or copy."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def results(
    learner: mf.MAMLPlusPlus, batches: list[mf.EpisodeBatch], calls: Calls | None = None
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        if calls is None or i == 0:
            metrics = learner.meta_step(batch)
        else:
            with calls:
                metrics = learner.meta_step(batch)
        found[f"{i} loss"] = metrics.task_losses
        found |= {f"{i} {name}": g for name, g in gradients(learner.model, learner.rates).items()}
        found |= {f"{i} {name}": b.clone() for name, b in learner.model.named_buffers()}
    found |= {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    found["logits"] = learner.evaluate(batches[0]).logits
    return found


def shared_calls(learner: mf.MAMLPlusPlus) -> int:
    """Calls for two roles at once in the program that was run last."""
    prepared: Any = learner.engine
    return sum("_shared" in i.name for i in prepared._current.program.instructions)


def test_passes_are_paired_where_they_are_alike_and_there_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a target pass comes by itself: with other images than the support, and where its activations do not fit."""
    monkeypatch.setattr(base, "launches_cost", lambda device: True)
    monkeypatch.setattr(FusedEngine, "_convolves", lambda self, network: False)
    found, needs = {}, {}
    for targets, room in ((2, True), (1, True), (2, False)):
        learner: Any = small_learner(mf.MAMLConfig(steps=3), engine="fused", verify=False)
        if not room:
            most = needs[2, True] - 1
            monkeypatch.setattr("mamlpp_fast.engine.fused.engine.free_bytes", lambda device, most=most: most)
        learner.meta_gradient(random_batch(tasks=4, targets=targets))
        prepared = learner.engine._current
        found[targets, room] = shared_calls(learner)
        assert ("one pass with the next support pass" in learner.explain()) == (found[targets, room] > 0)
        needs[targets, room] = prepared.workspace_bytes + prepared.owned_bytes
    assert found == {(2, True): 12, (1, True): 0, (2, False): 0}
    assert needs[2, False] < needs[2, True]


def test_what_is_rounded_in_a_pair_is_not_rounded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The support's part of it serves the Hessian-vector products."""
    monkeypatch.setattr(base, "launches_cost", lambda device: True)
    monkeypatch.setattr(FusedEngine, "_convolves", lambda self, network: False)
    found, copies = [], []
    for apart in (False, True):
        if apart:
            monkeypatch.setattr("mamlpp_fast.engine.fused.sweep.can_pair", lambda *_: False)
        torch.manual_seed(0)
        model = mf.Conv4(1, 3, image_size=12, filters=8, stages=2, num_steps=3)
        learner: Any = mf.MAMLPlusPlus(
            model, mf.MAMLConfig(steps=3), engine="fused", precision="bfloat16", verify=False
        )
        learner.meta_gradient(random_batch(tasks=4, dtype=torch.float32))
        assert shared_calls(learner) == (0 if apart else 12)
        found.append(gradients(learner.model, learner.rates))
        copies.append(sum(i.name == "copy_" for i in learner.engine._current.program.instructions))
    for name, value in found[1].items():
        assert_close(found[0][name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()), msg=name)
    # Activations and gradient of the convolution, once where there were two; weights are rounded once for both anyway.
    assert copies[0] == copies[1] - 2 * 2


FORMS: dict[str, dict[str, Any]] = {
    "everything": {},
    "last loss, first order": {"msl": False, "second_order": False},
    "a row of weights, one of statistics": {"bnwb": False, "bnrs": False},
    "weights of norms adapt": {"bnwb": False, "adapt_norm": True},
    "more steps than rows": {"eval_steps": 5},
    "a rate an element": {"rates": "element"},
}


@pytest.mark.parametrize("group", [None, 1], ids=["all tasks", "one by one"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_gpus_way_is_a_cpus(monkeypatch: pytest.MonkeyPatch, form: str, group: int | None) -> None:
    """In sums over tasks and losses, which one call takes in float64, up to their rounding."""
    config = mf.MAMLConfig(steps=3, **FORMS[form])
    batches = [random_batch(tasks=4, seed=i) for i in range(2)]
    expected = results(small_learner(config, engine="fused"), batches)
    monkeypatch.setattr(base, "launches_cost", lambda device: True)
    monkeypatch.setattr(FusedEngine, "_convolves", lambda self, network: False)
    learner = small_learner(config, engine="fused")
    learner.engine.group = group  # type: ignore[attr-defined]
    found = results(learner, batches)
    # Of one task 6 x 3 x 3 x 4 positions of a pool do not end on 16 bytes.
    apart = group == 1 or form in ("last loss, first order", "weights of norms adapt")
    assert shared_calls(learner) == (0 if apart else 2 * 6)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max()) if value.is_floating_point() else 1.0
        # Adam divides a gradient of zero by its own rounding error.
        assert_close(found[name], value, rtol=1e-9, atol=1e-9 * max(scale, 1e-3), msg=f"{form}: {name}")


class Partly(nn.Module):
    """With a parameter that no prediction depends on, and one that takes no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(3))
        self.features = nn.Linear(4, 5)
        self.features.bias.requires_grad_(False)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.features(x)))


def test_what_has_no_gradient_is_zero_in_every_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "launches_cost", lambda device: True)
    torch.manual_seed(0)
    learner = mf.MAMLPlusPlus(Partly().double(), mf.MAMLConfig(steps=2), engine="fused", precision="float64")
    x, y = torch.randn(2, 6, 4).double(), torch.arange(6).remainder(3).expand(2, 6)
    batch = mf.EpisodeBatch(x, y, x + 1, y, by_class=False)
    for _ in range(2):
        learner.meta_gradient(batch)
        spare = learner.model.spare.grad
        assert spare is None or not spare.any()
        assert learner.model.head.weight.grad is not None
        assert learner.model.head.weight.grad.any()
        for p in learner.model.parameters():
            if p.grad is not None:
                p.grad.add_(1.0)  # whoever clips or decays gradients writes to them


def test_what_is_moved_and_summed_is_a_handful_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the operations of the passes: all that is given in, to tasks; results; sums over tasks; gradients out."""
    monkeypatch.setattr(base, "launches_cost", lambda device: True)
    monkeypatch.setattr(FusedEngine, "_convolves", lambda self, network: False)
    config, batches = mf.MAMLConfig(steps=3), [random_batch(tasks=3, seed=i) for i in range(2)]
    calls = Calls()
    results(small_learner(config, engine="fused"), batches, calls)
    assert calls.found["strided_sums"] == 5 + (config.steps - 1)  # and the adjoint of all steps but the last
    assert calls.found["running_blend"] == 2
    small = ("copy_", "mul_", "sum", "mul", "mm", "addmm_")
    assert sum(calls.found[name] for name in small) <= 6, calls.found
