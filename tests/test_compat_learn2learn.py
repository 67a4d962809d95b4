"""learn2learn's learners on our operations, against nested autograd of plain PyTorch, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from front_end_helpers import Calls
from torch import Tensor, nn
from torch.func import functional_call

import mamlpp_fast.compat.learn2learn as l2l
from bench.learn2learn_scripts import SCRIPTS, errors, run
from mamlpp_fast.compat.learn2learn._batch_norm import FusedBatchNorm2d, normalise_relu
from mamlpp_fast.compat.learn2learn.algorithms import MAML, MetaSGD

WAYS, STEPS, RATE = 3, 3, 0.1
Task = tuple[Tensor, Tensor, Tensor, Tensor]


def network() -> nn.Sequential:
    """Batch norms of both kinds, every parameter off the value that would hide an error."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 6),
        nn.BatchNorm1d(6, track_running_stats=False),
        nn.LeakyReLU(),
        nn.Linear(6, WAYS),
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def task() -> Task:
    x = torch.randn(2, 2 * WAYS, 1, 8, 8, dtype=torch.float64)
    y = torch.arange(WAYS).repeat(2)
    return x[0], y, x[1], y


def textbook(
    model: nn.Module,
    data: Task,
    rates: dict[str, Tensor | float],
    adapting: set[str] | None = None,
    first_order: bool = False,
) -> Tensor:
    """The target loss after STEPS of plain nested autograd."""
    fast: dict[str, Tensor] = dict(model.named_parameters())
    names = [name for name in fast if adapting is None or name in adapting]
    for _ in range(STEPS):
        loss = F.cross_entropy(functional_call(model, fast, (data[0],)), data[1])
        grads = torch.autograd.grad(loss, [fast[n] for n in names], create_graph=not first_order)
        fast = fast | {n: fast[n] - rates[n] * g for n, g in zip(names, grads, strict=True)}
    return F.cross_entropy(functional_call(model, fast, (data[2],)), data[3])


def adapted_loss(learner: nn.Module, data: Task) -> Tensor:
    for _ in range(STEPS):
        learner.adapt(F.cross_entropy(learner(data[0]), data[1]))
    return F.cross_entropy(learner(data[2]), data[3])


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in module.parameters()]


@pytest.mark.parametrize("first_order", [False, True])
def test_maml_has_the_textbooks_loss_and_gradients(first_order: bool) -> None:
    model, data = network(), task()
    witness = copy.deepcopy(model)
    expected = textbook(witness, data, dict.fromkeys(dict(model.named_parameters()), RATE), None, first_order)
    expected.backward()
    maml = l2l.algorithms.MAML(model, lr=RATE, first_order=first_order)
    loss = adapted_loss(maml.clone(), data)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(model), gradients(witness))
    torch.testing.assert_close(dict(model.named_buffers()), dict(witness.named_buffers()))


def test_meta_sgd_has_the_textbooks_gradients_for_weights_and_rates() -> None:
    model, data = network(), task()
    witness = copy.deepcopy(model)
    rates = {n: torch.full_like(p, RATE).requires_grad_() for n, p in witness.named_parameters()}
    textbook(witness, data, dict(rates)).backward()
    learner = l2l.algorithms.MetaSGD(model, lr=RATE)
    adapted_loss(learner.clone(), data).backward()
    torch.testing.assert_close(gradients(model), gradients(witness))
    torch.testing.assert_close([p.grad for p in learner.lrs], [r.grad for r in rates.values()])


def test_anil_adapts_the_head_alone() -> None:
    model, data = network(), task()
    witness = copy.deepcopy(model)
    textbook(witness, data, {"8.weight": RATE, "8.bias": RATE}, {"8.weight", "8.bias"}).backward()
    features, head = model[:8], l2l.algorithms.MAML(model[8], lr=RATE)
    learner = head.clone()
    support, target = features(data[0]), features(data[2])
    adapted_loss(learner, (support, data[1], target, data[3])).backward()
    torch.testing.assert_close(gradients(model), gradients(witness))


@pytest.mark.parametrize("transform", ["scale", "kronecker", "linear", "curvature"])
def test_gbml_with_transforms_at_the_identity_is_maml(transform: str) -> None:
    made = {
        "scale": lambda p: l2l.nn.Scale(tuple(p.shape)),
        "kronecker": l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear),
        "linear": l2l.optim.ModuleTransform(lambda n, m: _identity(n)),
        "curvature": l2l.optim.MetaCurvatureTransform,
    }[transform]
    model, data = network(), task()
    witness = copy.deepcopy(model)
    adapted_loss(MAML(witness, lr=RATE).clone(), data).backward()
    gbml = l2l.algorithms.GBML(model, transform=made, lr=RATE).double()
    adapted_loss(gbml.clone(), data).backward()
    torch.testing.assert_close(gradients(model), gradients(witness))
    assert all(p.grad is not None for p in gbml.compute_update.parameters())


