"""The fusions one by one: what each makes of the steps, where it must not, and that none changes a meta-gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import jittered, random_batch, small_conv4
from test_fused_sweep import assert_same, compare, engines, step_weights
from torch import Tensor, nn

import mamlpp_fast as mf
from mamlpp_fast.engine.fused import fusions
from mamlpp_fast.engine.fused.fusions import drop_inert_biases, fuse_first_layer, fuse_head, fuse_norms
from mamlpp_fast.engine.fused.lowering import lower
from mamlpp_fast.engine.fused.network import Network
from mamlpp_fast.engine.fused.steps import CrossEntropy, FirstLayer, Head, NormActPool, SquaredError
from mamlpp_fast.engine.record import record


def unfused(model: nn.Module, *example: int, adapted: tuple[str, ...] = ()) -> Network:
    x, other = (torch.randn(n, *(example or (1, 12, 12)), dtype=torch.float64) for n in (3, 4))
    return lower(record(model.double().train(), x, other), model, frozenset(adapted))


def kinds(network: Network) -> list[str]:
    return [step.kind for step in network.steps]


class Net(nn.Module):
    """A convolution of the image, a batch norm, and what a test makes of them: ``then(self, x, conv)``."""

    def __init__(self, then: Callable[[Any, Tensor, Tensor], Tensor], channels: int = 1, **conv: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, **{"padding": 1, **conv})
        self.norm = nn.BatchNorm2d(4)
        self.then = then
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.then(self, x, self.conv(x)).mean((2, 3)))


def _norm_in_no_grad(net: Any, x: Tensor, conv: Tensor) -> Tensor:
    with torch.no_grad():
        h = net.norm(conv)
    return F.max_pool2d(F.relu(h), 2)


THEN: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "whole": lambda net, x, conv: F.max_pool2d(F.leaky_relu(net.norm(conv), 0.1), 2),
    "no-pool": lambda net, x, conv: F.relu(net.norm(conv)),
    "pool-alone": lambda net, x, conv: F.max_pool2d(net.norm(conv), 2),
    "pool-first": lambda net, x, conv: F.relu(F.max_pool2d(net.norm(conv), 2)),
    "conv-read-twice": lambda net, x, conv: F.max_pool2d(F.relu(net.norm(conv)), 2) + F.avg_pool2d(conv, 2),
    "norm-read-twice": lambda net, x, conv: F.max_pool2d(F.relu(h := net.norm(conv)) + h, 2),
    "activation-read-twice": lambda net, x, conv: (
        F.max_pool2d(h := F.relu(net.norm(conv)), 2) + F.avg_pool2d(h, 2)
    ),
    "conv-detached": lambda net, x, conv: F.max_pool2d(F.relu(net.norm(conv.detach())), 2),
    "norm-detached": lambda net, x, conv: F.max_pool2d(F.relu(net.norm(conv).detach()), 2),
    "norm-in-no-grad": _norm_in_no_grad,
    "activation-detached": lambda net, x, conv: F.max_pool2d(F.relu(net.norm(conv)).detach(), 2),
    "activation-first": lambda net, x, conv: F.max_pool2d(net.norm(F.relu(conv)), 2),
    "negative-slope": lambda net, x, conv: F.max_pool2d(F.leaky_relu(net.norm(conv), -0.3), 2),
}
END = ["AveragePool", "Linear"]

# What the passes make, one after the other: drop_inert_biases, fuse_norms, fuse_first_layer.
CASES = {
    "whole": "Conv NormActPool Activation MaxPool | Conv NormActPool | FirstLayer",
    "no-pool": "Conv NormActPool Activation | Conv NormActPool |",
    "pool-alone": "Conv NormActPool MaxPool | Conv NormActPool | FirstLayer",
    "pool-first": "Conv NormActPool MaxPool Activation | Conv NormActPool Activation | FirstLayer Activation",
    "conv-read-twice": (
        "Conv Bias NormActPool Activation MaxPool AveragePool Add | Conv Bias NormActPool AveragePool Add |"
    ),
    "norm-read-twice": "Conv NormActPool Activation Add MaxPool | |",
    "activation-read-twice": (
        "Conv NormActPool Activation MaxPool AveragePool Add | Conv NormActPool MaxPool AveragePool Add |"
    ),
    "conv-detached": "Conv Bias Detach NormActPool Activation MaxPool | Conv Bias Detach NormActPool |",
    "norm-detached": "Conv NormActPool Detach Activation MaxPool | |",
    "norm-in-no-grad": "Conv NormActPool Detach Activation MaxPool | |",
    "activation-detached": "Conv NormActPool Activation Detach MaxPool | Conv NormActPool Detach MaxPool |",
    "activation-first": "Conv Bias Activation NormActPool MaxPool | Conv Bias Activation NormActPool |",
    "negative-slope": "Conv NormActPool Activation MaxPool | Conv NormActPool |",
}


@pytest.mark.parametrize("name", CASES)
def test_each_pass_changes_its_own_steps(name: str) -> None:
    """Nothing named: the same as before."""
    network = unfused(Net(THEN[name]))
    assert kinds(network)[:2] == ["Conv", "Bias"]
    made = [each.split() for each in CASES[name].split("|")]
    for one, expected in zip((drop_inert_biases, fuse_norms, fuse_first_layer), made, strict=True):
        before, network = kinds(network), one(network)
        assert kinds(network) == ([*expected, *END] if expected else before)
        assert network.output == network.steps[-1].output
        written = {0, *(step.output for step in network.steps)}
        assert all(written.issuperset(step.inputs) for step in network.steps)
        assert kinds(one(network)) == kinds(network), "a second time changes nothing"


def test_what_a_fused_norm_holds() -> None:
    network = fuse_norms(drop_inert_biases(unfused(Net(THEN["whole"]))))
    norm = network.steps[1]
    assert isinstance(norm, NormActPool)
    assert (norm.slope, norm.pool, norm.shape, norm.name) == (0.1, True, (6, 6, 4), "norm")
    assert network.norms["norm"].bias == "conv.bias"
    first = fuse_first_layer(network).steps[0]
    assert isinstance(first, FirstLayer)
    assert (first.slope, first.padding, first.shape, first.inputs) == (0.1, 1, (6, 6, 4), (0,))
    assert first.params() == {"conv.weight", "norm.weight", "norm.bias"}


def _without_statistics(net: Net) -> None:
    net.norm.track_running_stats = False
    net.norm.running_mean = net.norm.running_var = net.norm.num_batches_tracked = None


def test_a_bias_goes_though_no_statistics_are_kept() -> None:
    net = Net(THEN["whole"])
    _without_statistics(net)
    assert kinds(drop_inert_biases(unfused(net)))[:2] == ["Conv", "NormActPool"]


@pytest.mark.parametrize(
    ("options", "channels", "fits"),
    [({}, 3, True), ({}, 4, False), ({"stride": 2}, 1, False), ({"padding": 0}, 2, True)],
)
def test_which_first_layers_are_fused(options: dict[str, Any], channels: int, fits: bool) -> None:
    network = unfused(Net(THEN["whole"], channels, **options), channels, 14, 14)
    network = fuse_first_layer(fuse_norms(drop_inert_biases(network)))
    assert ("FirstLayer" in kinds(network)) == fits


@pytest.mark.parametrize("adapted", [("norm.weight", "norm.bias"), ("norm.bias",)], ids=["both", "bias"])
@pytest.mark.parametrize("name", CASES)
def test_norms_that_adapt_fuse_like_others(name: str, adapted: tuple[str, ...]) -> None:
    networks = [unfused(Net(THEN[name]), adapted=names) for names in ((), adapted)]
    for one in (drop_inert_biases, fuse_norms, fuse_first_layer):
        networks = [one(network) for network in networks]
        assert kinds(networks[0]) == kinds(networks[1])
    assert [len(network.rows()) for network in networks] == [1, 0]
    assert {"norm.weight", "norm.bias"} <= networks[1].slots().keys()


def test_norms_of_each_image_stay_apart() -> None:
    layers = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.LayerNorm([4, 10, 10]),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(100, 3),
    )
    network = unfused(layers)
    assert "Bias" in kinds(drop_inert_biases(network))
    assert fuse_norms(network) == network


def test_a_norm_in_evaluation_keeps_the_bias_before_it() -> None:
    """Running statistics take nothing out."""
    model = Net(THEN["whole"]).double().eval()
    x, other = (torch.randn(n, 1, 12, 12, dtype=torch.float64) for n in (3, 4))
    network = lower(record(model, x, other), model, frozenset())
    assert kinds(network)[:3] == ["Conv", "Bias", "FrozenNorm"]
    assert fuse_first_layer(fuse_norms(drop_inert_biases(network))) == network


# The head ------------------------------------------------------------------------------------------------------------


class Logits(nn.Module):
    def __init__(self, then: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self, F.relu(self.body(x)))


def _twice_the_logits(net: Any, h: Tensor) -> Tensor:
    y = net.head(h)
    return y + F.relu(y)


def test_the_last_layer_meets_its_loss() -> None:
    network = unfused(Logits(lambda net, h: net.head(h)), 5)
    fused = fuse_head(network, CrossEntropy(0.0))
    assert kinds(fused) == ["Linear", "Activation", "Head"]
    head, linear = fused.steps[-1], network.steps[-1]
    assert isinstance(head, Head)
    assert (head.slots, head.inputs, head.output) == (linear.slots, linear.inputs, network.output)
    assert fuse_head(network, SquaredError()) == network


@pytest.mark.parametrize(
    "then",
    [
        pytest.param(lambda net, h: F.relu(net.head(h)), id="activation-behind"),
        pytest.param(_twice_the_logits, id="read-twice"),
        pytest.param(lambda net, h: net.head(h).detach(), id="detached"),
    ],
)
def test_other_ends_keep_the_linear_layer(then: Callable[[Any, Tensor], Tensor]) -> None:
    network = unfused(Logits(then), 5)
    assert fuse_head(network, CrossEntropy(0.0)) == network


def test_a_layer_that_reaches_no_output_is_left_out_and_no_head() -> None:

    def fn(net: Any, h: Tensor) -> Tensor:
        y = F.relu(h)
        net.head(h)
        return y

    network = unfused(Logits(fn), 5)
    assert kinds(network) == ["Linear", "Activation", "Activation"]
    assert fuse_head(network, CrossEntropy(0.0)) == network


# The same mathematics ------------------------------------------------------------------------------------------------

PASSES: dict[str, Callable[[Network, Any], Network]] = {
    "none": lambda network, loss: network,
    "biases": lambda network, loss: drop_inert_biases(network),
    "norms": lambda network, loss: fuse_norms(network),
    "biases-and-norms": lambda network, loss: fuse_norms(drop_inert_biases(network)),
    "but-the-head": lambda network, loss: fuse_first_layer(fuse_norms(drop_inert_biases(network))),
    "head": fuse_head,
}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "conv4": lambda: small_conv4(2),
    "adapting-conv4": lambda: small_conv4(2, per_step_affine=False),
    **{
        name: lambda name=name: jittered(Net(THEN[name.removeprefix("adapting-")]))  # type: ignore[misc]
        for name in (
            "negative-slope",
            "norm-read-twice",
            "norm-detached",
            "pool-first",
            "adapting-whole",
            "adapting-negative-slope",
            "adapting-norm-read-twice",
            "adapting-conv-detached",
            "adapting-norm-detached",
            "adapting-pool-first",
        )
    },
}


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("name", MODELS)
def test_no_pass_changes_the_meta_gradient(name: str, passes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamlpp_fast.engine.fused.engine.fuse", PASSES[passes])
    # Biases in front of batch norm: exactly zero where they are left out, rounding where not.
    pair = engines(MODELS[name](), 2, adapt_norm=name.startswith("adapting"), verify=False)
    compare(pair, random_batch(), step_weights(2), floor=1e-3)
    expected, ours = (engine.evaluate(random_batch(seed=1), steps=3, stats="running") for engine in pair)
    assert_same(ours, expected, "evaluation")


def test_a_learner_uses_all_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def watched(name: str, fn: Callable[..., Network]) -> Callable[..., Network]:
        def run(*args: Any) -> Network:
            called.append(name)
            return fn(*args)

        return run

    for one in ("drop_inert_biases", "fuse_norms", "fuse_first_layer", "fuse_head"):
        monkeypatch.setattr(fusions, one, watched(one, getattr(fusions, one)))
    learner = mf.MAMLPlusPlus(small_conv4(2), mf.MAMLConfig(steps=2), engine="fused", precision="float64")
    learner.meta_gradient(random_batch())
    assert called == ["drop_inert_biases", "fuse_norms", "fuse_first_layer", "fuse_head"]
