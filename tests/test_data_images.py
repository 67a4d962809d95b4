"""mini-ImageNet, CIFAR-FS, FC100 and folders of images, in each form they come in."""

import csv
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refused
from numpy.typing import NDArray
from PIL import Image

from mamlpp_fast.data import DataError, FewShotData, load
from mamlpp_fast.data import miniimagenet as mini
from mamlpp_fast.data.classes import IMAGENET_MEAN, IMAGENET_STD

SPLITS = ("train", "val", "test")
CLASSES = {"train": 4, "val": 3, "test": 3}
EACH = 5


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def class_names(split: str) -> list[str]:
    return [f"n{'vt'.find(split[0]) + 1}{len(split)}{c:06d}" for c in range(CLASSES[split])]


def pixels(split: str, size: int = 84) -> NDArray[np.uint8]:
    """[classes * EACH, size, size, 3], smooth enough to survive JPEG."""
    rng = np.random.RandomState(SPLITS.index(split))
    coarse = rng.randint(0, 256, (CLASSES[split] * EACH, 4, 4, 3)).astype(np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(i).resize((size, size), Image.Resampling.BICUBIC)) for i in coarse]
    )


def labels(split: str) -> NDArray[np.int64]:
    return np.repeat(np.arange(CLASSES[split]), EACH)


def jpeg(image: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=75)
    return stream.getvalue()


def write_npz(root: Path, **change: Any) -> None:
    """The .npz triple: a header common to all images of one size and quality, then scans end to end."""
    for split in SPLITS:
        files = [jpeg(i) for i in pixels(split)]
        start = files[0].index(b"\xff\xda")
        start += 2 + int.from_bytes(files[0][start + 2 : start + 4], "big")
        assert len({f[:start] for f in files}) == 1
        scans = [f[start:-2] for f in files]
        arrays: dict[str, Any] = {
            "jpeg_header": np.frombuffer(files[0][:start], np.uint8),
            "scan": np.frombuffer(b"".join(scans), np.uint8),
            "offset": np.cumsum([0, *map(len, scans)]),
            "label": labels(split).astype(np.uint8),
            "wnid": np.array(class_names(split)),
            "number": np.arange(len(scans), dtype=np.uint32),
        }
        arrays |= {k: v(arrays[k]) for k, v in change.items()}
        np.savez(root / f"mini_imagenet_{split}.npz", **arrays)


def write_images(root: Path, split: str, images: NDArray[np.uint8]) -> None:
    for image, (c, j) in zip(images, np.ndindex(CLASSES[split], EACH), strict=True):
        file = root / class_names(split)[c] / f"{class_names(split)[c]}{j:08d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)


def assert_holds(data: FewShotData, expected: dict[str, NDArray[np.uint8]], *, names: bool = True) -> None:
    for split in SPLITS:
        got = data.split(split)
        channels_first = torch.from_numpy(expected[split].transpose(0, 3, 1, 2).copy())
        torch.testing.assert_close(got.images, channels_first, rtol=0, atol=0)
        assert got.class_count.tolist() == [EACH] * CLASSES[split]
        assert not names or list(got.names) == class_names(split)


def test_mini_npz_is_decoded_once_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_npz(tmp_path)
    decoded = {s: np.stack([np.asarray(Image.open(io.BytesIO(jpeg(i)))) for i in pixels(s)]) for s in SPLITS}
    assert_holds(load("miniimagenet", tmp_path), decoded)
    assert len(list((tmp_path / "cache/mamlpp_fast/data").iterdir())) == 3
    monkeypatch.setattr(mini, "_decode_npz", None)
    again = load("miniimagenet", tmp_path / "mini_imagenet_val.npz")
    assert_holds(again, decoded)
    batch = again.sampler("val", ways=3, shots=1, targets=4).batch(0, 2)
    assert tuple(batch.target_x.shape) == (2, 12, 3, 84, 84)