def _identity(n: int) -> nn.Linear:
    layer = nn.Linear(n, n, bias=False)
    nn.init.eye_(layer.weight)
    return layer


def test_gbml_adapts_its_transforms() -> None:
    model, (x, y, *_) = nn.Linear(3, 2).double(), (torch.randn(4, 3).double(), torch.tensor([0, 1, 0, 1]), 0)
    gbml = l2l.algorithms.GBML(
        model, transform=lambda p: l2l.nn.Scale(tuple(p.shape)), lr=RATE, adapt_transform=True
    ).double()
    learner = gbml.clone()
    for _ in range(2):
        learner.adapt(F.cross_entropy(learner(x), y))
    theta = list(model.parameters())
    scales = [torch.ones_like(p) for p in theta]

    def gradient(of: list[Tensor], by: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(F.linear(x, *of), y), by, create_graph=True)

    scales = [s.requires_grad_() for s in scales]
    theta = [p - RATE * s * g for p, s, g in zip(theta, scales, gradient(theta, theta), strict=True)]
    new = [s - RATE * g for s, g in zip(scales, gradient(theta, scales), strict=True)]
    theta = [p - RATE * s * g for p, s, g in zip(theta, new, gradient(theta, theta), strict=True)]
    torch.testing.assert_close(list(learner.module.parameters()), theta)


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_a_cloned_batch_norm_computes_what_the_original_does(track: bool, momentum: float | None) -> None:
    norm = nn.BatchNorm2d(3, momentum=momentum, track_running_stats=track).double()
    nn.init.uniform_(norm.weight)
    witness = copy.deepcopy(norm)
    clone = l2l.clone_module(norm)
    assert type(clone) is FusedBatchNorm2d and repr(clone) == repr(norm)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    for mode in (True, True, False):
        clone.train(mode), witness.train(mode)
        torch.testing.assert_close(clone(x), witness(x))
    # Running statistics are shared with the original, as learn2learn's clones share them.
    torch.testing.assert_close(dict(norm.named_buffers()), dict(witness.named_buffers()))
    with l2l.plain_batch_norm():
        torch.testing.assert_close(clone.train()(x), witness.train()(x))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        clone.train()(x[:1, :, :1, :1])


def test_batch_norm_without_weights_or_under_func_goes_pytorchs_way() -> None:
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    bare = nn.BatchNorm2d(3, affine=False).double()
    torch.testing.assert_close(l2l.clone_module(bare)(x), copy.deepcopy(bare)(x))
    norm = nn.BatchNorm2d(3, track_running_stats=False).double()
    clone = l2l.clone_module(norm)
    ours, plain = (torch.func.grad(lambda t, m=m: m(t).square().sin().sum())(x) for m in (clone, norm))
    torch.testing.assert_close(ours, plain)


def test_a_relu_with_hooks_is_not_fused_away() -> None:
    norm, relu = l2l.clone_module(nn.BatchNorm2d(3).double()), nn.ReLU()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(normalise_relu(norm, relu, x), relu(norm(x)))
    seen: list[Tensor] = []
    relu.register_forward_hook(lambda module, inputs, output: seen.append(output))
    normalise_relu(norm, relu, x)
    l2l.clone_module(nn.Sequential(norm, relu))(x)
    assert len(seen) == 2


def test_a_cloned_sequence_stays_one() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.LeakyReLU(0.2), nn.BatchNorm2d(3), nn.BatchNorm2d(3)).double()
    clone = l2l.clone_module(model)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(clone(x), copy.deepcopy(model)(x))
    assert repr(clone) == repr(model) and isinstance(clone, nn.Sequential)
    torch.testing.assert_close(clone[:1](x), copy.deepcopy(model)[:1](x))
    clone.eval(), model.eval()
    torch.testing.assert_close(clone(x), model(x))


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.register_buffer("scale", torch.tensor(2.0, requires_grad=True))
        self.register_buffer("count", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x)) * self.scale


