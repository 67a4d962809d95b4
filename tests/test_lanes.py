"""Lanes: tasks on threads of their own give the reference's results, and the same bits on any number of threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import gradients, random_batch, small_conv4
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mamlpp_fast as mf
from mamlpp_fast.engine import lanes
from mamlpp_fast.engine.fused import FusedEngine, engine, program
from mamlpp_fast.engine.fused.prepared import Prepared

pytestmark = pytest.mark.usefixtures("own_threads")


def learner(kind: str = "fused", precision: str = "float64", **settings: Any) -> mf.MAMLPlusPlus:
    loss = settings.pop("loss_fn", None)
    config = mf.MAMLConfig(**{"steps": 2} | settings)
    rows = {"per_step_affine": config.bnwb, "per_step_stats": config.bnrs}
    model = small_conv4(2, filters=16, **rows)
    return mf.MAMLPlusPlus(model, config, engine=kind, precision=precision, loss_fn=loss, verify=False)  # type: ignore[arg-type]


def results(own: mf.MAMLPlusPlus, batch: mf.EpisodeBatch) -> dict[str, Tensor]:
    """Losses, meta-gradients, running statistics and, after every step of an evaluation, predictions."""
    metrics = own.meta_gradient(batch)
    found = {
        "loss": metrics.loss,
        "losses": metrics.task_losses,
        "logits": own.evaluate(batch, steps=3).logits,
    }
    found |= gradients(own.model, own.rates)
    return found | {name: b.clone() for name, b in own.model.named_buffers()}


@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 8])
def test_the_reference_for_any_tasks_and_threads(tasks: int) -> None:
    batches = [random_batch(tasks=tasks, seed=seed) for seed in range(2)]
    reference = learner("reference")
    expected = [results(reference, batch) for batch in batches]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        own = learner()
        for batch, found in zip(batches, expected, strict=True):
            torch.testing.assert_close(results(own, batch), found, rtol=1e-9, atol=1e-9)


SETTINGS: dict[str, dict[str, Any]] = {
    "maml++": {},
    "final-loss": {"msl": False},
    "first-order": {"second_order": False},
    "shared-rows": {"bnwb": False, "bnrs": False},
    "adapting-norms": {"bnwb": False, "adapt_norm": True},
    "element-rates": {"rates": "element"},
    "running": {"eval_stats": "running"},
    "smoothed": {"loss_fn": torch.nn.CrossEntropyLoss(label_smoothing=0.1)},
    "squared": {"loss": "mse"},
    "bfloat16": {"precision": "bfloat16"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_bits_on_any_number_of_threads(name: str) -> None:
    batch = random_batch(tasks=5, dtype=torch.float32)
    if name == "squared":
        values = [torch.randn(*y.shape, 3) for y in (batch.support_y, batch.target_y)]
        batch = mf.EpisodeBatch(batch.support_x, values[0], batch.target_x, values[1], by_class=False)
    found = []
    for threads in (1, 2, 3, 12):
        torch.set_num_threads(threads)
        found.append(results(learner(**{"precision": "float32"} | SETTINGS[name]), batch))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


def test_the_order_in_which_tasks_end_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(3)
    batch = random_batch(tasks=6, dtype=torch.float32)
    expected = results(learner(precision="float32"), batch)
    group, ended = Prepared._group, []

    def late(prepared: Prepared, batch: mf.EpisodeBatch, number: int, *rest: Any) -> None:
        group(prepared, batch, number, *rest)
        if number == 0:
            time.sleep(0.5)
        ended.append(number)

    monkeypatch.setattr(Prepared, "_group", late)
    torch.testing.assert_close(results(learner(precision="float32"), batch), expected, rtol=0, atol=0)
    assert sorted(ended) == sorted(2 * list(range(6))) and ended[:6] != list(range(6))


def test_threads_may_change_between_calls() -> None:
    batch, own = random_batch(tasks=4, dtype=torch.float32), learner(precision="float32")
    alone = gradients_of(own, batch)
    for threads in (3, 2, 1, 4):
        torch.set_num_threads(threads)
        torch.testing.assert_close(gradients_of(own, batch), alone, rtol=0, atol=0)
        assert torch.get_num_threads() == threads


def gradients_of(own: mf.MAMLPlusPlus, batch: mf.EpisodeBatch) -> dict[str, Tensor]:
    own.meta_gradient(batch)
    return gradients(own.model, own.rates)


def test_later_threads_begin_with_the_number_they_would_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "_pool", lanes._Pool())
    seen: list[int] = []

    def look(*_: Any) -> None:
        seen.append(torch.get_num_threads())

    for threads in (2, 3):
        torch.set_num_threads(threads)
        lanes.run(look, threads)
        for thread in [threading.Thread(target=look) for _ in range(2)]:
            thread.start()
            thread.join()
    assert seen == [1, 1, 2, 2, 1, 1, 1, 3, 3]
    assert torch.get_num_threads() == 3


def test_torch_computes_on_one_thread_and_a_single_lane_is_the_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(2)
    monkeypatch.setattr(lanes, "_pool", lanes._Pool())
    group, seen = Prepared._group, []

    def looking(prepared: Prepared, batch: mf.EpisodeBatch, number: int, *rest: Any) -> None:
        group(prepared, batch, number, *rest)
        seen.append((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))

    monkeypatch.setattr(Prepared, "_group", looking)
    learner(precision="float32").meta_gradient(random_batch(tasks=5, dtype=torch.float32))
    # The last task, which leaves one thread over, is computed by the caller's own threads: no lane has a second team.
    assert seen == [*4 * [(False, 1)], (True, 1)]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("groups", "most", "threads", "expected"),
    [
        (8, 2, 2, [(range(8), 2, 1)]),
        (5, 2, 2, [(range(4), 2, 1), (range(4, 5), 1, 2)]),
        (1, 1, 2, [(range(1), 1, 2)]),
        (5, 3, 3, [(range(5), 3, 1)]),
        (4, 4, 16, [(range(4), 4, 4)]),
        (20, 16, 16, [(range(16), 16, 1), (range(16, 20), 4, 4)]),
        (5, 1, 4, [(range(5), 1, 4)]),
    ],
)
def test_groups_are_shared_so_that_no_thread_idles(
    groups: int, most: int, threads: int, expected: list[lanes.Share]
) -> None:
    assert lanes.shares(groups, most, threads) == expected


def test_little_memory_makes_lanes_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(4)
    batch, own = random_batch(tasks=4), learner()
    model, rates = own.model, own.rates
    whole = FusedEngine(model, rates, verify=False).prepare(batch, True, True)
    two = 2 * whole.program.workspace_bytes + whole.program.owned_bytes(2) + whole.finish.owned_bytes()
    monkeypatch.setattr(engine, "free_bytes", lambda device: two)
    fewer = FusedEngine(model, rates, memory="keep", verify=False)
    assert (whole.lanes, fewer.prepare(batch, True, True).lanes) == (4, 2)
    fewer.meta_gradient(batch, None, True)
    prepared = fewer.prepare(batch, False, True)
    assert fewer.workspace.memory.numel() >= prepared.workspace_bytes == 2 * prepared.program.workspace_bytes
    assert "4 tasks in groups of 1, 2 at once on lanes" in fewer.explain()


def test_an_error_of_a_lane_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    batch, own = random_batch(tasks=6, dtype=torch.float32), learner(precision="float32")
    expected, group = gradients_of(own, batch), Prepared._group
    begun: list[int] = []

    def failing(prepared: Prepared, batch: mf.EpisodeBatch, number: int, *rest: Any) -> None:
        begun.append(number)
        if number == 1:
            raise ArithmeticError("of task 1")
        group(prepared, batch, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Prepared, "_group", failing)
        with pytest.raises(ArithmeticError, match="of task 1"):
            own.meta_gradient(batch)
    assert len(begun) < 6
    torch.testing.assert_close(gradients_of(own, batch), expected, rtol=0, atol=0)


def test_an_interrupt_stops_every_lane_first() -> None:
    torch.set_num_threads(2)
    both, stopped = threading.Barrier(2), list[int]()

    def work(lane: int, halt: lanes.Halt) -> None:
        both.wait(60)
        if lane == 0:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        while not halt.wanted:
            time.sleep(0.01)
        time.sleep(0.2)
        stopped.append(lane)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            lanes.run(work, 2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(stopped) == [0, 1]


def test_an_interrupt_while_lanes_are_handed_out_stops_them_first(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    begun, stopped = threading.Event(), list[int]()
    submit = ThreadPoolExecutor.submit

    def work(lane: int, halt: lanes.Halt) -> None:
        begun.set()
        while not halt.wanted:
            time.sleep(0.01)
        time.sleep(0.2)
        stopped.append(lane)

    def interrupted(self: ThreadPoolExecutor, *args: Any) -> None:
        submit(self, *args)
        assert begun.wait(60)
        raise KeyboardInterrupt

    lanes.run(lambda lane, halt: None, 2)  # the threads are there
    with monkeypatch.context() as patch:
        patch.setattr(ThreadPoolExecutor, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lanes.run(work, 2)
    assert stopped == [0]


def test_two_learners_in_two_threads() -> None:
    torch.set_num_threads(2)
    batches = [random_batch(tasks=3, seed=seed, dtype=torch.float32) for seed in range(2)]
    alone = [gradients_of(learner(precision="float32"), batch) for batch in batches]
    found: dict[int, dict[str, Tensor]] = {}

    def train(number: int) -> Callable[[], None]:
        own = learner(precision="float32")

        def work() -> None:
            torch.set_num_threads(2 + number)
            for _ in range(4):
                found[number] = gradients_of(own, batches[number])

        return work

    threads = [threading.Thread(target=train(number)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    torch.testing.assert_close([found[0], found[1]], alone, rtol=0, atol=0)


def test_a_dispatch_mode_sees_every_call() -> None:
    class Counting(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            return func(*args, **(kwargs or {}))

    torch.set_num_threads(2)
    batch, own = random_batch(tasks=2, dtype=torch.float32), learner(precision="float32")
    expected = gradients_of(own, batch)
    prepared = own.engine.prepare(batch, True, True)  # type: ignore[attr-defined]
    with Counting() as mode:
        found = gradients_of(own, batch)
    assert mode.calls > 2 * len(prepared.program.instructions)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.get_num_threads() == 2


def test_lanes_treat_subnormal_numbers_as_the_caller_does() -> None:
    torch.set_num_threads(2)
    found: list[float] = []

    def work(*_: Any) -> None:
        found.append(float(torch.tensor(1e-310, dtype=torch.float64) * 0.5))

    try:
        for flush in (False, True, False):
            if torch.set_flush_denormal(flush):
                work()
                lanes.run(work, 1)
    finally:
        torch.set_flush_denormal(False)
    assert found[::2] == found[1::2]


_FORKING = """
import os, sys, torch
from helpers import gradients, random_batch, small_conv4
import mamlpp_fast as mf

