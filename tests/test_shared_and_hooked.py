"""Tied weights, modules under two names, hooks and reparametrisations through every inner loop, for several
meta-iterations, against a textbook loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import moved
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

import mamlpp_fast as mf
import mamlpp_fast.compat.higher as higher
import mamlpp_fast.compat.learn2learn as l2l
from tests.inner_loops import (
    CLASSES,
    RATE,
    STEPS,
    Loss,
    Task,
    adapted,
    assert_as_the_textbook,
    learned,
    task,
    textbook,
)

# Models --------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers that share one matrix, as an embedding and a decoder do."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 6)
        self.decoder = nn.Linear(6, 6, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(x)))


class TiedInOneModule(nn.Module):
    """One parameter under two names of the same module."""

    def __init__(self) -> None:
        super().__init__()
        self.up = self.down = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.up) @ self.down


class Repeated(nn.Module):
    """One layer under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Chained(nn.Module):
    """Layers by name and the chain of them, with a hook that keeps what one of them gave."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.chain = nn.Sequential(self.hidden, nn.ReLU(), self.out)
        self.hidden.register_forward_hook(_keep)

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) + self.hidden.kept.square().mean()


def _keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    module.kept = output


class Recurrent(nn.Module):
    def __init__(self, wrap: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.lstm = wrap(nn.LSTM(3, 4, batch_first=True), "weight_hh_l0")
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x.view(len(x), 2, 3))[0][:, -1])


def _old(norm: str) -> Callable[..., nn.Module]:
    """``weight_norm`` and ``spectral_norm`` as hooks, which PyTorch warns of."""

    def wrap(module: nn.Module, name: str = "weight") -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return getattr(torch.nn.utils, norm)(module, name)

    return wrap


def _chain(change: Callable[[nn.Sequential], object]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))
        change(model)
        return model

    return make


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied": Tied,
    "tied in one module": TiedInOneModule,
    "a layer twice": Repeated,
    "a layer and its chain": Chained,
    "forward hook": _chain(lambda m: m[0].register_forward_hook(lambda module, x, y: y * 0.5)),
    "hook on a fused norm": _chain(lambda m: m[1].register_forward_hook(lambda module, x, y: y - 0.5)),
    "hook with keywords": _chain(
        lambda m: m[0].register_forward_hook(lambda module, x, options, y: y * 0.5, with_kwargs=True)
    ),
    "pre-hook": _chain(lambda m: m[3].register_forward_pre_hook(lambda module, x: (x[0] + 1,))),
    "backward hook": _chain(lambda m: m[3].register_full_backward_hook(lambda module, g, go: (g[0] / 2,))),
    "backward pre-hook": _chain(
        lambda m: m[3].register_full_backward_pre_hook(lambda module, g: (g[0] / 2,))
    ),
    "old weight_norm": _chain(lambda m: _old("weight_norm")(m[3])),
    "old spectral_norm": _chain(lambda m: _old("spectral_norm")(m[0])),
    "weight_norm": _chain(lambda m: parametrizations.weight_norm(m[3])),
    "spectral_norm": _chain(lambda m: parametrizations.spectral_norm(m[3])),
    "orthogonal": _chain(lambda m: parametrizations.orthogonal(m[3])),
    "pruned": _chain(lambda m: prune.l1_unstructured(m[3], "weight", 0.5)),
    "LSTM": lambda: Recurrent(lambda module, name: module),
    "LSTM, old weight_norm": lambda: Recurrent(_old("weight_norm")),
    "LSTM, weight_norm": lambda: Recurrent(parametrizations.weight_norm),
}


# Inner loops ---------------------------------------------------------------------------------------------------------


def textbook_of_pytorch(model: nn.Module) -> Loss:
    return textbook(model, right=False)


def textbook_with_copied_buffers(model: nn.Module) -> Loss:
    return textbook(model, dict(model.named_buffers()))


def updated(model: nn.Module) -> Loss:
    def loss(data: Task) -> Tensor:
        clone = l2l.clone_module(model)
        for _ in range(STEPS):
            support = F.cross_entropy(clone(data[0]), data[1])
            grads = torch.autograd.grad(support, list(clone.parameters()), create_graph=True)
            clone = l2l.update_module(clone, [-RATE * g for g in grads])
        return F.cross_entropy(clone(data[2]), data[3])

    return loss


def with_higher(model: nn.Module) -> Loss:
    opt = torch.optim.SGD(model.parameters(), lr=RATE)

    def loss(data: Task) -> Tensor:
        with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
            for _ in range(STEPS):
                diffopt.step(F.cross_entropy(fmodel(data[0]), data[1]))
            return F.cross_entropy(fmodel(data[2]), data[3])

    return loss


LOOPS: dict[str, tuple[Callable[[nn.Module], Loss], Callable[[nn.Module], Loss]]] = {
    "adapt": (adapted, textbook),
    "adapt, every alias named": (lambda model: adapted(model, aliases=True), textbook),
    "learn2learn MAML": (lambda model: learned(l2l.algorithms.MAML(model, RATE)), textbook),
    "learn2learn Meta-SGD": (lambda model: learned(l2l.algorithms.MetaSGD(model, RATE)), textbook),
    "learn2learn GBML": (
        lambda model: learned(l2l.algorithms.GBML(model, lambda p: None, lr=RATE)),
        textbook,
    ),
    "learn2learn update_module": (updated, textbook_of_pytorch),
    "higher": (with_higher, textbook_with_copied_buffers),
}


def _meta_train(make: Callable[[], nn.Module], loop: Callable[[nn.Module], Loss]) -> list[object]:
    """Two meta-iterations of two tasks; what each left."""
    torch.manual_seed(0)
    model = make().double()
    loss, optimizer, seen = loop(model), torch.optim.SGD(model.parameters(), 0.5), []
    for iteration in range(2):
        optimizer.zero_grad()
        for number in range(2):
            value = loss(task(2 * iteration + number))
            value.backward()
            seen.append(value.detach())
        seen.append([p.grad for p in model.parameters()])
        optimizer.step()
    return [seen, {name: p.detach() for name, p in model.named_parameters()}]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("model", MODELS)
def test_every_loop_is_the_textbooks(model: str, loop: str) -> None:
    ours, plain = LOOPS[loop]
    assert_close(_meta_train(MODELS[model], ours), _meta_train(MODELS[model], plain), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("model", ["tied", "a layer and its chain"])
def test_higher_adam_moves_a_shared_parameter_once(model: str) -> None:
    torch.manual_seed(0)
    net, data = MODELS[model]().double(), task(0)
    fast: dict[str, Tensor] = dict(net.named_parameters())
    first, second = ({n: torch.zeros_like(p) for n, p in fast.items()} for _ in range(2))
    for step in range(1, STEPS + 1):
        support = F.cross_entropy(mf.reference.functional_call(net, fast, (data[0],)), data[1])
        grads = dict(
            zip(fast, torch.autograd.grad(support, list(fast.values()), create_graph=True), strict=True)
        )
        first = {n: 0.9 * m + 0.1 * grads[n] for n, m in first.items()}
        second = {n: 0.99 * v + 0.01 * grads[n].square() for n, v in second.items()}
        size = 0.1 * (1 - 0.99**step) ** 0.5 / (1 - 0.9**step)
        fast = {n: p - size * first[n] / (second[n].sqrt() + 1e-8) for n, p in fast.items()}
    wanted = F.cross_entropy(mf.reference.functional_call(net, fast, (data[2],)), data[3])
    expected = torch.autograd.grad(wanted, list(net.parameters()))
    opt = torch.optim.Adam(net.parameters(), lr=0.1, betas=(0.9, 0.99), eps=1e-8)
    for _ in range(2):  # the first leaves nothing behind
        with higher.innerloop_ctx(net, opt, copy_initial_weights=False) as (fmodel, diffopt):
            for _ in range(STEPS):
                diffopt.step(F.cross_entropy(fmodel(data[0]), data[1]))
            loss = F.cross_entropy(fmodel(data[2]), data[3])
        assert_close(loss, wanted)
        assert_close(torch.autograd.grad(loss, list(net.parameters())), expected, rtol=1e-7, atol=1e-10)


# Hooks on gradients --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["reference", "autograd", None])
def test_a_hook_on_a_gradient_acts_on_the_first_inner_gradient_and_on_the_meta_gradient(
    engine: str | None,
) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
        model[0].weight.register_hook(lambda g: g * 0.1)
        return model

    witness, data = make(), task(0)
    learner = assert_as_the_textbook(make(), witness, engine)
    if learner is not None:
        fast = mf.adapt(witness, data[0], data[1], RATE, steps=STEPS)
        logits = mf.reference.functional_call(witness, fast, (data[2],)).detach()
        batch = mf.EpisodeBatch(*(part[None] for part in data))
        assert_close(learner.evaluate(batch).logits[-1, 0], logits)


def test_parameters_without_part_in_the_loss_stay_and_those_named_adapt_though_frozen() -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double(), task(0)
    model.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    rates = mf.LSLR(model.named_parameters(), STEPS, RATE)
    expected = mf.adapt(model, data[0], data[1], rates)
    assert_close(expected["unused"], model.unused)
    loss = F.cross_entropy(mf.reference.functional_call(model, expected, (data[2],)), data[3])
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    grads = dict(zip(rates.names, found, strict=True))
    assert grads["unused"] is None
    with torch.no_grad():
        constants = mf.adapt(model, data[0], data[1], rates)
        model.unused += 1
    assert_close(constants, {name: p.detach() for name, p in expected.items()} | {"unused": model.unused - 1})
    with torch.no_grad():
        model.unused -= 1
    model[0].requires_grad_(False)
    fast = mf.adapt(model, data[0], data[1], rates)
    assert_close(fast, expected)
    F.cross_entropy(mf.reference.functional_call(model, fast, (data[2],)), data[3]).backward()
    assert model[0].weight.grad is None
    assert_close(model[2].weight.grad, grads["2.weight"])


def test_a_shared_parameter_has_one_rate() -> None:
    model = Tied()
    rates = mf.LSLR(model.named_parameters(remove_duplicate=False), STEPS)
    assert rates.names == ("encoder.weight", "encoder.bias") and rates.rates.shape == (2, STEPS)
    alias = mf.LSLR([("decoder.weight", model.decoder.weight)], STEPS, RATE)
    data = tuple(t.float() if t.is_floating_point() else t for t in task(0))
    fast = mf.adapt(model, data[0], data[1], alias)
    first = mf.adapt(
        model, data[0], data[1], mf.LSLR([("encoder.weight", model.encoder.weight)], STEPS, RATE)
    )
    assert_close(fast["decoder.weight"], first["encoder.weight"])


# Interfaces ----------------------------------------------------------------------------------------------------------


class Keywords(nn.Module):
    """Called with keywords, as models for text are; gives a dictionary, or a tuple."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(
        self, x: Tensor | None = None, *, mask: Tensor, labels: Tensor
    ) -> dict[str, Tensor] | tuple[Tensor, ...]:
        logits = self.head(torch.tanh(self.body(x * mask)))
        loss = F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if self.kind is dict else (loss, logits)