def test_clone_copies_shared_parameters_once_and_shares_plain_buffers() -> None:
    module = _Tied()
    clone = l2l.clone_module(module)
    assert clone.one.weight is clone.two.weight and clone.one.weight is not module.one.weight
    assert clone.scale is not module.scale and clone.count is module.count
    clone(torch.ones(2, 3)).sum().backward()
    assert module.one.weight.grad is not None and module.scale.grad is not None
    updates = [torch.full_like(p, i) for i, p in enumerate(clone.parameters())]
    assert l2l.update_module(clone, updates) is clone
    assert clone.one.weight is clone.two.weight
    torch.testing.assert_close(clone.one.bias, module.one.bias + 1)
    assert l2l.clone_module("no module") == "no module"


def test_update_module_takes_attributes_and_warns_of_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    clone = l2l.clone_module(nn.Linear(2, 1))
    before = clone.bias
    clone.bias.update = torch.ones(1)
    l2l.update_module(clone)
    torch.testing.assert_close(clone.bias, before + 1)
    assert not clone.bias.is_leaf and before.update is None
    l2l.update_module(clone, [torch.zeros(1, 2)])
    l2l.algorithms.maml_update(clone, 0.1, [None])
    printed = capsys.readouterr().out
    assert "WARNING:update_module(): Parameters and updates have different length. (2 vs 1)" in printed
    assert "WARNING:maml_update(): Parameters and gradients have different length. (2 vs 1)" in printed


@pytest.mark.parametrize("keep", [False, True])
def test_detach_cuts_the_graph(keep: bool) -> None:
    module = _Tied()
    clone = l2l.clone_module(module)
    l2l.detach_module(clone, keep_requires_grad=keep)
    assert all(p.is_leaf and p.requires_grad is keep for p in clone.parameters())
    if keep:
        clone(torch.ones(2, 3)).sum().backward()
        assert clone.one.weight.grad is not None and module.one.weight.grad is None


def test_a_recurrent_network_adapts() -> None:
    parts = {"rnn": nn.GRU(3, 4, batch_first=True), "head": nn.Linear(4, WAYS)}
    model = Calls(lambda m, x: m.head(m.rnn(x)[0][:, -1]), **parts).double()
    data = (torch.randn(6, 5, 3).double(), torch.arange(WAYS).repeat(2)) * 2
    witness = copy.deepcopy(model)
    textbook(witness, data, dict.fromkeys(dict(model.named_parameters()), RATE)).backward()
    adapted_loss(MAML(model, lr=RATE).clone(), data).backward()
    torch.testing.assert_close(gradients(model), gradients(witness))


def test_unused_parameters_are_refused_or_left(capfd: pytest.CaptureFixture[str]) -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "not": nn.Linear(2, 1)})
    maml = MAML(model, lr=RATE)
    clone = maml.clone()
    before = list(clone.parameters())
    loss = clone.module["used"](torch.ones(1, 2)).sum()
    for error in (RuntimeError, UnboundLocalError):  # autograd's, and what learn2learn lets escape
        with pytest.raises(error, match="not have been used"):
            clone.adapt(loss)
    output = capfd.readouterr()
    assert "learn2learn: Maybe try with allow_nograd=True and/or allow_unused=True ?" in output.out
    assert "Traceback" in output.err
    clone.adapt(loss, allow_unused=True)
    after = list(clone.parameters())
    assert [a is b for a, b in zip(before, after, strict=True)] == [False, False, True, True]


def test_frozen_parameters_are_refused_or_left() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    (x, y, *_) = task()
    clone = MAML(model, lr=RATE).clone()
    with pytest.raises(RuntimeError, match="does not require grad"):
        clone.adapt(F.cross_entropy(clone(x), y))
    allowed = MAML(model, lr=RATE, allow_nograd=True)
    assert allowed.allow_unused and allowed.clone().allow_nograd
    clone = allowed.clone()
    clone.adapt(F.cross_entropy(clone(x), y))
    torch.testing.assert_close(clone.module[0].weight, model[0].weight)
    F.cross_entropy(clone(x), y).backward()
    assert model[0].weight.grad is None and model[8].weight.grad is not None


def test_options_of_clone_and_adapt_override() -> None:
    maml = MAML(network(), lr=RATE, first_order=True)
    assert maml.clone().first_order and not maml.clone(first_order=False).first_order
    (x, y, *_) = task()
    clone = maml.clone()
    clone.adapt(F.cross_entropy(clone(x), y), first_order=False)
    meta_sgd = MetaSGD(network(), lr=RATE, first_order=True)
    assert meta_sgd.clone().first_order


