"""The fused engine on the Triton kernels, through their interpreter."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import gradients, random_batch, small_learner
from mamlpp_fast.kernels import norm_act_pool

import mamlpp_fast as mf
from mamlpp_fast.testing import use_backend


def test_a_meta_gradient_on_triton_kernels_is_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    launch = norm_act_pool._Launch.__call__

    def counted(self: norm_act_pool._Launch, kernel: Any, *tensors: torch.Tensor, **scalars: float) -> None:
        launches.append(kernel)
        launch(self, kernel, *tensors, **scalars)

    monkeypatch.setattr(norm_act_pool._Launch, "__call__", counted)
    config = mf.MAMLConfig(steps=2)
    batch = random_batch(tasks=1, ways=3, shots=1, targets=1, size=8)
    results = {}
    for engine in ("reference", "fused"):
        learner = small_learner(config, engine=engine, image_size=8)
        with use_backend("triton" if engine == "fused" else "python"):
            learner.meta_gradient(batch)
        results[engine] = gradients(learner.model, learner.rates)
    assert len(launches) >= 2 * 2 * 2 * 4  # stages, steps, two passes of each of four orders
    assert results["reference"].keys() == results["fused"].keys()
    for name, expected in results["reference"].items():
        scale = max(float(expected.abs().max()), 1e-3)
        torch.testing.assert_close(results["fused"][name], expected, rtol=0, atol=1e-9 * scale)


def test_a_backend_is_in_use_from_the_first_call() -> None:
    """Operations that nothing has imported yet must not slip past the override."""
    code = (
        "import mamlpp_fast\nfrom mamlpp_fast.ops._library import OPERATIONS\n"
        "assert {'norm_act_pool', 'task_conv2d', 'lslr_update'} <= OPERATIONS.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
