"""The `autograd` engine's tasks side by side, and what is taken one after the other, against `reference` in float64."""

from __future__ import annotations

import contextvars
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from front_end_helpers import Calls
from test_accelerate import CLOSE, Scaled, conv_net, data, mlp
from test_accelerate_underneath import NETS, STEPS, Tied, own_loss
from torch import Tensor, nn

import mamlpp_fast as mf
from mamlpp_fast import routes
from mamlpp_fast.engine import together
from mamlpp_fast.engine.fused.differentiable import DifferentiableNetwork

BESIDE = "tasks side by side"
AFTER = "one task after the other"


def weighted() -> Callable[[Tensor, Tensor], Tensor]:
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    return lambda prediction, y: F.cross_entropy(prediction, y, weights)


@pytest.fixture(autouse=True)
def threads(own_threads: None, nothing_accelerated: None) -> None:
    torch.set_num_threads(2)


def batch(tasks: int = 3) -> mf.EpisodeBatch:
    return mf.EpisodeBatch(*(torch.stack(parts) for parts in zip(*data(tasks), strict=True)))


def learner(make: Callable[[], nn.Module], engine: str = "autograd", **settings: Any) -> mf.MAMLPlusPlus:
    torch.manual_seed(0)
    model, loss_fn = make(), settings.pop("loss_fn", F.cross_entropy)
    config = mf.MAMLConfig(**({"steps": STEPS, "da_epoch": -1} | settings))
    return mf.MAMLPlusPlus(model, config, engine=engine, precision="float64", loss_fn=loss_fn)  # type: ignore[arg-type]


def quickly(ours: mf.MAMLPlusPlus) -> Any:
    """A meta-gradient; the reference's on one thread, which does not wait for another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if ours.engine.name == "reference" else threads)
    metrics = ours.meta_gradient(batch())
    torch.set_num_threads(threads)
    return metrics


def left(ours: mf.MAMLPlusPlus, tasks: int = 3) -> dict[str, Any]:
    """What two meta-gradients and an evaluation leave."""
    ours.meta_gradient(batch(tasks))
    metrics = ours.meta_gradient(batch(tasks))
    ours_rates = ours.rates.rates.grad
    grads = {n: p.grad for n, p in ours.model.named_parameters()} | {"rates": ours_rates}
    steps = {n: m.step for n, m in ours.model.named_modules() if hasattr(m, "per_step_stats")}
    logits = ours.evaluate(batch(tasks), steps=STEPS + 1).logits
    return (
        grads | dict(ours.model.named_buffers()) | steps | {"losses": metrics.task_losses, "logits": logits}
    )


def same(make: Callable[[], nn.Module], why: str, evaluated: str | None = None, **settings: Any) -> None:
    """Asserts what the reference leaves, and how the training's and the evaluation's tasks were taken."""
    torch.set_num_threads(1)
    expected = left(learner(make, "reference", **settings))
    torch.set_num_threads(2)
    ours = learner(make, **settings)
    ours.meta_gradient(batch())
    assert why in ours.explain()
    ours = learner(make, **settings)
    torch.testing.assert_close(left(ours), expected, **CLOSE)
    assert (why if evaluated is None else evaluated) in ours.explain()


@pytest.mark.parametrize(
    ("net", "second_order", "msl"),
    [
        *((net, True, True) for net in NETS),
        ("Conv4", False, True),
        ("Conv4", True, False),
        ("per step", False, False),
    ],
)
def test_side_by_side(net: str, second_order: bool, msl: bool) -> None:
    settings = {"second_order": second_order, "msl": msl, "bnwb": False, "bnrs": False}
    same(NETS[net], BESIDE, **settings)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (lambda: conv_net(track_running_stats=False), {"bnwb": False, "bnrs": False, "adapt_norm": True}),
        (NETS["per step"], {"adapt": "head"}),
        (Tied, {}),
        (Scaled, {"loss_fn": own_loss}),
        (Scaled, {"loss_fn": weighted()}),
        (Scaled, {"lslr": False}),
        (mlp, {"loss_fn": functools.partial(F.cross_entropy, label_smoothing=0.1)}),
    ],
    ids=["norms adapt", "head", "tied", "loss of one's own", "closed over", "fixed rates", "smoothing"],
)
def test_other_forms(monkeypatch: pytest.MonkeyPatch, make: Any, settings: dict[str, Any]) -> None:
    monkeypatch.setattr("mamlpp_fast.engine.fused.differentiable.EVEN_WITHOUT_GAIN", True)
    same(make, BESIDE, **settings)


def test_tasks_are_on_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, together_now = set(), threading.Barrier(2, timeout=60)
    plain = DifferentiableNetwork.call

    def call(self: Any, held: Any, x: Tensor) -> Tensor:
        if threading.get_ident() not in seen:
            seen.add(threading.get_ident())
            if threading.current_thread() is not threading.main_thread():
                together_now.wait()  # breaks where the tasks come one after the other
        return plain(self, held, x)

    ours = learner(NETS["Conv4"])
    ours.meta_gradient(batch(2))
    monkeypatch.setattr(DifferentiableNetwork, "call", call)
    ours.meta_gradient(batch(2))
    assert len(seen) == 2


@pytest.mark.parametrize("net", ["Conv4", "per step", "PyTorch's norms"])
def test_bits_do_not_depend_on_the_threads(net: str) -> None:
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        ours = learner(NETS[net], bnwb=False, bnrs=False)
        found.append(left(ours, 4))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


class Counting(Scaled):
    """Weighs a task by those before it: by a list, whose identity stays."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.seen[0] += 1
        made: Tensor = super().forward(x) * (1 + 0.01 * self.seen[0])
        return made