def test_learners_answer_with_their_modules_attributes() -> None:
    module = _Tied()
    maml = MAML(module, lr=RATE)
    assert maml.one is module.one and maml.module is module
    with pytest.raises(AttributeError, match="nothing"):
        _ = maml.nothing
    assert next(n for n, _ in maml.named_parameters()) == "module.one.weight"
    assert list(maml.state_dict()) == [f"module.{name}" for name in module.state_dict()]


def test_a_learned_rate_takes_a_gradient() -> None:
    rate = nn.Parameter(torch.tensor(RATE, dtype=torch.float64))
    maml = MAML(network(), lr=rate)
    adapted_loss(maml.clone(), task()).backward()
    assert rate.grad is not None and float(rate.grad.abs()) > 0


def test_learnable_optimizer_updates_the_model_and_learns_the_transform() -> None:
    model, x = nn.Linear(2, 1).double(), torch.ones(3, 2, dtype=torch.float64)
    before = model.weight.detach().clone()
    optimizer = l2l.optim.LearnableOptimizer(model, lambda p: l2l.nn.Scale(tuple(p.shape)), lr=0.5).double()
    model(x).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before - 0.5 * 3)
    optimizer.zero_grad()
    model(x).sum().backward()
    # d(sum w'x)/d scale = -lr * grad * d/dw' = -0.5 * 3 * 3
    torch.testing.assert_close(optimizer.transforms[0].alpha.grad, torch.full_like(before, -4.5))


def test_small_helpers() -> None:
    logits, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    assert float(l2l.accuracy(logits, labels)) == float(l2l.utils.accuracy(logits, labels)) == 0.5
    x = torch.tensor(3.0, requires_grad=True)
    (l2l.magic_box(x) * 2).backward()
    assert float(l2l.magic_box(x).detach()) == 1 and float(x.grad) == 2 and l2l.magic_box("x") == "x"
    clone = l2l.clone_distribution(torch.distributions.Normal(x, torch.tensor(1.0)))
    assert clone.loc is not x and clone.loc.requires_grad
    assert not l2l.detach_distribution(clone).loc.requires_grad
    prototypes = l2l.nn.PrototypicalClassifier(torch.eye(2), torch.tensor([1, 0]))
    assert prototypes(torch.eye(2)).argmax(1).tolist() == [1, 0]
    kronecker = l2l.nn.KroneckerLinear(2, 3)
    torch.nn.init.normal_(kronecker.left), torch.nn.init.normal_(kronecker.right)
    v = torch.randn(6)
    matrix = torch.kron(kronecker.right.t().contiguous(), kronecker.left)
    torch.testing.assert_close(kronecker(v), matrix @ v)


def test_a_distribution_is_copied_with_its_parts() -> None:
    """Its tensors that take a gradient, its modules and the distributions in it; the rest is a plain copy."""

    class Noisy(torch.distributions.Normal):
        def __init__(self, loc: Tensor, scale: Tensor) -> None:
            super().__init__(loc, scale)
            self.net = nn.Linear(2, 1)

    loc, scale = torch.zeros(3, requires_grad=True), torch.ones(3)
    whole = torch.distributions.Independent(Noisy(loc, scale), 1)
    clone = l2l.clone_distribution(whole)
    assert clone.base_dist is not whole.base_dist
    clone.log_prob(torch.ones(3)).backward()
    torch.testing.assert_close(loc.grad, torch.ones(3))
    clone.base_dist.net(torch.ones(2)).backward()
    torch.testing.assert_close(whole.base_dist.net.weight.grad, torch.ones(1, 2))
    assert clone.base_dist.scale is not scale
    l2l.detach_distribution(clone)
    assert not clone.base_dist.loc.requires_grad and clone.base_dist.scale.equal(scale)
    assert all(p.is_leaf for p in clone.base_dist.net.parameters())


def test_meta_sgd_update_takes_attributes() -> None:
    """The rate and gradient that a tensor carries; what lacks either stays."""
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    weight, bias = model[0].weight, model[0].bias
    weight.grad, bias.grad = torch.ones(1, 2), torch.ones(1)
    weight._lr = torch.tensor([[0.5, 0.25]])
    assert l2l.algorithms.meta_sgd_update(model) is model
    torch.testing.assert_close(model[0].weight, weight - torch.tensor([[0.5, 0.25]]))
    assert weight.grad is None and weight._lr is None
    assert model[0].bias is bias and bias.grad is not None


