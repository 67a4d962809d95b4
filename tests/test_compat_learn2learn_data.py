"""learn2learn's tasks: bookkeeping, transforms, sampling, networks and benchmarks."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

import mamlpp_fast.compat.learn2learn as l2l
from mamlpp_fast.compat.learn2learn.data.transforms import (
    ConsecutiveLabels,
    FilterLabels,
    FusedNWaysKShots,
    KShots,
    LoadData,
    NWays,
    RemapLabels,
)
from mamlpp_fast.compat.learn2learn.vision.models.cnn4 import truncated_normal_
from mamlpp_fast.compat.learn2learn.vision.transforms import RandomClassRotation, rotated

LABELS = [7, 3, 9] * 4


@pytest.fixture
def dataset() -> l2l.data.MetaDataset:
    return l2l.data.MetaDataset(TensorDataset(torch.arange(12.0).view(12, 1), torch.tensor(LABELS)))


class Listed(Dataset[Any]):
    def __init__(self, labels: list[Any]) -> None:
        self.labels = labels

    def __getitem__(self, i: int) -> tuple[int, Any]:
        return i, self.labels[i]

    def __len__(self) -> int:
        return len(self.labels)


def indices(description: list[l2l.data.DataDescription]) -> list[int]:
    return [described.index for described in description]


def test_bookkeeping(dataset: l2l.data.MetaDataset) -> None:
    assert dataset.labels == [7, 3, 9] and len(dataset) == 12
    assert dataset.labels_to_indices[3] == [1, 4, 7, 10] and dataset.indices_to_labels[5] == 9
    listed = l2l.data.MetaDataset(Listed([torch.tensor(label) for label in LABELS]))
    assert listed.labels_to_indices == dataset.labels_to_indices
    for given in ({"labels_to_indices": {0: [1], 1: [0]}}, {"indices_to_labels": {0: 1, 1: 0}}):
        bootstrapped = l2l.data.MetaDataset(Listed(["a", "b"]), **given)
        assert bootstrapped.labels_to_indices[0] == [1] and bootstrapped.indices_to_labels[0] == 1


def test_bookkeeping_is_kept_in_a_file_where_the_data_set_names_one(tmp_path: Path) -> None:
    data = Listed(["a", "b", "a"])
    data._bookkeeping_path = str(tmp_path / "index.pkl")  # type: ignore[attr-defined]
    first = l2l.data.MetaDataset(data)
    assert pickle.loads((tmp_path / "index.pkl").read_bytes())["labels"] == ["a", "b"]
    data.labels = ["x", "x", "x"]
    assert l2l.data.MetaDataset(data).labels_to_indices == first.labels_to_indices


def test_data_sets_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match="MetaDataset only accepts a torch dataset as input"):
        l2l.data.MetaDataset([1, 2])  # type: ignore[arg-type]
    for labels in (Listed([torch.zeros(2)]), TensorDataset(torch.zeros(1), torch.zeros(1, 2))):
        with pytest.raises(ValueError, match="Requires scalar labels"):
            l2l.data.MetaDataset(labels)


def test_union_renumbers_and_filter_keeps_labels(dataset: l2l.data.MetaDataset) -> None:
    union = l2l.data.UnionMetaDataset([dataset, Listed(["a", "b"])])
    assert len(union) == 14 and union.labels == [0, 1, 2, 3, 4]
    assert union.labels_to_indices[4] == [13] and list(union[13]) == [1, 4] and list(union[1])[1] == 1
    filtered = l2l.data.FilteredMetaDataset(dataset, [9, 7])
    assert filtered.labels == [9, 7] and len(filtered) == 8
    assert float(filtered[0][0]) == 2 and int(filtered[0][1]) == 9


def test_transforms_of_a_new_task_and_of_a_description(dataset: l2l.data.MetaDataset) -> None:
    everything = LoadData(dataset)(None)
    assert indices(everything) == list(range(12))
    assert [LABELS[i] for i in indices(FilterLabels(dataset, [3, 9])(everything))] == [3, 9] * 4
    for ways in (NWays(dataset, n=2)(None), NWays(dataset, n=2)(everything)):
        counts = Counter(LABELS[i] for i in indices(ways))
        assert len(counts) == 2 and set(counts.values()) == {4}
        assert set(Counter(LABELS[i] for i in indices(KShots(dataset, k=3)(ways))).values()) == {3}
    assert sorted(LABELS) == [LABELS[i] for i in indices(ConsecutiveLabels(dataset)(everything))]
    for fused in (FusedNWaysKShots(dataset, n=2, k=3)(None), FusedNWaysKShots(dataset, n=2, k=3)(everything)):
        assert len(set(indices(fused))) == 6 and len({LABELS[i] for i in indices(fused)}) == 2
    only = FusedNWaysKShots(dataset, n=1, k=9, replacement=True, filter_labels=[3])
    assert {LABELS[i] for i in indices(only(None))} == {3} and len(only(None)) == 9
    with pytest.raises(ValueError, match="larger than population"):
        KShots(dataset, k=5)(None)


def test_samples_drawn_with_replacement_have_transforms_of_their_own(dataset: l2l.data.MetaDataset) -> None:
    drawn = KShots(dataset, k=8, replacement=True)(LoadData(dataset)(None))
    RemapLabels(dataset)(drawn)
    assert len(drawn) == 24 and {len(described.transforms) for described in drawn} == {2}


def test_a_task_is_loaded_and_renumbered(dataset: l2l.data.MetaDataset) -> None:
    transforms = [
        NWays(dataset, 2),
        KShots(dataset, 2),
        LoadData(dataset),
        RemapLabels(dataset),
        ConsecutiveLabels(dataset),
    ]
    tasks = l2l.data.Taskset(dataset, transforms, num_tasks=5)
    x, y = tasks[3]
    assert x.shape == (4, 1) and sorted(y.tolist()) == [0, 0, 1, 1]
    true = [LABELS[int(i)] for i in x.flatten()]
    assert true == sorted(true) and len({*zip(true, y.tolist(), strict=True)}) == 2
    again, _ = tasks[3]
    torch.testing.assert_close(again, x)
    assert len(tasks) == 5 and len(list(tasks)) == 5 and len(tasks.sampled_descriptions) == 5
    tasks.sample()
    in_order = RemapLabels(dataset, shuffle=False)
    assert [in_order.remap((0, 5), mapping=[5].index)] == [[0, 0]]
    endless = l2l.data.Taskset(dataset, transforms)
    assert len(endless) == 1 and not endless.sampled_descriptions
    assert len({tuple(next(endless)[0].flatten().tolist()) for _ in range(20)}) > 1
    custom = l2l.data.Taskset(dataset, lambda _: LoadData(dataset)(None), task_collate=len)
    assert custom[0] == 12


def test_task_sets_errors_and_the_former_name(dataset: l2l.data.MetaDataset) -> None:
    for number in (0, -2):
        with pytest.raises(ValueError, match=r"num_tasks needs to be -1 \(infinity\) or positive."):
            l2l.data.Taskset(dataset, num_tasks=number)
    with pytest.raises(NotImplementedError, match="Adding datasets not yet supported"):
        l2l.data.Taskset(dataset) + l2l.data.Taskset(dataset)
    l2l.utils.warn_once.warned_messages.clear()
    with pytest.warns(DeprecationWarning, match="TaskDataset is deprecated, use Taskset instead"):
        l2l.data.TaskDataset(dataset)
    l2l.data.TaskDataset(Listed([0, 1]))  # warns no more, and wraps what is no MetaDataset


def test_the_same_seed_gives_learn2learns_tasks(dataset: l2l.data.MetaDataset) -> None:
    """The order of draws: labels, then shots label by label, then the new numbers."""
    tasks = l2l.data.Taskset(
        dataset, [NWays(dataset, 2), KShots(dataset, 2), LoadData(dataset), RemapLabels(dataset)]
    )
    random.seed(5)
    x, y = tasks.sample()
    random.seed(5)
    random.randint(0, 0)
    classes = random.sample([7, 3, 9], k=2)
    shots = [random.sample(dataset.labels_to_indices[c], k=2) for c in classes]
    numbers = list({*classes})
    random.shuffle(numbers)
    assert x.flatten().tolist() == [float(i) for row in shots for i in row]
    assert y.tolist() == [numbers.index(c) for c in classes for _ in range(2)]


def test_partition_iterator_and_tensors(dataset: l2l.data.MetaDataset) -> None:
    x, y = torch.arange(6.0).view(6, 1), torch.tensor([1, 0, 1, 0, 1, 0])
    (support, labels), (query, _) = l2l.data.partition_task(x, y, shots=1)
    assert support.flatten().tolist() == [1, 0] and labels.tolist() == [0, 1]
    assert query.flatten().tolist() == [3, 5, 2, 4]
    with pytest.raises(AssertionError, match="Only query_shot == support_shot supported"):
        l2l.data.partition_task(x[:5], y[:5], shots=1)
    endless = l2l.data.InfiniteIterator([1, 2])
    assert [next(endless) for _ in range(5)] == [1, 2, 1, 2, 1]
    resident = l2l.data.OnDeviceDataset(dataset, transform=lambda t: t * 2)
    assert float(resident[3][0]) == 6 and l2l.data.MetaDataset(resident).labels == [7, 3, 9]


def test_truncated_normal_draws_from_numpy_within_two_deviations() -> None:
    np.random.seed(0)  # noqa: NPY002
    values = truncated_normal_(torch.empty(20_000, dtype=torch.float64), mean=1.0, std=0.5)
    assert float((values - 1).abs().max()) <= 1
    # Variance of a normal cut at two deviations: 1 - 4 φ(2) / (Φ(2) - Φ(-2)) = 0.7737
    assert abs(float(((values - 1) / 0.5).var()) - 0.7737) < 0.02


@pytest.mark.parametrize(
    ("make", "shape", "parameters"),
    [
        (lambda: l2l.vision.models.OmniglotFC(784, 5), (2, 1, 28, 28), 247_621),
        (lambda: l2l.vision.models.OmniglotCNN(5, 8), (2, 1, 28, 28), 1_941),
        (lambda: l2l.vision.models.MiniImagenetCNN(5, 8), (2, 3, 84, 84), 3_045),
        (lambda: l2l.vision.models.CNN4(5, 8, max_pool=False, embedding_size=288), (2, 3, 84, 84), None),
        (lambda: l2l.vision.models.ResNet12(5), (2, 3, 84, 84), None),
    ],
)
def test_networks_have_learn2learns_sizes(make: Any, shape: tuple[int, ...], parameters: int | None) -> None:
    model = make()
    assert model(torch.rand(shape)).shape == (2, 5)
    assert parameters is None or sum(p.numel() for p in model.parameters()) == parameters


def test_networks_have_learn2learns_names() -> None:
    names = [n for n, _ in l2l.vision.models.OmniglotCNN().named_parameters()]
    assert names[:4] == [
        f"base.0.{n}" for n in ("normalize.weight", "normalize.bias", "conv.weight", "conv.bias")
    ]
    names = [n for n, _ in l2l.vision.models.ResNet12(5).named_parameters()]
    assert names[0] == "features.layer1.0.conv1.weight" and names[-1] == "classifier.bias"


@pytest.mark.parametrize("degrees", [0.0, 90.0, 180.0, 270.0])
def test_rotation_of_tensors_and_images_agree(degrees: float) -> None:
    x = torch.randint(0, 255, (1, 7, 7), dtype=torch.uint8)
    image = Image.fromarray(x[0].numpy())
    assert rotated(x, degrees)[0].tolist() == np.asarray(rotated(image, degrees)).tolist()


def test_other_angles_turn_the_same_way() -> None:
    x = torch.zeros(1, 9, 9)
    x[0, 4, 7] = 1.0  # right of the middle: anticlockwise by 45 degrees goes up
    turned = rotated(x, 45.0)
    assert turned.nonzero().tolist() == [[0, 2, 6]]


def test_all_classes_of_a_task_turn_by_the_last_ones_angle(dataset: l2l.data.MetaDataset) -> None:
    random.seed(1)
    description = RandomClassRotation(dataset, [0.0, 90.0, 180.0, 270.0])(LoadData(dataset)(None))
    assert len({described.transforms[-1].angle for described in description}) == 1


def test_benchmarks_refuse_what_they_do_not_have() -> None:
    assert list(l2l.vision.benchmarks.list_tasksets()) == ["omniglot", "mini-imagenet"]
    with pytest.raises(ValueError, match="name: expected one of omniglot, mini-imagenet, got 'fc100'"):
        l2l.vision.benchmarks.get_tasksets("fc100")
    with pytest.raises(ValueError, match="Needs to be train, test or validation"):
        l2l.vision.datasets.MiniImagenet("nowhere", mode="val")


@pytest.mark.data
def test_omniglot_tasks(real_data: Path) -> None:
    sets = l2l.vision.benchmarks.get_tasksets(
        "omniglot", train_ways=3, train_samples=4, num_tasks=10, root=str(real_data)
    )
    x, y = sets.train.sample()
    assert x.shape == (12, 1, 28, 28) and sorted(y.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    assert 0 <= float(x.min()) < 0.1 and float(x.max()) > 0.9 and float(x.mean()) < 0.3
    assert len(sets.train.dataset.labels) == 1100 and len(sets.test.dataset.labels) == 423
    own = l2l.vision.benchmarks.get_tasksets("omniglot", root=str(real_data), disjoint=True)
    known = own.validation.task_transforms[0].filter_labels
    assert set(known) == set(own.validation.dataset.labels) and len(known) == 100


def test_mini_imagenet_tasks_from_learn2learns_files(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "validation", "test")):
        images = np.full((6, 84, 84, 3), number, np.uint8) + np.arange(6, dtype=np.uint8)[:, None, None, None]
        content = {"image_data": images, "class_dict": {"a": [0, 1, 2], "b": [3, 4, 5]}}
        (tmp_path / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(content))
    images = l2l.vision.datasets.MiniImagenet(str(tmp_path), mode="validation")
    assert len(images) == 6 and images.sample_labels() == [0, 0, 0, 1, 1, 1]
    x, label = images[5]
    assert x.shape == (3, 84, 84) and x.dtype == torch.float32 and label == 1
    assert torch.equal(x, torch.full_like(x, 6))
    sizes = {"train_ways": 2, "train_samples": 3, "test_ways": 1, "test_samples": 2}
    for device in (None, "cpu"):
        sets = l2l.vision.benchmarks.get_tasksets(
            "mini-imagenet", root=str(tmp_path), data_augmentation="normalize", device=device, **sizes
        )
        x, y = sets.train.sample()
        assert x.shape == (6, 3, 84, 84) and float(x.max()) == pytest.approx(5 / 255)
        assert sorted(y.tolist()) == [0, 0, 0, 1, 1, 1]
        assert sets.test.sample()[1].tolist() == [0, 0]
    with pytest.raises(ValueError, match="Invalid data_augmentation argument"):
        l2l.vision.benchmarks.get_tasksets("mini-imagenet", root=str(tmp_path), data_augmentation="other")
