"""Modules and inner loops of ``compat.higher`` against nested autograd written out."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import moved
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

import mamlpp_fast.compat.higher as higher
from bench.drop_in import largest_error
from bench.peers.higher_scripts import SCRIPTS, build
from bench.peers.problem import Problem, Sizes, make
from mamlpp_fast import _native

STEPS, RATE = 3, 0.1


class Net(nn.Module):
    """Nested, with batch norm, dropout, a parameter used twice and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_parameter("absent", None)

    def embed(self, x: Tensor) -> Tensor:
        return self.features(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.second(torch.tanh(self.first(self.embed(x)))) * self.scale)


def net(dropout: bool = False) -> Net:
    model = Net().double()
    model.drop.p = 0.5 if dropout else 0.0
    return model


def task() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.randn(6, 2, 5, 5, dtype=torch.float64),
        torch.arange(6) % 4,
        torch.randn(6, 2, 5, 5, dtype=torch.float64),
        torch.arange(6) % 4,
    )


def textbook(
    model: nn.Module, support_x: Tensor, support_y: Tensor, rate: Tensor | float
) -> dict[str, Tensor]:
    fast = dict(model.named_parameters())
    for _ in range(STEPS):
        loss = F.cross_entropy(functional_call(model, fast, (support_x,)), support_y)
        names = [n for n, p in fast.items() if p.requires_grad]
        grads = torch.autograd.grad(loss, [fast[n] for n in names], create_graph=True)
        fast |= {n: fast[n] - rate * g for n, g in zip(names, grads, strict=True)}
    return fast


@pytest.mark.parametrize("fused", [True, False])
def test_maml_is_nested_autograd(fused: bool) -> None:
    model, (support_x, support_y, target_x, target_y) = net(), task()
    wanted = textbook(model, support_x, support_y, RATE)
    loss = F.cross_entropy(functional_call(model, wanted, (target_x,)), target_y)
    learned = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss, learned)
    opt = torch.optim.SGD(model.parameters(), lr=RATE)
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False, fused=fused) as (fmodel, diffopt):
        for _ in range(STEPS):
            diffopt.step(F.cross_entropy(fmodel(support_x), support_y))
        ours = F.cross_entropy(fmodel(target_x), target_y)
    assert_close(ours, loss)
    assert_close(dict(fmodel.named_parameters()), wanted)
    assert_close(torch.autograd.grad(ours, learned), expected, rtol=1e-9, atol=1e-12)


def test_copied_weights_take_no_gradient_and_settings_do() -> None:
    model, (support_x, support_y, target_x, target_y) = net(), task()
    opt = torch.optim.SGD(model.parameters(), lr=RATE)
    rate = torch.tensor(RATE, dtype=torch.float64, requires_grad=True)
    wanted = textbook(model, support_x, support_y, rate)
    (expected,) = torch.autograd.grad(
        F.cross_entropy(functional_call(model, wanted, (target_x,)), target_y), rate
    )
    with higher.innerloop_ctx(model, opt, override={"lr": [rate]}) as (fmodel, diffopt):
        for _ in range(STEPS):
            diffopt.step(F.cross_entropy(fmodel(support_x), support_y))
        F.cross_entropy(fmodel(target_x), target_y).backward()
    assert rate.grad is not None
    assert_close(rate.grad, expected)
    assert all(p.grad is None for p in model.parameters())
    assert all(
        p.requires_grad == q.requires_grad
        for p, q in zip(model.parameters(), fmodel.parameters(time=0), strict=True)
    )


def test_without_higher_gradients_only_the_latest_parameters_are_kept() -> None:
    model, (support_x, support_y, *_) = net(), task()
    opt = torch.optim.SGD(model.parameters(), lr=RATE)
    with higher.innerloop_ctx(model, opt, track_higher_grads=False) as (fmodel, diffopt):
        for _ in range(STEPS):
            diffopt.step(F.cross_entropy(fmodel(support_x), support_y))
    assert all(p.is_leaf for p in fmodel.parameters())
    assert_close(
        list(fmodel.parameters()), [p.detach() for p in textbook(model, support_x, support_y, RATE).values()]
    )
    with pytest.raises(RuntimeError, match="init_fast_params"):
        _ = fmodel.init_fast_params
    with pytest.raises(ValueError, match="time: expected None"):
        fmodel.parameters(time=2)