def test_updates_by_what_the_parameters_carry() -> None:
    """``maml_update`` without gradients, ``DifferentiableSGD`` without gradients: attributes and ``grad``."""
    model = l2l.clone_module(nn.Linear(2, 1))
    before = model.weight
    before.update = torch.ones(1, 2)
    l2l.algorithms.maml_update(model, 0.1)
    torch.testing.assert_close(model.weight, before + 1)
    plain = nn.Linear(2, 1)
    before = plain.weight
    before.grad = torch.full((1, 2), 2.0)
    l2l.optim.DifferentiableSGD(0.5)(plain)
    torch.testing.assert_close(plain.weight, before - 1)


def test_recurrent_kronecker_cells() -> None:
    """At the identity an RNN cell adds input and state, and an LSTM cell gates each element alone."""
    x, h, c = torch.randn(3, 2, 4).unbind()
    y, hidden = l2l.nn.KroneckerRNN(2, 4)(x, h)
    torch.testing.assert_close((y, hidden), (torch.tanh(x + h),) * 2)
    gate = torch.sigmoid(x + h)
    expected = gate * c + gate * torch.tanh(x + h)
    out, (same, cell) = l2l.nn.KroneckerLSTM(2, 4)(x, (h, c))
    torch.testing.assert_close((out, same, cell), (gate * torch.tanh(expected),) * 2 + (expected,))


def test_modules_that_learn2learn_refuses_are_refused() -> None:
    kronecker = l2l.nn.KroneckerLinear(2, 3, device="cpu")
    torch.testing.assert_close(kronecker(torch.ones(6)), torch.ones(6))
    with pytest.raises(ValueError, match=r"must have size n\*m"):
        kronecker(torch.ones(5))
    with pytest.raises(ValueError, match=r"must have shape \(n, m\)"):
        kronecker(torch.ones(3, 2))
    cube = torch.ones(2, 2, 2)
    with pytest.raises(NotImplementedError, match="not supported"):
        l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)(cube)
    with pytest.raises(NotImplementedError, match="not supported by MetaCurvature"):
        l2l.optim.MetaCurvatureTransform(cube)
    with pytest.raises(ValueError, match="Transform should be either a Module or None"):
        l2l.optim.ParameterUpdate([cube], lambda p: "neither")
    with pytest.raises(ValueError, match="only accepts Modules or Parameters"):
        l2l.optim.transforms.TransformDictionary({"weight": None})


def test_a_transform_for_some_parameters() -> None:
    """A dictionary gives a module's parameters a transform, another parameter its own, and the others none."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    x = torch.ones(1, 2)
    scale = lambda alpha: lambda p: l2l.nn.Scale(tuple(p.shape), alpha)  # noqa: E731
    chosen = l2l.optim.transforms.TransformDictionary({model[0]: scale(2.0), model[1].bias: scale(3.0)})
    update = l2l.optim.ParameterUpdate(model.parameters(), chosen)
    plain = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    found = update(model(x).sum(), model.parameters())
    torch.testing.assert_close(found, [2 * plain[0], plain[1], 3 * plain[2]])


def test_an_optimiser_leaves_what_has_no_gradient() -> None:
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = l2l.optim.LearnableOptimizer(model, lambda p: l2l.nn.Scale(tuple(p.shape)), lr=0.5)
    model(torch.ones(1, 2)).sum().backward()
    model.bias.requires_grad_(True)
    optimizer.step()
    torch.testing.assert_close((model.weight, model.bias), (weight - 0.5, bias))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.zero_grad()
    torch.testing.assert_close(model.weight.grad, torch.zeros(1, 2))


def test_a_message_is_said_once() -> None:
    warn = type(l2l.utils.warn_once)()
    with pytest.warns(DeprecationWarning, match="old"):
        warn("old", severity="deprecation")
    warn("old", severity="deprecation")
    with pytest.raises(RuntimeError, match="wrong"):
        warn("wrong", severity="error")


def test_a_frozen_module_takes_no_gradient_until_it_is_thawed() -> None:
    module = l2l.nn.freeze(l2l.clone_module(nn.Linear(2, 1)))
    assert all(p.is_leaf and not p.requires_grad for p in module.parameters())
    assert all(p.requires_grad for p in l2l.nn.unfreeze(module).parameters())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_gives_the_same_numbers_on_pytorchs_batch_norm(script: str) -> None:
    sizes = {"ways": 3, "iterations": 2, "tasks": 1, "steps": 2, "hidden": 4, "dtype": "float64"}
    fused = run(script, l2l, **sizes)
    with l2l.plain_batch_norm():
        plain = run(script, l2l, **sizes)
    assert max(errors(fused, plain).values()) < 1e-6
    assert all(torch.isfinite(loss) for loss in fused["losses"])
