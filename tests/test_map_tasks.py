"""`mf.map_tasks`: the tasks of a loop side by side, against the loop, in float64."""

from __future__ import annotations

import copy
import threading
import time
import types
import weakref
from collections import namedtuple
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from helpers import maml_loss
from test_accelerate import CLOSE, Scaled, conv_net, data, mlp
from torch import Tensor, nn

import mamlpp_fast as mf
from mamlpp_fast.compat import learn2learn as l2l

Task = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def threads(own_threads: None, nothing_accelerated: None) -> None:
    torch.set_num_threads(2)


def step(model: nn.Module, task: Task) -> Tensor:
    """MAML of a textbook."""
    # Torch's leaves fast weights in a model that holds a module under two names.
    return maml_loss(
        mf.functional_call if isinstance(model, Tied) else torch.func.functional_call, model, task
    )


def own(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def left(model: nn.Module) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    return {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())


def loop(step: Callable[[Any, Any], Any], tasks: list[Any], model: nn.Module) -> list[Tensor]:
    losses = []
    for task in tasks:
        loss = step(model, task)
        loss.backward()
        losses.append(loss.detach())
    return losses


class Tied(nn.Module):
    """A module in two places, a parametrised one, and a recurrent one with a list of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(64, 6))
        self.shared = nn.Linear(6, 6)
        self.again = self.shared
        self.cell = nn.GRUCell(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.shared(torch.tanh(self.first(x.flatten(1)))))
        made: Tensor = self.last(self.cell(h, self.again(h)))
        return made


MODELS: dict[str, Callable[[], nn.Module]] = {
    "conv": conv_net,
    "conv, accelerated": lambda: mf.accelerate(conv_net().double()),
    "mlp": mlp,
    "mlp, accelerated": lambda: mf.accelerate(mlp().double()),
    "own parameters": lambda: mf.accelerate(Scaled().double()),
    "tied": Tied,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [2, 5])
def test_it_leaves_what_the_loop_leaves(name: str, count: int) -> None:
    tasks = data(count)
    one, other = own(MODELS[name]), own(MODELS[name])
    for _ in range(3):  # gradients and statistics go on from where they are
        expected = loop(step, tasks, one)
        found = mf.map_tasks(step, tasks, other)
        torch.testing.assert_close(found, expected, **CLOSE)
        assert not any(t.requires_grad for t in found)
        torch.testing.assert_close(left(other), left(one), **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_any_number_of_threads_leaves_the_same(name: str) -> None:
    tasks = data(5)
    model = own(MODELS[name])
    torch.set_num_threads(1)
    expected = loop(step, tasks, copy.deepcopy(model))
    first = copy.deepcopy(model)
    loop(step, tasks, first)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        other = copy.deepcopy(model)
        found = mf.map_tasks(step, tasks, other)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(left(other), left(first), rtol=1e-11, atol=1e-13)


def test_steps_run_side_by_side_on_one_thread_each() -> None:
    together = threading.Barrier(2, timeout=60)

    def meet(model: nn.Module, task: int) -> tuple[int, int]:
        together.wait()
        return threading.get_ident(), torch.get_num_threads()

    found = mf.map_tasks(meet, [0, 1], own(mlp))
    assert len({ident for ident, _ in found} | {threading.get_ident()}) == 3
    assert [count for _, count in found] == [1, 1] and torch.get_num_threads() == 2


def test_results_come_in_the_tasks_order_and_as_they_are() -> None:
    Made = namedtuple("Made", "loss name")

    def slow(model: nn.Module, task: int) -> Any:
        time.sleep(0.02 * (4 - task))
        loss = model(torch.ones(1, 64, dtype=torch.float64)).sum() * task
        return [Made(loss, "named"), (loss, loss.detach()), {"count": task}, loss, None][task]

    model = own(mlp)
    found = mf.map_tasks(slow, list(range(5)), model)
    assert (
        isinstance(found[0], Made)
        and found[0].name == "named"
        and found[2] == {"count": 2}
        and found[4] is None
    )
    torch.testing.assert_close(found[1][0], found[1][1], rtol=0, atol=0)
    assert not any(t.requires_grad for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, Tensor))
    other = own(mlp)
    (other(torch.ones(1, 64, dtype=torch.float64)).sum() * (0 + 1 + 3)).backward()
    torch.testing.assert_close(left(model)[0], left(other)[0], **CLOSE)
    assert mf.map_tasks(slow, [], model) == []


def test_learned_rates_get_their_gradients() -> None:
    tasks, found = data(3), []
    for run in (loop, mf.map_tasks):
        model = own(conv_net)
        rates = mf.LSLR(model, 2, 0.1).double()
        rate = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

        def adapt(model: nn.Module, task: Task, rates: mf.LSLR = rates, rate: Tensor = rate) -> Tensor:
            fast = mf.adapt(model, task[0], task[1], rates)
            return F.cross_entropy(mf.reference.functional_call(model, fast, (task[2],)), task[3]) * (
                1 + rate
            )

        run(adapt, tasks, model)
        found.append((rate.grad, rates.rates.grad, left(model)))
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def test_gradients_that_share_memory_are_added_each_to_its_own() -> None:
    def flat(model: nn.Module, task: float) -> Tensor:
        return torch.stack([p.sum() for p in model.parameters()]).sum() * task

    model = own(mlp)
    mf.map_tasks(flat, [1.0, 2.0, 4.0], model)
    for p in model.parameters():
        assert p.grad is not None and p.grad.stride() == p.stride()
        torch.testing.assert_close(p.grad, torch.full_like(p, 7.0), rtol=0, atol=0)


def test_without_gradients_nothing_is_differentiated() -> None:
    model = own(conv_net)

    def trying(model: nn.Module, task: Task) -> Tensor:
        assert not torch.is_grad_enabled()
        with torch.enable_grad():
            return step(model, task)

    with torch.no_grad():
        found = mf.map_tasks(trying, data(3), model)
    assert not any(t.requires_grad for t in found) and all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(found, loop(step, data(3), own(conv_net)), **CLOSE)


@pytest.mark.parametrize("l2l_kind", ["MAML", "MetaSGD"])
def test_learn2learn_clones(l2l_kind: str) -> None:
    def adapt(maml: Any, task: Task) -> Tensor:
        learner = maml.clone()
        for _ in range(2):
            learner.adapt(F.cross_entropy(learner(task[0]), task[1]))
        return F.cross_entropy(learner(task[2]), task[3])

    found = []
    for run in (loop, mf.map_tasks):
        model = own(lambda: getattr(l2l.algorithms, l2l_kind)(conv_net(), lr=0.1))
        found.append((run(adapt, data(3), model), left(model)))
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def test_the_first_error_is_raised_and_nothing_is_added() -> None:
    model = own(conv_net)
    state = copy.deepcopy(model.state_dict())

    def failing(model: nn.Module, task: int) -> Tensor:
        loss = step(model, data(1)[0])
        if task in (1, 3):
            raise LookupError(f"task {task}")
        return loss

    with pytest.raises(LookupError, match=r"task [13]"):
        mf.map_tasks(failing, list(range(6)), model)
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert "forward" not in vars(model) and not any("forward" in vars(m) for m in model.modules())
    torch.testing.assert_close(
        mf.map_tasks(step, data(3), model), loop(step, data(3), own(conv_net)), **CLOSE
    )


@pytest.mark.parametrize("part", ["the model", "a part of it"])
def test_a_step_that_calls_the_shared_model_is_refused(part: str) -> None:
    shared = own(mlp)
    before = dict(shared.named_parameters())

    def careless(model: nn.Module, task: Task) -> Tensor:
        if part == "the model":
            return step(shared, task)
        made: Tensor = shared[1](task[0].flatten(1)).sum()  # type: ignore[index]
        return made

    for _ in range(20):
        with pytest.raises(RuntimeError, match="the model that the threads share"):
            mf.map_tasks(careless, data(4), shared)
        assert all(p is before[n] for n, p in shared.named_parameters())
    assert all(p.grad is None for p in shared.parameters())
    found = mf.map_tasks(careless, data(4), shared, threads=1)  # one after the other it may
    assert len(found) == 4 and "forward" not in vars(shared)


def _by_critic(call: Callable[..., Tensor], copied: bool = False) -> Callable[[], tuple[Any, nn.Module]]:
    """A step that adapts another module than the model, closed over; or a copy of it."""

    def make() -> tuple[Any, nn.Module]:
        critic = own(mlp)

        def by_critic(model: nn.Module, task: Task) -> Tensor:
            net = copy.deepcopy(critic) if copied else critic
            return step(model, task) + maml_loss(call, net, task)

        return by_critic, critic

    return make


class ByObject:
    """Such a step that is an object, which holds the other module in another object."""

    def __init__(self) -> None:
        self.nets = types.SimpleNamespace(critic=own(mlp), call=torch.func.functional_call)

    def __call__(self, model: nn.Module, task: Task) -> Tensor:
        return step(model, task) + maml_loss(self.nets.call, self.nets.critic, task)


def _by_object() -> tuple[Any, nn.Module]:
    made = ByObject()
    return made, made.nets.critic


def _by_norm() -> tuple[Any, nn.Module]:
    norms = [nn.BatchNorm1d(3).double()]
    return lambda model, task: norms[0](model(task[0])).square().sum(), norms[0]


def _by_layer() -> tuple[Any, nn.Module]:
    layers = {"last": nn.Linear(3, 3).double()}
    return lambda model, task: layers["last"](model(task[0])).square().sum(), layers["last"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_by_critic(torch.func.functional_call), "called a Sequential beside the model with other tensors"),
        (_by_critic(mf.functional_call), "called a Sequential beside the model with other tensors"),
        (_by_object, "called a Sequential beside the model with other tensors"),
        (_by_norm, "changed running_mean of a BatchNorm1d beside the model"),
        (_by_critic(torch.func.functional_call, copied=True), None),
        (_by_layer, None),
    ],
)
def test_modules_beside_the_model_are_called_as_they_are(
    make: Callable[[], tuple[Any, nn.Module]], words: str | None
) -> None:
    """With other tensors in them a thread would compute with another's, and leave those behind."""
    model, other = own(mlp), own(mlp)
    beside, shared = make()
    torch.manual_seed(0)
    before, state = dict(shared.named_parameters()), copy.deepcopy(shared.state_dict())
    if words is not None:
        for _ in range(5):
            with pytest.raises(RuntimeError, match=words):
                mf.map_tasks(beside, data(4), model)
            assert all(p is before[n] for n, p in shared.named_parameters())
            torch.testing.assert_close(shared.state_dict(), state, rtol=0, atol=0)
        assert all(p.grad is None for p in (*model.parameters(), *shared.parameters()))
    threads = None if words is None else 1
    found = mf.map_tasks(beside, data(4), model, threads=threads), left(model), left(shared)
    shared.load_state_dict(state)
    shared.zero_grad()
    expected = loop(beside, data(4), other), left(other), left(shared)
    torch.testing.assert_close(found[0], expected[0], **CLOSE)
    torch.testing.assert_close(found[1], expected[1], **CLOSE)
    assert not shared._forward_pre_hooks


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        made: Tensor = self.last(x.flatten(1))
        return made


def backward_inside(model: nn.Module, task: Task) -> None:
    step(model, task).backward()


def written(model: nn.Module, task: Task) -> None:
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)


