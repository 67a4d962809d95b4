"""Deterministic mode: the same bits on one, two and three threads."""

from pathlib import Path

import pytest
import torch
from helpers import random_batch
from torch import Tensor
from train_helpers import draw_folder, metrics_of, tiny_arguments

import mamlpp_fast as mf
from mamlpp_fast import _native
from mamlpp_fast.cli import main
from mamlpp_fast.engine.deterministic import one_thread

pytestmark = pytest.mark.usefixtures("own_threads")


def steps(engine: str, precision: str, threads: int, *, deterministic: bool | None = True) -> list[Tensor]:
    """Meta-gradients, losses and predictions of three training steps, and the parameters after them.

    Tensors of more than 32768 elements, from which torch divides its work; six tasks, which two and three threads
    would group differently.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = mf.Conv4(1, 3, image_size=12, filters=64, stages=2, num_steps=2)
    learner = mf.MAMLPlusPlus(
        model,
        mf.MAMLConfig(steps=2),
        engine=engine,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        deterministic=deterministic,
    )
    results = []
    for seed in range(3):
        batch = random_batch(tasks=6, seed=seed, dtype=torch.float32)
        metrics = learner.meta_step(batch)
        results += [metrics.task_losses, metrics.loss, learner.evaluate(batch).logits]
        for module in (learner.model, learner.rates):
            results += [p.grad.clone() for p in module.parameters() if p.grad is not None]
    results += [p.detach() for module in (learner.model, learner.rates) for p in module.parameters()]
    results.append(learner.adapt(batch.support_x[0], batch.support_y[0])(batch.target_x[0]))
    assert torch.get_num_threads() == threads
    return results


@pytest.mark.parametrize(
    ("engine", "precision"),
    [("fused", "float32"), ("fused", "bfloat16"), ("autograd", "float32"), ("reference", "float32")],
)
def test_any_number_of_threads_gives_the_same_bits(engine: str, precision: str) -> None:
    first = steps(engine, precision, 1)
    for threads in (2, 3):
        torch.testing.assert_close(steps(engine, precision, threads), first, rtol=0, atol=0)


def test_the_test_would_see_a_difference() -> None:
    """Without the option the bits of PyTorch's operations follow the number of threads."""
    one, two = (steps("reference", "float32", n, deterministic=False) for n in (1, 2))
    assert any(not torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_torchs_own_switch_is_followed() -> None:
    model = mf.Conv4(1, 3, image_size=12, filters=4, stages=2, num_steps=2)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        followed = mf.MAMLPlusPlus(model, mf.MAMLConfig(steps=2), engine="fused")
        overruled = mf.MAMLPlusPlus(model, mf.MAMLConfig(steps=2), engine="fused", deterministic=False)
    finally:
        torch.use_deterministic_algorithms(before)
    assert (followed.deterministic, overruled.deterministic) == (True, False)


def test_a_training_run(tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = ["--out", str(tmp_path / str(threads))]
        command = ["train", "--data", str(data), "--device", "cpu", "--deterministic", *out]
        assert main([*command, *tiny_arguments(filters=64)]) == 0
        assert not torch.are_deterministic_algorithms_enabled()
    assert metrics_of(tmp_path / "1") == metrics_of(tmp_path / "2")


def test_threads_come_back_after_an_error() -> None:
    torch.set_num_threads(2)

    def failing() -> None:
        with one_thread():
            raise ValueError(f"on {torch.get_num_threads()}")

    with pytest.raises(ValueError, match="on 1"):
        failing()
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(not _native.load(), reason="no native library")
def test_small_updates_take_no_second_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    learner = mf.MAMLPlusPlus(
        mf.Conv4(1, 3, image_size=12, filters=4, stages=2, num_steps=2), mf.MAMLConfig(steps=2)
    )
    seen: list[int] = []
    learner.meta_gradient(random_batch(tasks=2, dtype=torch.float32))
    learner.optimizer.register_step_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    learner.apply_gradient()
    monkeypatch.setattr(_native, "_FEW", 0)
    learner.apply_gradient()
    assert seen == [1, 2] and torch.get_num_threads() == 2
