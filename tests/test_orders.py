"""Derivatives of any order through norms: of functions, and of models whose forward takes gradients itself."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from helpers import maml_loss
from torch import Tensor, nn
from torch.autograd import grad as gradient_of
from torch.nn.functional import layer_norm as by_layer
from torch.utils.checkpoint import checkpoint

import mamlpp_fast as mf
from mamlpp_fast import reference
from mamlpp_fast.compat import higher
from mamlpp_fast.compat import learn2learn as l2l

# torch's own: of its forward mode, and of `backward` with a graph.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning"),
]
SHAPE = (5, 4, 6)


def statistics() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)


def _rows(w: Tensor) -> Tensor:
    return w[:, None].expand(4, 6)


# By PyTorch's functions and by what they call, with running statistics behind the affine parameters; and the axes.
NORMS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "batch": (lambda x, w, b, m=None, v=None: F.batch_norm(x, m, v, w, b, True, 0.3, 0.1), (0, 2)),
    "batch_by_torch": (
        lambda x, w, b, m=None, v=None: torch.batch_norm(x, w, b, m, v, True, 0.3, 0.1, False),
        (0, 2),
    ),
    "instance": (lambda x, w, b, m=None, v=None: F.instance_norm(x, m, v, w, b, True, 0.3, 0.1), (2,)),
    "instance_by_torch": (
        lambda x, w, b, m=None, v=None: torch.instance_norm(x, w, b, m, v, True, 0.3, 0.1, False),
        (2,),
    ),
    "layer": (lambda x, w, b: F.layer_norm(x, (4, 6), _rows(w), _rows(b), 0.1), (1, 2)),
    "layer_by_torch": (lambda x, w, b: torch.layer_norm(x, [4, 6], _rows(w), _rows(b), 0.1), (1, 2)),
}


def given() -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (SHAPE, (4,), (4,))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def derivatives(norm: Callable[..., Tensor]) -> list[Tensor]:
    """The value, and derivatives of up to the fourth order along lines."""
    tensors = given()
    found = [norm(*tensors)]
    value = found[0].pow(3).mean()
    for _ in range(4):
        grads = torch.autograd.grad(value, tensors, create_graph=True)
        found += grads
        value = torch.stack([g.flatten() @ torch.linspace(-1, 1, g.numel()).to(g) for g in grads]).sum()
    return [f.detach() for f in found]


@pytest.mark.parametrize("name", NORMS)
def test_derivatives_are_those_of_the_norm_written_out(name: str) -> None:
    norm, axes = NORMS[name]

    def written_out(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        return (x - mean) / (var + 0.1).sqrt() * w[:, None] + b[:, None]

    with reference.norms_of_any_order():
        found = derivatives(norm)
    torch.testing.assert_close(found, derivatives(written_out), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in NORMS if "layer" not in name])
def test_running_statistics_move_once(name: str) -> None:
    norm, expected, found = NORMS[name][0], statistics(), statistics()
    y = norm(*given(), *expected)
    with reference.norms_of_any_order():
        torch.testing.assert_close(norm(*given(), *found), y)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["batch", "instance"])
def test_results_have_the_type_of_pytorchs_and_its_error(name: str, dtype: torch.dtype) -> None:
    norm, tensors = NORMS[name][0], [t.detach().to(dtype) for t in given()]
    exact = norm(*(t.double() for t in tensors))
    expected = norm(*tensors)
    with reference.norms_of_any_order():
        found = norm(*tensors)
    assert found.dtype is expected.dtype is dtype
    assert (found - exact).abs().max() <= 2 * (expected - exact).abs().max()


def test_errors_and_evaluation_are_pytorchs() -> None:
    x = torch.randn(1, 4, dtype=torch.float64)
    norm = nn.BatchNorm1d(4, dtype=torch.float64)
    with reference.norms_of_any_order():
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            norm(x)
        with pytest.raises(RuntimeError, match="normalized_shape"):
            F.layer_norm(x, (3,))
        found = norm.eval()(x)
    torch.testing.assert_close(found, norm(x), rtol=0, atol=0)


class WrittenOut(nn.Module):
    """A norm of [N, 8] over an axis, in place of PyTorch's."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        if axis == 0:
            self.register_buffer("running_mean", torch.zeros(8))
            self.register_buffer("running_var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, self.axis, correction=0, keepdim=True)
        if self.axis == 0:
            with torch.no_grad():
                self.running_mean.lerp_(mean[0], 0.1)
                self.running_var.lerp_(var[0] * len(x) / (len(x) - 1), 0.1)
        return (x - mean) / (var + 1e-5).sqrt() * self.weight + self.bias


class Energy(nn.Module):
    """The force of a learned energy: x [N, 6] to [N, 6], by ``order`` derivatives."""

    def __init__(self, norm: nn.Module, order: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), norm, nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))
        self.order = order
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = self.net(x).sum()
            for _ in range(self.order):
                (found,) = torch.autograd.grad(value, x, create_graph=True)
                value = found.square().sum()
        return found