def noisy(model: nn.Module, task: Task) -> Tensor:
    return step(model, task) + torch.rand(())


@pytest.mark.parametrize(
    ("make", "wrong", "words"),
    [
        (mlp, backward_inside, "return the loss"),
        (mlp, written, "changed a parameter in place"),
        (mlp, noisy, "drew random numbers"),
        (lambda: nn.Sequential(mlp(), nn.Dropout(0.5)), step, "drew random numbers"),
        (Counting, step, "changed the buffer calls of a Counting"),
        (lambda: conv_net(momentum=None), step, "changed the buffer running_mean of a BatchNorm2d"),
        (lambda: mf.convert_batch_norm(conv_net(), 2), step, "changed the buffer running_mean"),
    ],
)
def test_what_threads_do_not_pass_on_is_refused(
    make: Callable[[], nn.Module], wrong: Any, words: str
) -> None:
    model = own(make)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    with pytest.raises(RuntimeError, match=words):
        mf.map_tasks(wrong, data(4), model)
    torch.testing.assert_close(dict(model.named_buffers()), buffers, rtol=0, atol=0)
    if wrong is step:
        assert all(p.grad is None for p in model.parameters())
        one, other = own(make), own(make)  # and one after the other it is what the loop does
        torch.manual_seed(1)
        expected = loop(step, data(4), one)
        torch.manual_seed(1)
        torch.testing.assert_close(mf.map_tasks(step, data(4), other, threads=1), expected, **CLOSE)
        torch.testing.assert_close(left(other), left(one), **CLOSE)


