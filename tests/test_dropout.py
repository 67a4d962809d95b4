"""Dropout in the fused engine: the masks of a plain loop after the same seed, one for all rules of a pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from front_end_helpers import Calls
from helpers import gradients, kept_threads
from test_generic_rules import N, autograd, rules
from torch import Tensor, nn
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast._seeded import seeded
from mamlpp_fast.engine.base import Unsupported
from mamlpp_fast.engine.executions import Draw
from mamlpp_fast.engine.fused import masks
from mamlpp_fast.engine.fused.masks import Mask, PassMasks
from mamlpp_fast.engine.fused.program import Emitter
from mamlpp_fast.engine.fused.steps import Dropout, Generic
from mamlpp_fast.engine.fused.steps.generic import Recorded
from mamlpp_fast.engine.operation import Operation, Value

WAYS = 3


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    with kept_threads():
        yield


def batch_of(*shape: int, tasks: int = 3, support: int = 4, targets: int = 5) -> mf.EpisodeBatch:
    generator = torch.Generator().manual_seed(0)

    def side(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(tasks, count, *shape, generator=generator, dtype=torch.float64)
        return x, torch.randint(WAYS, (tasks, count), generator=generator)

    return mf.EpisodeBatch(*side(support), *side(targets), by_class=False)


def learner(model: nn.Module, engine: str = "fused", **settings: Any) -> mf.MAMLPlusPlus:
    verify = settings.pop("verify", True)
    config = mf.MAMLConfig(**{"steps": 2, "inner_lr": 0.1, "da_epoch": -1} | settings)
    model = copy.deepcopy(model)
    return mf.MAMLPlusPlus(model, config, engine=engine, precision="float64", verify=verify)  # type: ignore[arg-type]


def results(own: mf.MAMLPlusPlus, batch: mf.EpisodeBatch, seed: int = 3) -> dict[str, Tensor]:
    """Of one meta-gradient and one evaluation after this seed; with where they leave the generator."""
    torch.manual_seed(seed)
    metrics = own.meta_gradient(batch)
    found = {"losses": metrics.task_losses, **gradients(own.model, own.rates)}
    found |= {name: b.clone() for name, b in own.model.named_buffers()}
    found["logits"] = own.evaluate(batch).logits
    return found | {"generator": torch.get_rng_state()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close = {"rtol": 1e-9, "atol": 1e-12} if value.is_floating_point() else {"rtol": 0, "atol": 0}
        assert_close(found[name], value, **close, msg=lambda text, name=name: f"{name}: {text}")


def assert_numbers_of_the_reference(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, batch = make().double(), batch_of(*shape)
    ours, reference = learner(model), learner(model, "reference")
    for seed in (3, 4):
        assert_same(results(ours, batch, seed), results(reference, batch, seed))
    assert ours.engine.name == "fused"


def assert_form_of_the_sweep(make: Callable[[], nn.Module], memory: str, **settings: Any) -> None:
    """Of models of images [2, 8, 8], in three steps."""
    torch.manual_seed(0)
    model, batch = make().double(), batch_of(2, 8, 8, tasks=4)
    ours, reference = learner(model, steps=3, **settings), learner(model, "reference", steps=3, **settings)
    ours.engine.memory = memory  # type: ignore[attr-defined]
    assert_same(results(ours, batch), results(reference, batch))


# Networks ------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
        self.head, self.weights = nn.Linear(4, WAYS), weights

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.attention(x, x, x, need_weights=self.weights)[0]
        return self.head(h.mean(1))


class Direct(nn.Module):
    """Attention without heads, for which PyTorch makes one up, or none."""

    def __init__(self, axes: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.body, self.head, self.axes = nn.Linear(4, 4), nn.Linear(4, WAYS), axes

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        p = 0.2 if self.training else 0.0
        h = F.scaled_dot_product_attention(h, h, h, dropout_p=p, is_causal=True)
        return self.head(h.sum(self.axes) if self.axes else h)


def _images() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.3)),
        *(nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.4), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Dropout(0.2), nn.Linear(20, WAYS)),
    )


def _sequence() -> nn.Module:
    layers = (nn.Conv1d(4, 4, 3, padding=1), nn.ReLU(), nn.Dropout1d(0.3), nn.Dropout(0.2), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(24, WAYS))


def _recurrent(kind: Callable[..., nn.Module], **options: Any) -> nn.Module:
    inner = kind(4, 3, 2, batch_first=True, dropout=0.4, **options)
    width = 6 if options.get("bidirectional") else 3
    return nn.Sequential(Calls(lambda m, x: m.inner(x)[0][:, -1], inner=inner), nn.Linear(width, WAYS))


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.3, batch_first=True)
    return nn.Sequential(layer, Calls(lambda m, x: x.mean(1)), nn.Linear(4, WAYS))


def _mlp(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), *between, nn.Linear(6, WAYS))


Case = tuple[Callable[[], nn.Module], tuple[int, ...]]
NETWORKS: dict[str, Case] = {
    "features": (lambda: _mlp(nn.Dropout(0.3), nn.Linear(6, 6), nn.GELU(), nn.Dropout(0.6)), (5,)),
    "input": (lambda: nn.Sequential(nn.Dropout(0.3), _mlp()), (5,)),
    "in-place": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.3, inplace=True), nn.Linear(6, 3)),
        (5,),
    ),
    "everything": (lambda: _mlp(nn.Dropout(1.0)), (5,)),
    "images": (_images, (2, 8, 8)),
    "sequence": (_sequence, (4, 6)),
    "volume": (
        lambda: nn.Sequential(
            *(nn.Conv3d(2, 3, 3, padding=1), nn.Dropout3d(0.3), nn.Flatten(), nn.Linear(3 * 27, WAYS))
        ),
        (2, 3, 3, 3),
    ),
    "alpha": (lambda: _mlp(nn.SELU(), nn.AlphaDropout(0.3)), (5,)),
    "feature-alpha": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.FeatureAlphaDropout(0.3), nn.Flatten(), nn.Linear(64, WAYS)
        ),
        (2, 6, 6),
    ),
    "rows": (lambda: _mlp(nn.Dropout1d(0.3)), (5,)),  # of features it drops whole examples
    "transformer": (_transformer, (3, 4)),
    "attention": (lambda: Attention(False), (3, 4)),
    "attention-weights": (lambda: Attention(True), (3, 4)),
    "direct-attention": (Direct, (3, 4)),
    "direct-attention-of-examples": (lambda: Direct(()), (4,)),
    "direct-attention-of-sets": (lambda: Direct((1, 2, 3)), (2, 1, 3, 4)),
    "lstm": (lambda: _recurrent(nn.LSTM), (3, 4)),
    "gru-both-ways": (lambda: _recurrent(nn.GRU, bidirectional=True), (2, 4)),
    # Drops weights, and keeps doing so in evaluation.
    "weights": (
        lambda: Calls(
            lambda m, x: m.head(torch.tanh(F.linear(x, F.dropout(m.first.weight, 0.3), m.first.bias))),
            first=nn.Linear(5, 6),
            head=nn.Linear(6, WAYS),
        ),
        (5,),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_numbers_of_the_reference_after_the_same_seed(name: str) -> None:
    """Masks, losses, meta-gradients, statistics, evaluation, and where the generator stands afterwards."""
    assert_numbers_of_the_reference(*NETWORKS[name])


@pytest.mark.parametrize("msl", [True, False])
@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_every_form_of_the_sweep(msl: bool, second_order: bool, memory: str) -> None:
    assert_form_of_the_sweep(_images, memory, msl=msl, second_order=second_order)


def test_any_groups_and_threads_give_the_same() -> None:
    torch.manual_seed(0)
    model, batch = _images().double(), batch_of(2, 8, 8, tasks=6)
    expected = results(learner(model, "reference"), batch)
    lanes = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        lanes.append(results(learner(model), batch))
        assert_same(lanes[-1], expected)
    assert_close(lanes[1:], [lanes[0]] * 2, rtol=0, atol=0)
    for group in (2, 3, 6):
        own = learner(model)
        own.engine.group = group  # type: ignore[attr-defined]
        assert_same(results(own, batch), expected)


def test_seeds_and_iterations_have_masks_of_their_own() -> None:
    torch.manual_seed(0)
    own, batch = learner(_mlp(nn.Dropout(0.5))), batch_of(5)
    first, again, other = (results(own, batch, seed)["losses"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(1)
    assert not torch.equal(own.meta_gradient(batch).task_losses, own.meta_gradient(batch).task_losses)


def test_training_goes_on_from_a_state_of_the_generator() -> None:
    torch.manual_seed(0)
    model, batch = _mlp(nn.Dropout(0.5)), batch_of(5)
    own = learner(model)
    torch.manual_seed(1)
    own.meta_step(batch)
    kept, state = copy.deepcopy(own.state_dict()), torch.get_rng_state()
    expected = own.meta_step(batch).task_losses
    later = learner(model)
    later.load_state_dict(kept)
    torch.set_rng_state(state)
    assert torch.equal(later.meta_step(batch).task_losses, expected)


def test_nothing_is_drawn_from_the_process_but_the_masks() -> None:
    """Neither recording nor check takes numbers; an evaluation without dropout takes none at all."""
    own, batch = learner(_mlp(nn.Dropout(0.5)).double()), batch_of(5, tasks=2)
    torch.manual_seed(5)
    own.evaluate(batch)
    own.engine.prepare(batch, True, True)
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(5).get_state())
    own.meta_gradient(batch)
    masks = torch.Generator().manual_seed(5)
    for _ in range(2 * 2):  # tasks and steps
        for examples in (4, 5):
            torch.empty(examples, 6).bernoulli_(0.5, generator=masks)
    assert torch.equal(torch.get_rng_state(), masks.get_state())


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_masks_drop_as_many_as_they_should(p: float) -> None:
    """The share that is kept, within five standard deviations, and what is kept grown by 1 / (1 - p)."""
    model = nn.Sequential(nn.Dropout(p), nn.Linear(100, WAYS)).double()
    with torch.no_grad():
        model[1].weight.fill_(1)  # type: ignore[union-attr]
        model[1].bias.zero_()  # type: ignore[union-attr]
    batch = batch_of(100, tasks=4, support=5, targets=50)
    batch.target_x.fill_(1)
    own = learner(model, steps=1, inner_lr=0.0, verify=False)
    torch.manual_seed(0)
    own.meta_gradient(batch)
    prepared = own.engine._current  # type: ignore[attr-defined]
    kept = prepared.logits[..., 0] * (1 - p)  # how many of 100
    assert_close(kept, kept.round(), rtol=0, atol=1e-9)
    deviation = (p * (1 - p) / (kept.numel() * 100)) ** 0.5
    assert abs(float(kept.mean()) / 100 - (1 - p)) < 5 * deviation
    assert len(kept.round().unique()) > 3  # no mask twice


# Rules ---------------------------------------------------------------------------------------------------------------


def _pass_rules(step: Any, x: Tensor, moving: Tensor, gy: Tensor, gy_dot: Tensor) -> tuple[Any, list[Tensor]]:
    """The four rules of a step of one input in a pass with masks; and these masks, drawn."""
    of_pass, drawn = PassMasks(len(x)), []

    def draw() -> None:
        made = masks.Masks([of_pass], len(x), 1)
        made.draw(torch.Generator().manual_seed(9))
        made.load(0, 0)
        drawn.extend(d.clone() for d in made._drawn)

    return rules(step, len(x), {0: x}, {0: moving}, gy, gy_dot, of_pass, draw), drawn


def _draw(*shape: int) -> Draw:
    return Draw((N, *shape), tuple(torch.empty(N, *shape).stride()), "bernoulli_", (0.7,))


def _generic(function: Callable[[Tensor], Tensor], draw: Draw) -> Generic:
    op = Operation(function, "", (Value(0),), {}, (1,), (((), torch.float64),), False, (draw,))
    return Generic(
        "f", (0,), 1, (), Recorded("f", {N: op}, {0: True}, torch.float64), 0, (0,), (), (), {}, False
    )


RULES: dict[str, tuple[Any, tuple[int, ...], Draw, tuple[int, ...] | None]] = {
    "features": (Dropout("f", (0,), 1, (5,), {N: _draw(5)}, 1 / 0.7, None, True), (5,), _draw(5), None),
    "images": (
        Dropout("f", (0,), 1, (3, 2, 5), {N: _draw(5, 3, 2)}, 1 / 0.7, (3, 2, 5), True),
        (3, 2, 5),
        _draw(5, 3, 2),
        (5, 3, 2),
    ),
    "flattened": (
        Dropout("f", (0,), 1, (30,), {N: _draw(30)}, 1 / 0.7, (3, 2, 5), True),
        (30,),
        _draw(30),
        (5, 3, 2),
    ),
    "channels": (
        Dropout("f", (0,), 1, (3, 2, 5), {N: _draw(5, 1, 1)}, 1 / 0.7, (3, 2, 5), False),
        (3, 2, 5),
        _draw(5, 1, 1),
        (5, 1, 1),
    ),
    "generic": (_generic(lambda x: F.dropout(x, 0.3).sin(), _draw(3, 5)), (3, 5), _draw(3, 5), None),
}


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("name", RULES)
def test_the_four_rules_read_one_mask(name: str, tasks: int) -> None:
    step, shape, draw, grid = RULES[name]
    x, moving, gy, gy_dot = (torch.randn(tasks, N, *shape, dtype=torch.float64) for _ in range(4))
    found, (drawn,) = _pass_rules(step, x, moving, gy, gy_dot)
    for t in range(tasks):
        mask = drawn[t].double().view(draw.shape) / 0.7
        if grid is not None:
            mask = mask.view(N, *grid).permute(0, 2, 3, 1)
            mask = mask.reshape(N, *shape) if len(shape) == 1 else mask

        def plain(x: Tensor, mask: Tensor = mask) -> Tensor:
            return torch.sin(x * mask) if name == "generic" else x * mask

        for key, expected in autograd(plain, {0: x[t]}, {0: moving[t]}, gy[t], gy_dot[t]).items():
            assert_close(found[key][t], expected, rtol=1e-10, atol=1e-12)


def test_a_draw_in_another_order_of_memory() -> None:
    """As of an activation whose channels come last: numbers go to the elements in the order that they lie in."""
    draw = Draw((N, 3, 5), (15, 1, 3), "bernoulli_", (0.5,))
    own = PassMasks(2)
    ref = own.of(Emitter(torch.device("cpu"), torch.float64), "key", draw)
    of_all = masks.Masks([own], 2, 1)
    of_all.draw(torch.Generator().manual_seed(1))
    of_all.load(0, 0)
    generator = torch.Generator().manual_seed(1)
    for t in range(2):
        expected = torch.empty_strided((N, 3, 5), (15, 1, 3)).bernoulli_(0.5, generator=generator)
        assert_close(ref.tensor()[t], expected.double(), rtol=0, atol=0)


# What is refused -----------------------------------------------------------------------------------------------------


def test_masks_of_another_order_are_found_by_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = masks.Masks.draw

    def reversed_(self: masks.Masks, generator: torch.Generator | None = None) -> None:
        draw(self, torch.Generator())
        self._draws = self._draws[::-1]
        draw(self, generator)

    monkeypatch.setattr(masks.Masks, "draw", reversed_)
    own = learner(_mlp(nn.Dropout(0.5), nn.Linear(6, 6), nn.Dropout(0.4)), "auto")
    own.meta_gradient(batch_of(5))
    assert own.engine.name == "autograd" and "off the reference loop's" in own.engine_reason


def test_a_scale_that_is_wrong_is_found_by_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Mask.load
    monkeypatch.setattr(Mask, "load", lambda self, drawn, lane: load(self, ~drawn, lane))
    own = learner(_mlp(nn.Dropout(0.4)), "auto")
    own.meta_gradient(batch_of(5))
    assert own.engine.name == "autograd" and "off the reference loop's" in own.engine_reason


def test_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = learner(_mlp(nn.Dropout(0.5)))
    engine: Any = own.engine
    with monkeypatch.context() as patch:
        patch.setattr(engine, "device", torch.device("cuda"))
        with pytest.raises(Unsupported, match="dropout draws random numbers, which is for a CPU alone"):
            engine.prepare(batch_of(5), True, True)


def test_accelerate_leaves_dropout_to_pytorch() -> None:
    model = _mlp(nn.Dropout(0.5), nn.BatchNorm1d(6))
    fast = mf.accelerate(copy.deepcopy(model))
    x = torch.randn(4, 5)
    torch.manual_seed(1)
    found = fast(x)
    torch.manual_seed(1)
    assert_close(found, model(x), rtol=0, atol=0)


def test_a_seeded_thread_draws_masks_of_its_seed() -> None:
    own, batch = learner(_mlp(nn.Dropout(0.5)).double()), batch_of(5)
    expected = results(own, batch, 6)["losses"]
    torch.manual_seed(1)
    with seeded(6):
        assert torch.equal(own.meta_gradient(batch).task_losses, expected)
