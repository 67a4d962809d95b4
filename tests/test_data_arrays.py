"""Arrays of one's own, names of data sets and protocols, and where data are looked for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mamlpp_fast.data import DATASETS, DataError, FewShotData, ImageClasses, from_arrays, load, protocols


def test_unsorted_labels_become_class_major() -> None:
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1)
    split = from_arrays(images, [2, 0, 1, 0, 2, 2], names=["a", "b", "c"])
    assert split.images.flatten().tolist() == [1, 3, 2, 0, 4, 5]
    assert split.class_start.tolist() == [0, 2, 3]
    assert split.class_count.tolist() == [2, 1, 3]
    assert split.image_shape == (1, 1, 1)


def test_select_takes_images_along() -> None:
    split = from_arrays(torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1), [0, 0, 1, 2, 2, 2])
    chosen = split.select([2, 0], "val")
    assert chosen.images.flatten().tolist() == [3, 4, 5, 0, 1]
    assert (chosen.names, chosen.split) == (("2", "0"), "val")
    assert chosen.class_start.tolist() == [0, 3]


IMAGES = np.zeros((4, 1, 2, 2), np.uint8)
NAN = np.array([0, 0, np.nan, 0], np.float32).reshape(4, 1, 1, 1)


@pytest.mark.parametrize(
    ("images", "labels", "options", "message"),
    [
        (NAN, [0, 0, 1, 1], {}, "images: expected finite values, got NaN or infinity in image 2"),
        (np.full_like(NAN, np.inf), [0, 0, 1, 1], {}, "images: expected finite values"),
        (IMAGES, [0, 0, 1, 5], {"names": ["a", "b"]}, "labels: expected 0 .. 1, got 5"),
        (IMAGES, [0, 0, -1, 1], {}, "labels: expected 0 .. 1, got -1"),
        (IMAGES, [0, 0, 2, 2], {}, "class '1': expected at least one image, got none"),
        (IMAGES, [0, 0, 1], {}, "images, labels: expected the same length > 0, got 4 and 3"),
        (IMAGES[:0], [], {}, "labels: expected integers"),
        (IMAGES, [0.0, 0.5, 1.0, 1.0], {}, "labels: expected integers [num_images], got torch.float32 [4]"),
        (IMAGES[0, 0], [0, 0], {}, "images: expected [num_images, C, H, W], got [2, 2]"),
        (
            IMAGES.astype(np.int32),
            [0, 0, 1, 1],
            {},
            "images: expected uint8 or floating point, got torch.int32",
        ),
    ],
    ids=["nan", "inf", "label-high", "label-low", "empty-class", "length", "none", "float", "shape", "dtype"],
)
def test_bad_arrays(images: Any, labels: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as raised:
        from_arrays(images, labels, **options)
    assert message in str(raised.value)
    assert str(raised.value).startswith("arrays, split 'train': ")
    assert "\n" not in str(raised.value)


def test_class_bounds_are_checked() -> None:
    one = torch.ones(1, dtype=torch.int64)
    with pytest.raises(DataError, match="reach outside the 4 images"):
        ImageClasses(torch.from_numpy(IMAGES), one, 4 * one, ("a",), "train", "mine")
    with pytest.raises(DataError, match="expected one entry a class"):
        ImageClasses(torch.from_numpy(IMAGES), one, one, ("a", "b"), "train", "mine")


def test_splits_must_agree() -> None:
    small, large = from_arrays(IMAGES, [0] * 4), from_arrays(np.zeros((4, 1, 3, 3), np.uint8), [0] * 4)
    with pytest.raises(DataError, match="expected images of one shape in all splits"):
        FewShotData("mine", "none", small, large, small)
    data = FewShotData("mine", "none", small, small, small)
    with pytest.raises(DataError, match="split: expected one of train, val, test, got 'tset'"):
        data.split("tset")


def test_unknown_names() -> None:
    with pytest.raises(DataError, match=r"dataset: expected one of strokes, omniglot, .* got 'omnigolt'"):
        load("omnigolt")
    for name in DATASETS:
        with pytest.raises(DataError, match=f"protocol: expected one of .* for {name}, got 'mine'"):
            load(name, protocol="mine")
        assert protocols(name)


@pytest.mark.parametrize("name", [n for n in DATASETS if n != "strokes"])
def test_missing_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAMLPP_FAST_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="give --data PATH or set MAMLPP_FAST_DATA"):
        load(name)
    with pytest.raises(DataError, match=r"--data: expected an existing file or folder, got '.*absent'"):
        load(name, tmp_path / "absent")
    monkeypatch.setenv("MAMLPP_FAST_DATA", str(tmp_path / "gone"))
    with pytest.raises(
        DataError, match=r"MAMLPP_FAST_DATA: expected an existing file or folder, got '.*gone'"
    ):
        load(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=rf"{name}: .*expected .*found none"):
        load(name, tmp_path / "empty")