class Writing(Scaled):
    """Reads a buffer that it writes."""

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = super().forward(x)
        with torch.no_grad():
            self.shift += 0.01 * made.mean()
        return made


def hooked(kind: str) -> Callable[[], nn.Module]:
    """Of each gradient, or output, another share than of the one before."""

    def make() -> nn.Module:
        model, count = conv_net(track_running_stats=False), [0]

        def scaled(t: Tensor) -> Tensor:
            count[0] += 1
            return t * (1 + 0.01 * count[0])

        if kind == "gradient":
            model[0].weight.register_hook(scaled)
        else:
            model.register_forward_hook(lambda module, args, y: scaled(y))
        return model

    return make


class StatefulLoss:
    """Each call weighs more than the one before."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, prediction: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(prediction, y) * (1 + 0.01 * self.calls)


def deciding(prediction: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(prediction, y) * (2.0 if prediction.mean() > 0 else 1.0)


@pytest.mark.parametrize(
    ("make", "loss", "why"),
    [
        (Counting, None, "changes attributes"),
        (Writing, None, "changed in place"),
        (hooked("gradient"), None, "has a hook on its gradient"),
        (hooked("output"), None, "has a forward hook"),
        (NETS["PyTorch's norms"], StatefulLoss, "loss: expected a function"),
        (
            NETS["PyTorch's norms"],
            lambda: Calls(
                lambda m, z, y: F.cross_entropy(z * m.t, y),
                t=nn.Parameter(torch.tensor(1.5, dtype=torch.float64)),
            ),
            "loss: has parameters",
        ),
        (NETS["PyTorch's norms"], lambda: deciding, "loss: "),
    ],
    ids=["counts", "writes", "gradient hook", "hook", "loss counts", "loss learns", "loss decides"],
)
def test_one_after_the_other(make: Callable[[], nn.Module], loss: Callable[[], Any] | None, why: str) -> None:
    """Side by side these would come in another order, or be left out."""
    results = []
    for engine in ("reference", "autograd"):
        routes.kept.clear()
        given = {} if loss is None else {"loss_fn": loss()}
        ours = learner(make, engine, bnwb=False, bnrs=False, **given)
        metrics = quickly(ours)
        results.append((metrics.task_losses, {n: p.grad for n, p in ours.model.named_parameters()}))
    said = ours.explain()
    assert AFTER in said and why in said
    if loss is not StatefulLoss and make is not Counting:  # looking at these counts as well
        torch.testing.assert_close(results[1], results[0], **CLOSE)


scale = contextvars.ContextVar("scale", default=1.0)
own = threading.local()


def of_the_context(prediction: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(prediction, y) * scale.get()


def of_the_thread(prediction: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(prediction, y) * getattr(own, "scale", 7.0)


@pytest.mark.parametrize(
    ("loss", "why"),
    [(of_the_context, BESIDE), (of_the_thread, "what each thread has its own of")],
    ids=["context", "thread"],
)
def test_a_loss_by_values_of_the_caller(loss: Any, why: str) -> None:
    def run(engine: str) -> tuple[Tensor, str]:
        scale.set(2.0)
        ours = learner(Scaled, engine, loss_fn=loss)
        losses = quickly(ours).task_losses
        return losses, ours.explain()

    own.scale = 2.0
    (expected, _), (found, said) = (contextvars.copy_context().run(run, e) for e in ("reference", "autograd"))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert why in said


def test_dropout_draws_as_in_the_loop() -> None:
    def make() -> nn.Module:
        return nn.Sequential(conv_net(track_running_stats=False), nn.Dropout(0.3))

    results = []
    for engine in ("reference", "autograd"):
        ours = learner(make, engine, bnwb=False, bnrs=False)
        torch.manual_seed(5)
        results.append((quickly(ours).task_losses, torch.rand(3)))
    torch.testing.assert_close(results[1], results[0], **CLOSE)
    assert AFTER in ours.explain() and "draws random numbers" in ours.explain()


def test_evaluation_by_running_statistics() -> None:
    same(NETS["per step"], BESIDE, "target passes normalise with running statistics", eval_stats="running")


def test_an_error_leaves_everything_as_it_was() -> None:
    ours = learner(NETS["Conv4"])
    ours.meta_gradient(batch())
    buffers = {n: b.clone() for n, b in ours.model.named_buffers()}
    wrong = batch()
    wrong.target_y[2, 0] = 7
    with pytest.raises(ValueError, match="expected labels from 0 to 2"):
        ours.meta_gradient(wrong)
    torch.testing.assert_close(dict(ours.model.named_buffers()), buffers, rtol=0, atol=0)


def test_without_the_memory_for_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "free_bytes", lambda device: 0)
    torch.set_num_threads(1)
    expected = left(learner(NETS["Conv4"], "reference"))
    torch.set_num_threads(2)
    ours = learner(NETS["Conv4"])
    monkeypatch.setattr(together.lanes, "each", None)
    torch.testing.assert_close(left(ours), expected, **CLOSE)
    assert BESIDE in ours.explain()


def test_what_is_no_longer_right_side_by_side_is_left() -> None:
    """A hook, an attribute: seen at the next batch."""
    ours, expected = (
        learner(NETS["PyTorch's norms"], engine, bnwb=False, bnrs=False)
        for engine in ("autograd", "reference")
    )
    for one in (ours, expected):
        quickly(one)
        one.model[0].weight.register_hook(lambda g: 2 * g)
        quickly(one)
    assert "hook" in ours.explain()
    grads = [{n: p.grad for n, p in one.model.named_parameters()} for one in (ours, expected)]
    torch.testing.assert_close(grads[0], grads[1], **CLOSE)
