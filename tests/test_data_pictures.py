"""Pictures of one's own: their range, transparency and orientation, and which folders and files are taken."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mamlpp_fast.data import DataError, load

RAMP = np.tile(np.linspace(0, 255, 16), (16, 1)).astype(np.uint8)
SPLITS = ("train", "val", "test")


def save(root: Path, names: str, image: Image.Image, file: str = "0.png", **options: Any) -> None:
    """One image in each of the folders ``names``."""
    for name in names.split():
        (root / name).mkdir(parents=True, exist_ok=True)
        image.save(root / name / file, **options)


def pixels(root: Path, **options: Any) -> NDArray[np.uint8]:
    """[C, H, W] of the first image."""
    images: NDArray[np.uint8] = load("folder", root, **options).train.images[0].numpy()
    return images


@pytest.mark.parametrize(
    ("values", "suffix"),
    [
        (RAMP, "png"),
        (RAMP.astype(np.uint16) * 257, "png"),
        (RAMP.astype(">u2") * 257, "tif"),
        (RAMP.astype(np.uint16) * 257, "pgm"),
        (RAMP.astype(np.int32) * 257, "tif"),
        (RAMP.astype(np.int32), "tif"),
        (RAMP.astype(np.float32) / 255, "tif"),
        (np.float32(RAMP > 127), "tif"),
    ],
    ids=["8", "16", "16-big-endian", "16-pgm", "32-of-16", "32-of-8", "float", "float-0-or-1"],
)
def test_every_depth_is_scaled_by_its_range(values: Any, suffix: str, tmp_path: Path) -> None:
    save(tmp_path, "a b c", Image.fromarray(values), f"0.{suffix}")
    white = 1 if values.dtype.kind == "f" else 255 if values.max() < 256 else 65535
    expected = np.rint(values.astype(np.float64) * (255 / white)).astype(np.uint8)
    np.testing.assert_array_equal(pixels(tmp_path), expected[None])
    np.testing.assert_array_equal(pixels(tmp_path, channels=3), np.stack([expected] * 3))


@pytest.mark.parametrize("split", ["", "train", "test"])
def test_all_images_of_32_bit_integers_have_one_range(split: str, tmp_path: Path) -> None:
    """A dark image of 16 bits does not pass for one of 8: the brightest may lie in another split."""
    places = {"": "a b c d e f", "train": "train/a val/b test/c", "test": "train/a val/b test/c"}[split]
    save(tmp_path, places, Image.fromarray(np.full((4, 4), 200, np.int32)), "0.tif")
    bright = {"": "a", "train": "train/z", "test": "test/z"}[split]
    save(tmp_path, bright, Image.fromarray(np.full((4, 4), 65535, np.int32)), "1.tif")
    data = load("folder", tmp_path)
    levels = torch.cat([data.split(s).images[:, 0, 0, 0] for s in SPLITS]).tolist()
    assert sorted(levels) == [1] * len(places.split()) + [255]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.float32([[0, 80.5]]), r"expected floating-point values in 0 .. 1, got 0 .. 80\.5; scale them"),
        (np.float32([[-0.25, 1]]), r"expected floating-point values in 0 .. 1, got -0\.25 .. 1; scale them"),
        (np.float32([[0, np.nan]]), r"expected floating-point values in 0 .. 1, got nan .. nan; scale them"),
        (np.int32([[0, 70000]]), r"expected 32-bit integers in 0 .. 65535, got 0 .. 70000; scale them"),
        (np.int32([[-1, 5]]), r"expected 32-bit integers in 0 .. 65535, got -1 .. 5; scale them"),
    ],
    ids=["float-high", "float-low", "nan", "integer-high", "integer-low"],
)
def test_a_range_that_cannot_be_told_is_refused(values: Any, message: str, tmp_path: Path) -> None:
    save(tmp_path, "a b c", Image.fromarray(values), "0.tif")
    with pytest.raises(DataError, match=r"0\.tif: " + message) as raised:
        load("folder", tmp_path)
    assert "\n" not in str(raised.value)


def test_transparency_shows_white_paper(tmp_path: Path) -> None:
    """Black ink on a transparent ground is a drawing, not a black square."""
    expected = 255 - RAMP
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[..., 3] = RAMP
    save(tmp_path / "rgba", "a b c", Image.fromarray(ink))
    np.testing.assert_array_equal(pixels(tmp_path / "rgba"), np.stack([expected] * 3))
    save(tmp_path / "la", "a b c", Image.fromarray(ink[..., 2:]))
    np.testing.assert_array_equal(pixels(tmp_path / "la"), expected[None])
    colour = np.full((16, 16, 4), 255, np.uint8)
    colour[..., :3] = (200, 100, 0)
    colour[..., 3] = RAMP
    save(tmp_path / "colour", "a b c", Image.fromarray(colour))
    alpha = RAMP[..., None] / 255.0
    blend = (np.array([200, 100, 0]) * alpha + 255 * (1 - alpha)).transpose(2, 0, 1)
    np.testing.assert_allclose(pixels(tmp_path / "colour").astype(np.float64), blend, atol=0.5 + 1e-9)


def test_a_palette_with_a_transparency_for_each_colour(tmp_path: Path) -> None:
    image = Image.fromarray(RAMP).convert("P")
    image.putpalette([0, 0, 0] * 256)
    save(tmp_path, "a b c", image, transparency=bytes(range(256)))
    np.testing.assert_array_equal(pixels(tmp_path), 255 - RAMP[None])
    np.testing.assert_array_equal(pixels(tmp_path, channels=3), np.stack([255 - RAMP] * 3))


@pytest.mark.parametrize(
    ("image", "key"),
    [
        (Image.fromarray(RAMP), 17),
        (Image.fromarray(RAMP.astype(np.uint16) * 257), 17 * 257),
        (Image.fromarray(np.stack([RAMP] * 3, -1)), (17, 17, 17)),
        (Image.fromarray(RAMP).convert("P"), 17),
    ],
    ids=["grey", "16-bit", "colour", "palette"],
)
def test_the_one_transparent_value_of_a_png_is_white(image: Image.Image, key: Any, tmp_path: Path) -> None:
    save(tmp_path, "a b c", image, transparency=key)
    expected = np.where(RAMP == 17, 255, RAMP)
    for got in pixels(tmp_path):
        np.testing.assert_array_equal(got, expected)


def test_palettes_are_grey_where_their_colours_are(tmp_path: Path) -> None:
    save(tmp_path / "grey", "a b c", Image.fromarray(RAMP).convert("P"))
    np.testing.assert_array_equal(pixels(tmp_path / "grey"), RAMP[None])
    save(
        tmp_path / "gif",
        "a b c",
        Image.fromarray(RAMP),
        "0.gif",
        save_all=True,
        append_images=[Image.new("L", (16, 16))],
    )
    np.testing.assert_array_equal(pixels(tmp_path / "gif"), RAMP[None])  # the first picture of it
    coloured = Image.fromarray(RAMP).convert("P")
    coloured.putpalette([v for i in range(256) for v in (i, 0, 255 - i)])
    save(tmp_path / "coloured", "a b c", coloured)
    np.testing.assert_array_equal(pixels(tmp_path / "coloured"), np.stack([RAMP, 0 * RAMP, 255 - RAMP]))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright_as_their_camera_held_them(orientation: int, tmp_path: Path) -> None:
    stored = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    turned = (
        stored,
        stored[:, ::-1],
        stored[::-1, ::-1],
        stored[::-1],
        stored.T,
        np.rot90(stored, -1),
        stored[::-1, ::-1].T,
        np.rot90(stored),
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path, "a b c", Image.fromarray(stored), exif=exif)
    np.testing.assert_array_equal(pixels(tmp_path), turned[orientation - 1][None])


def test_mini_imagenet_is_not_turned(tmp_path: Path) -> None:
    """Published results are of its files as Pillow opens them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path, "train/a val/b test/c", Image.fromarray(RAMP), exif=exif)
    images = load("miniimagenet", tmp_path, image_size=16).train.images
    np.testing.assert_array_equal(images[0].numpy(), np.stack([RAMP] * 3))
    assert ImageOps.exif_transpose(Image.open(tmp_path / "train/a/0.png")).getpixel((0, 15)) != 0


