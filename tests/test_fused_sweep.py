"""The fused engine against the reference in float64: every form of the sweep, on random networks."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import jittered, kept_threads, random_batch, small_conv4
from torch import Tensor, nn

import mamlpp_fast as mf
from mamlpp_fast import reference
from mamlpp_fast.engine.fused import FusedEngine
from mamlpp_fast.engine.fused.steps import linear
from mamlpp_fast.engine.reference import ReferenceEngine

TOLERANCE = 1e-10


def assert_same(ours: Tensor, expected: Tensor, what: str, floor: float = 1e-9) -> None:
    """Equal relative to the largest expected value; ``floor`` stands in where all are zero but for rounding."""
    scale = max(float(expected.abs().max()), floor)
    error = float((ours - expected).abs().max()) / scale
    assert error <= TOLERANCE, f"{what}: relative error {error:.1e}"


def engines(
    model: nn.Module,
    steps: int,
    *,
    adapt: Any = "all",
    adapt_norm: bool = False,
    rates: Any = "tensor",
    learnable: bool = True,
    loss: reference.LossFn = F.cross_entropy,
    **options: Any,
) -> tuple[ReferenceEngine, FusedEngine]:
    """Two engines on copies of one model, with rates that differ by tensor and step."""
    result = []
    for kind in (ReferenceEngine, FusedEngine):
        own = copy.deepcopy(model)
        named = dict(own.named_parameters())
        names = reference.adapted_names(own, adapt, adapt_norm)
        lslr = mf.LSLR(((n, named[n]) for n in names), steps, 0.1, rates=rates, learnable=learnable)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(3)
            lslr.rates.mul_(torch.rand(lslr.rates.shape, generator=generator, dtype=lslr.rates.dtype) + 0.3)
        if kind is ReferenceEngine:
            result.append(ReferenceEngine(own, lslr, loss))
        else:
            result.append(FusedEngine(own, lslr, loss, **options))
    return result[0], result[1]  # type: ignore[return-value]


def step_weights(steps: int) -> Tensor:
    return torch.linspace(0.2, 1, steps, dtype=torch.float64)


def compare(
    pair: tuple[ReferenceEngine, FusedEngine],
    batch: mf.EpisodeBatch,
    weights: Tensor | None,
    second_order: bool = True,
    floor: float = 1e-9,
) -> None:
    """One meta-gradient of each: losses, predictions, gradients and running statistics."""
    expected, ours = (engine.meta_gradient(batch, weights, second_order) for engine in pair)
    for name in ("loss", "task_losses", "target_logits"):
        assert_same(getattr(ours, name), getattr(expected, name), name)
    sides = [{**dict(e.model.named_parameters()), "rates": e.rates.rates} for e in pair]
    for name, p in sides[0].items():
        if not p.requires_grad:
            continue
        grad = sides[1][name].grad
        assert grad is not None, name
        assert_same(grad, torch.zeros_like(p) if p.grad is None else p.grad, f"gradient of {name}", floor)
    for (name, b), own in zip(pair[0].model.named_buffers(), pair[1].model.buffers(), strict=True):
        assert_same(own.double(), b.double(), name)


FORMS = {
    "multi-step": (True, True),
    "final-loss": (False, True),
    "first-order": (True, False),
    "first-order-final": (False, False),
}


@pytest.mark.parametrize(("multi_step", "second_order"), FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize("group", [1, 3])
def test_every_form(multi_step: bool, second_order: bool, memory: str, group: int) -> None:
    pair = engines(small_conv4(), 3, memory=memory, group=group)
    compare(pair, random_batch(tasks=3), step_weights(3) if multi_step else None, second_order)


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "strided": ({"max_pool": False}, {}),
    "layer-norm": ({"norm": "layer"}, {}),
    "shared-affine": ({"per_step_affine": False}, {}),
    "shared-statistics": ({"per_step_affine": False, "per_step_stats": False}, {}),
    "adapting-norms": ({"per_step_affine": False}, {"adapt_norm": True}),
    "adapting-norms-recompute": ({"per_step_affine": False}, {"adapt_norm": True, "memory": "recompute"}),
    "adapting-norms-strided": ({"per_step_affine": False, "max_pool": False}, {"adapt_norm": True}),
    "adapting-norms-odd-size": ({"per_step_affine": False, "image_size": 13}, {"adapt_norm": True}),
    "adapting-norms-element-rates": ({"per_step_affine": False}, {"adapt_norm": True, "rates": "element"}),
    "only-first-norm": ({"per_step_affine": False}, {"adapt": ("blocks.0.norm",), "adapt_norm": True}),
    "only-second-norm": ({"per_step_affine": False}, {"adapt": ("blocks.1.norm",), "adapt_norm": True}),
    "only-norm-biases": (
        {"per_step_affine": False},
        {"adapt": ("blocks.0.norm.bias", "blocks.1.norm.bias"), "adapt_norm": True},
    ),
    "only-norm-weights": (
        {"per_step_affine": False},
        {"adapt": ("blocks.0.norm.weight", "blocks.1.norm.weight"), "adapt_norm": True},
    ),
    "odd-size": ({"image_size": 13}, {}),
    "element-rates": ({}, {"rates": "element"}),
    "fixed-rates": ({}, {"learnable": False}),
    "anil": ({}, {"adapt": "head"}),
    "anil-element-rates": ({}, {"adapt": "head", "rates": "element"}),
    "only-first-block": ({}, {"adapt": ("blocks.0",)}),
    "only-second-convolution": ({}, {"adapt": ("blocks.1.conv.weight",)}),
}


@pytest.mark.parametrize(("network", "options"), SETTINGS.values(), ids=SETTINGS.keys())
def test_every_setting(network: dict[str, Any], options: dict[str, Any]) -> None:
    size = network.get("image_size", 12)
    pair = engines(small_conv4(**network), 3, **options)
    compare(pair, random_batch(size=size), step_weights(3))
    for steps in (2, 5):
        for stats in ("batch", "running"):
            batch = random_batch(size=size, seed=1)
            expected, ours = (engine.evaluate(batch, steps=steps, stats=stats) for engine in pair)
            assert_same(ours, expected, f"evaluation with {stats} statistics")


def test_frozen_parameters_get_no_gradient() -> None:
    model = small_conv4()
    for name in ("blocks.0.norm.weight", "blocks.1.conv.weight"):
        model.get_parameter(name).requires_grad_(False)
    pair = engines(model, 3)
    compare(pair, random_batch(), step_weights(3))
    assert pair[1].model.get_parameter("blocks.0.norm.weight").grad is None


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_half_of_an_adapting_norm_gets_no_gradient(frozen: str) -> None:
    model = small_conv4(per_step_affine=False)
    for i in (0, 1):
        model.get_parameter(f"blocks.{i}.norm.{frozen}").requires_grad_(False)
    pair = engines(model, 3, adapt_norm=True)
    compare(pair, random_batch(), step_weights(3))
    assert pair[1].model.get_parameter(f"blocks.0.norm.{frozen}").grad is None


def test_adapting_norms_of_weight_zero() -> None:
    model = small_conv4(per_step_affine=False)
    with torch.no_grad():
        for i in (0, 1):
            model.get_parameter(f"blocks.{i}.norm.weight")[1] = 0
            model.get_parameter(f"blocks.{i}.norm.bias")[1] = 0.3
    compare(engines(model, 3, adapt_norm=True), random_batch(), step_weights(3))


def test_squared_error() -> None:
    batch = random_batch()
    targets = torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(2, 6, 3, dtype=torch.float64)
    batch = mf.EpisodeBatch(batch.support_x, targets[0], batch.target_x, targets[1])
    compare(engines(small_conv4(), 3, loss=F.mse_loss), batch, step_weights(3))


class _Residual(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


FEATURES: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "relu": (lambda: [nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)], (3,)),
    "without-bias": (
        lambda: [nn.Linear(1, 8, bias=False), nn.LeakyReLU(), nn.Linear(8, 1, bias=False)],
        (1,),
    ),
    "layer-norm": (lambda: [nn.Linear(3, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 2)], (3,)),
    "residual": (lambda: [_Residual(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)], (4,)),
    "two-axes": (lambda: [nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)], (2, 3)),
    "images": (lambda: [nn.ReLU(), nn.Flatten(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 2)], (2, 3, 4)),
}


def regression_batch(example: tuple[int, ...], outputs: int) -> mf.EpisodeBatch:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, *example), (5, outputs), (4, *example), (4, outputs))
    fields = (torch.randn(3, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return mf.EpisodeBatch(*fields)


@pytest.mark.parametrize(("multi_step", "second_order"), FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize(("layers", "example"), FEATURES.values(), ids=FEATURES.keys())
def test_regression_from_features(
    layers: Callable[[], list[nn.Module]], example: tuple[int, ...], multi_step: bool, second_order: bool
) -> None:
    model = jittered(nn.Sequential(*layers()))
    outputs = model[-1].out_features
    pair = engines(model, 3, loss=F.mse_loss)
    batch = regression_batch(example, outputs)
    compare(pair, batch, step_weights(3) if multi_step else None, second_order)
    for steps in (1, 5):
        expected, ours = (engine.evaluate(batch, steps=steps, stats="batch") for engine in pair)
        assert_same(ours, expected, "evaluation")


@pytest.mark.parametrize(
    "options", [{"memory": "recompute"}, {"group": 1}, {"rates": "element"}, {"adapt": "head"}]
)
def test_regression_in_every_setting(options: dict[str, Any]) -> None:
    model = jittered(nn.Sequential(*FEATURES["relu"][0]()))
    compare(engines(model, 3, loss=F.mse_loss, **options), regression_batch((3,), 2), step_weights(3))


def test_regression_targets_are_not_broadcast() -> None:
    pair = engines(nn.Sequential(nn.Linear(3, 2)).double(), 2, loss=F.mse_loss)
    with pytest.raises(ValueError, match=r"targets: expected one for each prediction, .*2\), got .*1\)"):
        pair[1].meta_gradient(regression_batch((3,), 1), None, True)


@pytest.mark.parametrize(
    "loss",
    [
        functools.partial(F.cross_entropy, label_smoothing=0.2),
        nn.CrossEntropyLoss(label_smoothing=0.2),
        nn.CrossEntropyLoss(),
    ],
    ids=["partial", "module", "plain-module"],
)
def test_label_smoothing(loss: reference.LossFn) -> None:
    pair = engines(small_conv4(), 3, loss=loss)
    compare(pair, random_batch(), step_weights(3))
    expected, ours = (engine.evaluate(random_batch(seed=1), steps=4, stats="batch") for engine in pair)
    assert_same(ours, expected, "evaluation")


def test_resnet12() -> None:
    torch.manual_seed(0)
    model = jittered(mf.ResNet12(3, 3, filters=(3, 4, 3, 4), num_steps=2))
    pair = engines(model, 2)
    compare(pair, random_batch(channels=3, size=17), step_weights(2))


def random_network(
    rng: random.Random,
    steps: int,
    ways: int,
    norms: tuple[str, ...] = ("per-step", "leaky", "shared", "plain"),
) -> tuple[nn.Module, int, int]:
    """A network from the supported modules, its input channels and image size."""
    channels = first = rng.choice([1, 2, 3])
    size = image = rng.choice([9, 11, 12, 14])
    stages: list[nn.Module] = []

    def norm(width: int) -> nn.Module:
        kind = rng.choice(norms)
        if kind == "plain":
            return nn.BatchNorm2d(width, momentum=0.3)
        return mf.PerStepBatchNorm2d(
            width,
            steps,
            negative_slope=0.2 if kind == "leaky" else None,
            per_step_affine=kind != "shared",
            per_step_stats=rng.random() < 0.5,
        )

    for _ in range(rng.randint(1, 4)):
        width, stride = rng.choice([2, 3, 5]), rng.choice([1, 1, 2])
        kernel = rng.choice([1, 3, 3])
        padding = kernel // 2 if size < 5 else rng.choice([kernel // 2, 0])
        bias = rng.random() < 0.5
        parts: list[nn.Module] = [nn.Conv2d(channels, width, kernel, stride, padding, bias=bias)]
        size = (size + 2 * padding - kernel) // stride + 1
        if rng.random() < 0.8:
            parts.append(norm(width))
        parts.append(rng.choice([nn.ReLU(), nn.LeakyReLU(0.1), nn.Identity()]))
        stage = nn.Sequential(*parts)
        if rng.random() < 0.4 and (size, padding) == (size, kernel // 2):
            shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=bias), norm(width))
            stages.append(_Residual(stage, shortcut))
        else:
            stages.append(stage)
        channels = width
        if size >= 4 and rng.random() < 0.6:
            stages.append(rng.choice([nn.MaxPool2d(2), nn.AvgPool2d(2)]))
            size //= 2
    if rng.random() < 0.5:
        stages.append(nn.AdaptiveAvgPool2d(1))
        size = 1
    head = [nn.Flatten(), nn.Linear(channels * size * size, ways)]
    return nn.Sequential(*stages, *head), first, image


@pytest.mark.parametrize("seed", range(24))
def test_random_networks(seed: int) -> None:
    rng = random.Random(seed)
    steps, tasks, ways = rng.randint(1, 6), rng.randint(1, 5), rng.choice([2, 3])
    network, channels, size = random_network(rng, steps, ways)
    model = jittered(network)
    batch = random_batch(
        tasks=tasks, ways=ways, shots=2, targets=rng.choice([1, 2]), channels=channels, size=size, seed=seed
    )
    options = {"rates": rng.choice(["tensor", "element"]), "memory": rng.choice(["keep", "recompute"])}
    weights = step_weights(steps) if rng.random() < 0.6 else None
    # Biases in front of batch norm are exactly zero here and rounding noise in the reference.
    compare(engines(model, steps, **options), batch, weights, rng.random() < 0.8, floor=1e-3)


@pytest.mark.parametrize("seed", range(12))
def test_random_networks_with_adapting_norms(seed: int) -> None:
    rng = random.Random(1000 + seed)
    steps, ways = rng.randint(1, 4), rng.choice([2, 3])
    network, channels, size = random_network(rng, steps, ways, norms=("shared", "plain"))
    batch = random_batch(tasks=3, ways=ways, channels=channels, size=size, seed=seed)
    options = {"rates": rng.choice(["tensor", "element"]), "memory": rng.choice(["keep", "recompute"])}
    pair = engines(jittered(network), steps, adapt_norm=True, **options)
    compare(pair, batch, step_weights(steps), rng.random() < 0.8, floor=1e-3)


def test_ten_adam_steps_stay_together() -> None:
    learners = [
        mf.MAMLPlusPlus(small_conv4(), mf.MAMLConfig(steps=3, inner_lr=0.2), engine=name, precision="float64")
        for name in ("reference", "fused")
    ]
    for i in range(10):
        expected, ours = (learner.meta_step(random_batch(seed=i)) for learner in learners)
        assert_same(ours.loss, expected.loss, f"loss {i}")
    for (name, p), own in zip(
        learners[0].model.named_parameters(), learners[1].model.parameters(), strict=True
    ):
        assert_same(own.detach(), p.detach(), name)
    assert_same(learners[1].rates.rates.detach(), learners[0].rates.rates.detach(), "rates")


def test_lanes_follow_the_number_of_threads() -> None:
    reference_engine, ours = engines(small_conv4(), 3)
    batch = random_batch(tasks=4)
    with kept_threads():
        for count in (1, 2, 4, 1):
            torch.set_num_threads(count)
            compare((reference_engine, ours), batch, step_weights(3))
            assert ours.prepare(batch, True, True).lanes == count


def test_another_batch_shape_and_form_in_between_changes_nothing() -> None:
    pair = engines(small_conv4(), 3)
    compare(pair, random_batch(), step_weights(3))
    compare(pair, random_batch(tasks=4, shots=3), None)
    compare(pair, random_batch(seed=1), step_weights(3))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        pytest.param(
            mf.EpisodeBatch(*(torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.int64)) * 2),
            "blocks.0.conv: its forward raises, ",
            id="vectors",
        ),
        pytest.param(
            mf.EpisodeBatch(
                torch.zeros(1, 2, 1, 12, 12),
                torch.zeros(1, 2),
                torch.zeros(1, 2, 1, 12, 12),
                torch.zeros(1, 2),
            ),
            "support_y: expected int64 labels",
            id="float-labels",
        ),
        pytest.param(
            mf.EpisodeBatch(
                torch.zeros(1, 2, 1, 12, 12),
                torch.zeros(1, 2, dtype=torch.int64),
                torch.zeros(1, 2, 1, 9, 9),
                torch.zeros(1, 2, dtype=torch.int64),
            ),
            "target_x: expected examples of shape",
            id="sizes",
        ),
    ],
)
def test_wrong_batches_are_named(batch: mf.EpisodeBatch, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engines(small_conv4(), 3)[1].meta_gradient(batch, None, True)


@pytest.fixture(params=[True, False], ids=["rounds", "keeps"])
def pays(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether bfloat16 pays, whatever this machine multiplies."""
    monkeypatch.setattr(linear, "pays_in_bfloat16", lambda *_: request.param)
    return bool(request.param)