def test_every_step_is_kept_and_the_model_left_alone() -> None:
    model, (support_x, support_y, *_) = net(), task()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    opt = torch.optim.SGD(model.parameters(), lr=RATE)
    with higher.innerloop_ctx(model, opt) as (fmodel, diffopt):
        returned = [diffopt.step(F.cross_entropy(fmodel(support_x), support_y)) for _ in range(STEPS)]
    assert_close(dict(model.state_dict()), before)
    for time, params in enumerate(returned, start=1):
        assert all(p is q for p, q in zip(fmodel.parameters(time=time), params, strict=True))
    assert all(p is q for p, q in zip(fmodel.parameters(), returned[-1], strict=True))
    assert_close(fmodel.init_fast_params, list(model.parameters()))
    assert fmodel.features[1].num_batches_tracked == STEPS


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(3),
        nn.BatchNorm2d(3, momentum=None),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.BatchNorm2d(3, affine=False),
        nn.BatchNorm1d(3),
    ],
    ids=["2d", "cumulative", "batch-only", "no-affine", "1d"],
)
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_and_its_buffers(norm: nn.Module, training: bool) -> None:
    norm = norm.double().train(training)
    fnorm = higher.monkeypatch(norm)
    shape = (4, 3) if isinstance(norm, nn.BatchNorm1d) else (4, 3, 2, 2)
    for _ in range(2):
        x = torch.randn(shape, dtype=torch.float64) + 1
        assert_close(fnorm(x), norm(x))
    assert_close(dict(fnorm.state_dict()), dict(norm.state_dict()))


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.3), nn.Tanh(), nn.ReLU6()])
def test_what_follows_a_batch_norm(act: nn.Module) -> None:
    model, x = nn.Sequential(nn.BatchNorm2d(3), act).double(), torch.randn(4, 3, 2, 2, dtype=torch.float64)
    fmodel = higher.monkeypatch(model, copy_initial_weights=False)

    def second(net: nn.Module) -> tuple[Tensor, ...]:
        inputs, weights = x.clone().requires_grad_(), list(model.parameters())
        grads = torch.autograd.grad(net(inputs).pow(3).sum(), [inputs, *weights], create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in grads), [inputs, *weights])

    assert_close(second(fmodel), second(model))
    assert_close(dict(fmodel.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("place", [0, 1])
def test_the_functional_module_has_the_model_s_hooks_and_its_own(place: int) -> None:
    model, x = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).double(), torch.randn(4, 3, 2, 2).double()
    called: list[str] = []
    model[place].register_forward_hook(lambda *_: called.append("model"))
    fmodel = higher.monkeypatch(model)
    fmodel[place].register_forward_hook(lambda *_: called.append("functional"))
    fmodel(x)
    assert called == ["model", "functional"]
    called.clear()
    model(x)
    assert called == ["model"]


def test_mode_and_dropout_are_the_functional_module_s_own() -> None:
    model, (x, *_) = net(dropout=True), task()
    fmodel = higher.monkeypatch(model)
    torch.manual_seed(1)
    expected = functional_call(model, {}, (x,))
    torch.manual_seed(1)
    assert_close(fmodel(x), expected)
    fmodel.eval()
    assert model.training and model.drop.training and not fmodel.drop.training
    assert_close(fmodel(x), fmodel(x))


def test_it_is_still_the_user_s_module() -> None:
    model, (x, *_) = net(), task()
    fmodel = higher.patch.monkeypatch(model)
    assert isinstance(fmodel, Net) and isinstance(fmodel.features[0], nn.Conv2d)
    assert fmodel.absent is None
    assert_close(fmodel.embed(x), model.embed(x))
    assert_close(fmodel.first(x[:, :, 0, :4]), model.first(x[:, :, 0, :4]))
    assert list(fmodel.state_dict()) == list(model.state_dict())
    assert fmodel.first.weight is fmodel.second.weight
    assert len(list(fmodel.parameters())) == len(list(model.parameters()))
    assert "FunctionalNet" in repr(fmodel)


def test_given_parameters_become_the_latest() -> None:
    model, (x, *_) = net(), task()
    fmodel = higher.make_functional(model)
    with pytest.raises(ValueError, match="params: expected"):
        fmodel(x)
    with pytest.raises(RuntimeError, match="with fast weights"):
        fmodel.parameters()
    with pytest.raises(RuntimeError, match="with fast weights"):
        fmodel.first.bias = torch.zeros(4)
    params = higher.utils.get_func_params(model)
    assert all(p.is_leaf and p is not q for p, q in zip(params, model.parameters(), strict=True))
    assert_close(fmodel(x, params=params), model(x))
    doubled = [2 * p for p in params]
    names = [name for name, _ in model.named_parameters()]
    expected = functional_call(model, dict(zip(names, doubled, strict=True)), (x,))
    assert_close(fmodel(x, params=doubled), expected)
    assert_close(fmodel(x), expected)
    with pytest.raises(ValueError, match=f"params: expected {len(params)} tensors, got 1"):
        fmodel(x, params=params[:1])


def test_assigning_a_fast_weight() -> None:
    model, (x, *_) = net(), task()
    fmodel = higher.monkeypatch(model)
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    fmodel.second.weight = weight
    assert fmodel.first.weight is weight and any(p is weight for p in fmodel.parameters())
    (grad,) = torch.autograd.grad(fmodel(x).sum(), weight)
    assert grad.shape == weight.shape
    with pytest.raises(TypeError, match="expected a tensor as fast weight, got float"):
        fmodel.second.weight = 1.0


def test_options_and_their_mistakes() -> None:
    model = net()
    fmodel = higher.monkeypatch(model, device="meta")
    assert all(t.is_meta for t in [*fmodel.parameters(), *fmodel.buffers()])
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    with pytest.raises(ValueError, match="expected a module that is not functional"):
        higher.monkeypatch(fmodel)
    model.parameters = lambda: list(model.named_parameters())[1:]  # type: ignore[assignment, method-assign]
    with pytest.raises(ValueError, match=r"expected parameters\(\) to give every parameter"):
        higher.monkeypatch(model)
    del model.parameters
    with pytest.raises(ValueError, match="track_higher_grads: expected a bool"):
        higher.monkeypatch(model, track_higher_grads=1)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="recurse=False"):
        assert len(list(fmodel.parameters(recurse=False))) == len(list(model.parameters()))
    with pytest.raises(KeyError, match="submodule 'features'"):
        higher.buffer_sync(model, nn.Linear(1, 1))


