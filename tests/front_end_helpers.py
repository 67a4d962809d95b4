"""A learner under ``auto`` without verification beside the textbook, on a small convolutional network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import mamlpp_fast as mf
from tests.textbook import SETTINGS as MAMLPP
from tests.textbook import Batch, Textbook

SETTINGS = MAMLPP | {"eval_stats": "batch", "meta_lr": 0.01}


class Net(nn.Module):
    """Images [n, 1, 8, 8] to predictions [n, 3]."""

    slope = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm: nn.Module = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 16, 3)

    def body(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.leaky_relu(self.norm(self.conv(x)), self.slope), 2).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x))
        return y


class Calls(nn.Module):
    """Modules by name, put together by ``how``."""

    def __init__(self, how: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.how = how
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *x: Tensor) -> Tensor:
        return self.how(self, *x)


def batch(seed: int, size: int = 8) -> Batch:
    g = torch.Generator().manual_seed(seed)
    x, q = (torch.randn(2, n, 1, size, size, generator=g, dtype=torch.float64) for n in (3, 6))
    y, z = (torch.randint(3, (2, n), generator=g) for n in (3, 6))
    return x, y, q, z


def pair(build: Callable[[], nn.Module], **settings: Any) -> tuple[mf.MAMLPlusPlus, Textbook]:
    chosen = {**SETTINGS, **settings}
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(build())
    config = mf.MAMLConfig(**chosen)
    return mf.MAMLPlusPlus(models[0], config, precision="float64", verify=False), Textbook(models[1], chosen)


def compare(
    build: Callable[[], nn.Module], change: Callable[[nn.Module], object] | None = None, **settings: Any
) -> tuple[list[str], str]:
    """Two meta-gradients, a change of the model between, and an evaluation; the engines that served them, and why."""
    learner, textbook = pair(build, **settings)
    served = []
    for seed in range(2):
        result = learner.meta_gradient(mf.EpisodeBatch(*batch(seed)))
        assert_close(result.task_losses, textbook.gradient(batch(seed)))
        own = dict(learner.model.named_parameters())
        for name, p in textbook.model.named_parameters():
            found = own[name].grad
            assert_close(torch.zeros_like(p) if found is None else found, p.grad, rtol=1e-6, atol=1e-9)
        _same_state(learner.model, textbook.model)
        served.append(learner.engine.name)
        reason = learner.engine_reason
        if change is not None:
            for model in (learner.model, textbook.model):
                change(model)
    found = learner.evaluate(mf.EpisodeBatch(*batch(2))).logits
    assert_close(found, textbook.evaluate(batch(2), SETTINGS["eval_stats"], 2))
    _same_state(learner.model, textbook.model)
    return [*served, learner.engine.name], reason


def _same_state(model: nn.Module, textbook: nn.Module) -> None:
    buffers = dict(model.named_buffers())
    for name, expected in textbook.named_buffers():
        assert_close(buffers[name], expected, check_dtype=False)
    for m, n in zip(model.modules(), textbook.modules(), strict=True):
        assert getattr(m, "passes", lambda: 0)() == getattr(n, "passes", lambda: 0)()


FUSED, AUTOGRAD = ["fused"] * 3, ["autograd"] * 3
