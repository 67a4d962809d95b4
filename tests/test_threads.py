"""Learners in several Python threads at once: each ends as it would have alone."""

import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from helpers import random_batch
from torch import Tensor, nn

import mamlpp_fast as mf
from mamlpp_fast import data
from mamlpp_fast.engine.record import record
from mamlpp_fast.train import TrainConfig
from mamlpp_fast.train.build import build_learner

Work = Callable[[], list[Tensor]]


def together(works: Sequence[Work]) -> list[list[Tensor]]:
    """Runs all at once, a thread each, and returns what each returned."""
    results: dict[int, list[Tensor]] = {}
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(works))

    def run(index: int) -> None:
        try:
            barrier.wait()
            results[index] = works[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[i] for i in range(len(works))]


def training(engine: str, seed: int, precision: str = "float32") -> Work:
    """Three updates, an evaluation and an adaptation of a learner of its own, every second one of another form."""
    config = mf.MAMLConfig(
        steps=2, second_order=seed % 2 == 0, msl=seed % 3 != 0, eval_stats="running" if seed % 2 else "batch"
    )

    def work() -> list[Tensor]:
        learner = build_learner(
            TrainConfig(**config.to_dict(), ways=3, filters=8 + 4 * seed, stages=2, init_seed=seed),
            1,
            12,
            engine=engine,  # type: ignore[arg-type]
            precision=precision,  # type: ignore[arg-type]
        )
        found: list[Tensor] = []
        for step in range(3):
            batch = random_batch(tasks=2 + seed % 2, seed=10 * seed + step, dtype=torch.float32)
            found += [learner.meta_step(batch).task_losses, learner.evaluate(batch).logits]
            found.append(learner.adapt(batch.support_x[0], batch.support_y[0])(batch.target_x[0]))
        return found + [p.detach() for m in (learner.model, learner.rates) for p in m.parameters()]

    return work


@pytest.mark.parametrize("engine", ["fused", "autograd", "reference"])
def test_two_learners_of_one_engine(engine: str) -> None:
    works = [training(engine, seed) for seed in range(2)]
    alone = [work() for work in works]
    for _ in range(3):
        torch.testing.assert_close(together(works), alone, rtol=0, atol=0)


def test_learners_of_every_engine_at_once() -> None:
    kinds = (("fused", "float32"), ("fused", "bfloat16"), ("autograd", "float32"), ("reference", "float64"))
    works = [training(engine, seed, precision) for seed, (engine, precision) in enumerate(kinds)]
    alone = [work() for work in works]
    torch.testing.assert_close(together(works), alone, rtol=0, atol=0)


def test_a_module_is_called_as_ever_while_another_thread_records() -> None:
    other, found = nn.Linear(2, 1), []

    def call() -> None:
        found.append(other(torch.ones(1, 2)))

    class Meanwhile(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
            return super().forward(x)  # type: ignore[no-any-return]

    recording = record(Meanwhile(nn.Linear(2, 3)), torch.ones(2, 2), torch.ones(3, 2))
    assert [op.name for op in recording.operations] == ["linear"]
    assert [y.shape for y in found] == [(1, 1), (1, 1)]


def test_initial_parameters_come_from_the_seed_alone() -> None:
    """Torch's generator is the process's: drawn from by turns, it would give each thread a part of each seed."""

    def build(seed: int) -> Work:
        config = TrainConfig(init_seed=seed, filters=8)
        return lambda: [
            p.detach()
            for _ in range(10)
            for p in build_learner(config, 1, 28, engine="reference").model.parameters()
        ]

    works = [build(seed) for seed in range(3)]
    alone = [work() for work in works]
    torch.testing.assert_close(together(works), alone, rtol=0, atol=0)


def test_one_sampler_serves_several_threads() -> None:
    sampler = data.load("strokes").sampler("train", ways=5, shots=1, targets=1, seed=0)

    def draw(start: int) -> Work:
        return lambda: [sampler.batch(start + 4 * i, 4).support_x for i in range(20)]

    works = [draw(start) for start in (0, 1000)]
    alone = [work() for work in works]
    torch.testing.assert_close(together(works), alone, rtol=0, atol=0)
