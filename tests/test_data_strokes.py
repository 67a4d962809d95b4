"""The embedded data set: same bytes everywhere, distinct characters, hard for nearest neighbours."""

import hashlib

import pytest
import torch
from helpers import refused

from mamlpp_fast.data import DataError, FewShotData, load
from mamlpp_fast.data.strokes import draw_strokes

SHA256 = "c86c8e2e40f13ca0a75248ef3994fb491aad982c991d2048c57b1d78753c64bd"


@pytest.fixture(scope="module")
def strokes() -> FewShotData:
    return load("strokes")


def test_sizes_and_protocol(strokes: FewShotData) -> None:
    assert [strokes.split(s).num_classes for s in ("train", "val", "test")] == [400, 80, 120]
    assert [strokes.split(s).image_shape for s in ("train", "val", "test")] == [(1, 28, 28)] * 3
    assert (strokes.image_size, strokes.channels, strokes.divisor) == (28, 1, 255.0)
    assert strokes.rotate_train_classes
    assert not load("strokes", protocol="upright").rotate_train_classes
    assert {int(n) for n in strokes.train.class_count} == {20}


def test_alphabets_are_not_divided(strokes: FewShotData) -> None:
    alphabets = [{n.split("/")[0] for n in strokes.split(s).names} for s in ("train", "val", "test")]
    assert [len(a) for a in alphabets] == [20, 4, 6]
    assert len(set.union(*alphabets)) == 30


def test_bytes_are_pinned(strokes: FewShotData) -> None:
    """Numpy, its version or the processor must not matter: see the module's docstring."""
    whole = b"".join(strokes.split(s).images.numpy().tobytes() for s in ("train", "val", "test"))
    assert hashlib.sha256(whole).hexdigest() == SHA256


def test_seed_changes_everything(strokes: FewShotData) -> None:
    other = torch.from_numpy(draw_strokes(seed=1)).view(-1, 1, 28, 28)[:8000]
    same = (other == strokes.train.images).flatten(1).all(1)
    assert not bool(same.any())


def test_no_blank_or_repeated_drawing(strokes: FewShotData) -> None:
    for split in ("train", "val", "test"):
        images = strokes.split(split).images.flatten(1)
        assert int((images > 128).sum(1).min()) >= 5
        assert len(torch.unique(images, dim=0)) == len(images)


def test_nearest_neighbours_on_pixels_do_badly(strokes: FewShotData) -> None:
    """20-way 1-shot: above chance (5 %), and far below what learning reaches (over 80 %)."""
    batch = strokes.sampler("test", ways=20, shots=1, targets=1, seed=0).batch(0, 100)
    distance = torch.cdist(batch.target_x.flatten(2), batch.support_x.flatten(2))
    accuracy = (distance.argmin(-1) == batch.target_y).double().mean().item()
    assert 0.2 < accuracy < 0.42


def test_other_sizes() -> None:
    assert load("strokes", image_size=14).train.image_shape == (1, 14, 14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "x"}, "--data: strokes is generated and takes no path, got 'x'"),
        ({"image_size": 4}, "image_size: expected 8 .. 128 for strokes, got 4"),
        ({"seed": -1}, "seed: expected 0 .. 2**32 - 1 for strokes, got -1"),
        ({"protocol": "lake"}, "protocol: expected one of rotated, upright for strokes, got 'lake'"),
        ({"download": True}, "download: expected omniglot"),
    ],
    ids=["path", "size", "seed", "protocol", "download"],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with refused(DataError, message):
        load("strokes", **options)  # type: ignore[arg-type]
