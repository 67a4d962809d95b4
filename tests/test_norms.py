"""Every norm of PyTorch in a learner, against textbook loops over PyTorch's own modules."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from helpers import moved
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast import reference
from mamlpp_fast.engine.reduction import Reduction
from mamlpp_fast.nn import check_model

STEPS, WAYS, RATE = 2, 3, 0.1


def _without(name: str, norm: nn.Module) -> nn.Module:
    norm.register_parameter(name, None)
    return norm


class Several(nn.Module):
    """A norm over all elements of sets [n, B, ...], as of points, nodes or frames: [n * B, ...] at a time."""

    def __init__(self, norm: nn.Module, elements_first: bool = False) -> None:
        super().__init__()
        self.norm, self.elements_first = norm, elements_first

    def forward(self, x: Tensor) -> Tensor:
        if self.elements_first:
            x = x.transpose(0, 1)
        y: Tensor = self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return y.transpose(0, 1) if self.elements_first else y


# One example's shape, what stands in front of the norm, and the norm.
KINDS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "1d of features": ((6,), lambda: nn.Linear(6, 4), lambda: nn.BatchNorm1d(4, eps=1e-3, momentum=0.3)),
    "1d of sequences": ((2, 5), lambda: nn.Conv1d(2, 4, 3), lambda: nn.BatchNorm1d(4)),
    "2d": ((1, 5, 5), lambda: nn.Conv2d(1, 4, 3), lambda: nn.BatchNorm2d(4)),
    "3d": ((1, 4, 5, 3), lambda: nn.Conv3d(1, 4, 3), lambda: nn.BatchNorm3d(4, momentum=0.2)),
    "several rows": ((5, 6), lambda: nn.Linear(6, 4), lambda: Several(nn.BatchNorm1d(4, momentum=0.3))),
    "elements first": ((5, 6), lambda: nn.Linear(6, 4), lambda: Several(nn.BatchNorm1d(4), True)),
    "several sequences": (
        (3, 2, 5),
        lambda: nn.Linear(5, 7),
        lambda: Several(nn.BatchNorm1d(2, affine=False)),
    ),
    "several images": ((2, 3, 4, 5), lambda: nn.Linear(5, 6), lambda: Several(nn.BatchNorm2d(3))),
    "cumulative": ((6,), lambda: nn.Linear(6, 4), lambda: nn.BatchNorm1d(4, momentum=None)),
    "no weights": ((1, 5, 5), lambda: nn.Conv2d(1, 4, 3), lambda: nn.BatchNorm2d(4, affine=False)),
    "no bias": ((2, 5), lambda: nn.Conv1d(2, 4, 3), lambda: _without("bias", nn.BatchNorm1d(4))),
    "no weight": ((1, 5, 5), lambda: nn.Conv2d(1, 4, 3), lambda: _without("weight", nn.BatchNorm2d(4))),
    "instance": (
        (2, 5),
        lambda: nn.Conv1d(2, 4, 3),
        lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    ),
}
CONFIGS = {"maml": mf.MAMLConfig.maml(steps=STEPS), "maml++": mf.MAMLConfig(steps=STEPS)}


class _Textbook(nn.Module):
    """A norm of PyTorch's own for every inner step, or one for all."""

    def __init__(self, body: nn.Module, norms: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.body, self.norms, self.head = body, nn.ModuleList(norms), head
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norms[min(self.step, len(self.norms) - 1)]
        out: Tensor = self.head(F.relu(norm(self.body(x))).flatten(1))
        return out

    def adapted(self) -> dict[str, Tensor]:
        return {n: p for n, p in self.named_parameters() if not n.startswith("norms.")}

    def adaptation(self, x: Tensor, y: Tensor, create_graph: bool):  # type: ignore[no-untyped-def]
        fast = self.adapted()
        for self.step in range(STEPS):
            loss = F.cross_entropy(torch.func.functional_call(self, fast, (x,)), y)
            fast = moved(loss, fast, RATE, create_graph)
            yield fast


def _batch(shape: tuple[int, ...], tasks: int = 2) -> mf.EpisodeBatch:
    generator = torch.Generator().manual_seed(5)
    centres = 2 + torch.randn(tasks, WAYS, 1, *shape, generator=generator, dtype=torch.float64)

    def side(n: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(tasks, WAYS, n, *shape, generator=generator, dtype=torch.float64)
        return centres + noise, torch.arange(WAYS).view(1, WAYS, 1).expand(tasks, WAYS, n)

    return mf.EpisodeBatch(*side(3), *side(2))


def _pair(kind: str, config: mf.MAMLConfig, engine: str) -> tuple[_Textbook, mf.MAMLPlusPlus]:
    torch.manual_seed(3)
    shape, body, norm = KINDS[kind]
    first, middle = body().double(), norm().double()
    with torch.no_grad():
        for t in (*middle.parameters(), *(b for b in middle.buffers() if b.is_floating_point())):
            t.uniform_(0.5, 1.5)
        width = middle(first(torch.randn(4, *shape, dtype=torch.float64))).flatten(1).shape[1]
    head = nn.Linear(width, WAYS).double()
    per_step = config.bnwb and kind != "instance"
    plain = _Textbook(
        copy.deepcopy(first),
        [copy.deepcopy(middle) for _ in range(STEPS if per_step else 1)],
        copy.deepcopy(head),
    )
    model = nn.Sequential(first, middle, nn.ReLU(), nn.Flatten(), head)
    return plain, mf.MAMLPlusPlus(model, config, engine=engine, precision="float64")  # type: ignore[arg-type]


def _norm(module: nn.Module) -> nn.Module:
    return module.norm if isinstance(module, Several) else module


def _rows(norms: nn.ModuleList, name: str, like: Tensor) -> Tensor:
    """Of the textbook's norms what one norm holds."""
    own = [_norm(n) for n in norms]
    values = [getattr(n, name).grad if name in ("weight", "bias") else getattr(n, name) for n in own]
    return torch.stack(values).view_as(like)


@pytest.mark.parametrize("engine", ["reference", "autograd", "auto"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_trains_and_evaluates_as_in_a_textbook_loop(
    kind: str, config: mf.MAMLConfig, engine: str
) -> None:
    plain, learner = _pair(kind, config, engine)
    batch = _batch(KINDS[kind][0])
    learner.meta_gradient(batch)
    for task in batch:
        total = torch.zeros((), dtype=torch.float64)
        for step, fast in enumerate(plain.adaptation(task.support_x, task.support_y, True)):
            if config.msl or step == STEPS - 1:
                logits = torch.func.functional_call(plain, fast, (task.target_x,))
                total = total + F.cross_entropy(logits, task.target_y) / (STEPS if config.msl else 1)
        (total / batch.num_tasks).backward()
    model = learner.model
    for ours, theirs in ((model[0], plain.body), (model[4], plain.head)):
        assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-9, atol=1e-11)
    norm = _norm(model[1])
    for name in ("weight", "bias"):
        if (p := getattr(norm, name)) is not None:
            assert_close(p.grad, _rows(plain.norms, name, p), rtol=1e-9, atol=1e-11)
    for name, buffer in norm.named_buffers():
        assert_close(buffer, _rows(plain.norms, name, buffer), rtol=1e-9, atol=1e-11)

    state = copy.deepcopy(learner.state_dict()["model"])
    stats: Literal["batch", "running"]
    for stats in ("batch", "running"):
        learner.config = dataclasses.replace(config, eval_stats=stats)
        logits = learner.evaluate(batch).logits
        for t, task in enumerate(batch):
            # A copy in training mode: the statistics of what it is given, whatever becomes of its running ones.
            transductive = copy.deepcopy(plain)
            for step, fast in enumerate(transductive.adaptation(task.support_x, task.support_y, False)):
                target = copy.deepcopy(plain if stats == "running" else transductive)
                target.train(stats == "batch").step = step
                expected = torch.func.functional_call(target, fast, (task.target_x,))
                assert_close(logits[step, t], expected.detach(), rtol=1e-9, atol=1e-11)
        assert_close(learner.state_dict()["model"], state, rtol=0, atol=0)


FUSED = [
    "no weights",
    "no bias",
    "no weight",
    "several rows",
    "elements first",
    "several sequences",
    "several images",
]


@pytest.mark.parametrize("kind", FUSED)
def test_a_batch_norm_is_fused(kind: str) -> None:
    _, learner = _pair(kind, CONFIGS["maml++"], "auto")
    learner.meta_gradient(_batch(KINDS[kind][0]))
    assert learner.engine.name == "fused"


@pytest.mark.parametrize("engine", ["autograd", "fused"])
def test_the_weight_of_a_batch_norm_without_bias_adapts(engine: str) -> None:
    """Not a bias without weight: PyTorch's batch norm has no second derivative then, it raises."""
    config = mf.MAMLConfig.maml(steps=STEPS, adapt_norm=True)
    found = []
    for one in (engine, "reference"):
        _, learner = _pair("no bias", config, one)
        batch = _batch(KINDS["no bias"][0])
        learner.meta_gradient(batch)
        assert [name for name in learner.rates.names if name.startswith("1.")] == ["1.weight"]
        found.append(
            {n: p.grad for n, p in learner.model.named_parameters()} | dict(learner.model.named_buffers())
        )
        for stats in ("batch", "running"):
            learner.config = dataclasses.replace(config, eval_stats=stats)
            found[-1][stats] = learner.evaluate(batch).logits
        assert learner.engine.name == one
    assert_close(*found, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(5,), (5, 4), (5, 3, 4), (5, 2, 3, 4), (5, 2, 1, 3, 2)])
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("channels_last", [False, True])
def test_per_step_norm_takes_any_shape(
    shape: tuple[int, ...], momentum: float | None, channels_last: bool
) -> None:
    """PyTorch's functional batch norm, given a row's tensors, is the right answer: value, both derivatives, counts."""
    torch.manual_seed(0)
    x = torch.randn(6, *shape, dtype=torch.float64)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x
    norm = mf.PerStepBatchNorm2d(5, 3, momentum=momentum, negative_slope=0.2).double()
    with torch.no_grad():
        for p in norm.parameters():
            p.uniform_(-1, 1)
    means, variances = norm.running_mean.clone(), norm.running_var.clone()
    for count, (step, row) in enumerate(((1, 1), (2, 2), (1, 1), (7, 2)), 1):
        mf.set_step(norm, step)
        found = []
        for module in (True, False):
            given = x.clone(memory_format=torch.preserve_format).mul_(count).requires_grad_()
            if module:
                y = norm(given)
            else:
                share = 1 / (1 + (count - 1) // 2) if momentum is None else momentum
                y = F.batch_norm(
                    given, means[row], variances[row], norm.weight[row], norm.bias[row], True, share
                )
                y = F.leaky_relu(y, 0.2)
            assert y.shape == x.shape
            wanted = (given, norm.weight, norm.bias)
            first = torch.autograd.grad(y.sin().sum(), wanted, create_graph=True)
            second = torch.autograd.grad(first[0].pow(3).sum() + first[1].pow(2).sum(), wanted)
            found.append((y, *first, *second))
        assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
        assert_close(norm.running_mean, means, rtol=1e-12, atol=1e-12)
        assert_close(norm.running_var, variances, rtol=1e-12, atol=1e-12)
    assert ("num_batches_tracked" in norm.state_dict()) == (momentum is None)
    if momentum is None:
        assert norm.num_batches_tracked.tolist() == [0, 2, 2]


def test_conversion_carries_the_count_of_a_cumulative_mean_on() -> None:
    torch.manual_seed(0)
    plain = nn.BatchNorm1d(4, momentum=None).double()
    x = torch.randn(3, 8, 4, dtype=torch.float64)
    plain(x[0])
    norm = mf.convert_batch_norm(copy.deepcopy(plain), 2)
    assert norm.num_batches_tracked.tolist() == [1, 1]
    mf.set_step(norm, 1)
    for part in x[1:]:
        plain(part)
        norm(part)
    assert_close(norm.running_mean[1], plain.running_mean, rtol=1e-12, atol=1e-12)
    assert_close(norm.running_var[1], plain.running_var, rtol=1e-12, atol=1e-12)
    assert_close(norm.running_mean[0], x[0].mean(0), rtol=1e-12, atol=1e-12)


def test_ranks_refuse_a_cumulative_mean() -> None:
    model = nn.Sequential(nn.Linear(4, 4), mf.PerStepBatchNorm2d(4, 2, momentum=None))
    with pytest.raises(ValueError, match="expected batch norms with a momentum to share tasks, 1 has"):
        Reduction(SimpleNamespace(), model, mf.LSLR(model, 2))  # type: ignore[arg-type]


class _Doubled(nn.BatchNorm1d):
    """A subclass that computes something of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class _Gentle(nn.BatchNorm1d):
    """A subclass that computes what PyTorch's does."""

    def __init__(self, features: int) -> None:
        super().__init__(features, momentum=0.01)


class _Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * x


def _patched() -> nn.Module:
    norm = nn.BatchNorm1d(4)
    norm.forward = lambda x: x + 1  # type: ignore[method-assign]
    return norm


def _parametrized() -> nn.Module:
    norm = nn.BatchNorm1d(4)
    parametrize.register_parametrization(norm, "weight", _Scale())
    return norm


@pytest.mark.parametrize("make", [lambda: _Doubled(4), _patched, _parametrized])
def test_what_computes_otherwise_is_left_in_place_and_named(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    norm = make()
    model = nn.Sequential(nn.Linear(3, 4), norm, _Gentle(4))
    x = torch.randn(6, 3)
    expected = model(x)
    with pytest.warns(UserWarning, match=rf"batch norms left as they are.*: 1 \({type(norm).__name__}\)$"):
        mf.convert_batch_norm(model, 3)
    assert model[1] is norm
    assert type(model[2]) is mf.PerStepBatchNorm2d and model[2].momentum == 0.01
    assert_close(model(x), expected)


@pytest.mark.parametrize("engine", ["reference", "autograd", "auto"])
def test_a_norm_left_in_place_evaluates_as_told(engine: str) -> None:
    torch.manual_seed(0)
    batch = _batch((6,))
    model = nn.Sequential(nn.Linear(6, 4), _Doubled(4), nn.Tanh(), nn.Linear(4, WAYS)).double()
    in_training = copy.deepcopy(model)
    task = batch[0]
    with pytest.warns(UserWarning, match=r"1 \(_Doubled\)"):
        learner = mf.MAMLPlusPlus(
            model,
            mf.MAMLConfig.maml(steps=1, inner_lr=0.2),
            engine=engine,  # type: ignore[arg-type]
            precision="float64",
        )
    names = ("0.weight", "0.bias", "3.weight", "3.bias")
    assert learner.rates.names == names
    own = dict(in_training.named_parameters())
    loss = F.cross_entropy(in_training(task.support_x), task.support_y)
    grads = torch.autograd.grad(loss, [own[n] for n in names])
    fast = {n: own[n] - 0.2 * g for n, g in zip(names, grads, strict=True)}
    expected = torch.func.functional_call(in_training, fast, (task.target_x,))
    before = copy.deepcopy(model.state_dict())
    assert_close(learner.evaluate(task).logits[0, 0], expected, rtol=1e-10, atol=1e-12)
    predict = learner.adapt(task.support_x, task.support_y)
    assert_close(predict(task.target_x), expected, rtol=1e-10, atol=1e-12)
    assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    # A copy obeys as well; an error within leaves the module as it was.
    twin = pickle.loads(pickle.dumps(model)).eval()
    one = task.target_x[:1]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        twin(one)
    assert not twin[1].training
    mf.set_eval_stats(twin, "running")
    assert_close(twin[1](twin[0](one)), 2 * twin[0](one) / (1 + 1e-5) ** 0.5)


def test_norms_of_a_model_that_was_not_converted_stay_pytorchs() -> None:
    norm = nn.BatchNorm1d(4).eval()
    x = 3 + torch.randn(6, 4)
    mf.set_eval_stats(norm, "batch")
    assert_close(norm(x), x / (1 + 1e-5) ** 0.5)


def test_norms_that_cannot_serve_are_refused_and_nothing_is_changed() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.SyncBatchNorm(4))
    with pytest.raises(ValueError, match="expected batch norms of one process, 1 is a SyncBatchNorm"):
        mf.convert_batch_norm(model, 2)
    assert type(model[0]) is nn.BatchNorm2d
    lazy = nn.Sequential(nn.Linear(3, 4), nn.LazyBatchNorm1d())
    with pytest.raises(
        ValueError, match="expected norms that have seen an input, 1 is a LazyBatchNorm1d: call"
    ):
        mf.MAMLPlusPlus(lazy)
    lazy(torch.randn(2, 3))
    assert isinstance(mf.convert_batch_norm(lazy, 2)[1], mf.PerStepBatchNorm2d)


@pytest.mark.parametrize(
    "norm",
    [
        nn.InstanceNorm1d(4, affine=True),
        nn.InstanceNorm2d(4, affine=True),
        nn.InstanceNorm3d(4, affine=True),
        nn.RMSNorm(4),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.BatchNorm1d(4),
        _Doubled(4),
        mf.PerStepBatchNorm2d(4, 2, per_step_affine=False),
        type("_Own", (nn.RMSNorm,), {})(4),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_weights_of_every_norm_adapt_only_when_asked(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), norm)
    assert reference.adapted_names(model) == ("0.weight", "0.bias")
    assert reference.adapted_names(model, adapt_norm=True) == tuple(n for n, _ in model.named_parameters())


class _Listed(nn.Linear):
    def parameters(self, recurse: bool = True) -> list[Tensor]:  # type: ignore[override]
        return [self.weight, self.bias]


class _Partial(nn.Linear):
    def parameters(self, recurse: bool = True):  # type: ignore[no-untyped-def]
        return iter([self.weight])


class _Renamed(nn.Linear):
    def named_parameters(self, *args: object, **kwargs: object):  # type: ignore[no-untyped-def]
        return ((f"meta_{n}", p) for n, p in super().named_parameters())


class _Trainable(nn.Linear):
    """Leaves out frozen parameters, which does no harm."""

    def parameters(self, recurse: bool = True):  # type: ignore[no-untyped-def]
        return filter(lambda p: p.requires_grad, super().parameters(recurse))


def test_check_model_refuses_parameters_that_are_not_pytorchs() -> None:
    with pytest.raises(TypeError, match=r"model: expected parameters\(\) to be .* got list of _Listed$"):
        check_model(_Listed(2, 3))
    with pytest.raises(TypeError, match=r"model: expected parameters\(\) to be .* over all parameters"):
        check_model(_Partial(2, 3))
    with pytest.raises(TypeError, match=r"model: expected named_parameters\(\) to be .* of _Renamed$"):
        check_model(_Renamed(2, 3))
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got function"):
        check_model(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"expected initialised parameters, 1\.weight is lazy: call the model"
    ):
        check_model(nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2)))
    frozen = _Trainable(2, 3)
    frozen.bias.requires_grad_(False)
    check_model(frozen)
    # What a submodule's say is never asked.
    check_model(nn.Sequential(_Listed(2, 3), _Renamed(3, 3)))


@pytest.mark.parametrize("kind", [_Listed, _Partial, _Renamed])
def test_what_adapts_does_not_ask_a_models_own_methods(kind: type[nn.Linear]) -> None:
    assert reference.adapted_names(kind(2, 3)) == ("weight", "bias")
    assert reference.adapted_names(nn.Sequential(kind(2, 3))) == ("0.weight", "0.bias")
