"""Per-step batch norm as a module, and its conversion from PyTorch's."""

from __future__ import annotations

import pytest
import torch
from helpers import random_batch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast import reference
from mamlpp_fast.nn import plain_batch_norm


@pytest.mark.parametrize("per_step_affine", [True, False])
@pytest.mark.parametrize("per_step_stats", [True, False])
@pytest.mark.parametrize("slope", [None, 0.1])
def test_fused_and_plain_modules_agree(
    per_step_affine: bool, per_step_stats: bool, slope: float | None
) -> None:
    torch.manual_seed(0)
    modules = [
        kind(
            5, 3, per_step_affine=per_step_affine, per_step_stats=per_step_stats, negative_slope=slope
        ).double()
        for kind in (mf.PerStepBatchNorm2d, reference.PerStepBatchNorm2d)
    ]
    with torch.no_grad():
        for p in modules[0].parameters():
            p.uniform_(-1, 1)
    modules[1].load_state_dict(modules[0].state_dict())
    x = torch.randn(4, 5, 6, 6, dtype=torch.float64)
    for step in (0, 2, 1, 4):
        for stats, training in (("batch", True), ("batch", False), ("running", False)):
            outputs = []
            for module in modules:
                module.train(training)
                mf.set_step(module, step)
                mf.set_eval_stats(module, stats)
                inputs = [x.clone().requires_grad_(), module.weight, module.bias]
                y = module(inputs[0])
                first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
                second = torch.autograd.grad(sum(g.pow(3).sum() for g in first), inputs, allow_unused=True)
                outputs.append((y, *first, *(s if s is not None else torch.zeros(1) for s in second)))
            assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-9)
    assert_close(dict(modules[0].state_dict()), dict(modules[1].state_dict()), rtol=1e-12, atol=1e-12)


def test_convert_keeps_values_mode_and_frozen_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.2), nn.ReLU()).double()
    model[1].weight.requires_grad_(False)
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    model(x)
    expected = model(x)
    converted = mf.convert_batch_norm(model, 3)
    assert converted is model
    norm = model[1]
    assert isinstance(norm, mf.PerStepBatchNorm2d)
    assert norm.weight.shape == (3, 4) and norm.eps == 1e-3 and norm.momentum == 0.2
    assert not norm.weight.requires_grad and norm.bias.requires_grad
    assert_close(model(x), expected)
    model.eval()
    mf.set_eval_stats(model, "running")
    assert model(x[:1]).shape == (1, 4, 6, 6)
    bare = mf.convert_batch_norm(nn.BatchNorm2d(4), 2)
    assert isinstance(bare, mf.PerStepBatchNorm2d)


def test_convert_keeps_a_shared_batch_norm_shared() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.BatchNorm2d(2)
            self.again = self.first
            self.inner = nn.Sequential(self.first)

    model = mf.convert_batch_norm(Twice(), 3)
    assert isinstance(model.first, mf.PerStepBatchNorm2d)
    assert model.first is model.again and model.first is model.inner[0]
    with pytest.raises(ValueError, match="num_steps: expected at least 1, got 0"):
        mf.convert_batch_norm(nn.Sequential(), 0)


def test_plain_batch_norm_is_undone_after_an_error() -> None:
    model = mf.Conv4(1, 3, image_size=12, stages=2, filters=4)
    with pytest.raises(RuntimeError), plain_batch_norm(model):
        model(torch.zeros(2, 5, 12, 12))
    assert not model.get_submodule("blocks.0.norm").plain


def test_the_learner_converts_plain_batch_norm_and_refuses_other_rows() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    learner = mf.MAMLPlusPlus(model, mf.MAMLConfig(steps=2), engine="reference")
    assert isinstance(model[1], mf.PerStepBatchNorm2d)
    learner.meta_step(random_batch(dtype=torch.float32))
    with pytest.raises(ValueError, match="expected per-step batch norms of 5 steps, 1 has 2"):
        mf.MAMLPlusPlus(model, mf.MAMLConfig(steps=5), engine="reference")


class _Calls(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_function__(
        self, func: object, types: object, args: tuple = (), kwargs: object = None
    ) -> object:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class _Marked(Tensor):
    pass


@pytest.mark.parametrize("kind", [mf.PerStepBatchNorm2d, reference.PerStepBatchNorm2d])
def test_torch_function_sees_a_per_step_norm_as_one_operation(kind: type[nn.Module]) -> None:
    norm = kind(3, 2, negative_slope=0.1).double()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    expected = norm(x)
    with _Calls() as calls:
        y = norm(x)
    assert calls.seen == [reference.per_step_norm]
    assert_close(y, expected, rtol=0, atol=0)
    assert isinstance(norm(x.as_subclass(_Marked)), _Marked)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_vmap_in_training_mode_is_refused_in_words(momentum: float | None) -> None:
    norm = mf.PerStepBatchNorm2d(3, 2, momentum=momentum).double()
    x = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with pytest.raises(
        NotImplementedError, match=r"PerStepBatchNorm2d: expected evaluation mode under torch.func"
    ):
        torch.func.vmap(norm)(x)
    with pytest.raises(NotImplementedError, match="got training mode"):
        torch.func.vmap(torch.func.grad(lambda t: norm(t).square().sum()))(x)
    assert_close(dict(norm.state_dict()), before, rtol=0, atol=0)
    for stats in ("batch", "running"):
        mf.set_eval_stats(norm.eval(), stats)
        assert_close(torch.func.vmap(norm)(x), torch.stack([norm(t) for t in x]))
