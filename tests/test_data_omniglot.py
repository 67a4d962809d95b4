"""Omniglot in every form it comes in, and its protocols."""

import hashlib
import io
import json
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import refused
from PIL import Image

from mamlpp_fast.data import DataError, FewShotData, load, omniglot
from mamlpp_fast.data.authors import authors_class_split, authors_seed

SPLITS = ("train", "val", "test")
ALPHABETS = {"images_background": ("Latin", "Anglo_(Runes)"), "images_evaluation": ("Ge_ez",)}
CHARACTERS, DRAWERS = 6, 4


def drawings() -> Iterator[tuple[str, bytes, np.ndarray]]:
    """Path, PNG and ink (1 = ink) of a small made-up Omniglot, file names as in the original."""
    rng = np.random.RandomState(0)
    number = 0
    for part, alphabets in ALPHABETS.items():
        for alphabet in alphabets:
            for character in range(1, CHARACTERS + 1):
                number += 1
                for drawer in range(1, DRAWERS + 1):
                    ink = rng.rand(105, 105) < 0.1
                    stream = io.BytesIO()
                    Image.fromarray(~ink).save(stream, "PNG")
                    path = f"{part}/{alphabet}/character{character:02d}/{number:04d}_{drawer:02d}.png"
                    yield path, stream.getvalue(), ink


def write_pngs(root: Path, *, flat: bool = False) -> None:
    for path, png, _ in drawings():
        file = root / (path.split("/", 1)[1] if flat else path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png)