torch.set_num_threads(2)
learner = mf.MAMLPlusPlus(small_conv4(2, filters=16), mf.MAMLConfig(steps=2), engine="fused")
batch = random_batch(tasks=3, dtype=torch.float32)

def trained():
    learner.meta_gradient(batch)
    return gradients(learner.model, learner.rates)

before = trained()
child = os.fork()
after = trained()
same = all(torch.equal(before[name], after[name]) for name in before)
if child == 0:
    os._exit(0 if same else 3)
sys.exit(1 if not same else os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_has_lanes_of_its_own() -> None:
    """The interpreter's end, with lanes that wait for work, is part of it."""
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent)])
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _FORKING]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, timeout=300, check=False)
    assert done.returncode == 0


def test_calls_outside_python_are_those_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native library's list of a program, argument for argument with its defaults."""
    batch = random_batch(tasks=3, dtype=torch.float32)
    results = []
    for natively in (True, False):
        if not natively:
            monkeypatch.setattr(program, "_without_python", lambda *_: False)
        own = learner(precision="float32")
        results.append(gradients_of(own, batch))
        prepared = next(iter(own.training_engine._prepared.values()))  # type: ignore[attr-defined]
        assert bool(prepared.program._lists) == natively
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_list_of_calls_stops_where_it_is_halted_and_refuses_a_call_of_the_wrong_size() -> None:
    calls, total, halt = torch.classes.mamlpp_fast.Calls(), torch.zeros(2), torch.zeros(1, dtype=torch.uint8)
    calls.add("aten::add_", "Scalar", [total, 1.0, 2], [])
    calls.add("aten::copy_", "", [halt, torch.ones(1, dtype=torch.uint8), False], [])
    calls.add("aten::add_", "Scalar", [total, 100.0, 1], [])
    calls.run(halt)
    assert total.tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match="expected 3 of aten::copy_, got 1"):
        calls.add("aten::copy_", "", [total], [])
    calls.run(halt)
    assert total.tolist() == [2.0, 2.0]
    calls.run(halt.zero_())
    assert total.tolist() == [4.0, 4.0]


def test_a_list_copies_what_an_operator_without_outputs_makes() -> None:
    x = torch.tensor([3.0, 1.0, 2.0])
    values, places, none = (
        torch.zeros(3),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(1, dtype=torch.uint8),
    )
    calls = torch.classes.mamlpp_fast.Calls()
    calls.add("aten::sort", "", [x, 0, False], [values, places])
    calls.add("aten::index_put", "", [x, [places[:1]], torch.tensor([9.0]), False], [x])
    calls.add("aten::sum", "dim_IntList", [x, None, False, None], [None])  # None for an empty list
    calls.run(none)
    assert (values.tolist(), places.tolist(), x.tolist()) == ([1.0, 2.0, 3.0], [1, 2, 0], [3.0, 9.0, 2.0])