def test_mini_npz_cache_follows_the_content_and_survives_damage(tmp_path: Path) -> None:
    write_npz(tmp_path)
    first = load("miniimagenet", tmp_path).train.images.clone()
    for file in (tmp_path / "cache/mamlpp_fast/data").iterdir():
        file.write_bytes(file.read_bytes()[:200])
    torch.testing.assert_close(load("miniimagenet", tmp_path).train.images, first)
    write_npz(tmp_path, offset=lambda o: o[: EACH + 1], label=lambda a: a[:EACH])
    with pytest.raises(DataError, match=r"mini_imagenet_train\.npz: offset: expected 6 rising numbers"):
        load("miniimagenet", tmp_path)


def test_mini_protocol(tmp_path: Path) -> None:
    write_npz(tmp_path)
    data = load("miniimagenet", tmp_path)
    assert (data.mean, data.std, data.divisor) == (IMAGENET_MEAN, IMAGENET_STD, 255.0)
    assert not data.rotate_train_classes
    assert (data.channels, data.image_size) == (3, 84)
    assert load("miniimagenet", tmp_path, protocol="unnormalised").mean == ()
    assert load("miniimagenet", tmp_path, image_size=42).val.image_shape == (3, 42, 42)


@pytest.mark.parametrize("form", ["cache", "category-split", "bytes-keys"])
def test_mini_pickles(form: str, tmp_path: Path) -> None:
    for split in SPLITS:
        rows = {n: list(range(c * EACH, (c + 1) * EACH)) for c, n in enumerate(class_names(split))}
        content: dict[Any, Any] = {"image_data": pixels(split), "class_dict": rows}
        name = f"mini-imagenet-cache-{split}.pkl"
        if form == "category-split":
            content = {"data": pixels(split), "labels": (labels(split) + 64).tolist(), "catname2label": rows}
            name = f"miniImageNet_category_split_{split + '_phase_train' * (split == 'train')}.pickle"
        elif form == "bytes-keys":
            content = {k.encode(): v for k, v in content.items()}
        (tmp_path / name).write_bytes(pickle.dumps(content))
    data = load("miniimagenet", tmp_path)
    assert_holds(data, {s: pixels(s) for s in SPLITS}, names=form != "category-split")