def write_zips(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for part in ALPHABETS:
        with zipfile.ZipFile(root / f"{part}.zip", "w") as z:
            for path, png, _ in drawings():
                if path.startswith(part):
                    z.writestr(path, png)


def write_npz(file: Path, *, full: bool) -> None:
    rows = [p.split("/") for p, _, _ in drawings()][::DRAWERS]
    ink = np.stack([i for _, _, i in drawings()]).reshape(len(rows), DRAWERS, 105, 105).astype(np.uint8)
    meta = {
        "split": np.array([r[0].removeprefix("images_") for r in rows]),
        "alphabet": np.array([r[1] for r in rows]),
        "character": np.array([int(r[2].removeprefix("character")) for r in rows], np.uint8),
    }
    if full:
        np.savez(file, images_packed=np.packbits(ink, axis=-1), **meta)
        return
    pick = ((np.arange(28) + 0.5) * 105 / 28).astype(int)
    small = ink[:, :, pick][..., pick]
    grey = [
        np.asarray(Image.fromarray(i * np.uint8(255)).resize((28, 28), Image.Resampling.LANCZOS))
        for i in ink.reshape(-1, 105, 105)
    ]
    images = np.stack(grey).reshape(len(rows), DRAWERS, 28, 28)
    np.savez(file, images=images, images_maml_packed=np.packbits(small, axis=-1), **meta)


def write_index(folder: Path) -> dict[str, list[str]]:
    """The authors' index of the drawings, every class in another order, none in that of the names; by class."""
    rng = np.random.RandomState(5)
    by_class: dict[str, list[str]] = {}
    for path, _, _ in drawings():
        by_class.setdefault("/".join(path.split("/")[1:3]), []).append(f"datasets/omniglot_dataset/{path}")
    for label, paths in by_class.items():
        shuffled = [paths[i] for i in rng.permutation(len(paths))]
        by_class[label] = shuffled if shuffled != paths else paths[::-1]
    index = {str(i): by_class[label] for i, label in enumerate(sorted(by_class))}
    (folder / "omniglot_dataset.json").write_text(json.dumps(index))
    return by_class


def assert_same(a: FewShotData, b: FewShotData) -> None:
    for split in SPLITS:
        assert a.split(split).names == b.split(split).names
        torch.testing.assert_close(a.split(split).images, b.split(split).images, rtol=0, atol=0)


@pytest.fixture
def reference(tmp_path: Path) -> dict[str, FewShotData]:
    write_npz(tmp_path / "omniglot.npz", full=False)
    names = ("maml++", "maml++-antialiased")
    return {p: load("omniglot", tmp_path / "omniglot.npz", protocol=p) for p in names}


@pytest.mark.parametrize("protocol", ["maml++", "maml++-antialiased"])
@pytest.mark.parametrize(
    "form",
    [
        "authors-folder",
        "authors-flat-folder",
        "zips",
        "zip-file",
        "extracted",
        "torchvision",
        "npz-105",
        "env",
    ],
)
def test_every_form_gives_the_same_data(
    form: str,
    protocol: str,
    tmp_path: Path,
    reference: dict[str, FewShotData],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "data"
    given: Path | None = root
    if form == "authors-folder":
        write_pngs(root / "omniglot_dataset")
    elif form == "authors-flat-folder":
        write_pngs(root / "omniglot_dataset", flat=True)
    elif form == "zips":
        write_zips(root)
    elif form == "zip-file":
        write_zips(root)
        given = root / "images_background.zip"
    elif form == "extracted":
        write_pngs(root)
    elif form == "torchvision":
        write_pngs(root / "omniglot-py")
        write_zips(root / "omniglot-py")
    else:
        root.mkdir()
        write_npz(root / "omniglot_105.npz", full=True)
        if form == "env":
            monkeypatch.setenv("MAMLPP_FAST_DATA", str(root))
            given = None
    assert_same(load("omniglot", given, protocol=protocol), reference[protocol])


def test_default_protocol_is_the_authors(reference: dict[str, FewShotData]) -> None:
    data = reference["maml++"]
    names = sorted(f"{p.split('/')[1]}/{p.split('/')[2]}" for p, _, _ in list(drawings())[::DRAWERS])
    for split, classes in zip(SPLITS, authors_class_split(len(names)), strict=True):
        assert list(data.split(split).names) == [names[c] for c in classes]
    ink = {f"{p.split('/')[1]}/{p.split('/')[2]}": i for p, _, i in list(drawings())[::DRAWERS]}
    pick = ((np.arange(28) + 0.5) * 105 / 28).astype(int)
    paper = torch.from_numpy(~ink[data.train.names[0]][pick][:, pick])
    torch.testing.assert_close(data.train.images[0, 0], paper.to(torch.uint8) * 255)
    batch = data.sampler("test", ways=2, shots=1, targets=1).batch(0, 2)
    assert set(batch.support_x.unique().tolist()) == {0.0, 1.0}
    assert data.rotate_train_classes


def test_binary_pixels_are_what_pillow_makes_of_one_bit_images() -> None:
    _, png, ink = next(drawings())
    resized = Image.open(io.BytesIO(png)).resize((28, 28), resample=Image.Resampling.LANCZOS)
    ours = omniglot._nearest(ink.astype(np.uint8) * 255, 28)
    np.testing.assert_array_equal(np.asarray(resized), ours == 0)


@pytest.mark.parametrize("form", ["beside", "inside", "parent-given", "npz", "npz-105", "zips"])
def test_the_authors_index_orders_the_drawings(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Episodes as their code draws them: classes, turns and numbers by RandomState, drawings by number in the index."""
    root = tmp_path / "datasets" / "omniglot_dataset"
    root.mkdir(parents=True)
    if form.startswith("npz"):
        write_npz(root / ("omniglot.npz" if form == "npz" else "omniglot_105.npz"), full=form == "npz-105")
    elif form == "zips":
        write_zips(root)
    else:
        write_pngs(root)
    by_class = write_index(root if form == "inside" else root.parent)
    if form.startswith("npz"):
        (root.parent / "omniglot_dataset.json").rename(root / "omniglot_dataset.json")
    monkeypatch.chdir(root)
    data = load("omniglot", {"parent-given": root.parent, "beside": "."}.get(form, root))

    ways, images, pick = 3, 3, ((np.arange(28) + 0.5) * 105 / 28).astype(int)
    paper = {path: ~ink[pick][:, pick] for path, _, ink in drawings()}
    batch = data.sampler("train", ways=ways, shots=1, targets=images - 1, sampling="authors").batch(4, 2)
    for task in range(2):
        rng = np.random.RandomState(authors_seed(0) + 4 + task)
        labels = rng.choice(list(data.train.names), size=ways, replace=False)
        rng.shuffle(labels)
        turns = rng.randint(0, 4, size=ways)
        for way, label in enumerate(labels):
            drawn = rng.choice(DRAWERS, size=images, replace=False)
            files = [by_class[label][d].removeprefix("datasets/omniglot_dataset/") for d in drawn]
            expected = torch.from_numpy(np.stack([np.rot90(paper[f], turns[way]) for f in files]))
            got = torch.cat(
                [batch.support_x[task][way : way + 1], batch.target_x[task][2 * way : 2 * way + 2]]
            )
            torch.testing.assert_close(got[:, 0], expected.float(), rtol=0, atol=0)


def test_the_index_is_of_their_protocols_alone(tmp_path: Path) -> None:
    classes = 120
    np.savez(
        tmp_path / "omniglot.npz",
        images=np.zeros((classes, 2, 28, 28), np.uint8),
        split=np.array(["background"] * 110 + ["evaluation"] * 10),
        alphabet=np.array(["A"] * classes),
        character=np.arange(1, classes + 1),
    )
    (tmp_path / "omniglot_dataset.json").write_text("{}")
    assert load("omniglot", tmp_path, protocol="lake").test.num_classes == 10
    with pytest.raises(
        DataError, match=r"omniglot_dataset\.json: expected the 2 images of class 'A/character"
    ):
        load("omniglot", tmp_path, protocol="maml++-antialiased")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"what is this", "expected lists of images by class, got JSONDecodeError: Expecting value"),
        (b"\xff\xfe\xfd", "expected lists of images by class, got UnicodeDecodeError"),
        (b"[" * 100_000, "expected lists of images by class, got RecursionError"),
        (b'"a\\nb"', "expected lists of images by class, got 'a"),
        (b'{"0": [1, 2]}', "expected lists of images by class, got {'0': [1, 2]}"),
        (b'{"0": {"a": "b"}}', "expected lists of images by class, got {'0': {'a': 'b'}}"),
        (
            b"{}",
            "expected the 4 images of class 'Anglo_(Runes)/character01' as they are found, got a list of 0, 0 of",
        ),
        (
            b'{"0": ["Anglo_(Runes)/character01/0007_01.png", "Anglo_(Runes)/character01/0007_01.png", "x"]}',
            "expected the 4 images of class 'Anglo_(Runes)/character01' as they are found, got a list of 2, 1 of",
        ),
        (
            b'{"0": ["Anglo_(Runes)/character01/0_%b.png"]}'
            % b'.png", "Anglo_(Runes)/character01/0_'.join([b"01", b"02", b"03", b"05"]),
            "expected the 4 images of class 'Anglo_(Runes)/character01' as they are found, got a list of 4, 3 of",
        ),
    ],
    ids=["text", "encoding", "nested", "string", "numbers", "dict", "empty", "twice", "other"],
)
def test_bad_index(content: bytes, message: str, tmp_path: Path) -> None:
    write_pngs(tmp_path)
    (tmp_path / "omniglot_dataset.json").write_bytes(content)
    with pytest.raises(DataError) as raised:
        load("omniglot", tmp_path)
    assert str(raised.value).startswith(f"{tmp_path / 'omniglot_dataset.json'}: {message}")
    assert "\n" not in str(raised.value)


def test_two_drawings_by_one_hand(tmp_path: Path) -> None:
    """An index that cannot tell them apart is refused, not broadcast."""
    write_pngs(tmp_path)
    for label in (tmp_path / "images_background" / "Latin").iterdir():
        first = sorted(label.iterdir())[0]
        first.rename(first.with_name("0000_02.png"))
    write_index(tmp_path)
    with pytest.raises(DataError, match=r"expected the 4 images of class 'Latin/character01' as they are"):
        load("omniglot", tmp_path)


def test_image_size(tmp_path: Path) -> None:
    write_npz(tmp_path / "omniglot.npz", full=False)
    with pytest.raises(DataError, match=r"image_size: .*holds 28x28 alone .*expected 28, got 20"):
        load("omniglot", tmp_path, image_size=20)
    write_npz(tmp_path / "omniglot_105.npz", full=True)
    assert load("omniglot", tmp_path, image_size=20).train.image_shape == (1, 20, 20)
    with pytest.raises(DataError, match=r"image_size: expected 1 .. 105"):
        load("omniglot", tmp_path, image_size=200)


def test_lake_needs_enough_alphabets(tmp_path: Path) -> None:
    write_npz(tmp_path / "omniglot.npz", full=False)
    with pytest.raises(
        DataError, match="protocol 'lake' expects images_background and images_evaluation, got 12 and 6"
    ):
        load("omniglot", tmp_path, protocol="lake")


@pytest.mark.parametrize("what", ["truncated", "not-npz", "keys", "shape", "suffix"])
def test_bad_npz(what: str, tmp_path: Path) -> None:
    file = tmp_path / ("omniglot.txt" if what == "suffix" else "omniglot.npz")
    write_npz(tmp_path / "omniglot.npz", full=False)
    if what == "truncated":
        file.write_bytes(file.read_bytes()[:-2000])
    elif what == "not-npz":
        file.write_bytes(b"what is this")
    elif what == "suffix":
        file.write_bytes(b"")
    elif what == "keys":
        np.savez(file, images=np.zeros(3))
    else:
        with np.load(file) as a:
            np.savez(file, **(dict(a) | {"images_maml_packed": np.zeros((3, 2), np.uint8)}))
    message = {
        "truncated": "expected a whole .npz archive, got a damaged one",
        "not-npz": "expected a whole .npz archive, got a damaged one",
        "keys": "missing images_maml_packed, split, alphabet, character",
        "shape": "images_maml_packed: expected uint8 [18, 20, 28, 4], got uint8 [3, 2]",
        "suffix": "omniglot.txt: expected omniglot.npz",
    }[what]
    with refused(DataError, message):
        load("omniglot", file)


@pytest.mark.parametrize("at", range(100, 9000, 1700))
def test_flipped_bytes_never_pass(at: int, tmp_path: Path) -> None:
    file = tmp_path / "omniglot_105.npz"
    write_npz(file, full=True)
    data = bytearray(file.read_bytes())
    data[at : at + 4] = bytes(b ^ 0xFF for b in data[at : at + 4])
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"omniglot_105\.npz: "):
        load("omniglot", file)


def test_bad_folders_and_zips(tmp_path: Path) -> None:
    write_pngs(tmp_path / "a")
    broken = next((tmp_path / "a").rglob("*.png"))
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    with pytest.raises(DataError, match=r"\.png: expected a whole PNG file, got"):
        load("omniglot", tmp_path / "a")
    broken.unlink()
    with pytest.raises(DataError, match="expected as many drawings of each character, got 3 of"):
        load("omniglot", tmp_path / "a")
    write_zips(tmp_path / "b")
    file = tmp_path / "b" / "images_background.zip"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(
        DataError, match=r"images_background\.zip: expected a whole zip archive, got a damaged one"
    ):
        load("omniglot", tmp_path / "b")


def test_download_checks_and_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_zips(tmp_path / "server")
    monkeypatch.delenv("MAMLPP_FAST_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked: list[str] = []

    def answer(url: str, timeout: float) -> io.BytesIO:
        asked.append(url.rsplit("/", 1)[1])
        return io.BytesIO((tmp_path / "server" / asked[-1]).read_bytes())

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    with pytest.raises(
        DataError, match=r"images_background\.zip: expected MD5 68d2efa1b9178cc56df9314c21c6e718, got"
    ):
        load("omniglot", download=True)
    sums = {n: hashlib.md5((tmp_path / "server" / n).read_bytes()).hexdigest() for n in omniglot.ZIPS}
    monkeypatch.setattr(omniglot, "ZIPS", sums)
    data = load("omniglot", download=True)
    assert data.train.num_classes + data.val.num_classes + data.test.num_classes == 18
    asked.clear()
    assert_same(load("omniglot", download=True), data)
    assert_same(load("omniglot"), data)
    assert asked == []


def test_download_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, timeout: float) -> io.BytesIO:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(
        DataError, match=r"download: expected https://.*images_background\.zip, got .*no route to host"
    ):
        omniglot.download_omniglot(tmp_path)


def test_the_real_thing(real_data: Path) -> None:
    if not (real_data / "omniglot.npz").is_file():
        pytest.skip(f"no omniglot.npz in {real_data}")
    data = load("omniglot", real_data)
    assert [data.split(s).num_classes for s in SPLITS] == [1150, 50, 423]
    assert {int(n) for s in SPLITS for n in data.split(s).class_count} == {20}
    assert len(set(data.train.names) | set(data.val.names) | set(data.test.names)) == 1623
    lake = load("omniglot", real_data, protocol="lake")
    assert [lake.split(s).num_classes for s in SPLITS] == [914, 50, 659]
    vinyals = load("omniglot", real_data, protocol="vinyals")
    assert [vinyals.split(s).num_classes for s in SPLITS] == [1150, 50, 423]
    # Ink covers 8 % of the paper, whichever way up it is stored.
    assert 0.9 < float(data.train.images.float().mean()) / 255 < 0.94
    assert 0.06 < float(lake.train.images.float().mean()) / 255 < 0.1
