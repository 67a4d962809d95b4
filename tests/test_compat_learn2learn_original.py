"""Our learn2learn against the real one, script by script and task by task, where that is installed."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import mamlpp_fast.compat.learn2learn as ours
from bench.learn2learn_scripts import SCRIPTS, errors, run
from bench.peers.learn2learn_source import load


@pytest.fixture(scope="module")
def original() -> ModuleType:
    try:
        return load()
    except ImportError as error:
        pytest.skip(f"learn2learn cannot be imported: {error}")


# learn2learn reads the gradients of parameters that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_gives_the_same_numbers(script: str, original: ModuleType) -> None:
    sizes = {"ways": 3, "iterations": 2, "tasks": 2, "hidden": 8, "dtype": "float64"}
    theirs, mine = run(script, original, **sizes), run(script, ours, **sizes)
    assert max(errors(mine, theirs).values()) < 1e-6


def chain(l2l: ModuleType, dataset: Any, kind: str) -> list[Callable[[Any], Any]]:
    t = l2l.data.transforms
    labels = dataset.labels[1:]
    first = {
        "ways, shots": [t.NWays(dataset, 3), t.KShots(dataset, 2)],
        "replacement": [t.NWays(dataset, 3), t.KShots(dataset, 6, replacement=True)],
        "filtered": [t.FilterLabels(dataset, labels), t.NWays(dataset, 2), t.KShots(dataset, 2)],
        "shots of all": [t.KShots(dataset, 1)],
        "fused": [t.FusedNWaysKShots(dataset, n=3, k=2)],
        "fused, replacement": [t.FusedNWaysKShots(dataset, n=2, k=5, replacement=True, filter_labels=labels)],
        "not fused": [t.FilterLabels(dataset, dataset.labels), t.FusedNWaysKShots(dataset, n=2, k=2)],
    }[kind]
    return [*first, t.LoadData(dataset), t.RemapLabels(dataset), t.ConsecutiveLabels(dataset)]


def data_set(l2l: ModuleType, kind: str) -> Any:
    x, y = torch.arange(60.0), torch.arange(60) * 7 % 30 % 5 * 3
    whole = l2l.data.MetaDataset(TensorDataset(x, y))
    if kind == "filtered":
        return l2l.data.FilteredMetaDataset(whole, [12, 3, 6, 0])
    return l2l.data.UnionMetaDataset([whole, TensorDataset(x, y)]) if kind == "union" else whole


@pytest.mark.parametrize("kind", ["whole", "filtered", "union"])
@pytest.mark.parametrize(
    "transforms",
    ["ways, shots", "replacement", "filtered", "shots of all", "fused", "fused, replacement", "not fused"],
)
def test_the_same_seed_gives_the_same_tasks(
    kind: str, transforms: str, original: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its NWays samples from a set where it does not come first, which Python 3.10 and older did as from a tuple.
    sample = random.sample
    monkeypatch.setattr(random, "sample", lambda values, k: sample(tuple(values), k))

    def tasks(l2l: ModuleType) -> list[list[Tensor]]:
        random.seed(3)
        dataset = data_set(l2l, kind)
        made = l2l.data.Taskset(dataset, chain(l2l, dataset, transforms), num_tasks=4)
        return [list(made.sample()) for _ in range(6)] + [list(task) for task in made]

    torch.testing.assert_close(tasks(ours), tasks(original), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("OmniglotFC", (784, 5)),
        ("OmniglotCNN", (5,)),
        ("CNN4", (5, 16)),
        ("CNN4Backbone", (16, 2)),
        ("ResNet12", (5,)),
    ],
)
def test_networks_start_from_the_same_values(
    name: str, arguments: tuple[int, ...], original: ModuleType
) -> None:
    states, names = [], []
    for l2l in (ours, original):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        model = getattr(l2l.vision.models, name)(*arguments)
        states.append(model.state_dict())
        names.append([n for n, _ in model.named_parameters()])
    assert names[0] == names[1]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_resnet12_with_drop_block_computes_the_same(original: ModuleType) -> None:
    outputs = []
    for l2l in (ours, original):
        torch.manual_seed(0)
        model = l2l.vision.models.ResNet12(5, dropblock_dropout=0.3, wider=False, hidden_size=512).double()
        for module in model.modules():
            module.num_batches_tracked = 40_000 if type(module).__name__ == "BasicBlock" else None
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked = torch.tensor(0)
        x = torch.rand(2, 3, 84, 84, dtype=torch.float64)
        outputs.append(model(x))
    torch.testing.assert_close(outputs[0], outputs[1])


@pytest.mark.parametrize("shape", [(3, 4, 5, 2), (3, 4), (3,)])
@pytest.mark.parametrize("kind", ["curvature", "Kronecker", "Kronecker with bias", "module"])
def test_transforms_compute_the_same(kind: str, shape: tuple[int, ...], original: ModuleType) -> None:
    results = []
    for l2l in (ours, original):
        linear, kronecker = l2l.nn.KroneckerLinear, l2l.optim.KroneckerTransform
        make = {
            "curvature": l2l.optim.MetaCurvatureTransform,
            "Kronecker": kronecker(linear),
            "Kronecker with bias": kronecker(linear, bias=True, psd=False),
            "module": l2l.optim.ModuleTransform(nn.Linear),
        }[kind]
        torch.manual_seed(0)
        transform = make(torch.zeros(shape)).double()
        for p in transform.parameters():
            nn.init.normal_(p)
        grad = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        update = transform(grad)
        update.square().sum().backward()
        results.append([update, grad.grad, *(p.grad for p in transform.parameters())])
    torch.testing.assert_close(results[0], results[1])


def test_kronecker_cells_compute_the_same(original: ModuleType) -> None:
    results = []
    for l2l in (ours, original):
        torch.manual_seed(0)
        outputs: list[Any] = []
        for cell, hidden in ((l2l.nn.KroneckerRNN(2, 3), 1), (l2l.nn.KroneckerLSTM(2, 3), 2)):
            for _, p in sorted(cell.named_parameters()):
                nn.init.normal_(p)
            state = tuple(torch.randn(2, 3) for _ in range(hidden))
            outputs.append(cell(torch.randn(2, 3), state if hidden == 2 else state[0]))
        results.append(outputs)
    torch.testing.assert_close(results[0], results[1])