class Counting(Energy):
    """Computes with what its calls leave: a number, a list, a dict, and a buffer that it sets anew."""

    def __init__(self, norm: nn.Module, **options: Any) -> None:
        super().__init__(norm, **options)
        self.seen: list[float] = []
        self.by_name: dict[str, int] = {}
        self.register_buffer("average", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.average: Tensor = 0.9 * self.average + x.detach().mean(0)
        self.seen.append(float(x.sum()))
        self.by_name["calls"] = self.by_name.get("calls", 0) + 1
        self.last = getattr(self, "last", 1.0) / 2
        found: Tensor = super().forward(x) * (self.average + sum(self.seen) + self.by_name["calls"])
        return found * self.last + self.calls


SHARED = {"per_step_affine": False, "per_step_stats": False}


def energies(kind: str, **options: Any) -> tuple[Energy, Energy]:
    """One with a norm written out, and one with PyTorch's."""
    torch.manual_seed(0)
    norms = {
        "batch": (WrittenOut(0), nn.BatchNorm1d(8)),
        "layer": (WrittenOut(1), nn.LayerNorm(8)),
        "per step": (WrittenOut(0), reference.PerStepBatchNorm2d(8, 1, **SHARED)),
        "fused": (WrittenOut(0), mf.PerStepBatchNorm2d(8, 1, **SHARED)),
    }
    right, model = (Energy(norm, **options).double() for norm in norms[kind])
    with torch.no_grad():
        for p in right.parameters():
            p.add_(torch.randn_like(p) / 4)
    model.load_state_dict(right.state_dict(), strict=False)
    return right, model


def task() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    sx, sy, tx, ty = torch.randn(4, 5, 6, dtype=torch.float64)
    return sx, sy, tx, ty


def textbook(model: nn.Module, predict: Callable[..., Tensor], first_order: bool = False) -> list[Tensor]:
    """The meta-gradients and buffers after two inner steps."""
    target = maml_loss(predict, model, task(), loss_fn=F.mse_loss, second_order=not first_order)
    grads = torch.autograd.grad(target, list(model.parameters()), allow_unused=True)
    return [*(g for g in grads if g is not None), *(b for b in model.buffers() if b.is_floating_point())]


class Pushed(Energy):
    """The tangent of an energy, by forward mode."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        pushed: Tensor = torch.func.jvp(self.net, (x,), (torch.ones_like(x),))[1]
        return pushed.expand(-1, 6)


class Left(Energy):
    """The force by what ``torch.autograd.backward`` leaves, of which no mode is told."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x.detach().requires_grad_()
        torch.autograd.backward(self.net(x).sum(), create_graph=True, inputs=[x])
        assert x.grad is not None
        return x.grad


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


WAYS = (reference.functional_call, reference.predicted, mf.functional_call)


@pytest.mark.parametrize("predict", WAYS)
def test_what_a_forward_that_takes_gradients_leaves_is_as_of_one_call(predict: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    right, model = (Counting(norm).double() for norm in (WrittenOut(1), nn.LayerNorm(8)))
    model.load_state_dict(right.state_dict())
    close(textbook(model, predict), textbook(right, torch.func.functional_call))
    assert (model.calls, model.seen, model.by_name) == (3, right.seen, {"calls": 3})


@pytest.mark.parametrize(("order", "first_order"), [(1, False), (2, True), (2, False)])
@pytest.mark.parametrize(
    ("kind", "predict"),
    [
        *((kind, way) for kind in ("batch", "layer", "per step") for way in WAYS),
        ("fused", mf.functional_call),
    ],
)
def test_a_forward_that_takes_gradients(
    kind: str, order: int, first_order: bool, predict: Callable[..., Tensor]
) -> None:
    right, model = energies(kind, order=order)
    expected = textbook(right, torch.func.functional_call, first_order)
    close(textbook(model, predict, first_order), expected)
    assert model.calls == right.calls == 3


@pytest.mark.parametrize("kind", ["batch", "layer", "per step", "fused"])
@pytest.mark.parametrize("engine", ["reference", "autograd", "auto"])
def test_engines_and_a_forward_that_takes_gradients(kind: str, engine: Any) -> None:
    right, model = energies(kind)
    config = mf.MAMLConfig.maml(steps=2, inner_lr=0.1, loss="mse", adapt_norm=True)
    learner = mf.MAMLPlusPlus(model, config, engine=engine, precision="float64")
    sx, sy, tx, ty = task()
    learner.meta_step(mf.EpisodeBatch(sx[None], sy[None], tx[None], ty[None]))
    found = [p.grad for p in model.parameters() if p.grad is not None and p.grad.any()]
    floating = [b for b in model.buffers() if b.is_floating_point()]
    close([*found, *floating], textbook(right, torch.func.functional_call))


@pytest.mark.parametrize("forward", [Pushed, Left])
def test_derivatives_by_other_means(forward: type[Energy]) -> None:
    right, model = energies("layer")
    for each in (right, model):
        each.__class__ = forward
    close(textbook(model, reference.predicted), textbook(right, torch.func.functional_call))


@pytest.mark.parametrize("way", ["accelerated", "functional_call"])
def test_gradients_of_tangents_of_a_model(way: str) -> None:
    right, model = (energy.net for energy in energies("layer"))
    x, along, *_ = task()
    called = mf.accelerate(model) if way == "accelerated" else lambda x: mf.functional_call(model, {}, (x,))

    def gradient(f: Callable[[Tensor], Tensor]) -> Tensor:
        found: Tensor = torch.func.grad(lambda x: torch.func.jvp(f, (x,), (along,))[1].pow(2).sum())(x)
        return found

    torch.testing.assert_close(gradient(called), gradient(right), rtol=1e-9, atol=1e-11)


def test_accelerate_and_a_forward_that_takes_gradients() -> None:
    right, model = energies("layer")
    close(
        textbook(mf.accelerate(model), torch.func.functional_call),
        textbook(right, torch.func.functional_call),
    )


@pytest.mark.parametrize("way", ["accelerated", "functional", "learned", "per step"])
def test_a_loop_of_ones_own_with_third_derivatives(way: str) -> None:
    def penalties(model: Callable[[Tensor], Tensor], own: list[Tensor]) -> list[Tensor]:
        loss = F.mse_loss(model(task()[0]), task()[1])
        for _ in range(2):
            grads = torch.autograd.grad(loss, own, create_graph=True)
            loss = torch.stack([g.square().sum() for g in grads]).sum()
        return list(torch.autograd.grad(loss, own))

    torch.manual_seed(0)
    right, model = (
        nn.Sequential(nn.Linear(6, 8, bias=False), norm, nn.Tanh(), nn.Linear(8, 6)).double()
        for norm in (WrittenOut(0), nn.BatchNorm1d(8))
    )
    model.load_state_dict(right.state_dict(), strict=False)
    expected = penalties(right, list(right.parameters()))
    with reference.norms_of_any_order():
        if way == "accelerated":
            found = penalties(mf.accelerate(model), list(model.parameters()))
        elif way == "functional":
            functional = higher.monkeypatch(model, copy_initial_weights=False)
            found = penalties(functional, list(functional.parameters()))
        elif way == "learned":
            clone = l2l.clone_module(model)
            found = penalties(clone, list(clone.parameters()))
        else:
            model = mf.convert_batch_norm(model, 1, per_step_affine=False, per_step_stats=False)
            found = penalties(model, list(model.parameters()))
    close(found, expected)


class Switched(Energy):
    """Takes gradients where it is told to, and where they are recorded."""

    on = False

    def forward(self, x: Tensor) -> Tensor:
        if self.on and torch.is_grad_enabled():
            return super().forward(x)
        self.calls += 1
        y: Tensor = self.net(x)
        return y.expand(-1, 6)


def normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return by_layer(x, (8,), weight, bias)


def pulled(y: Tensor, x: Tensor) -> Tensor:
    return gradient_of(y.sum(), x, create_graph=True)[0]


class Helped(Energy):
    """Names neither norm nor gradient itself: its functions do, one of a module that names it for it."""

    of: Any

    def features(self, x: Tensor) -> Tensor:
        norm: Any = self.net[1]
        return normed(x, norm.weight, norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x.detach().requires_grad_()
        force: Tensor = self.of["gradient"][0](self.net[4](self.net[2](self.features(self.net[0](x)))), x)
        return force


class Bare(nn.Module):
    """Affine parameters alone, for a norm that is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))


@pytest.mark.parametrize("predict", [*WAYS, "accelerated"])
def test_a_forward_that_takes_gradients_later(predict: Any) -> None:
    """Behind calls without: of its own accord, or since none are recorded."""
    right, model = energies("batch")
    for each in (right, model):
        each.__class__ = Switched
    own = predict
    if predict == "accelerated":
        model, own = mf.accelerate(model), torch.func.functional_call
    for on in (False, True):
        for each, call in ((right, torch.func.functional_call), (model, own)):
            vars(each)["on"] = on
            with torch.no_grad():
                call(each, dict(each.named_parameters()), (task()[0],))
        close(textbook(model, own), textbook(right, torch.func.functional_call))


@pytest.mark.parametrize("predict", [*WAYS, "accelerated"])
def test_norms_and_gradients_of_functions_that_a_forward_calls(predict: Any) -> None:
    right, model = energies("layer")
    bare, own = Bare().double(), predict
    bare.load_state_dict(model.net[1].state_dict())
    model.net[1] = bare
    model.__class__ = Helped
    vars(model)["of"] = {"gradient": [pulled]}
    if predict == "accelerated":
        model, own = mf.accelerate(model), torch.func.functional_call
    close(textbook(model, own), textbook(right, torch.func.functional_call))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("way", WAYS)
def test_lazy_modules_of_a_forward_that_takes_gradients(way: Callable[..., Tensor]) -> None:
    right, ready = energies("batch")
    net = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Tanh(), nn.Dropout(0), nn.LazyLinear(1))
    model = Energy(nn.Identity())
    model.net = net.double()
    x = task()[0]
    way(model, {}, (x,))
    ready.load_state_dict(model.state_dict())
    assert ready.net[1].num_batches_tracked == 1
    right.load_state_dict({n: t for n, t in model.state_dict().items() if "tracked" not in n})
    close(textbook(model, way), textbook(right, torch.func.functional_call))


@pytest.mark.parametrize("way", WAYS)
def test_checkpoints_of_a_forward_that_takes_gradients(way: Callable[..., Tensor]) -> None:
    """Both passes of the first call save the same."""
    right, model = energies("layer")
    x = task()[0].requires_grad_()
    expected = torch.autograd.grad(right(x).square().sum(), list(right.parameters())[:3])
    for _ in range(2):
        y = checkpoint(lambda x: way(model, {}, (x,)), x, use_reentrant=False)
        found = torch.autograd.grad(y.square().sum(), list(model.parameters())[:3])
        close(list(found), list(expected))


def test_random_numbers_are_drawn_once() -> None:
    right, model = energies("layer", dropout=0.5)
    found = []
    for each in (right, model):
        torch.manual_seed(2)
        found.append([*textbook(each, reference.predicted), torch.rand(1)])
    close(found[1], found[0])


def test_what_takes_no_gradient_is_called_once_with_pytorchs_norms() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8)).double()
    seen = []

    class See(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(5, 6, dtype=torch.float64)
    y = reference.predicted(model, {}, x)
    with See():
        assert torch.equal(reference.predicted(model, {}, x), y)
    assert seen.count(F.layer_norm) == 1


@pytest.mark.parametrize("frozen", [True, False])
def test_statistics_that_are_no_buffers_move_once_a_call(frozen: bool) -> None:
    right, model = energies("batch")
    norm, names = cast(Any, model.net[1]), ("running_mean", "running_var")
    for name in names:
        value = norm._buffers.pop(name)
        setattr(norm, name, nn.Parameter(value, requires_grad=False) if frozen else value)
    for x in task()[:2]:
        close([mf.functional_call(model, {}, x)], [right(x)])
        close([getattr(norm, name) for name in names], [getattr(right.net[1], name) for name in names])