@pytest.mark.parametrize("columns", ["filename,label", "class_name,image_name"])
@pytest.mark.parametrize("layout", ["images", "images-by-class", "beside", "by-class"])
def test_mini_csv(layout: str, columns: str, tmp_path: Path) -> None:
    """Lists of Ravi & Larochelle, and those of easy-few-shot-learning, whose images lie in folders of classes."""
    for split in SPLITS:
        with open(tmp_path / f"{split}.csv", "w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.writer(stream)
            writer.writerow(columns.split(","))
            for image, (c, j) in zip(pixels(split), np.ndindex(CLASSES[split], EACH), strict=True):
                label = class_names(split)[c]
                name = f"{label}{j:08d}.png"
                folders = {"images-by-class": f"images/{label}", "beside": "", "by-class": label}
                folder = tmp_path / folders.get(layout, layout)
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(folder / name)
                writer.writerow([label, name] if columns.startswith("class") else [name, label])
    assert_holds(load("miniimagenet", tmp_path), {s: pixels(s) for s in SPLITS})
    next(tmp_path.rglob("*.png")).unlink()
    with pytest.raises(DataError, match=r"\.csv: expected image 'n.*\.png' in .* found none"):
        load("miniimagenet", tmp_path)


def test_mini_split_folders_are_resized(tmp_path: Path) -> None:
    for split in SPLITS:
        write_images(tmp_path / "mini_imagenet_full_size" / split, split, pixels(split, 100))
    resized = {
        s: np.stack(
            [
                np.asarray(Image.fromarray(i).resize((84, 84), Image.Resampling.BICUBIC))
                for i in pixels(s, 100)
            ]
        )
        for s in SPLITS
    }
    assert_holds(load("miniimagenet", tmp_path), resized)


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_mini_in_the_order_of_the_authors_index(place: str, tmp_path: Path) -> None:
    root = tmp_path / "datasets" / "mini_imagenet_full_size"
    order = np.random.RandomState(3).permutation(EACH)
    index = {}
    for split in SPLITS:
        write_images(root / split, split, pixels(split))
        for label in class_names(split):
            files = [f"datasets/mini_imagenet_full_size/{split}/{label}/{label}{j:08d}.png" for j in order]
            index[str(len(index))] = files
    (root.parent if place == "beside" else root).joinpath("mini_imagenet_full_size.json").write_text(
        json.dumps(index)
    )
    rows = {s: (np.arange(CLASSES[s])[:, None] * EACH + order).ravel() for s in SPLITS}
    assert_holds(load("miniimagenet", root), {s: pixels(s)[rows[s]] for s in SPLITS})
    next((root / "val").rglob("*.png")).unlink()
    with pytest.raises(
        DataError, match=r"full_size\.json: expected the 4 images of class 'val/n.*, got a list of 5"
    ):
        load("miniimagenet", root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected keys image_data and class_dict, or data and labels, got list"),
        ({"x": 1}, "or data and labels, got ['x']"),
        (
            {"data": np.zeros((2, 8, 8, 3)), "labels": [0, 1]},
            "images: expected uint8 [n, H, W, 3], got float64",
        ),
        ({"data": np.zeros((2, 8, 8, 3), np.uint8), "labels": [0]}, "labels: expected 2 numbers, got [1]"),
        (
            {"image_data": np.zeros((2, 8, 8, 3), np.uint8), "class_dict": {"a": [0, 2]}},
            "class_dict['a']: expected 0 .. 1, got 0 .. 2",
        ),
        ({"image_data": np.zeros((2, 8, 8, 3), np.uint8), "class_dict": [0]}, "class_dict: expected a dict"),
        (
            {"data": np.zeros((2, 0, 8, 3), np.uint8), "labels": [0, 1]},
            "images: expected at least one pixel, got [2, 0, 8, 3]",
        ),
        (
            {"data": np.zeros((2, 8, 8, 3), np.uint8), "labels": [0.5, 1.5]},
            "labels: expected integers, got list of something else",
        ),
        (
            {"image_data": np.zeros((2, 8, 8, 3), np.uint8), "class_dict": {"a": ["0"]}},
            "class_dict['a']: expected integers, got list of something else",
        ),
    ],
    ids=["list", "keys", "dtype", "length", "out-of-range", "not-a-dict", "empty", "fractions", "texts"],
)
def test_bad_mini_pickles(content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "mini-imagenet-cache-train.pkl").write_bytes(pickle.dumps(content))
    with refused(DataError, message):
        load("miniimagenet", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected columns filename,label or image_name,class_name with at least one row"),
        (
            "name,label\na.png,b\n",
            "expected columns filename,label or image_name,class_name with at least one row",
        ),
        ("filename,image_name\na.png,b\n", "expected columns filename,label or image_name,class_name with"),
        ("filename,label\na.png,b\n", "expected image 'a.png' in "),
        ("class_name,image_name\nb,a.png\n", "expected image 'a.png' in "),
        ("class_name,image_name\nb\n", "expected image_name,class_name in every row, row 1 is cut short"),
        ('filename,label\n"a\n.png",b\n', r"expected image 'a\n.png' in "),
        (
            "filename,label\n" + "a" * 200_000 + ",b\n",
            "expected a list of images, got Error: field larger than",
        ),
        ("filename,label\n\udcff,b\n", "expected a list of images, got UnicodeDecodeError"),
    ],
    ids=["empty", "columns", "mixed", "no-image", "no-image-by-class", "short", "lines", "long", "encoding"],
)
def test_bad_mini_lists(content: str, message: str, tmp_path: Path) -> None:
    for split in SPLITS:
        (tmp_path / f"{split}.csv").write_bytes(content.encode("utf-8", "surrogateescape"))
    (tmp_path / "images").mkdir()
    with refused(DataError, message):
        load("miniimagenet", tmp_path)


