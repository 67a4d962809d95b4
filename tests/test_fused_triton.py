"""The fused engine on the Triton kernels, through their interpreter."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from helpers import gradients, random_batch, small_learner
from mamlpp_fast.kernels import linear_cross_entropy, norm_act_pool

import mamlpp_fast as mf
from mamlpp_fast.engine import base
from mamlpp_fast.engine.fused.engine import FusedEngine
from mamlpp_fast.testing import use_backend


@pytest.mark.parametrize("settings", [{}, {"bnwb": False, "adapt_norm": True}], ids=["fixed", "adapting"])
def test_a_meta_gradient_on_triton_kernels_is_the_references(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, bool]
) -> None:
    launches: Counter[str] = Counter()

    def count(module: str, kind: type[Any]) -> None:
        launch = kind.__call__

        def counted(*args: Any, **options: Any) -> None:
            launches[module] += 1
            launch(*args, **options)

        monkeypatch.setattr(kind, "__call__", counted)

    count("norm_act_pool", norm_act_pool._Launch)
    count("linear_cross_entropy", linear_cross_entropy._Call)
    monkeypatch.setattr(base, "launches_cost", lambda device: True)  # what is moved and summed, too
    monkeypatch.setattr(FusedEngine, "_convolves", lambda self, network: False)
    config = mf.MAMLConfig(steps=2, **settings)  # type: ignore[arg-type]
    batch = random_batch(tasks=2, ways=3, shots=1, targets=1, size=8)
    results = {}
    for engine in ("reference", "fused"):
        learner = small_learner(config, engine=engine, verify=False, image_size=8)
        with use_backend("triton" if engine == "fused" else "python"):
            learner.meta_gradient(batch)
        results[engine] = gradients(learner.model, learner.rates) | dict(learner.model.named_buffers())
    # Forward and backward of two support and two target passes, the second and the first in one where norms have rows,
    # and both tangents of the support passes; the first stage is another operation's.
    passes = 4 if settings else 3
    rules = 2 * passes + 2 + 2
    assert launches == {"norm_act_pool": rules, "linear_cross_entropy": rules}
    assert results["reference"].keys() == results["fused"].keys()
    for name, expected in results["reference"].items():
        scale = max(float(expected.double().abs().max()), 1e-3)
        torch.testing.assert_close(results["fused"][name], expected, rtol=0, atol=1e-9 * scale)


def test_a_backend_is_in_use_from_the_first_call() -> None:
    """Operations that nothing has imported yet must not slip past the override."""
    code = (
        "import mamlpp_fast\nfrom mamlpp_fast.ops._library import OPERATIONS\n"
        "assert {'norm_act_pool', 'task_conv2d', 'lslr_update'} <= OPERATIONS.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