def test_bfloat16_rounds_operands_where_it_pays_and_nothing_else(pays: bool) -> None:
    """Too wide to be computed in float64. The first layer, of one channel, is never rounded on a CPU."""
    batch = random_batch(dtype=torch.float32)
    results = []
    for precision in ("float32", "bfloat16"):
        model = small_conv4(filters=12).float()
        names = reference.adapted_names(model)
        lslr = mf.LSLR(((n, model.get_parameter(n)) for n in names), 3, 0.1)
        engine = FusedEngine(model, lslr, precision=precision)  # type: ignore[arg-type]
        result = engine.meta_gradient(batch, None, True)
        results.append((result.loss, lslr.rates.grad, *(p.grad for p in model.parameters())))
    (exact, *_), (rounded, grad, *_) = results
    assert grad is not None and grad.dtype == torch.float32
    words = next(line for line in engine.explain().splitlines() if "rounded to bfloat16" in line)
    if pays:
        assert 0 < float((rounded - exact).abs()) < 0.05 * float(exact)
        assert words.endswith(": blocks.1.conv"), words
    else:
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)
        assert words.endswith(": none; in float32, which is faster here: blocks.1.conv"), words


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_adapting_norms_in_low_precision(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too wide to be computed in float64; strided, so that no near-tie of a pool tips."""
    monkeypatch.setattr(linear, "pays_in_bfloat16", lambda *_: True)
    model, batch = small_conv4(per_step_affine=False, max_pool=False, filters=12), random_batch()
    exact, _ = engines(model, 3, adapt_norm=True)
    plain, ours = engines(model.float(), 3, adapt_norm=True, precision=precision)
    low = mf.EpisodeBatch(batch.support_x.float(), batch.support_y, batch.target_x.float(), batch.target_y)
    found = []
    for engine, given in ((exact, batch), (plain, low), (ours, low)):
        with torch.no_grad():
            engine.rates.rates.copy_(exact.rates.rates)
        engine.meta_gradient(given, step_weights(3).to(given.support_x.dtype), True)
        parameters = dict(engine.model.named_parameters())
        found.append({n: p.grad.double() for n, p in parameters.items() if not n.endswith("conv.bias")})
    if precision == "bfloat16":
        whole = [torch.cat([g.flatten() for g in gradients.values()]) for gradients in found]
        assert 1e-4 < float((whole[2] - whole[0]).norm() / whole[0].norm()) < 0.1
        return
    for name, expected in found[0].items():
        errors = [float((other[name] - expected).norm() / expected.norm()) for other in found[1:]]
        assert errors[1] <= 4 * errors[0] + 1e-6, (name, errors)