def test_incomplete_mini(tmp_path: Path) -> None:
    write_npz(tmp_path)
    (tmp_path / "mini_imagenet_val.npz").unlink()
    with pytest.raises(
        DataError, match=r"expected '.*mini_imagenet_val\.npz' beside the other splits, found none"
    ):
        load("miniimagenet", tmp_path)


def test_damaged_mini(tmp_path: Path) -> None:
    write_npz(tmp_path, jpeg_header=lambda h: h[:100])
    with pytest.raises(
        DataError, match=r"mini_imagenet_train\.npz, image 0: expected a whole JPEG image, got"
    ):
        load("miniimagenet", tmp_path)
    file = tmp_path / "mini_imagenet_train.npz"
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(
        DataError, match=r"mini_imagenet_train\.npz: expected a whole \.npz archive, got a damaged"
    ):
        load("miniimagenet", tmp_path)


def test_unwritable_cache_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_npz(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load("miniimagenet", tmp_path).train.num_classes == 4


def test_real_mini(real_data: Path) -> None:
    """One class of the real archive: decoding all 60,000 images would take minutes."""
    file = real_data / "mini_imagenet_val.npz"
    if not file.is_file():
        pytest.skip(f"no mini_imagenet_val.npz in {real_data}")
    with np.load(file) as a:
        few = {k: a[k] for k in ("jpeg_header", "scan", "offset", "label", "wnid")}
    assert (len(few["wnid"]), len(few["label"])) == (16, 9600)
    end = few["offset"][20]
    few |= {"label": few["label"][:20], "offset": few["offset"][:21], "scan": few["scan"][:end]}
    images = mini._decode_npz(few, "few", str(file), 84)
    assert images.shape == (20, 3, 84, 84)
    assert 60 < images.mean() < 180
    assert images.std() > 30


def write_cifar(file: Path, **change: Any) -> NDArray[np.uint8]:
    rng = np.random.RandomState(0)
    strips, images = [], rng.randint(0, 256, (9, 6, 32, 32, 3)).astype(np.uint8)
    for strip in images:
        stream = io.BytesIO()
        Image.fromarray(strip.reshape(-1, 32, 3)).save(stream, "WEBP", lossless=True, exact=True)
        strips.append(stream.getvalue())
    arrays: dict[str, Any] = {
        "webp": np.frombuffer(b"".join(strips), np.uint8),
        "offset": np.cumsum([0, *map(len, strips)]),
        "name": np.array([f"class{i}" for i in range(9)]),
        "split_cifar_fs": np.array(["test", "train", "val"] * 3),
        "split_fc100": np.array(["train"] * 5 + ["val"] * 2 + ["test"] * 2),
    }
    np.savez(file, **{k: v for k, v in (arrays | change).items() if v is not None})
    return images


def oblong_strips() -> dict[str, Any]:
    """The strips of nine classes, each one image and a half."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 12)).save(stream, "WEBP")
    data = stream.getvalue()
    return {"webp": np.frombuffer(9 * data, np.uint8), "offset": len(data) * np.arange(10)}


def test_cifar(tmp_path: Path) -> None:
    images = write_cifar(tmp_path / "cifar_fs_subset.npz")
    data = load("cifar-fs", tmp_path)
    assert data.val.names == ("class2", "class5", "class8")
    expected = torch.from_numpy(images[[2, 5, 8]].reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2).copy())
    torch.testing.assert_close(data.val.images, expected)
    assert data.train.class_count.tolist() == [6, 6, 6]
    assert len(data.mean) == len(data.std) == 3
    fc100 = load("fc100", tmp_path / "cifar_fs_subset.npz", protocol="unnormalised", image_size=16)
    assert [fc100.split(s).num_classes for s in SPLITS] == [5, 2, 2]
    assert (fc100.mean, fc100.train.image_shape) == ((), (3, 16, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split_cifar_fs": None}, "missing split_cifar_fs"),
        (
            {"split_cifar_fs": np.array(["train"] * 9)},
            "split_cifar_fs: expected classes of split 'val', found none",
        ),
        ({"offset": np.arange(3)}, "offset: expected 10 numbers up to"),
        (
            {"webp": np.zeros(90, np.uint8), "offset": np.arange(0, 91, 10)},
            "expected a whole WebP image, got",
        ),
        (oblong_strips(), "class 'class1': expected a strip of square images, got 8x12"),
    ],
    ids=["keys", "splits", "offset", "image", "oblong"],
)
def test_bad_cifar(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar_fs_subset.npz", **change)
    with refused(DataError, message):
        load("cifar-fs", tmp_path)


def test_real_cifar(real_data: Path) -> None:
    if not (real_data / "cifar_fs_subset.npz").is_file():
        pytest.skip(f"no cifar_fs_subset.npz in {real_data}")
    data = load("cifar-fs", real_data)
    assert [data.split(s).num_classes for s in SPLITS] == [64, 16, 20]
    assert {int(n) for n in data.test.class_count} == {80}


def test_folder_with_splits(tmp_path: Path) -> None:
    for split, name in zip(SPLITS, ("train", "validation", "test"), strict=True):
        write_images(tmp_path / name, split, pixels(split, 20))
    data = load("folder", tmp_path)
    assert_holds(data, {s: pixels(s, 20) for s in SPLITS})
    assert load("folder", tmp_path, image_size=10).train.image_shape == (3, 10, 10)
    assert load("folder", tmp_path, channels=1).train.image_shape == (1, 20, 20)
    assert load("folder", tmp_path, protocol="rotated").rotate_train_classes


def test_folder_without_splits(tmp_path: Path) -> None:
    for c in range(20):
        (tmp_path / f"kind{c}").mkdir()
        for j in range(c % 3 + 1):
            Image.new("L", (6, 6), 10 * c + j).save(tmp_path / f"kind{c}" / f"{j}.png")
    data = load("folder", tmp_path)
    assert [data.split(s).num_classes for s in SPLITS] == [13, 3, 4]
    assert data.channels == 1
    for split in SPLITS:
        part = data.split(split)
        first = part.images[part.class_start][:, 0, 0, 0].tolist()
        assert first == [10 * int(name.removeprefix("kind")) for name in part.names]
    again = load("folder", tmp_path)
    assert all(data.split(s).names == again.split(s).names for s in SPLITS)


def test_bad_folders(tmp_path: Path) -> None:
    for split in SPLITS:
        write_images(tmp_path / split, split, pixels(split, 20))
    odd = next((tmp_path / "val").rglob("*.png"))
    whole = odd.read_bytes()
    Image.new("RGB", (10, 12)).save(odd)
    with pytest.raises(DataError, match=r"expected .*x.* like the others"):
        load("folder", tmp_path)
    odd.write_bytes(whole[:80])
    with pytest.raises(DataError, match=r"\.png: expected a whole image, got"):
        load("folder", tmp_path)
    for file in (tmp_path / "test").rglob("*.png"):
        file.unlink()
    with pytest.raises(DataError, match=r"test'.*expected class folders with images, found none"):
        load("folder", tmp_path)
    (tmp_path / "test").rename(tmp_path / "other")
    with pytest.raises(DataError, match="expected train/, val/ and test/, missing test"):
        load("folder", tmp_path)
    with pytest.raises(DataError, match="expected at least 3 classes to split, got 2"):
        load_two_classes(tmp_path / "two")
    with pytest.raises(DataError, match="channels: expected 1 or 3, got 2"):
        load("folder", tmp_path, channels=2)


def load_two_classes(root: Path) -> FewShotData:
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(root / name / "0.png")
    return load("folder", root)
