"""Random numbers of a forward in the fused engine: those of a plain loop after the same seed."""

from __future__ import annotations

import copy
import cProfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from front_end_helpers import Calls, Net, batch, pair
from helpers import kept_threads
from test_dropout import (
    WAYS,
    assert_form_of_the_sweep,
    assert_numbers_of_the_reference,
    assert_same,
    batch_of,
    learner,
    results,
)
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast.engine.base import Unsupported
from mamlpp_fast.engine.executions import Draw
from mamlpp_fast.engine.record import record
from mamlpp_fast.models import DropBlock

Draws = Callable[[Tensor], Tensor]


def _drop_path(h: Tensor) -> Tensor:
    keep = h.new_empty((h.shape[0],) + (1,) * (h.ndim - 1)).bernoulli_(0.7)
    keep.div_(0.7)
    return h * keep


def _of_a_part(h: Tensor) -> Tensor:
    return h * torch.empty(2, 6)[0].normal_()


def _twice(h: Tensor) -> Tensor:
    noise = torch.empty(6, dtype=h.dtype)
    first = h + noise.normal_()
    return first + noise.uniform_(-1, 1)


# What stands between the layers of an MLP, on activations [N, 6].
BETWEEN: dict[str, Draws] = {
    "drop-path": _drop_path,
    "randn": lambda h: h + torch.randn(h.shape[0], 6),
    "randn-of-all-examples": lambda h: h + torch.randn(6),
    "randn-of-the-type": lambda h: h + torch.randn(6, dtype=h.dtype),
    "randn_like": lambda h: h * torch.randn_like(h),
    "randn_like-turned": lambda h: h * torch.randn_like(h.t()).t(),  # drawn in another order of memory
    "rand": lambda h: h * (torch.rand(h.shape[0], 1) < 0.5),
    "rand-one-number": lambda h: h * torch.rand(()),
    "rand_like": lambda h: h * torch.rand_like(h),
    "rand-in-parts": lambda h: h + torch.cat([torch.rand(h.shape[0], 2), torch.zeros(h.shape[0], 4)], 1),
    "normal": lambda h: h + torch.normal(0.1, 0.2, (h.shape[0], 6)),
    "bernoulli-of-a-chance": lambda h: h * torch.bernoulli(h.detach(), 0.5),
    "empty-normal_": lambda h: h + torch.empty_like(h).normal_(0.5, 0.1),
    "empty-uniform_": lambda h: h * torch.empty(6, dtype=h.dtype).uniform_(-1, 1),
    "empty-exponential_": lambda h: h * torch.empty_like(h).exponential_(2.0),
    "empty-of-truth-values": lambda h: h * torch.empty(6, dtype=torch.bool).bernoulli_(0.5),
    "unread": lambda h: h + 0 * (torch.randn(3).sum(), torch.ones(6))[1],
    "in-place-behind": lambda h: h + torch.randn(h.shape[0], 6).mul_(0.1).clamp_(-0.1, 0.1),
    "of-a-part": _of_a_part,
    "twice": _twice,
    "out": lambda h: h * torch.randn(6, out=torch.empty(6)),
    "gumbel": lambda h: F.gumbel_softmax(h, tau=0.7),
    "distribution": lambda h: Normal(h, 1.0, validate_args=False).rsample(),
    "many": lambda h: F.dropout(h * torch.rand_like(h), 0.3) + torch.randn(h.shape[0], 1),
}


def _mlp(between: Draws, width: int = 6) -> nn.Module:
    return Calls(
        lambda m, x: m.head(between(torch.tanh(m.first(x)))),
        first=nn.Linear(5, width),
        head=nn.Linear(width, WAYS),
    )


def _encoder() -> nn.Module:
    """A variational autoencoder's way to predictions."""

    def how(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.body(x))
        mean, logvar = m.mean(h), m.logvar(h)
        out: Tensor = m.decode(mean + torch.randn_like(mean) * torch.exp(0.5 * logvar))
        return out

    parts = {"mean": nn.Linear(8, 4), "logvar": nn.Linear(8, 4), "decode": nn.Linear(4, WAYS)}
    return Calls(how, body=nn.Linear(5, 8), **parts)


def _images() -> nn.Module:
    def noise(m: Any, h: Tensor) -> Tensor:
        return h + 0.1 * torch.randn_like(h) if m.training else h

    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(Calls(noise), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(), Calls(lambda m, h: _drop_path(h))),
        *(nn.Dropout(0.2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(20, WAYS)),
    )