def test_models_that_refer_to_themselves_are_refused() -> None:
    listed, bound, closed = own(mlp), own(mlp), own(mlp)
    listed.blocks = [listed[1]]  # type: ignore[index,assignment]
    bound.other = types.MethodType(lambda self, x: self(x), bound)  # type: ignore[assignment]
    closed.register_forward_hook(lambda *_: closed.training and None)
    for model, words in ((listed, "blocks"), (bound, "other"), (closed, "_forward_hooks")):
        with pytest.raises(ValueError, match=words):
            mf.map_tasks(step, data(2), model)
        assert len(mf.map_tasks(step, data(2), model, threads=1)) == 2
    with pytest.raises(ValueError, match="threads: expected at least 1"):
        mf.map_tasks(step, data(2), listed, threads=0)


TABLE: dict[Any, float] = {}
WEAK: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()


class Listed(nn.Linear):
    """Looks its scale up by the module that it is."""

    registry: ClassVar[dict[nn.Module, float]] = {}

    def __init__(self, how: Callable[[nn.Module], float]) -> None:
        super().__init__(64, 3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1)) * self.how(self)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda m: TABLE.get(m, 1.0), "TABLE"),
        (lambda m: TABLE.get(id(m), 1.0), "TABLE"),
        (lambda m: WEAK.get(m, 1.0), "WEAK"),
        (lambda m: m.registry.get(m, 1.0), "Listed.registry"),
        (lambda m: m.own.get("scale", 1.0), None),
    ],
)
def test_what_is_looked_up_by_module_is_refused(
    how: Callable[[Any], float], words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread's copy is another module, which no table has."""
    model = Listed(how).double()
    model.own = {"scale": 3.0}  # type: ignore[assignment]
    for key in (model, id(model)):
        monkeypatch.setitem(TABLE, key, 3.0)
    monkeypatch.setitem(WEAK, model, 3.0)
    monkeypatch.setitem(Listed.registry, model, 3.0)
    if words is None:
        monkeypatch.undo()
    else:
        with pytest.raises(ValueError, match=f"looked up by module.*{words}"):
            mf.map_tasks(step, data(2), model)
    expected = loop(step, data(2), copy.copy(model) if words is None else model)
    found = mf.map_tasks(step, data(2), model, threads=2 if words is None else 1)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda y: (y.sum(), y), "without a graph behind the loss"),
        (lambda y: [y.sum()], "a container with a graph"),
        (lambda y: y, "one number"),
    ],
)
def test_results_that_are_no_loss_are_refused(result: Callable[[Tensor], Any], words: str) -> None:
    model = own(mlp)
    for threads in (1, 2):
        with pytest.raises(ValueError, match=words):
            mf.map_tasks(lambda model, task: result(model(task[0])), data(2), model, threads=threads)


