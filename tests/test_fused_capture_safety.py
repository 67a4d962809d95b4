"""What a CUDA graph asks of an iteration, checked without a GPU: nothing waits, nothing is allocated, nothing moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import kept_threads, random_batch, small_conv4, small_learner
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mamlpp_fast as mf
from mamlpp_fast.engine.fused.engine import FusedEngine

SYNCHRONISES = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "_to_copy",
    "nonzero",
    "equal",
    "unique",
    "masked_select",
)


class CaptureSafe(TorchDispatchMode):
    """Fails on an operation that waits for the device, has a shape that depends on data, or returns fresh memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        name = func.overloadpacket.__name__
        assert name not in SYNCHRONISES, f"{name} waits for the device or has a shape that depends on data"
        leaves = tree_leaves((args, kwargs or {}))
        before = {t.untyped_storage().data_ptr() for t in leaves if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                known = t.untyped_storage().data_ptr() in before
                assert known, f"{name} allocates"
        return result


def engine_of(learner: mf.MAMLPlusPlus) -> FusedEngine:
    assert isinstance(learner.engine, FusedEngine)
    return learner.engine


CONFIGS = {
    "maml++": mf.MAMLConfig(steps=3),
    "maml": mf.MAMLConfig.maml(steps=3),
    "meta-sgd": mf.MAMLConfig(steps=3, rates="element"),
    "anil": mf.MAMLConfig(steps=3, adapt="head"),
    "adapting-norms": mf.MAMLConfig(steps=3, bnwb=False, adapt_norm=True),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("second_order", [True, False], ids=["second-order", "first-order"])
def test_an_iteration_neither_waits_nor_allocates(config: mf.MAMLConfig, second_order: bool) -> None:
    learner = small_learner(config, engine="fused")
    engine, weights = engine_of(learner), learner.step_weights()
    engine.meta_gradient(random_batch(), weights, second_order)
    following = random_batch(seed=1)
    with CaptureSafe() as mode:
        engine._iterate(following, weights, second_order)
    assert mode.calls > 50


@pytest.mark.parametrize("network", [{"max_pool": False}, {"norm": "layer"}], ids=["strided", "layer-norm"])
def test_other_networks_neither_wait_nor_allocate(network: dict[str, Any]) -> None:
    learner = mf.MAMLPlusPlus(
        small_conv4(**network), mf.MAMLConfig(steps=3), engine="fused", precision="float64"
    )
    engine = engine_of(learner)
    engine.meta_gradient(random_batch(), None, True)
    following = random_batch(seed=1)
    with CaptureSafe():
        engine._iterate(following, None, True)


def test_buffers_keep_their_addresses() -> None:
    learner = small_learner(engine="fused")
    engine = engine_of(learner)

    def addresses() -> list[int]:
        programs = [q for p in engine._prepared.values() for q in (p.program, p.finish)]
        tensors = [t for program in programs for b in program.buffers for t in b.tensors]
        tensors += [p.grad for m in (learner.model, learner.rates) for p in m.parameters()]
        return [t.data_ptr() for t in tensors if t is not None]

    learner.meta_step(random_batch())
    before = addresses()
    for seed in (1, 2):
        learner.optimizer.zero_grad(set_to_none=True)
        learner.meta_step(random_batch(seed=seed))
    assert addresses() == before


def test_results_survive_the_next_iteration() -> None:
    learner = small_learner(engine="fused")
    batch = random_batch()
    first = learner.engine.meta_gradient(batch, None, True)
    kept = [t.clone() for t in first]
    learner.engine.meta_gradient(random_batch(seed=1), None, True)
    for t, value in zip(first, kept, strict=True):
        torch.testing.assert_close(t, value, rtol=0, atol=0)


def test_memory_used_is_the_memory_predicted() -> None:
    learner = small_learner(engine="fused")
    engine = engine_of(learner)
    with kept_threads():
        torch.set_num_threads(2)
        prepared = engine.prepare(random_batch(), True, True)
    workspace = engine.workspace.memory
    own = prepared.program.workspace_bytes
    assert workspace.numel() == prepared.workspace_bytes == 2 * own
    for lane, start in enumerate((workspace.data_ptr(), workspace.data_ptr() + own)):
        placed = [b for b in prepared.program.buffers if not b.owned]
        spans = [(b.tensor(lane).data_ptr(), b.nbytes) for b in placed]
        assert min(begin for begin, _ in spans) == start
        assert max(begin + size for begin, size in spans) <= start + own
    learner.meta_gradient(random_batch())
    assert engine.workspace.memory.data_ptr() == workspace.data_ptr()
