"""What is captured, when anew, and what a replay computes, on a stand-in for CUDA's graphs (no GPU)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda, batch_on_gpu, on_gpu
from helpers import gradients, random_batch, small_learner
from torch import Tensor
from torch.testing import assert_close

import mamlpp_fast as mf


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_a_replay_computes_from_the_new_arguments_and_the_current_state(cuda: FakeCuda) -> None:
    state = torch.ones(3)
    calls = []

    def step(x: Tensor, scale: float) -> dict[str, Tensor]:
        calls.append(scale)
        state.add_(x * scale)
        return {"sum": state.sum()}

    fast = mf.graphed(step, preserve=lambda: [state])
    expected = torch.ones(3)
    for i in range(4):
        expected = expected + 2.0 * i
        assert_close(fast(on_gpu(torch.full((3,), float(i))), 2.0)["sum"], expected.sum())
        assert_close(state, expected)
    assert len(calls) == 3 + 1
    assert (fast.graphs, cuda.captured[0].replays) == (1, 4)
    state.zero_()
    assert_close(fast(on_gpu(torch.ones(3)), 2.0)["sum"], torch.tensor(6.0))


def test_warm_up_runs_beside_the_main_stream_and_both_wait(cuda: FakeCuda) -> None:
    def step(x: Tensor) -> Tensor:
        cuda.ran()
        return x + 1

    mf.graphed(step, warmup=2)(on_gpu(torch.ones(2)))
    assert cuda.events == [
        "side waits for main",
        "step on side",
        "step on side",
        "main waits for side",
        "capture",
        "step on capture",
    ]


def test_one_graph_for_every_form_of_the_arguments(cuda: FakeCuda) -> None:
    fast = mf.graphed(lambda pair, scale, *, more=None: pair[0] * scale if more is None else pair[0] + more)

    def count(*arguments: Any, **keywords: Any) -> int:
        fast(*arguments, **keywords)
        return fast.graphs

    x = on_gpu(torch.ones(2))
    assert count((x,), 2) == 1
    assert count((x + 1,), 2) == 1
    assert count((on_gpu(torch.ones(3)),), 2) == 2, "another shape"
    assert count((x.double(),), 2) == 3, "another dtype"
    assert count((x,), 3) == 4, "another plain value"
    assert count(([x],), 2) == 4 + 1, "another structure"
    assert count((x,), 2, more=x) == 6, "an argument more"
    assert count((x.clone().requires_grad_(),), 2) == 7, "one that needs gradients"
    assert count((x,), 2) == 7, "the first again"


def test_plain_values_of_other_types_are_other_forms(cuda: FakeCuda) -> None:
    """1, 1.0 and True are equal, their products are not."""
    fast = mf.graphed(lambda x, scale: x * scale)
    x = on_gpu(torch.ones(2, dtype=torch.bool))
    assert [fast(x, scale).dtype for scale in (1, 1.0, True)] == [torch.int64, torch.float32, torch.bool]
    assert fast.graphs == 3


def test_calls_with_arguments_that_need_gradients_keep_no_history(cuda: FakeCuda) -> None:
    fast = mf.graphed(lambda x: (x * 2).sum())
    x = on_gpu(torch.ones(2)).requires_grad_()
    fast(x)
    ((_, (static,), _),) = fast._captured.values()

    def history(node: Any) -> int:
        return 0 if node is None else 1 + max((history(n) for n, _ in node.next_functions), default=0)

    before = history(static.grad_fn)
    with torch.no_grad():
        x.fill_(3.0)
    assert_close(fast(x).item(), 12.0)
    assert history(static.grad_fn) == before


def test_a_step_that_fails_leaves_nothing_behind(cuda: FakeCuda) -> None:
    state = torch.zeros(2)
    wrong = {"after": 1}

    def step(x: Tensor) -> Tensor:
        state.add_(x)
        wrong["after"] -= 1
        if wrong["after"] < 0:
            raise RuntimeError("out of memory")
        return state * 2

    fast = mf.graphed(step, preserve=lambda: [state])
    for after in (1, 3):  # in the second warm-up run, in the capture
        wrong["after"] = after
        with pytest.raises(RuntimeError, match="out of memory"):
            fast(on_gpu(torch.ones(2)))
        assert fast.graphs == 0
        assert_close(state, torch.zeros(2))
    wrong["after"] = 100
    assert_close(fast(on_gpu(torch.ones(2))), on_gpu(torch.full((2,), 2.0)))


def test_waiting_for_the_device_inside_a_capture_is_an_error(cuda: FakeCuda) -> None:
    """That the stand-in is as strict as CUDA, or the tests of engines below would show less."""
    fast = mf.graphed(lambda x: x * x.sum().item())
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        fast(on_gpu(torch.ones(2)))


def test_a_captured_step_inside_another_becomes_part_of_it(cuda: FakeCuda) -> None:
    inner = mf.graphed(lambda x: x + 1)
    outer = mf.graphed(lambda x: inner(x) * 2)
    assert_close(outer(on_gpu(torch.ones(2))), on_gpu(torch.full((2,), 4.0)))
    assert (outer.graphs, inner.graphs, len(cuda.captured)) == (1, 0, 1)


def with_tensor_rate(learner: mf.MAMLPlusPlus) -> mf.MAMLPlusPlus:
    """Adam's learning rate in a tensor (of float32), as on a GPU."""
    for group in learner.optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    return learner