def test_buffer_sync_copies() -> None:
    model = net()
    fmodel = higher.monkeypatch(model)
    model(task()[0])
    assert fmodel.features[1].num_batches_tracked == 0
    higher.patch.buffer_sync(model, fmodel)
    assert_close(dict(fmodel.named_buffers()), dict(model.named_buffers()))
    assert fmodel.features[1].running_mean is not model.features[1].running_mean


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers(kind: type[nn.RNNBase]) -> None:
    layer, x = kind(3, 4, num_layers=2).double(), torch.randn(5, 2, 3, dtype=torch.float64)
    opt = torch.optim.SGD(layer.parameters(), lr=RATE)
    with higher.innerloop_ctx(layer, opt, copy_initial_weights=False) as (flayer, diffopt):
        diffopt.step(flayer(x)[0].square().sum())
    own = dict(layer.named_parameters())
    expected = functional_call(layer, moved(layer(x)[0].square().sum(), own, RATE), (x,))[0]
    assert_close(flayer(x)[0], expected)
    assert_close(
        torch.autograd.grad(flayer(x)[0].sum(), list(own.values())),
        torch.autograd.grad(expected.sum(), list(own.values())),
    )


def test_parametrized_and_shared_modules() -> None:
    shared = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3).double())
    model = nn.Sequential(shared, nn.Tanh(), shared)
    fmodel, x = higher.monkeypatch(model, copy_initial_weights=False), torch.randn(2, 3, dtype=torch.float64)
    assert fmodel[0] is fmodel[2]
    assert_close(fmodel(x), model(x))
    params = list(model.parameters())
    assert_close(torch.autograd.grad(fmodel(x).sum(), params), torch.autograd.grad(model(x).sum(), params))


