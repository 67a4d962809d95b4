"""Which models the fused engine takes, how it lowers them, and what it says about those it cannot take."""

from __future__ import annotations

import functools
import gc
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from front_end_helpers import Calls
from helpers import lowered, random_batch, small_conv4, small_learner
from torch import Tensor, nn

import mamlpp_fast as mf
from mamlpp_fast.engine.base import Unsupported
from mamlpp_fast.engine.fused.buffers import place
from mamlpp_fast.engine.fused.engine import FusedEngine
from mamlpp_fast.engine.fused.program import Buffer, Emitter, Workspace
from mamlpp_fast.engine.fused.steps.base import aten
from mamlpp_fast.ops.linear_cross_entropy import MOST_CLASSES


def kinds(
    model: nn.Module, image: tuple[int, int, int] = (1, 12, 12), adapted: tuple[str, ...] = ()
) -> list[str]:
    return [step.kind for step in lowered(model, image, adapted).steps]


def test_conv4_is_one_convolution_and_one_norm_a_stage() -> None:
    assert kinds(small_conv4()) == ["FirstLayer", "Conv", "NormActPool", "Flatten", "Linear"]


def test_strided_conv4_ends_in_an_average() -> None:
    model = small_conv4(max_pool=False)
    assert kinds(model) == ["Conv", "NormActPool"] * 2 + ["AveragePool", "Flatten", "Linear"]


def test_resnet12_lowers_as_it_stands() -> None:
    model = mf.ResNet12(3, 5, filters=(2, 3, 4, 5), num_steps=2)
    block = ["Conv", "NormActPool"] * 3 + ["Conv", "NormActPool", "Add", "Activation", "MaxPool"]
    assert kinds(model, (3, 16, 16)) == block * 4 + ["AveragePool", "Flatten", "Linear"]


def test_plain_module_with_functional_calls_lowers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, padding="same")
            self.norm = nn.BatchNorm2d(4)
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
            x = x + F.leaky_relu(x, 0.2)
            x = F.avg_pool2d(x, 3)
            return self.head(x.view(x.size(0), -1))

    assert kinds(Net()) == ["FirstLayer", "Activation", "Add", "AveragePool", "Flatten", "Linear"]


def _last(learner: mf.MAMLPlusPlus, batch: mf.EpisodeBatch) -> tuple[str, dict[str, int]]:
    """The last step's kind, and its calls in each of three inner steps."""
    engine = learner.engine
    assert isinstance(engine, FusedEngine)
    prepared = engine.prepare(batch, True, True)
    names = Counter(i.name for i in prepared.program.instructions)
    counts = {n.removeprefix("linear_cross_entropy"): c for n, c in names.items() if "cross_entropy" in n}
    return prepared.network.steps[-1].kind, {n: c // 3 for n, c in counts.items()}


def test_last_layer_and_cross_entropy_are_one_call_a_rule() -> None:
    kind, calls = _last(small_learner(mf.MAMLConfig(steps=3), engine="fused"), random_batch())
    assert kind == "Head"
    assert calls == {"": 2, "_backward": 2, "_tangent": 1, "_backward_tangent": 1}


def test_other_losses_and_many_classes_keep_the_linear_layer() -> None:
    features = torch.randn(2, 3, 4)
    plain = mf.MAMLPlusPlus(
        nn.Sequential(nn.Linear(4, 2)), mf.MAMLConfig(steps=3), engine="fused", loss_fn=F.mse_loss
    )
    targets = torch.randn(2, 3, 2)
    assert _last(plain, mf.EpisodeBatch(features, targets, features, targets)) == ("Linear", {})
    wide = mf.MAMLPlusPlus(
        nn.Sequential(nn.Linear(4, MOST_CLASSES + 1)), mf.MAMLConfig(steps=3), engine="fused"
    )
    labels = torch.zeros(2, 3, dtype=torch.int64)
    assert _last(wide, mf.EpisodeBatch(features, labels, features, labels)) == ("Linear", {})


def test_bias_stays_where_no_batch_norm_follows() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
    )
    assert kinds(model)[:3] == ["Conv", "Bias", "Activation"]


def test_adapting_norms_fuse_like_fixed_ones() -> None:
    for model in (small_conv4(per_step_affine=False), mf.ResNet12(1, 5, per_step_affine=False)):
        image = (1, 12, 12) if isinstance(model, mf.Conv4) else (1, 16, 16)
        names = tuple(n for n, _ in model.named_parameters())
        assert kinds(model, image, names) == kinds(model, image)
        bias = tuple(n for n in names if n.endswith("norm.bias"))
        assert kinds(model, image, bias) == kinds(model, image)
        adapting = {n for step in lowered(model, image, names).steps for n in step.params()}
        assert adapting >= set(bias)