def captured_learner(config: mf.MAMLConfig, engine: str, monkeypatch: pytest.MonkeyPatch) -> mf.MAMLPlusPlus:
    """A learner that believes it is on a GPU: its whole step is captured, its batches say they are CUDA's."""
    learner = with_tensor_rate(small_learner(config, engine=engine))
    monkeypatch.setattr(learner, "device", torch.device("cuda"))
    monkeypatch.setattr(mf.EpisodeBatch, "to", lambda self, *_, **__: batch_on_gpu(self))
    return learner


@pytest.mark.parametrize("engine", ["autograd", "fused"])
def test_captured_meta_steps_are_the_plain_ones(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """Through changes of order, of the learning rate and of the number of tasks."""
    config = mf.MAMLConfig(steps=3, msl=False, da_epoch=1, iterations_per_epoch=2, epochs=3)
    plain = with_tensor_rate(small_learner(config, engine=engine))
    batches = [random_batch(seed=i, tasks=3 if i == 4 else 2) for i in range(6)]
    expected = [plain.meta_step(batch) for batch in batches]
    learner = captured_learner(config, engine, monkeypatch)
    for i, (batch, metrics) in enumerate(zip(batches, expected, strict=True)):
        for found, value in zip(learner.meta_step(batch), metrics, strict=True):
            assert_close(found, value, rtol=1e-9, atol=1e-12, msg=lambda text, i=i: f"step {i}: {text}")
    assert_close(gradients(learner.model, learner.rates), gradients(plain.model, plain.rates))
    for ours, theirs in ((learner.model, plain.model), (learner.rates, plain.rates)):
        assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-9, atol=1e-12)
    assert learner.iteration == 6
    # First order, second order, three tasks.
    assert len(cuda.captured) == 3
    assert sum(graph.replays for graph in cuda.captured) == 6


def test_engines_that_serve_by_turns_are_captured_each_for_itself(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ``auto`` ignored labels take another engine for their batch; each has ``.grad`` tensors of its own."""
    config = mf.MAMLConfig(steps=3, msl=False)
    plain = with_tensor_rate(small_learner(config, engine="reference"))
    learner = captured_learner(config, "auto", monkeypatch)
    served = []
    for i in range(6):
        batch = random_batch(seed=i)
        if i in (1, 2, 4):
            batch.support_y[0, 1] = batch.target_y[1, 0] = -100
        expected = plain.meta_step(batch)
        for found, value in zip(learner.meta_step(batch), expected, strict=True):
            assert_close(found, value, rtol=1e-8, atol=1e-10, msg=lambda text, i=i: f"step {i}: {text}")
        assert_close(
            gradients(learner.model, learner.rates), gradients(plain.model, plain.rates), rtol=1e-7, atol=1e-9
        )
        served.append(learner.engine.name)
    assert served == ["fused", "autograd", "autograd", "fused", "autograd", "fused"]
    assert sorted(graph.replays for graph in cuda.captured) == [3, 3]


@pytest.mark.parametrize("engine", ["autograd", "fused"])
def test_captured_gradients_are_the_plain_ones(cuda: FakeCuda, engine: str) -> None:
    """As every rank computes them, with the multi-step loss: its weights are data, not form."""
    learner, plain = (small_learner(engine=engine) for _ in range(2))
    for i, weights in enumerate(([0.2, 0.3, 0.5], [0.1, 0.1, 0.8])):
        w = torch.tensor(weights, dtype=torch.float64)
        batch = random_batch(seed=i)
        expected = plain.engine.meta_gradient(batch, w, True)
        found = learner.engine.meta_gradient(batch_on_gpu(batch), on_gpu(w), True)
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(torch.Tensor(ours), theirs, rtol=1e-9, atol=1e-12)
        assert_close(gradients(learner.model, learner.rates), gradients(plain.model, plain.rates))
    assert [graph.replays for graph in cuda.captured] == [2]