@pytest.mark.parametrize("kind", [dict, tuple])
@pytest.mark.parametrize("library", ["learn2learn", "higher"])
def test_models_that_take_keywords_and_give_containers(kind: type, library: str) -> None:
    torch.manual_seed(0)
    model = Keywords(kind).double()
    mask = torch.tensor([1.0, 1, 1, 1, 0, 0], dtype=torch.float64)
    key = "loss" if kind is dict else 0
    opt = torch.optim.SGD(model.parameters(), lr=RATE)
    maml = l2l.algorithms.MAML(model, RATE)
    for number in range(2):
        support_x, support_y, target_x, target_y = task(number)
        support = {"x": support_x, "mask": mask, "labels": support_y}
        target = {"x": target_x, "mask": mask, "labels": target_y}
        own = dict(model.named_parameters())
        fast: dict[str, Tensor] = own
        for _ in range(STEPS):
            fast = moved(mf.reference.functional_call(model, fast, (), support)[key], fast, RATE)
        wanted = mf.reference.functional_call(model, fast, (), target)[key]
        if library == "learn2learn":
            clone = maml.clone()
            for _ in range(STEPS):
                clone.adapt(clone(**support)[key])
            loss = clone(**target)[key]
        else:
            with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
                for _ in range(STEPS):
                    diffopt.step(fmodel(**support)[key])
                loss = fmodel(**target)[key]
        assert_close(loss, wanted)
        assert_close(
            torch.autograd.grad(loss, list(own.values())), torch.autograd.grad(wanted, list(own.values()))
        )


@pytest.mark.parametrize("library", ["learn2learn", "higher"])
def test_freezing_and_thawing_between_iterations(library: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    maml = l2l.algorithms.MAML(model, RATE, allow_nograd=True)
    for iteration, body_learns in enumerate((True, False, True)):
        model[0].requires_grad_(body_learns)
        data, chosen = task(iteration), [p for p in model.parameters() if p.requires_grad]
        fast = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for _ in range(STEPS):
            inner = F.cross_entropy(mf.reference.functional_call(model, fast, (data[0],)), data[1])
            fast = moved(inner, fast, RATE)
        wanted = F.cross_entropy(mf.reference.functional_call(model, fast, (data[2],)), data[3])
        if library == "learn2learn":
            loss = learned(maml)(data)
        else:
            opt = torch.optim.SGD(chosen, lr=RATE)
            with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
                for _ in range(STEPS):
                    diffopt.step(F.cross_entropy(fmodel(data[0]), data[1]))
                loss = F.cross_entropy(fmodel(data[2]), data[3])
        assert_close(loss, wanted)
        assert_close(torch.autograd.grad(loss, chosen), torch.autograd.grad(wanted, chosen))