@pytest.mark.parametrize("name", ["train", "val", "validation", "test"])
def test_a_class_called_as_a_split_is_a_class(name: str, tmp_path: Path) -> None:
    save(tmp_path, f"bus car {name} tram bike truck", Image.fromarray(RAMP))
    data = load("folder", tmp_path)
    names = {n for s in SPLITS for n in data.split(s).names}
    assert names == {"bus", "car", name, "tram", "bike", "truck"}


def test_split_folders_are_told_by_the_classes_in_them(tmp_path: Path) -> None:
    image = Image.fromarray(RAMP)
    save(tmp_path / "beside", "train/test train/val val/a test/train notes", image)
    data = load("folder", tmp_path / "beside")
    assert [data.split(s).names for s in SPLITS] == [("test", "val"), ("a",), ("train",)]
    save(tmp_path / "flat", "train val test", image)
    with pytest.raises(DataError, match=r"flat/train': expected class folders with images, found none"):
        load("folder", tmp_path / "flat")
    save(tmp_path / "half", "a b c test/d", image)
    with pytest.raises(DataError, match=r"expected train/, val/ and test/, missing train, val"):
        load("folder", tmp_path / "half")


def test_what_is_no_picture_is_left_out(tmp_path: Path) -> None:
    save(tmp_path, "a b c", Image.fromarray(RAMP), "0.PNG")
    for hidden in (".hidden.png", "._0.PNG"):
        (tmp_path / "a" / hidden).write_bytes(b"\0\5\x16\7 no picture")
    (tmp_path / "a" / "folder.png").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "__MACOSX" / "a").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "._a").write_bytes(b"")
    save(tmp_path / ".thumbnails", "x", Image.fromarray(RAMP))
    data = load("folder", tmp_path)
    assert sorted(n for s in SPLITS for n in data.split(s).names) == ["a", "b", "c"]
    assert [int(data.split(s).class_count.sum()) for s in SPLITS] == [1, 1, 1]


def test_a_link_to_nothing_is_no_silent_loss(tmp_path: Path) -> None:
    save(tmp_path, "a b c", Image.fromarray(RAMP))
    (tmp_path / "a" / "1.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"1\.png: expected a whole image, got FileNotFoundError"):
        load("folder", tmp_path)


def test_data_are_shown_in_one_line(tmp_path: Path) -> None:
    save(tmp_path, "train/a train/b val/c test/d", Image.fromarray(RAMP))
    save(tmp_path, "train/a", Image.fromarray(RAMP), "1.png")
    data = load("folder", tmp_path)
    assert repr(data) == (
        "FewShotData('folder', 'plain': train 2 classes, 3 images; val 1 classes, 1 images; "
        "test 1 classes, 1 images; each 1x16x16)"
    )
    assert str(data.train) == "ImageClasses('train': 2 classes, 3 images of 1x16x16)"