def _drop_block() -> nn.Module:
    """As in a residual network: what is left is scaled by how much that is."""
    layers = nn.Conv2d(2, 4, 3, padding=1), DropBlock(0.2, 3), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(256, WAYS))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{name: (lambda f=f: _mlp(f), (5,)) for name, f in BETWEEN.items()},  # type: ignore[misc]
    "encoder": (_encoder, (5,)),
    "images": (_images, (2, 8, 8)),
    "input": (lambda: nn.Sequential(Calls(lambda m, x: x + torch.randn_like(x)), nn.Linear(5, 3)), (5,)),
    "drop-block": (_drop_block, (2, 8, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_numbers_of_the_reference_after_the_same_seed(name: str) -> None:
    """Losses, meta-gradients, statistics, evaluation, and where the generator stands; checked as every first batch."""
    assert_numbers_of_the_reference(*NETWORKS[name])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_of_float32_draws_in_float32(name: str) -> None:
    """As its plain loop; the check, in float64, of the same numbers."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model, data = make(), batch_of(*shape).to(dtype=torch.float32)
    found = []
    for engine in ("fused", "reference"):
        config = mf.MAMLConfig(steps=2, inner_lr=0.1, da_epoch=-1)
        own = mf.MAMLPlusPlus(copy.deepcopy(model), config, engine=engine)
        found.append(results(own, data))
    assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("msl", [True, False])
@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_every_form_of_the_sweep(msl: bool, second_order: bool, memory: str) -> None:
    assert_form_of_the_sweep(_images, memory, msl=msl, second_order=second_order)


def test_any_groups_and_threads_give_the_same() -> None:
    torch.manual_seed(0)
    model, data = _images().double(), batch_of(2, 8, 8, tasks=6)
    expected = results(learner(model, "reference"), data)
    with kept_threads():
        for threads, group in ((1, None), (3, None), (2, 2), (2, 6)):
            torch.set_num_threads(threads)
            own = learner(model)
            own.engine.group = group  # type: ignore[attr-defined]
            assert_same(results(own, data), expected)


def test_the_textbook_loop() -> None:
    learner, textbook = pair(lambda: Calls(lambda m, x: m.net.head(_drop_path(m.net.body(x))), net=Net()))
    for seed in (1, 2):
        torch.manual_seed(seed)
        result = learner.meta_gradient(mf.EpisodeBatch(*batch(seed)))
        torch.manual_seed(seed)
        assert_close(result.task_losses, textbook.gradient(batch(seed)), rtol=1e-9, atol=1e-12)
        own = dict(learner.model.named_parameters())
        for name, p in textbook.model.named_parameters():
            found = own[name].grad
            assert_close(torch.zeros_like(p) if found is None else found, p.grad, rtol=1e-9, atol=1e-12)
    assert learner.engine.name == "fused"


def test_a_chance_that_changes() -> None:
    """Between calls, as of an annealed rate."""
    torch.manual_seed(0)
    model = Calls(
        lambda m, x: m.head(x * torch.empty_like(x[0]).uniform_(0, m.top)), head=nn.Linear(5, WAYS), top=1.0
    )
    ours, reference = learner(model.double()), learner(model.double(), "reference")
    for top in (1.0, 0.5, 1.0):
        for own in (ours, reference):
            own.model.top = top
        assert_same(results(ours, batch_of(5)), results(reference, batch_of(5)))


@pytest.mark.parametrize("width", [6, 1])
def test_chances_that_are_a_constant_tensor(width: int) -> None:
    torch.manual_seed(0)
    model = Calls(lambda m, x: m.head(x * torch.bernoulli(m.chances)), head=nn.Linear(5, WAYS))
    model.chances = torch.rand(5)
    if width == 1:
        model.how = lambda m, x: m.head(x * Bernoulli(0.4).sample((len(x), 1)))
    found = []
    for engine in ("fused", "reference"):
        config = mf.MAMLConfig(steps=2, da_epoch=-1)
        own = mf.MAMLPlusPlus(copy.deepcopy(model), config, engine=engine)
        found.append(results(own, batch_of(5).to(dtype=torch.float32)))
    assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


# What is refused -----------------------------------------------------------------------------------------------------


def _overwritten(h: Tensor) -> Tensor:
    h = h * 1
    h.normal_()
    return h


def _put_back(h: Tensor) -> Tensor:
    state = torch.get_rng_state()
    noise = torch.randn(6)
    torch.set_rng_state(state)
    return h * noise


def _forked(h: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return h * torch.randn(6)


def _by_rows(h: Tensor) -> Tensor:
    both = torch.empty(2, 6)
    both[0].normal_()
    both[1].uniform_()
    return h * both.sum(0)


SEEDS = "seeds a random generator, or asks for its state"
DRAWS = "draws random numbers"
REFUSED: dict[str, tuple[Draws, str]] = {
    "generator": (lambda h: h * torch.randn(6, generator=torch.Generator().manual_seed(1)), DRAWS),
    "generator-in-place": (lambda h: h * torch.empty(6).normal_(generator=torch.Generator()), DRAWS),
    "chances-of-activations": (lambda h: h * torch.bernoulli(h.sigmoid()), DRAWS),
    "means-of-activations": (lambda h: h + torch.normal(h, 1.0), DRAWS),
    "gaps": (lambda h: h * torch.empty(6, 2)[:, 0].normal_(), DRAWS),
    "activation": (_overwritten, DRAWS),
    "rows": (_by_rows, "changed under another name"),
    "by-values": (lambda h: h * torch.rand(int(h.sum() > 0) + 1)[0], "asks for values"),
    "decides": (lambda h: h if torch.rand(()) < 0.5 else 2 * h, "asks for values"),
    "integers": (lambda h: h * torch.randint(2, (6,)), DRAWS),
    "order": (lambda h: h[:, torch.randperm(6)], DRAWS),
    "constant-dropout": (lambda h: h * F.dropout(torch.ones(6), 0.5), DRAWS),
    "rrelu": (lambda h: F.rrelu(h, training=True), DRAWS),
    "init": (lambda h: h * nn.init.normal_(torch.empty(6)), DRAWS),
    "seed": (lambda h: (torch.manual_seed(3), h * torch.randn(6))[1], SEEDS),
    "seed-and-dropout": (lambda h: (torch.manual_seed(3), F.dropout(h, 0.5))[1], SEEDS),
    "seed-of-the-generator": (
        lambda h: (torch.default_generator.manual_seed(3), h * torch.rand(6))[1],
        SEEDS,
    ),
    "state": (_put_back, SEEDS),
    "fork": (_forked, SEEDS),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_handed_over(name: str) -> None:
    """What the recording would take for fixed, or draw otherwise."""
    between, why = REFUSED[name]
    x, model = torch.randn(4, 5), _mlp(between)
    with pytest.raises(Unsupported, match=why):
        record(model, x, torch.cat([x, x[:1]]))
    torch.manual_seed(0)
    ours, reference = learner(model.double(), "auto"), learner(model.double(), "reference")
    assert_same(results(ours, batch_of(5)), results(reference, batch_of(5)))
    assert ours.engine.name == "autograd"


def test_another_precision_is_handed_over() -> None:
    data = batch_of(5).to(dtype=torch.float32)
    model = _mlp(lambda h: h * torch.randn(6, dtype=torch.float64).float())
    own = mf.MAMLPlusPlus(model, mf.MAMLConfig(steps=1))
    own.meta_gradient(data)
    assert "randn draws random numbers of torch.float64 in a model of torch.float32" in own.engine_reason


def test_a_version_that_draws_otherwise_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    into = Draw.into

    def other(self: Draw, place: Tensor, generator: torch.Generator | None = None) -> None:
        into(self, place, generator)
        into(self, place, generator)

    monkeypatch.setattr(Draw, "into", other)
    x = torch.randn(4, 5)
    for between in (lambda h: h + torch.randn(6), lambda h: h * torch.rand_like(h)):
        with pytest.raises(Unsupported, match=DRAWS):
            record(_mlp(between), x, torch.cat([x, x[:1]]))


def test_a_caller_under_a_profiler() -> None:
    x = torch.randn(4, 5)
    profile = cProfile.Profile()
    with profile:
        record(_mlp(BETWEEN["randn"]), x, torch.cat([x, x[:1]]))
        with pytest.raises(Unsupported, match=SEEDS):
            record(_mlp(REFUSED["seed"][0]), x, torch.cat([x, x[:1]]))
    assert any(
        "record.py" in entry.code.co_filename
        for entry in profile.getstats()
        if hasattr(entry.code, "co_filename")
    )