class _Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def _shared() -> nn.Module:
    norm = nn.BatchNorm2d(1)
    return nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), norm, norm)


@pytest.mark.parametrize(
    ("model", "module", "why"),
    [
        pytest.param(nn.Sequential(nn.RReLU()), "0", "draws random numbers", id="random-slopes"),
        pytest.param(nn.Sequential(nn.Identity(), _Branching()), "1", "asks for values", id="control-flow"),
        pytest.param(_shared(), "1", "running_mean is used more than once in a pass", id="shared-norm"),
        pytest.param(nn.Sequential(nn.Conv2d(1, 2, 3), nn.RReLU()), "1", "draws random numbers", id="drawn"),
    ],
)
def test_unsupported_names_the_module(model: nn.Module, module: str, why: str) -> None:
    with pytest.raises(Unsupported, match=why) as error:
        lowered(model, (1, 16, 16))
    assert error.value.module == module


def test_auto_says_which_module_stopped_it() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 5), nn.RReLU(), nn.Flatten(), nn.Linear(128, 3))
    learner = mf.MAMLPlusPlus(model, mf.MAMLConfig(steps=2), precision="float64")
    learner.meta_gradient(random_batch())
    assert learner.engine.name != "fused"
    assert "1: rrelu draws random numbers" in learner.engine_reason


def test_label_smoothing_has_a_range() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing: expected 0 to 1, got 1.5"):
        mf.MAMLPlusPlus(
            small_conv4(),
            mf.MAMLConfig(steps=3),
            loss_fn=functools.partial(F.cross_entropy, label_smoothing=1.5),
        )


def test_buffers_alive_together_never_overlap() -> None:
    generator = torch.Generator().manual_seed(0)
    buffers = []
    for i in range(60):
        b = Buffer(f"b{i}", (int(torch.randint(1, 500, (), generator=generator)),), torch.float32)
        b.first = int(torch.randint(0, 40, (), generator=generator))
        b.last = b.first + int(torch.randint(0, 10, (), generator=generator))
        buffers.append(b)
    total = place(buffers)
    assert total < sum(b.nbytes for b in buffers) / 2
    for i, a in enumerate(buffers):
        assert a.offset + a.nbytes <= total
        for b in buffers[:i]:
            together = a.first <= b.last and b.first <= a.last
            assert not together or a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset


def test_program_predicts_its_memory_and_keeps_it() -> None:
    em = Emitter(torch.device("cpu"), torch.float32)
    x = em.own("x", torch.arange(8.0))
    y, z = em.new("y", (8,)), em.new("z", (8,))
    em.call(aten.mul.out, x, em.constant(2.0), out=y)
    em.call(aten.add.out, y, x, out=z)
    program, workspace = em.finish(), Workspace(torch.device("cpu"))
    assert program.workspace_bytes == 64 + 32 + 32  # y padded to a cache line, z, and the end aligned
    program.bind(workspace)
    assert workspace.memory.numel() == program.workspace_bytes
    program.run()
    torch.testing.assert_close(z.tensor(), 3 * torch.arange(8.0))


def test_explanation_shows_network_memory_and_operations() -> None:
    learner = small_learner(engine="fused")
    learner.meta_gradient(random_batch())
    text = learner.explain()
    for part in (
        "kernels on cpu",
        "task_conv2d: ",
        "MiB",
        "GFLOP",
        "blocks.0.norm",
        "NormActPool",
        "reverse",
    ):
        assert part in text


def test_recomputing_needs_less_memory_than_keeping() -> None:
    needs = {}
    for option in ("keep", "recompute"):
        learner = small_learner(engine="fused")
        engine = mf.engine.fused.FusedEngine(learner.model, learner.rates, memory=option)  # type: ignore[attr-defined]
        needs[option] = engine.prepare(random_batch(), True, True).program.workspace_bytes
    assert needs["recompute"] < needs["keep"]


def test_a_rule_that_refuses_holds_no_memory() -> None:
    """An error's frames would hold what a caller above them works on, until the next collection of garbage."""

    def call() -> weakref.ref[Tensor]:
        examples = torch.zeros(2, 6)
        # `+` with a parameter: no rule, but a generic step.
        parts = {"head": nn.Linear(6, 3), "shift": nn.Parameter(torch.zeros(6))}
        shifted = Calls(lambda m, x: m.head(x + m.shift), **parts)
        kinds = [s.kind for s in lowered(shifted, examples.shape[1:]).steps]
        assert "generic add" in kinds
        return weakref.ref(examples)

    gc.collect()
    gc.disable()
    try:
        assert call()() is None
    finally:
        gc.enable()