def test_a_threads_own_settings_hold() -> None:
    def where(model: nn.Module, task: int) -> tuple[int, bool]:
        return threading.get_ident(), torch.is_autocast_enabled("cpu")

    here = threading.get_ident()
    model = own(mlp)
    with torch.autocast("cpu", torch.bfloat16):
        assert mf.map_tasks(where, [0, 1], model) == [(here, True)] * 2
    with torch.inference_mode():
        assert mf.map_tasks(where, [0, 1], model)[0][0] == here
    assert mf.map_tasks(where, [0, 1], model)[0][0] != here


def test_hooks_that_wait_for_accumulation_are_refused() -> None:
    model = own(mlp)
    next(model.parameters()).register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="hooks behind the accumulation"):
        mf.map_tasks(step, data(2), model)


def test_again_and_again() -> None:
    """Whatever threads might mix up would show."""
    model = mf.accelerate(own(conv_net))
    tasks = data(7)
    expected: Any = None
    for _ in range(25):
        model.zero_grad()
        found = mf.map_tasks(step, tasks, model)
        now = found, [p.grad.clone() for p in model.parameters() if p.grad is not None]
        expected = now if expected is None else expected
        torch.testing.assert_close(now, expected, rtol=1e-11, atol=1e-13)


def _evaluates(model: nn.Module, task: Any) -> Tensor:
    loss = F.cross_entropy(model(task[0]), task[1])
    model.eval()
    loss = loss + F.cross_entropy(model(2 * task[0]), task[1])
    model.train()
    return loss


