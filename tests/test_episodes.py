"""Episodes: pure functions of split, seed and number; fair, distinct, without host synchronization."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mamlpp_fast.data import (
    DataError,
    EpisodeSampler,
    ImageClasses,
    authors_episode,
    authors_seed,
    from_arrays,
)
from mamlpp_fast.data.authors import authors_class_split
from mamlpp_fast.data.sampler import _mix, _signed
from mamlpp_fast.episodes import EpisodeBatch

FIELDS = ("support_x", "support_y", "target_x", "target_y")


def make_split(sizes: Sequence[int], split: str = "train") -> ImageClasses:
    """Image j of class c is filled with its row number, in two uint8 digits of its first two pixels."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    row = np.arange(len(labels))
    images = np.zeros((len(labels), 1, 4, 4), np.uint8)
    images[:, :, 0, 0], images[:, :, 0, 1] = (row // 256)[:, None], (row % 256)[:, None]
    return from_arrays(images, labels, split)


def make_sampler(split: ImageClasses, **options: Any) -> EpisodeSampler:
    return EpisodeSampler(
        split, **({"ways": 5, "shots": 2, "targets": 3, "seed": 0, "divisor": 1.0} | options)
    )


def rows_of(x: torch.Tensor) -> torch.Tensor:
    return (x[..., 0, 0, 0] * 256 + x[..., 0, 0, 1]).long()


def assert_batches_equal(a: EpisodeBatch, b: EpisodeBatch) -> None:
    for name in FIELDS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0)


def joined(parts: Sequence[EpisodeBatch]) -> EpisodeBatch:
    return EpisodeBatch(*(torch.cat([getattr(p, name) for p in parts]) for name in FIELDS))


