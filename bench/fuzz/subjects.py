"""What is fuzzed: small valid inputs, how each is damaged, and the reader that must accept or refuse it in a line."""

from __future__ import annotations

import functools
import io
import json
import pickle
import random
import zipfile
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.fuzz import mutations as m
from bench.fuzz.archives import zip_of
from bench.fuzz.checkpoints import Authors, Checkpoint
from bench.fuzz.subject import Subject
from mamlpp_fast import data, replay
from mamlpp_fast.compat.experiment import _USED, read_experiment
from mamlpp_fast.data.authors import OMNIGLOT_FRACTIONS
from mamlpp_fast.data.classes import FewShotData
from mamlpp_fast.train import parse_settings, preset
from mamlpp_fast.train.run_folder import finished_summary, read_config

SPLITS = ("train", "val", "test")


def _npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def _picture(form: str, size: int = 12, *, mode: str = "RGB", dtype: Any = None, **options: Any) -> bytes:
    pixels = np.arange(size * size * 3, dtype=np.uint8).reshape(size, size, 3) * 7
    image = Image.fromarray(pixels).convert(mode)
    if dtype is not None:  # grey, of another depth
        image = Image.fromarray(pixels[..., 0].astype(dtype) // (255 if dtype == np.float32 else 1))
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def _draw(found: FewShotData) -> None:
    """A task of what was accepted must be drawable, or refused like any other mistake."""
    ways = min(2, found.train.num_classes)
    found.sampler("train", ways=ways, shots=1, targets=1).batch(0, 1)


class DataFile(Subject):
    """One file of a data set in a folder of its own; the others stay whole."""

    def __init__(self, name: str, share: float, dataset: str, file: str, **options: Any) -> None:
        self.name, self.share, self.dataset, self.file, self.options = name, share, dataset, file, options
        self.valid: list[bytes] = []

    def prepare(self, folder: Path) -> None:
        self.folder = folder / self.name
        for path, content in self.contents().items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_bytes(content)
        if not self.valid:
            self.valid.append((self.folder / self.file).read_bytes())
        self.read((self.folder / self.file).read_bytes())  # what is damaged is valid before

    @abstractmethod
    def contents(self) -> dict[str, bytes]:
        """The files of a small valid data set, by their paths."""

    def make(self, rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return m.bytes_of(rng, rng.choice(self.valid))
        return zip_of(rng, rng.choice(self.valid), m.npy_of)

    def read(self, content: bytes) -> None:
        (self.folder / self.file).write_bytes(content)
        _draw(data.load(self.dataset, self.folder, **self.options))


class Omniglot(DataFile):
    def contents(self) -> dict[str, bytes]:
        rng, number = np.random.RandomState(0), 34  # the fewest of which one is kept for validation
        return {
            self.file: _npz(
                images_maml_packed=rng.randint(0, 256, (number, 3, 28, 4)).astype(np.uint8),
                split=np.array(["background", "evaluation"] * 17),
                alphabet=np.array([f"alphabet{i // 10}" for i in range(number)]),
                character=np.arange(number) % 10,
            )
        }


class Index(DataFile):
    """The authors' index, beside an archive of what it lists."""

    def contents(self) -> dict[str, bytes]:
        lists = {
            str(i): [f"x/alphabet{i // 10}/character{i % 10:02d}/{i:04d}_{d:02d}.png" for d in (3, 1, 2)]
            for i in range(34)
        }
        archive = Omniglot("", 0, self.dataset, "omniglot.npz").contents()
        return archive | {self.file: json.dumps(lists).encode()}

    def make(self, rng: random.Random) -> bytes:
        return m.json_of(rng, self.valid[0])


class OmniglotZip(DataFile):
    def contents(self) -> dict[str, bytes]:
        parts = {}
        for part in ("images_background", "images_evaluation"):
            stream = io.BytesIO()
            with zipfile.ZipFile(stream, "w") as archive:
                for c in range(1, 18):
                    for d in range(2):
                        name = f"{part}/{part[7]}/character{c:02d}/{c:04d}_{d:02d}.png"
                        archive.writestr(name, _picture("PNG", 105, mode="1"))
            parts[f"{part}.zip"] = stream.getvalue()
        return parts

    def make(self, rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return m.bytes_of(rng, self.valid[0])
        return zip_of(rng, self.valid[0], m.png_of)


class MiniImageNet(DataFile):
    def contents(self) -> dict[str, bytes]:
        jpeg = _picture("JPEG", 16)
        start = jpeg.index(b"\xff\xda")
        start += 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big")
        scan = jpeg[start:-2]
        content = _npz(
            jpeg_header=np.frombuffer(jpeg[:start], np.uint8),
            scan=np.frombuffer(scan * 6, np.uint8),
            offset=np.arange(7) * len(scan),
            label=np.repeat(np.arange(3, dtype=np.uint8), 2),
            wnid=np.array(["a", "b", "c"]),
        )
        return {f"mini_imagenet_{split}.npz": content for split in SPLITS}

    def read(self, content: bytes) -> None:
        for kept in self.folder.parent.glob("cache/mamlpp_fast/data/*"):
            kept.unlink()
        super().read(content)


class Cifar(DataFile):
    def contents(self) -> dict[str, bytes]:
        stream = io.BytesIO()
        Image.fromarray(np.zeros((24, 8, 3), np.uint8)).save(stream, "WEBP", lossless=True)
        strip = stream.getvalue()
        return {
            self.file: _npz(
                webp=np.frombuffer(strip * 6, np.uint8),
                offset=np.arange(7) * len(strip),
                name=np.array([f"class{i}" for i in range(6)]),
                split_cifar_fs=np.array(["test", "train", "val"] * 2),
            )
        }


class Pickles(DataFile):
    """Both forms of the mini-ImageNet pickles, code among them."""

    def contents(self) -> dict[str, bytes]:
        images = np.arange(6 * 48, dtype=np.uint8).reshape(6, 4, 4, 3)
        self.content: list[dict[str, Any]] = [
            {"image_data": images, "class_dict": {"a": [0, 1], "b": [2, 3], "c": [4, 5]}},
            {"data": images, "labels": [0, 0, 1, 1, 2, 2]},
        ]
        self.valid = [pickle.dumps(c, protocol) for c in self.content for protocol in (0, 2, 4)]
        return {f"mini-imagenet-cache-{split}.pkl": self.valid[0] for split in SPLITS}

    def make(self, rng: random.Random) -> bytes:
        return m.pickle_of(rng, rng.choice(self.valid), rng.choice(self.content))


class Folder(DataFile):
    """An image in a folder of classes, of every format and kind that is read."""

    def contents(self) -> dict[str, bytes]:
        forms = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
        self.valid = [_picture(form) for form in forms]
        self.valid += [_picture("PNG", mode=mode) for mode in ("L", "LA", "P", "RGBA")]
        exif = Image.Exif()
        exif[0x0112] = 6
        self.valid += [_picture("PNG", mode="P", transparency=7), _picture("JPEG", exif=exif)]
        depths = {"PNG": np.uint16, "PPM": np.uint16, "TIFF": np.int32}
        self.valid += [_picture(form, dtype=dtype) for form, dtype in depths.items()]
        self.valid += [_picture("TIFF", dtype=np.uint16), _picture("TIFF", dtype=np.float32)]
        return {f"{c}/{i}.png": _picture("PNG") for c in "abc" for i in range(2)}

    def make(self, rng: random.Random) -> bytes:
        return m.png_of(rng, rng.choice(self.valid))


class Csv(DataFile):
    def contents(self) -> dict[str, bytes]:
        rows = "filename,label\n" + "".join(f"{c}{i}.png,{c}\n" for c in "abc" for i in range(2))
        images = {f"images/{c}{i}.png": _picture("PNG") for c in "abc" for i in range(2)}
        theirs = "class_name,image_name\n" + "".join(f"{c},{c}{i}.png\n" for c in "abc" for i in range(2))
        self.valid = [rows.encode(), theirs.encode()]
        return {f"{split}.csv": rows.encode() for split in SPLITS} | images

    def make(self, rng: random.Random) -> bytes:
        return m.bytes_of(rng, rng.choice(self.valid))


class Config(Subject):
    """``config.json`` and ``summary.json`` of a run's folder, and ``--set`` texts."""

    name, share = "config", 0.2

    def prepare(self, folder: Path) -> None:
        self.folder = folder / self.name
        self.folder.mkdir(exist_ok=True)
        record = {"preset": None, "data": None, "engine": "auto", "precision": "float32", "device": "cpu"}
        self.valid = [
            json.dumps(record | preset("omniglot-20w1s").deciding()).encode(),
            json.dumps({"iterations": 5, "models": ["epoch-0000.pt"], "test_accuracy": 0.5}).encode(),
        ]
        self.settings = preset("strokes").to_dict()

    def make(self, rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            key = rng.choice(list(self.settings))
            value = m.json_value(rng, self.settings[key])
            text = f"{key}={value}".encode("utf-8", "replace")
            return b"set:" + (m.bytes_of(rng, text) if rng.random() < 0.3 else text)
        return m.json_of(rng, rng.choice(self.valid))

    def read(self, content: bytes) -> None:
        if content.startswith(b"set:"):
            preset("strokes", parse_settings([content[4:].decode("utf-8", "replace")]))
            return
        for name in ("config.json", "summary.json"):
            (self.folder / name).write_bytes(content)
        try:
            finished_summary(self.folder, 5)
        finally:
            read_config(self.folder)


class ExperimentFile(Subject):
    """An experiment file of the authors' code."""

    name, share = "experiment", 0.05

    def prepare(self, folder: Path) -> None:
        self.path = folder / "experiment.json"
        named: dict[str, Any] = {"experiment_name": "x", "sets_are_pre_split": False}
        named |= {"train_val_test_split": OMNIGLOT_FRACTIONS, "max_pooling": True}
        self.valid = json.dumps({name: key.default for name, key in _USED.items()} | named).encode()
        self.read(self.valid)

    def make(self, rng: random.Random) -> bytes:
        return m.json_of(rng, self.valid)

    def read(self, content: bytes) -> None:
        self.path.write_bytes(content)
        read_experiment(self.path)


class Recorded(Subject):
    """A recorded run with other arrays and another ``config``; what is accepted is replayed."""

    name, share = "replay", 0.02

    def prepare(self, folder: Path) -> None:
        self.path = folder / "recorded.npz"
        c: dict[str, Any] = dict.fromkeys(("lslr", "msl", "second_order", "max_pool", "per_step_bn"), True)
        c |= {"inner_bn": False, "bn_gamma": True, "bn_beta": True, "inner_lr": 0.1, "dataset": "omniglot"}
        c |= {"ways": 2, "image": 4, "channels": 1, "filters": 2, "stages": 1, "steps": 2}
        self.config = c | {"msl_epochs": 10, "da_epoch": -1, "epoch": 0}
        network = "classifier.layer_dict."
        shapes = {f"{network}conv0.conv.weight": (2, 1, 3, 3), f"{network}conv0.conv.bias": (2,)}
        shapes |= {
            f"{network}conv0.norm_layer.{k}": (2, 2)
            for k in ("running_mean", "running_var", "bias", "weight")
        }
        shapes |= {f"{network}linear.weights": (2, 8), f"{network}linear.bias": (2,)}
        rates = "inner_loop_optimizer.names_learning_rates_dict.layer_dict-"
        shapes |= {
            rates + k: (3,) for k in ("conv0-conv-weight", "conv0-conv-bias", "linear-weights", "linear-bias")
        }
        rng = np.random.RandomState(0)
        arrays = {
            f"{part}/{k}": rng.rand(*s) for part in ("init", "grad0", "final") for k, s in shapes.items()
        }
        arrays = {k: v for k, v in arrays.items() if not (k.startswith("grad0") and "running" in k)}
        for i in range(3):
            for side in ("support", "target"):
                arrays[f"batch{i}/{side}_x"] = rng.rand(1, 2, 1, 1, 4, 4)
                arrays[f"batch{i}/{side}_y"] = np.array([[[0], [1]]])
        arrays |= {
            "losses": rng.rand(3),
            "msl_weights": np.full(2, 0.5, np.float32),
            "eval_logits": rng.rand(1, 2, 2),
        }
        self.arrays = arrays
        self.valid = _npz(**arrays, config=np.array(json.dumps(self.config)))
        self.read(self.valid)

    def make(self, rng: random.Random) -> bytes:
        kind = rng.randrange(4)
        if kind == 0:
            return m.bytes_of(rng, self.valid)
        if kind == 1:
            return zip_of(rng, self.valid, m.npy_of)
        config = m.json_of(rng, json.dumps(self.config).encode()).decode("latin1").replace("\x00", " ")
        arrays = dict(self.arrays)
        if kind == 3:
            key = rng.choice(list(arrays))
            v = arrays.pop(key)
            forms = (
                v.astype(np.float32),
                v[None],
                v.ravel()[:1],
                v * np.nan,
                v.astype(np.int64),
                v.astype(str),
                None,
            )
            if (form := rng.choice(forms)) is not None:
                arrays[rng.choice((key, key, key + "x"))] = form
            config = json.dumps(self.config)
        return _npz(**arrays, config=np.array(config))

    def read(self, content: bytes) -> None:
        self.path.write_bytes(content)
        replay.replay(self.path, engine="reference")


@functools.cache
def subjects() -> tuple[Subject, ...]:
    return (
        Omniglot("omniglot-npz", 0.03, "omniglot", "omniglot.npz"),
        Index("omniglot-index", 0.03, "omniglot", "omniglot_dataset.json"),
        OmniglotZip("omniglot-zip", 0.02, "omniglot", "images_background.zip"),
        MiniImageNet("miniimagenet-npz", 0.03, "miniimagenet", "mini_imagenet_train.npz", image_size=16),
        Pickles("pickles", 0.3, "miniimagenet", "mini-imagenet-cache-train.pkl", image_size=4),
        Csv("csv", 0.1, "miniimagenet", "train.csv", image_size=12),
        Cifar("cifar-npz", 0.05, "cifar-fs", "cifar_fs_subset.npz", image_size=8),
        Folder("images", 0.2, "folder", "a/0.png", image_size=12),
        Config(),
        Checkpoint(),
        Authors(),
        ExperimentFile(),
        Recorded(),
    )


SUBJECTS = subjects()