def test_a_third_derivative_through_a_fused_batch_norm_alone_is_refused() -> None:
    model, x = nn.BatchNorm2d(3).double(), torch.randn(4, 3, 2, 2, dtype=torch.float64)
    params = list(model.parameters())

    def penalised(net: nn.Module) -> list[Tensor]:
        weights = list(net.parameters())
        grads = torch.autograd.grad(net(x).pow(3).sum(), weights, create_graph=True)
        again = torch.autograd.grad(sum(g.pow(2).sum() for g in grads), weights, create_graph=True)
        return list(torch.autograd.grad(sum(g.pow(2).sum() for g in again), weights))

    expected = penalised(model)
    assert len(expected) == len(params)
    assert_close(penalised(higher.monkeypatch(model, fused=False)), expected)
    assert_close(penalised(higher.monkeypatch(model)), expected)  # one operation, which hands it to PyTorch
    if _native.status().loaded:  # else PyTorch's own batch norm runs
        drawing = nn.Sequential(model, nn.Dropout(0.1))  # no fixed list of operations: the norm alone is ours
        with pytest.raises(NotImplementedError, match="third derivative"):
            penalised(higher.monkeypatch(drawing))


def test_torch_func_passes_through_the_functional_module() -> None:
    model, x = (
        nn.BatchNorm2d(3, track_running_stats=False).double(),
        torch.randn(4, 3, 2, 2, dtype=torch.float64),
    )
    fmodel = higher.monkeypatch(model)
    gradient = torch.func.grad(lambda x: fmodel(x).pow(3).sum())(x)
    assert_close(gradient, torch.func.grad(lambda x: model(x).pow(3).sum())(x))


def test_a_finished_inner_loop_is_freed_without_the_garbage_collector() -> None:
    model, (support_x, support_y, *_) = net(), task()
    opt = torch.optim.SGD(model.parameters(), lr=RATE)
    gc.disable()
    try:
        with higher.innerloop_ctx(model, opt) as (fmodel, diffopt):
            diffopt.step(F.cross_entropy(fmodel(support_x), support_y))
        gone = weakref.ref(fmodel)
        del fmodel, diffopt
        assert gone() is None
    finally:
        gc.enable()


def test_a_difference_between_the_scripts_shows() -> None:
    exact = {"loss": np.array(2.0), "gradient/a": np.array([1.0, -4.0])}
    assert largest_error(exact, exact) == (0.0, "loss")
    assert largest_error(exact | {"gradient/a": np.array([1.0, -4.4])}, exact) == (
        pytest.approx(0.1),
        "gradient/a",
    )
    assert largest_error(exact | {"gradient/b": np.array(0.0)}, exact) == (float("inf"), "gradient/b")
    assert largest_error(exact | {"gradient/a": np.array([1.0, np.nan])}, exact) == (
        float("inf"),
        "gradient/a",
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_written_for_higher(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("higher") is None:
        pytest.skip("higher is not installed; bench/drop_in.py compares with it in an environment of its own")
    with warnings.catch_warnings():
        # higher's own, as it is compiled: `is` with a literal, invalid escape sequences.
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("higher")
    make(Sizes(ways=3, tasks=2, image_size=16, filters=4)).save(tmp_path / "problem.npz")
    problem = Problem.load(tmp_path / "problem.npz", "float64")
    dtype = torch.get_default_dtype()
    try:
        (before, theirs), (after, ours) = (
            build(problem, "cpu", f"{name}:{w}")() for w in ("before", "after")
        )
    finally:
        torch.set_default_dtype(dtype)
    assert after == pytest.approx(before, rel=1e-10)
    assert_close(dict(ours), dict(theirs), rtol=1e-7, atol=1e-9)


def test_a_part_does_not_outlive_the_whole() -> None:
    fmodule = higher.monkeypatch(nn.Sequential(nn.Linear(2, 1)))
    part = fmodule[0]
    del fmodule
    gc.collect()
    with pytest.raises(
        RuntimeError, match="root: the functional module that this is part of no longer exists"
    ):
        part(torch.ones(1, 2))


def test_assigning_takes_fast_weights() -> None:
    fmodule = higher.patch.make_functional(nn.Linear(2, 1))
    with pytest.raises(RuntimeError, match="weight: expected a module with fast weights to assign to"):
        fmodule.weight = torch.ones(1, 2)


def test_buffers_are_copied_to_a_module_of_the_same_parts() -> None:
    with pytest.raises(KeyError, match="fmodule: expected a submodule '0' as in Sequential, got none"):
        higher.patch.buffer_sync(nn.Sequential(nn.BatchNorm2d(1)), nn.Module())