def test_mix_is_splitmix64() -> None:
    def expected(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    values = [0, 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15, 123456789 * 987654321]
    mixed = _mix(torch.tensor([_signed(v) for v in values])).tolist()
    assert mixed == [_signed(expected(v)) for v in values]


PINNED = ([[29, 24, 25, 6, 3]], [1, 2, 6, 3, 5], [[0, 2, 3, 2, 2]])


def test_draws_are_pinned() -> None:
    """A change here changes every published run: the draws are part of the file formats, in effect."""
    classes, images, turns = make_sampler(make_split([7] * 30)).draws(10**12, 1)
    assert (classes.tolist(), images[0, 0].tolist(), turns.tolist()) == PINNED


@pytest.mark.parametrize("sampling", ["counter", "authors"])
def test_batches_shard_and_repeat(sampling: str) -> None:
    split = make_split([9, 5, 6, 8, 7, 5, 12])
    sampler = make_sampler(split, sampling=sampling, rotations=True)
    whole = sampler.batch(3, 8)
    assert_batches_equal(whole, joined([sampler.batch(3, 4), sampler.batch(7, 4)]))
    assert_batches_equal(whole, joined([sampler.batch(i, 1) for i in range(3, 11)]))
    fresh = make_sampler(split, sampling=sampling, rotations=True)
    fresh.batch(100, 2)
    assert_batches_equal(whole, fresh.batch(3, 8))


def test_batch_from_equals_batch() -> None:
    sampler = make_sampler(make_split([6] * 9), rotations=True)
    for counter in (torch.tensor(12), torch.tensor([12])):
        assert_batches_equal(sampler.batch_from(counter, 4), sampler.batch(12, 4))


def test_seed_split_and_number_all_matter() -> None:
    def draws(split: str, seed: int, number: int) -> torch.Tensor:
        return make_sampler(make_split([9] * 40, split), seed=seed).draws(number, 1)[0]

    base = draws("train", 0, 0)
    others = [draws("val", 0, 0), draws("train", 1, 0), draws("train", 0, 1), draws("train", 2**63 + 5, 0)]
    assert all(not torch.equal(base, other) for other in others)


@pytest.mark.parametrize("sampling", ["counter", "authors"])
@pytest.mark.parametrize("sizes", [[5] * 5, [5, 9, 300, 17, 6, 31, 5]], ids=["tight", "ragged"])
def test_no_class_or_image_repeats_and_labels_are_positions(sizes: list[int], sampling: str) -> None:
    split = make_split(sizes)
    sampler = make_sampler(split, sampling=sampling)
    batch = sampler.batch(0, 50)
    classes, images, _ = sampler.draws(0, 50)
    assert all(len(set(c)) == 5 for c in classes.tolist())
    assert all(len(set(i)) == 5 for task in images.tolist() for i in task)
    assert bool((images < split.class_count[classes][..., None]).all())
    rows = split.class_start[classes][..., None] + images
    torch.testing.assert_close(rows_of(batch.support_x), rows[..., :2].flatten(1))
    torch.testing.assert_close(rows_of(batch.target_x), rows[..., 2:].flatten(1))
    torch.testing.assert_close(batch.support_y, torch.arange(5).repeat_interleave(2).expand(50, -1))
    torch.testing.assert_close(batch.target_y, torch.arange(5).repeat_interleave(3).expand(50, -1))


def test_draws_are_uniform() -> None:
    """Counts of classes, positions, images and turns lie within 5 standard deviations of even."""
    tasks, classes_number, size = 20000, 23, 9
    classes, images, turns = make_sampler(make_split([size] * classes_number)).draws(0, tasks)

    def even(counts: torch.Tensor, trials: float, p: float) -> bool:
        return bool(((counts - trials * p).abs() < 5 * (trials * p * (1 - p)) ** 0.5).all())

    assert even(torch.bincount(classes.flatten(), minlength=classes_number), tasks, 5 / classes_number)
    assert even(torch.bincount(classes[:, 0], minlength=classes_number), tasks, 1 / classes_number)
    pairs = classes[:, 0] * classes_number + classes[:, 1]
    distinct = torch.bincount(pairs, minlength=classes_number**2).view(classes_number, -1)
    off_diagonal = distinct[~torch.eye(classes_number, dtype=torch.bool)]
    assert even(off_diagonal, tasks, 1 / (classes_number * (classes_number - 1)))
    assert even(torch.bincount(images[:, 0, 0], minlength=size), tasks, 1 / size)
    assert even(torch.bincount(images[:, 4, 4], minlength=size), tasks, 1 / size)
    assert even(torch.bincount(turns.flatten(), minlength=4), tasks * 5, 1 / 4)
    joint = torch.bincount(turns[:, 0] * 4 + turns[:, 1], minlength=16)
    assert even(joint, tasks, 1 / 16)


@pytest.mark.parametrize("channels", [1, 3])
def test_rotations_turn_every_image_of_a_class_alike(channels: int) -> None:
    labels = torch.arange(6).repeat_interleave(5)
    images = torch.randint(0, 256, (30, channels, 7, 7), dtype=torch.uint8)
    split = from_arrays(images, labels)
    sampler = make_sampler(split, rotations=True, dtype=torch.float64)
    batch = sampler.batch(0, 4)
    classes, drawn, turns = sampler.draws(0, 4)
    assert set(turns.flatten().tolist()) == {0, 1, 2, 3}
    for t in range(4):
        for w in range(5):
            k = int(turns[t, w])
            expected = torch.rot90(images[int(classes[t, w]) * 5 + drawn[t, w]].double(), k, (-2, -1))
            torch.testing.assert_close(batch.support_x[t, 2 * w : 2 * w + 2], expected[:2])
            torch.testing.assert_close(batch.target_x[t, 3 * w : 3 * w + 3], expected[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normalisation(dtype: torch.dtype) -> None:
    images = torch.randint(0, 256, (10, 3, 4, 4), dtype=torch.uint8)
    split = from_arrays(images, torch.arange(5).repeat(2))
    mean, std = (0.5, 0.25, 0.125), (0.2, 0.3, 0.4)
    sampler = EpisodeSampler(
        split, ways=5, shots=1, targets=1, seed=0, divisor=255.0, mean=mean, std=std, dtype=dtype
    )
    batch = sampler.batch(0, 1)
    classes, drawn, _ = sampler.draws(0, 1)
    source = split.images[split.class_start[classes[0]] + drawn[0, :, 0]].double() / 255
    expected = (source - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert batch.support_x.dtype == dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(batch.support_x[0].double(), expected.double(), rtol=tolerance, atol=tolerance)
    assert bool((split.images == images[torch.argsort(torch.arange(5).repeat(2), stable=True)]).all())


def test_float_images_are_not_changed_in_place() -> None:
    images = torch.rand(20, 1, 3, 3)
    kept = images.clone()
    split = from_arrays(images, torch.arange(4).repeat_interleave(5))
    for rotations in (False, True):
        make_sampler(split, ways=4, rotations=rotations, divisor=2.0, mean=(0.5,), std=(0.1,)).batch(0, 2)
    torch.testing.assert_close(split.images, kept, rtol=0, atol=0)


class NoHostSync(TorchDispatchMode):
    """Refuses whatever would make the host wait for a device, or have a shape depend on its data."""

    refused = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not any(name == r or name.startswith("_unique") for r in self.refused), name
        kwargs = kwargs or {}
        assert torch.device(kwargs.get("device") or "cpu").type == "cpu"
        return func(*args, **kwargs)


@pytest.mark.parametrize("rotations", [False, True], ids=["upright", "rotated"])
def test_drawing_never_waits_for_the_device(rotations: bool) -> None:
    sampler = make_sampler(make_split([6, 7, 8, 9, 10, 11]), rotations=rotations, mean=(0.5,), std=(0.5,))
    counter = torch.tensor(0)
    expected = sampler.batch(0, 3)
    with NoHostSync():
        batch = sampler.batch_from(counter, 3)
    assert_batches_equal(batch, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_draws_equal_cpu_draws_and_capture() -> None:
    split = make_split([6, 7, 8, 9, 10, 11, 300])
    here = make_sampler(split, rotations=True)
    there = make_sampler(split, rotations=True, device="cuda")
    counter = torch.zeros((), dtype=torch.int64, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        there.batch_from(counter, 4)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch = there.batch_from(counter, 4)
        counter += 4
    for start in (0, 4, 8):
        graph.replay()
        assert_batches_equal(batch.to("cpu"), here.batch(start, 4))


def test_copies_on_a_device_are_shared() -> None:
    split = make_split([5] * 5)
    assert split.on("cpu") is split
    assert split.on("meta") is split.on("meta")
    assert make_sampler(split).split is make_sampler(split, seed=1).split


# The authors' random draws.


def test_authors_seeds() -> None:
    assert [authors_seed(s) for s in (0, 1, 2)] == [985773, 128038, 875689]


def test_authors_class_split_sizes_and_order() -> None:
    train, val, test = authors_class_split(1623)
    assert (len(train), len(val), len(test)) == (1150, 50, 423)
    assert sorted(train + val + test) == list(range(1623))
    order = np.arange(1623, dtype=np.int32)
    np.random.RandomState(985773).shuffle(order)
    assert train + val + test == order.tolist()


@pytest.mark.parametrize("seed", [985773, 985774, 128038 + 399_999])
def test_authors_episode_is_their_sequence_of_calls(seed: int) -> None:
    """Their code draws string keys of a dictionary; the random numbers used must be the same."""
    sizes = [20, 7, 20, 9, 20, 20, 11]
    keys = [str(100 + i) for i in range(len(sizes))]
    rng = np.random.RandomState(seed)
    selected = rng.choice(list(keys), size=5, replace=False)
    rng.shuffle(selected)
    turns = rng.randint(0, 4, size=5)
    samples = [rng.choice(sizes[keys.index(k)], size=1 + 3, replace=False) for k in selected]

    classes, images, drawn_turns = authors_episode(sizes, 5, 4, seed)
    assert [keys[c] for c in classes] == list(selected)
    assert images.tolist() == [s.tolist() for s in samples]
    assert drawn_turns.tolist() == turns.tolist()


def test_authors_sampler_counts_from_the_hashed_seed() -> None:
    split = make_split([20] * 30)
    classes, images, turns = make_sampler(split, sampling="authors", seed=1).draws(7, 2)
    for t in range(2):
        c, i, k = authors_episode([20] * 30, 5, 5, 128038 + 7 + t)
        assert classes[t].tolist() == c.tolist()
        assert images[t].tolist() == i.tolist()
        assert turns[t].tolist() == k.tolist()


# Requests that cannot be served.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 8}, "ways: expected at most the 7 classes of arrays, split 'train', got 8"),
        (
            {"shots": 3},
            "shots + targets: expected at most the 5 images of class '2' of arrays, split 'train'",
        ),
        ({"ways": 0}, "ways: expected at least 1, got 0"),
        ({"targets": 0}, "targets: expected at least 1, got 0"),
        ({"mean": (0.5, 0.5)}, "mean: expected 1 values"),
        ({"sampling": "random"}, "sampling: expected 'counter' or 'authors', got 'random'"),
        ({"dtype": torch.int64}, "dtype: expected a floating point type, got torch.int64"),
    ],
    ids=["ways", "few-images", "no-ways", "no-targets", "mean", "sampling", "dtype"],
)
def test_impossible_requests(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as raised:
        make_sampler(make_split([9, 6, 5, 8, 7, 9, 12]), **options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_impossible_batches() -> None:
    sampler = make_sampler(make_split([5] * 5))
    for start, count in ((-1, 2), (0, 0)):
        with pytest.raises(DataError, match="start, count: expected"):
            sampler.batch(start, count)
    with pytest.raises(DataError, match="batch_from: expected sampling='counter'"):
        make_sampler(make_split([5] * 5), sampling="authors").batch_from(torch.tensor(0), 1)


def test_rotations_need_square_images() -> None:
    split = from_arrays(np.zeros((10, 1, 4, 6), np.uint8), [0] * 10)
    with pytest.raises(DataError, match=r"rotations: expected square images .* got 4x6"):
        make_sampler(split, ways=1, rotations=True)
