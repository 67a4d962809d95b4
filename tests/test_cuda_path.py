"""What the code does on a GPU, as far as it can be seen without one: precision, devices, gradients, the optimizer."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda, batch_on_gpu, on_gpu
from helpers import gradients, random_batch, small_learner
from mamlpp_fast.kernels import conv_norm_act_pool as kernels
from mamlpp_fast.kernels import norm_act_pool
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import mamlpp_fast as mf
from mamlpp_fast._modes import float32_products
from mamlpp_fast.ops import _library

CUDA = torch.device("cuda")
SETTINGS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)


def precisions() -> list[str]:
    return [s.fp32_precision for s in SETTINGS]


@pytest.fixture(autouse=True)
def settings_kept() -> Iterator[None]:
    before = precisions()
    yield
    for s, precision in zip(SETTINGS, before, strict=True):
        s.fp32_precision = precision


class Convolutions(TorchDispatchMode):
    """The precision that each convolution and each derivative of one finds."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" in func.overloadpacket.__name__:
            self.found.append(torch.backends.cudnn.conv.fp32_precision)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("engine", "precision", "expected"),
    [("reference", "float32", "ieee"), ("autograd", "float32", "ieee"), ("autograd", "tf32", "tf32")],
)
def test_every_convolution_has_the_precision_asked_for(engine: str, precision: Any, expected: str) -> None:
    """Those of the outer backward pass too: PyTorch's default rounds convolutions of float32 to TF32."""
    learner = mf.MAMLPlusPlus(mf.Conv4(1, 3, filters=2), engine=engine)  # type: ignore[arg-type]
    inner: Any = learner.engine
    inner.device, inner.precision = CUDA, precision  # as on a GPU, where tf32 is a choice
    batch = random_batch(size=28, dtype=torch.float32)
    torch.backends.cudnn.conv.fp32_precision = "tf32" if expected == "ieee" else "ieee"
    before = precisions()
    for call in (
        lambda: inner.meta_gradient(batch, None, True),
        lambda: inner.evaluate(batch, steps=1, stats="batch"),
    ):
        with Convolutions() as convolutions:
            call()
        assert convolutions.found
        assert set(convolutions.found) == {expected}
    assert precisions() == before


def test_settings_apart_are_no_error() -> None:
    """torch refuses to read ``cudnn.allow_tf32``, and so ``cudnn.flags``, once convolutions differ from RNNs."""
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    before = precisions()
    with float32_products(CUDA):
        assert precisions() == ["ieee"] * 3
    with float32_products(CUDA, tf32=True):
        assert precisions() == ["tf32"] * 3
    with float32_products(torch.device("cpu"), tf32=True):
        assert precisions() == before
    assert precisions() == before


@pytest.mark.parametrize("engine", ["autograd", "fused"])
def test_a_replay_leaves_gradients_after_zero_grad(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """``zero_grad`` sets ``.grad`` to None; a replay writes to the captured tensors and assigns nothing."""
    FakeCuda(monkeypatch)
    learner, plain = (small_learner(engine=engine) for _ in range(2))
    for i in range(3):
        batch = random_batch(seed=i)
        plain.engine.meta_gradient(batch, None, True)
        learner.engine.meta_gradient(batch_on_gpu(batch), None, True)
        expected = gradients(plain.model, plain.rates)
        assert_close(gradients(learner.model, learner.rates), expected, rtol=1e-9, atol=1e-12)
        learner.model.zero_grad()
        learner.rates.zero_grad()


def test_a_state_from_a_cpu_leaves_the_optimizer_capturable() -> None:
    """``load_state_dict`` takes over the saved one's ``capturable`` and a learning rate that no graph can follow."""
    ours, theirs = small_learner(), small_learner()
    theirs.meta_step(random_batch())
    rate = torch.tensor(0.5)
    for group in ours.optimizer.param_groups:
        group |= {"lr": rate, "capturable": True}
    ours.load_state_dict(theirs.state_dict())
    for group, other in zip(ours.optimizer.param_groups, theirs.optimizer.param_groups, strict=True):
        assert group["capturable"]
        assert not other["capturable"]
        assert group["lr"] is rate
        assert float(rate) == pytest.approx(other["lr"])
    moments = [s["exp_avg"] for s in ours.optimizer.state.values()]
    assert_close(moments, [s["exp_avg"] for s in theirs.optimizer.state.values()])


def test_a_graph_is_captured_and_replayed_on_its_arguments_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    x = on_gpu(torch.ones(2))
    step = mf.graphed(lambda x: x + 1)
    step(x)
    step(x)
    assert cuda.devices == [x.device] * 2


def test_a_kernel_is_launched_on_its_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    x = torch.ones(2, device="meta")
    launch = _library._on_its_device(lambda *args: (cuda.devices.copy(), args))
    assert launch(None, x, 3) == ([x.device], (None, x, 3))


def test_nothing_is_collected_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph in a cycle of garbage would be destroyed then, which ends the capture."""
    cuda = FakeCuda(monkeypatch)
    collecting: dict[str, bool] = {}

    def step(x: Tensor) -> Tensor:
        collecting[cuda._here] = gc.isenabled()
        return x + 1

    assert gc.isenabled()
    mf.graphed(step, warmup=1)(on_gpu(torch.ones(2)))
    assert collecting == {"side": True, "capture": False}
    assert gc.isenabled()


def anywhere(t: Tensor) -> Tensor:
    """The same at an address that is no multiple of 16 bytes."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def test_rows_that_start_anywhere() -> None:
    """A step's statistics [T, C] of 10 channels start on 40 bytes in float32."""
    images, filters = torch.rand(3, 2, 4, 4, 1), torch.rand(3, 3, 3, 1, 10)
    padded, sums = torch.zeros(3, 2, 6, 6, 1), torch.zeros(3, 9, 10)
    moments = torch.zeros(3, 11, 9, dtype=torch.float64)
    kernels.moments(images, 3, 3, 1, padded, moments)
    results = []
    for place in (torch.clone, anywhere):
        gamma, mean, rstd, ggamma, gbeta, moved = (place(torch.rand(3, 10) + 1) for _ in range(6))
        gamma.copy_(torch.arange(30.0).view(3, 10) / 30)
        y, gw = torch.zeros(3, 2, 2, 2, 10), torch.zeros_like(filters)
        index = torch.zeros(y.shape, dtype=torch.uint8)
        kernels.forward(padded, moments, filters, gamma, gamma, 1e-5, 0.01, y, index, mean, rstd)
        saved = (y, index, padded, moments, filters, gamma, rstd, 0.01)
        kernels.backward(y, *saved, gw, sums, ggamma, gbeta)
        uy = torch.zeros_like(y)
        kernels.tangent(filters, *saved, uy, moved, gamma, gamma)
        results.append([y, mean, rstd, gw, ggamma, gbeta, uy, moved])
    assert results[1][1].data_ptr() % 16
    for found, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(found, expected)


def test_a_layer_norm_of_many_tokens_has_a_grid() -> None:
    """CUDA's grids end at 65,535 in all axes but the first."""
    tokens = 70_000
    z, row = torch.empty(tokens, 1, 1, 1, 4), torch.empty(4)
    first, *others = norm_act_pool._Launch(z, torch.empty(tokens, 4), row, row, 0.0, False).grid
    assert first == tokens
    assert max(others) < 65_536