def _resets(model: nn.Module, task: Any) -> Tensor:
    model[1].reset_running_stats()  # type: ignore[operator, index]
    return F.cross_entropy(model(task[0]), task[1])


def _sets_momentum(model: nn.Module, task: Any) -> Tensor:
    model[1].momentum = 0.5  # type: ignore[assignment, index]
    return F.cross_entropy(model(task[0]), task[1])


def _counts(model: nn.Module, task: Any) -> Tensor:
    model.calls = getattr(model, "calls", 0) + 1  # type: ignore[assignment]
    return F.cross_entropy(model(task[0]), task[1]) * model.calls


def _keeps(model: nn.Module, task: Any) -> Tensor:
    """Running statistics that are no buffers, whose norm counts no change of them."""
    return F.cross_entropy(F.batch_norm(model(task[0]), model.mean, model.var, training=True), task[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("frozen", [True, False])
def test_statistics_that_threads_share_are_refused(frozen: bool) -> None:
    model = nn.Linear(4, 3).double()
    for name, t in (("mean", torch.zeros(3)), ("var", torch.ones(3))):
        setattr(model, name, nn.Parameter(t.double(), requires_grad=False) if frozen else t.double())
    tasks = [(torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3) for _ in range(4)]
    with pytest.raises(RuntimeError, match="changed a tensor of the model in place that is no buffer"):
        mf.map_tasks(_keeps, tasks, model)
    assert model.weight.grad is None
    assert len(mf.map_tasks(_keeps, tasks, model, threads=1)) == 4


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize(
    ("unkept", "message"),
    [
        (_evaluates, "evaluated batch norms, or wrote their running statistics"),
        (_resets, "evaluated batch norms, or wrote their running statistics"),
        (_sets_momentum, "changed the attribute momentum of a BatchNorm2d"),
        (_counts, "changed the attribute calls of a Sequential"),
    ],
)
def test_what_passes_from_task_to_task_is_refused(unkept: Any, message: str, accelerated: bool) -> None:
    """The statistics that the loop's next task finds, or state of Python's, are not a thread's to know."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 3)
    model = nn.Sequential(*layers).double()
    if accelerated:
        mf.accelerate(model)
    tasks = [(torch.randn(5, 2, 6, 6, dtype=torch.float64), torch.arange(5) % 3) for _ in range(4)]
    with pytest.raises(RuntimeError, match=message):
        mf.map_tasks(unkept, tasks, model)
    assert all(p.grad is None for p in model.parameters())
    assert int(model[1].num_batches_tracked) == 0


_settings = threading.local()


def test_what_a_thread_has_its_own_of_is_the_callers() -> None:
    """A step that names it has its tasks one after the other: other threads have other values."""

    def scaled(model: nn.Module, task: Task) -> Tensor:
        return step(model, task) * getattr(_settings, "scale", 1.0)

    _settings.scale = 3.0
    model, plain = own(mlp), own(mlp)
    found, expected = mf.map_tasks(scaled, data(), model), loop(scaled, data(), plain)
    torch.testing.assert_close((found, left(model)), (expected, left(plain)), **CLOSE)
