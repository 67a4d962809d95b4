"""Learners in several Python threads at once: each ends as it would have alone."""

import queue
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import FakeCuda, on_gpu
from helpers import random_batch
from torch import Tensor, nn

import mamlpp_fast as mf
from mamlpp_fast import data
from mamlpp_fast._modes import Switch, quiet
from mamlpp_fast._seeded import seeded
from mamlpp_fast.engine.graph import capturing, graphed
from mamlpp_fast.engine.record import record
from mamlpp_fast.reference import math_attention
from mamlpp_fast.train import TrainConfig
from mamlpp_fast.train.build import build_learner

Work = Callable[[], list[Tensor]]


@pytest.fixture(autouse=True)
def _turns_are_short() -> Iterator[None]:
    """Threads take turns as often as Python lets them, so that they meet in every place."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


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
    """Each several times in a row, so that one is built while another records its model."""
    kinds = (("fused", "float32"), ("fused", "bfloat16"), ("autograd", "float32"), ("reference", "float64"))
    works = [training(engine, seed, precision) for seed, (engine, precision) in enumerate(kinds)]
    alone = [work() for work in works]
    found = together([lambda work=work: [work() for _ in range(3)] for work in works])  # type: ignore[misc]
    torch.testing.assert_close(found, [[result] * 3 for result in alone], rtol=0, atol=0)


def test_a_module_is_called_as_ever_while_another_thread_records() -> None:
    # A list would be an effect of the forward, which a recording refuses.
    other, found = nn.Linear(2, 1), queue.SimpleQueue[torch.Size]()

    def call() -> None:
        found.put(other(torch.ones(1, 2)).shape)

    class Meanwhile(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
            return super().forward(x)  # type: ignore[no-any-return]

    recording = record(Meanwhile(nn.Linear(2, 3)), torch.ones(2, 2), torch.ones(3, 2))
    assert [op.name for op in recording.operations] == ["linear"]
    assert [found.get_nowait() for _ in range(found.qsize())] == [(1, 1)] * 3


def initial(seed: int) -> list[Tensor]:
    config = TrainConfig(init_seed=seed, filters=8)
    return [p.detach() for p in build_learner(config, 1, 28, engine="reference").model.parameters()]


def test_initial_parameters_come_from_the_seed_alone() -> None:
    """Torch's generator is the process's: drawn from by turns, it would give each thread a part of each seed.

    A recording that puts its state back does the same to a thread that is drawing.
    """

    def build(seed: int) -> Work:
        return lambda: [p for _ in range(10) for p in initial(seed)]

    def recording() -> list[Tensor]:
        while not done.is_set():
            record(nn.Sequential(nn.Linear(2, 3)), torch.ones(2, 2), torch.ones(3, 2))
        return []

    def builders() -> list[Tensor]:
        try:
            return together(works)  # type: ignore[return-value]
        finally:
            done.set()

    done = threading.Event()
    works = [build(seed) for seed in range(3)]
    alone = [work() for work in works]
    torch.testing.assert_close(together([builders, recording])[0], alone, rtol=0, atol=0)


@pytest.mark.parametrize("what", ["record", "seeded", "build"])
def test_the_generator_of_the_process_is_left_to_others(what: str) -> None:
    """Whatever is drawn from it meanwhile stays drawn, and nothing else is."""
    layer, drawn = (
        nn.Linear(2, 3),
        queue.SimpleQueue[Tensor](),
    )  # a recording puts a list back that its pass fills
    torch.manual_seed(0)
    expected = [torch.rand(2) for _ in range(4)]
    torch.manual_seed(0)

    def draw() -> None:
        thread = threading.Thread(target=lambda: drawn.put(torch.rand(2)))
        thread.start()
        thread.join()

    class Meanwhile(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            draw()
            return super().forward(F.dropout(x, 0.5) * torch.rand(2))  # type: ignore[no-any-return]

    if what == "record":
        record(Meanwhile(layer), torch.ones(2, 2), torch.ones(3, 2))
    elif what == "seeded":
        with seeded(5):
            first = torch.rand(2)
            draw()
            own = [first, torch.rand(2)]
        torch.testing.assert_close(own, list(torch.rand(2, 2, generator=torch.Generator().manual_seed(5))))
    else:
        initial(3)
    found = [drawn.get() for _ in range(drawn.qsize())]
    found += [torch.rand(2) for _ in range(4 - len(found))]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


SEEDED = {
    "layers": lambda x: nn.Conv2d(2, 3, 3).weight.detach(),
    "normal": lambda x: nn.init.trunc_normal_(nn.init.xavier_normal_(x)),
    "orthogonal": lambda x: nn.init.orthogonal_(x),
    "factories": lambda x: torch.cat([torch.rand(3), torch.randn(3), torch.randperm(3)]),
    "integers": lambda x: torch.cat([torch.randint(9, (4,)), torch.randint(2, 9, (4,))]),
    "like": lambda x: torch.rand_like(x) + torch.randn_like(x) + torch.randint_like(x, 7),
    "like-between": lambda x: torch.randint_like(x, 2, 7) + torch.randint_like(x, torch.tensor(7)),
    "dropout": lambda x: F.dropout(x) + F.alpha_dropout(x) + F.feature_alpha_dropout(x),
    "by-position": lambda x: F.rrelu(-x, training=True) + torch.poisson(x, None),
    "distributions": lambda x: torch.distributions.Dirichlet(x).sample() + torch.multinomial(x, 3),
}


@pytest.mark.parametrize("draw", SEEDED.values(), ids=SEEDED)
def test_seeded_draws_as_after_manual_seed(draw: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(7)
    expected = [draw(torch.ones(3, 3)) for _ in range(2)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with seeded(7):
        found = [draw(torch.ones(3, 3)) for _ in range(2)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_generator_that_is_named_is_drawn_from() -> None:
    expected = torch.rand(4, generator=torch.Generator().manual_seed(3))
    with seeded(7):
        found = torch.rand(4, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_one_sampler_serves_several_threads() -> None:
    sampler = data.load("strokes").sampler("train", ways=5, shots=1, targets=1, seed=0)

    def draw(start: int) -> Work:
        return lambda: [sampler.batch(start + 4 * i, 4).support_x for i in range(20)]

    works = [draw(start) for start in (0, 1000)]
    alone = [work() for work in works]
    torch.testing.assert_close(together(works), alone, rtol=0, atol=0)


SETTING = {"value": 0}


@contextmanager
def _setting(value: int) -> Iterator[None]:
    before, SETTING["value"] = SETTING["value"], value
    yield
    SETTING["value"] = before


SWITCH = Switch(_setting)
SWITCHES: dict[str, tuple[Callable[[], AbstractContextManager[Any]], Callable[[], Any]]] = {
    "attention": (math_attention, torch.backends.cuda.flash_sdp_enabled),
    "warnings": (quiet, lambda: list(warnings.filters)),
    "switch": (lambda: SWITCH.at(1), lambda: SETTING["value"]),
}


@pytest.mark.parametrize(("within", "state"), SWITCHES.values(), ids=SWITCHES)
def test_a_setting_of_the_process_lasts_until_the_last_thread_leaves(
    within: Callable[[], AbstractContextManager[Any]], state: Callable[[], Any]
) -> None:
    before = state()
    entered, leave = threading.Event(), threading.Event()

    def first() -> None:
        with within():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait()
    with within():
        during = state()
        leave.set()
        thread.join()
        assert state() == during
    assert during != before
    assert state() == before


def test_threads_that_need_other_values_of_a_setting_wait() -> None:
    def at(value: int) -> Callable[[], list[int]]:
        def work() -> list[int]:
            found = []
            for _ in range(200):
                with SWITCH.at(value):
                    found += [SETTING["value"] for _ in range(5)]
            return found

        return work

    assert together([at(1), at(2), at(2)]) == [[1] * 1000, [2] * 1000, [2] * 1000]  # type: ignore[list-item]
    assert SETTING["value"] == 0


def test_a_capture_is_one_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's step meanwhile is captured by itself, and may wait for the device."""
    FakeCuda(monkeypatch)
    fast, asked = graphed(lambda x: x * 2), []

    def step(x: Tensor) -> Tensor:
        def other() -> None:
            fast(on_gpu(torch.ones(2)))
            asked.append((capturing(), fast.graphs))

        if capturing():
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            asked.append((capturing(), fast.graphs))
        return x + 1

    graphed(step)(on_gpu(torch.ones(2)))
    assert asked == [(False, 1), (True, 1)]
