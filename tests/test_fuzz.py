"""A few hundred of the damaged and hostile inputs that ``python -m bench.fuzz`` makes by the hundred thousand."""

import io
import json
import pickle
import struct
import tracemalloc
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from authors_helpers import shipped
from helpers import refused
from PIL import Image

from bench.fuzz.archives import _archive, _bomb, _members
from bench.fuzz.driver import fuzz
from bench.fuzz.subjects import SUBJECTS, Recorded
from mamlpp_fast.compat.experiment import read_experiment
from mamlpp_fast.data import DataError, load
from mamlpp_fast.data.archives import read_npz
from mamlpp_fast.data.pickles import read_pickle
from mamlpp_fast.data.pictures import decode_image
from mamlpp_fast.replay import replay
from mamlpp_fast.train import TrainConfig, build_learner, load_checkpoint
from mamlpp_fast.train._resumable import check_best, check_learner
from mamlpp_fast.train.checkpoint import CheckpointError, load_tensors, save_checkpoint


def test_every_reader_refuses_in_a_line_and_runs_nothing(tmp_path: Path) -> None:
    rows = fuzz(600, seed=1, keep=tmp_path)
    assert [r["kind"] for r in rows] == [s.name for s in SUBJECTS]
    assert [(r["kind"], r["failures"]) for r in rows if r["failed"] or r["code_run"]] == []
    assert sum(r["refused"] for r in rows) > 300
    assert sum(r["accepted"] for r in rows) > 30


class _Faulty:
    """A reader with one fault for each limit."""

    name, share = "faulty", 1.0

    def prepare(self, folder: Path) -> None:
        self.folder = folder

    def make(self, rng: Any) -> bytes:
        return b""

    def read(self, content: bytes) -> None:
        raise NotImplementedError


class _Hanging(_Faulty):
    def read(self, content: bytes) -> None:
        while True:
            pass


class _Crashing(_Faulty):
    def read(self, content: bytes) -> None:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)  # as a fault would end it, without the report


class _Wordy(_Faulty):
    def read(self, content: bytes) -> None:
        raise ValueError("two\nlines")


class _Writing(_Faulty):
    def read(self, content: bytes) -> None:
        with open(self.folder.parent / f"{self.folder.name}-outside", "w"):
            pass
        (self.folder.parent / f"{self.folder.name}-outside").unlink()


class _Greedy(_Faulty):
    def read(self, content: bytes) -> None:
        bytearray(4 << 30)


class _Hiding(_Faulty):
    def read(self, content: bytes) -> None:
        try:
            bytearray(4 << 30)
        except MemoryError:
            raise ValueError("larger than memory") from None


class _Running(_Faulty):
    def read(self, content: bytes) -> None:
        from bench.fuzz.mutations import Canary

        pickle.loads(pickle.dumps(Canary()))


@pytest.mark.parametrize(
    ("subject", "what"),
    [
        (_Hanging(), "Hang"),
        (_Crashing(), "the process died"),
        (_Wordy(), "message 'two"),
        (_Writing(), "did open"),
        (_Greedy(), "MemoryError"),
        (_Hiding(), "more memory than there is"),
        (_Running(), None),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, _Faulty) else "",
)
def test_the_harness_sees_each_fault(subject: Any, what: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.fuzz.driver.SUBJECTS", (subject,))
    monkeypatch.setattr("bench.fuzz.driver.SECONDS", 0.2)
    (row,) = fuzz(1, seed=0)
    assert row["failed"] == 1
    assert row["code_run"] == (what is None)
    assert what is None or what in row["failures"][0]


def test_inputs_behind_a_crash_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.fuzz.driver.SUBJECTS", (_Crashing(),))
    (row,) = fuzz(3, seed=0)
    assert [f.split(":")[0] for f in row["failures"]] == ["input 0", "input 1", "input 2"]


def test_archives_of_packed_members_are_read_back() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", b"x" * 1000)
        archive.writestr("b", b"yz", zipfile.ZIP_STORED)
    plain, packed = _members(stream.getvalue())[::-1]
    with zipfile.ZipFile(io.BytesIO(_archive([plain, packed, _bomb("c", b"head", 2)]))) as archive:
        assert archive.testzip() is None
        assert [m.compress_type for m in archive.infolist()] == [
            zipfile.ZIP_STORED,
            *2 * (zipfile.ZIP_DEFLATED,),
        ]
        assert (archive.read("a"), archive.read("b")) == (b"x" * 1000, b"yz")
        assert archive.read("c") == b"head" + bytes(2 << 20)


# What it found, one by one.


def _npz(tmp_path: Path, header: str, body: bytes = b"") -> Path:
    text = header.encode() + b"\n"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body
    file = tmp_path / "a.npz"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.npy", array)
    return file


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000,)}",
            "expected 3 bytes as there are",
        ),
        (
            "{'descr': '|S0', 'fortran_order': False, 'shape': (1000000000000,)}",
            "expected an array of numbers",
        ),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", "expected an array of numbers"),
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (-1,)}", "expected 3 bytes as there are"),
        ("{'descr': [", "expected a whole .npz archive"),
    ],
    ids=["promises", "no-size", "objects", "negative", "cut"],
)
def test_headers_that_promise_what_is_not_there(header: str, message: str, tmp_path: Path) -> None:
    with refused(DataError, message):
        read_npz(_npz(tmp_path, header, b"abc"))


def test_characters_that_are_none(tmp_path: Path) -> None:
    header = "{'descr': '<U1', 'fortran_order': False, 'shape': (1,)}"
    with pytest.raises(DataError, match="x: expected texts, got a character 0xffffffff"):
        read_npz(_npz(tmp_path, header, b"\xff" * 4))
    assert read_npz(_npz(tmp_path, header, b"a\0\0\0"))["x"].tolist() == ["a"]


def test_an_archive_that_unpacks_to_a_thousand_times_its_size(tmp_path: Path) -> None:
    file = tmp_path / "omniglot.npz"
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("images_maml_packed.npy", "w", force_zip64=True) as member,
    ):
        for _ in range(300):
            member.write(bytes(1 << 20))
    with pytest.raises(DataError, match="expected an archive that unpacks to at most 100 times its size"):
        load("omniglot", file)


def _claiming(file: Path, packed: int, unpacked: int) -> None:
    """Other sizes for the last member of an archive."""
    content = bytearray(file.read_bytes())
    at = content.rfind(b"PK\x01\x02") + 20
    content[at : at + 8] = struct.pack("<II", packed, unpacked)
    file.write_bytes(content)


def test_an_archive_that_claims_to_be_larger_than_it_is(tmp_path: Path) -> None:
    """By the size that it claims, 3 GiB would be a hundredth of what it may unpack to."""
    file = _npz(tmp_path, "{'descr': '|u1', 'fortran_order': False, 'shape': (3,)}", b"abc")
    size = file.stat().st_size
    _claiming(file, 3 << 30, 3 << 30)
    with pytest.raises(
        DataError, match=f"expected parts within the {size} bytes of the archive, got {3 << 30}"
    ):
        read_npz(file)


def test_a_class_whose_name_has_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "a.png")
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.csv").write_text('filename,label\na.png,"b\n\nc"\n')
    train = load("miniimagenet", tmp_path, image_size=4)
    with pytest.raises(DataError, match=r"images of class 'b\\n\\nc' of .*, got 1 \+ 1") as raised:
        train.sampler("train", ways=1, shots=1, targets=1)
    assert "\n" not in str(raised.value)


def test_damage_that_shows_when_a_member_is_read(tmp_path: Path) -> None:
    for part in ("images_background", "images_evaluation"):
        with zipfile.ZipFile(tmp_path / f"{part}.zip", "w") as archive:
            archive.writestr("A/character01/0001_01.png", b"x" * 50)
    file = tmp_path / "images_background.zip"
    file.write_bytes(file.read_bytes().replace(b"xxxx", b"yyyy", 1))
    with pytest.raises(DataError, match=r"expected a whole zip archive, got a damaged one .*CRC"):
        load("omniglot", tmp_path)


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (10**5, r"x\.png: expected a whole PNG file, got DecompressionBomb"),
        (9000, r"x\.png: expected at most 8192x8192 pixels, got 9000x9000"),
    ],
)
def test_a_picture_of_ten_thousand_million_pixels(side: int, message: str) -> None:
    png = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT"):
        png += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(DataError, match=message):
        decode_image(png, "x.png", "PNG file", lambda image: image.load())


def test_a_chunk_that_is_longer_than_its_file(tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    Image.new("RGB", (4, 4)).save(file)
    content = bytearray(file.read_bytes())
    content[content.index(b"IDAT") - 4] = 0xF0  # of the length of the chunk: 3.75 GiB
    file.write_bytes(content)
    tracemalloc.start()
    try:
        with suppress(DataError):
            decode_image(file, "x.png", "PNG file", lambda image: image.load())
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


_DOUBLED = b")" + b"2\x86" * 60  # a tuple of twice itself, sixty times over


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (b"}" + _DOUBLED + b"Ns.", "key of tuple"),
        (b"\x8f(" + _DOUBLED + b"\x90.", "key of tuple"),
        (b"Nr\xff\xff\xff\x7f0N.", None),
        (b"c_codecs\nencode\n(N}X\x0b\x00\x00\x00__doc__aaaaX\x01\x00\x00\x00xstb.", "state of function"),
        (
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
            b"(K\x01J\x00\xca\x9a;\x85cnumpy\ndtype\nU\x02O8\x85R\x89]tb.",
            "objects of an array",
        ),
        (b"cnumpy\ndtype\nU\x02V0\x85R.", "dtype"),
        (
            b"cnumpy\ndtype\nU\x02u1\x85R(K\x03U\x01|N(U\x01at}J\x08\x00\x00\x00K\x01K\x00tb.",
            "dtype with fields",
        ),
    ],
    ids=["key", "member", "memo", "function", "objects", "no-size", "fields"],
)
def test_pickles_that_harm_without_code(program: bytes, reason: str | None, tmp_path: Path) -> None:
    file = tmp_path / "a.pkl"
    file.write_bytes(b"\x80\x04" + program)
    if reason is None:
        assert read_pickle(file) is None  # a memo of 16 GiB, did the file have its way
        return
    with refused(DataError, reason):
        read_pickle(file)


def test_labels_that_spell_out_to_a_power_of_two(tmp_path: Path) -> None:
    labels: list[Any] = [0]
    for _ in range(50):
        labels = [labels, labels]
    for split in ("train", "val", "test"):
        content = {"data": np.zeros((2, 4, 4, 3), np.uint8), "labels": labels}
        (tmp_path / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match="labels: expected integers, got list of something else"):
        load("miniimagenet", tmp_path)


_more_than_plain = pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"model": {"w": torch.zeros(1).expand(10**12)}}, "tensor outside its storage"),
        ({"model": {"w": torch.zeros(3).to_sparse()}}, "asks for torch._utils._rebuild_sparse_tensor"),
        ({"model": [[x := [1], x], [x]]}, "containers in two places"),
    ],
    ids=["expanded", "sparse", "shared"],
)


@_more_than_plain
def test_checkpoints_of_more_than_plain_tensors(content: Any, reason: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", "model", content)
    with refused(CheckpointError, reason):
        load_checkpoint(tmp_path / "a.pt", "model")


def test_a_compressed_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", "model", {"model": {}})
    stream = io.BytesIO()
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    (tmp_path / "a.pt").write_bytes(stream.getvalue())
    with pytest.raises(CheckpointError, match="expected parts stored as they are, got compressed ones"):
        load_checkpoint(tmp_path / "a.pt", "model")


def _legacy(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def _longer(saved: bytes) -> bytes:
    """The same, of a storage that claims 2**40 elements, and has the bytes of three."""
    assert saved.count(b"K\x03Nt") == 1
    return saved.replace(b"K\x03Nt", b"\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"Nt")


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "legacy"])
@_more_than_plain
def test_imported_checkpoints_are_vetted_like_our_own(
    content: Any, reason: str, legacy: bool, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "a", _use_new_zipfile_serialization=not legacy)
    with refused(CheckpointError, reason):
        load_tensors(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_longer, "storage of another size than its bytes"),
        (lambda saved: saved[:-1], "storage of another size than its bytes"),
        (lambda saved: saved[:-20] + bytes([4]) + saved[-19:], "storage of another size than its bytes"),
        (lambda saved: b"\x80\x02K\x01." + saved, "no magic number of torch.save"),
    ],
    ids=["promises", "cut", "counts", "magic"],
)
def test_storages_of_the_old_format_have_their_bytes(change: Any, reason: str, tmp_path: Path) -> None:
    saved = _legacy({"w": torch.zeros(3)})
    (tmp_path / "a").write_bytes(saved)
    torch.testing.assert_close(load_tensors(tmp_path / "a")["w"], torch.zeros(3), rtol=0, atol=0)
    (tmp_path / "a").write_bytes(change(saved))
    with refused(CheckpointError, reason):
        load_tensors(tmp_path / "a")


def test_a_checkpoint_of_both_formats_is_read_as_the_one_that_was_vetted(tmp_path: Path) -> None:
    """torch tells them apart by the first bytes, zipfile by the last."""
    header = {"format": "mamlpp_fast model", "version": 1}
    save_checkpoint(tmp_path / "a.pt", "model", {"model": "the archive's"})
    archive = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(_legacy(header | {"model": "the other's"}) + archive)
    assert load_checkpoint(tmp_path / "a.pt", "model")["model"] == "the archive's"
    assert load_tensors(tmp_path / "a.pt")["model"] == "the other's"


def test_parts_beside_the_folder_that_torch_would_read_first(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("b/version", b"3")
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
    with pytest.raises(
        CheckpointError, match=r"expected parts in one folder, got 'b/version' beside 'a/data\.pkl'"
    ):
        load_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("code", [pickle.BYTEARRAY8, pickle.BINBYTES8, pickle.BINUNICODE8, pickle.FRAME])
def test_no_more_is_set_aside_than_a_pickle_has(code: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.pkl"
    file.write_bytes(b"\x80\x05" + code + struct.pack("<Q", 1 << 46) + b"abc")  # no machine has as much
    with pytest.raises(DataError, match="got a damaged one"):
        read_pickle(file)


@pytest.mark.parametrize("module", ["os\nx", "m" * 20_000])
def test_a_pickle_that_asks_for_a_name_of_several_lines(module: str, tmp_path: Path) -> None:
    file = tmp_path / "a.pkl"
    file.write_bytes(pickle.PROTO + b"\x04" + _text(module) + _text("system") + pickle.STACK_GLOBAL + b".")
    with pytest.raises(DataError, match="got one that asks for") as raised:
        read_pickle(file)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1000


def _text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()


@pytest.mark.parametrize("name", ["../../x.pt", "/etc/passwd", "a/b.pt", "", 3, None])
def test_a_checkpoint_names_no_file_outside_its_folder(name: Any) -> None:
    """Models that are no longer among the best are deleted by these names."""
    entry = {"file": name, "val_accuracy": 0.5, "epoch": 0, "iteration": 1}
    with pytest.raises(CheckpointError, match="best: expected models with names"):
        check_best(Path("latest.pt"), [entry])


def test_an_experiment_file_with_null_for_a_truth_value(tmp_path: Path) -> None:
    file = tmp_path / "experiment.json"
    file.write_text(json.dumps(shipped("omniglot", 5, 1) | {"max_pooling": None}))
    with pytest.raises(ValueError, match=r"max_pooling \(max_pool\): expected true or false, got None"):
        read_experiment(file)


@pytest.mark.parametrize("flag", ["amsgrad", "maximize", "differentiable"])
def test_an_adam_of_other_flags(flag: str) -> None:
    """By a checkpoint's flags it would climb, fail, or look for moments that are not there."""
    learner = build_learner(TrainConfig(filters=2, stages=1, ways=2, image_size=4, steps=2), 1, 4)
    state = learner.state_dict()
    check_learner(Path("latest.pt"), state, learner)
    (group,) = state["optimizer"]["param_groups"]
    changed = state | {"optimizer": state["optimizer"] | {"param_groups": [group | {flag: True}]}}
    with pytest.raises(CheckpointError, match=f"optimizer: expected {flag} False, got True"):
        check_learner(Path("latest.pt"), changed, learner)


def test_a_recorded_rate_of_more_digits_than_numbers_have(tmp_path: Path) -> None:
    subject = Recorded()
    subject.prepare(tmp_path)
    np.savez(tmp_path / "x.npz", **subject.arrays, config=json.dumps(subject.config | {"inner_lr": 10**30}))
    with pytest.raises(ValueError, match="config inner_lr: expected a number within 1e9, got 1000"):
        replay(tmp_path / "x.npz", engine="reference")


@pytest.mark.parametrize(
    "rate", [1e308, 10**30, 10**400, float("nan")], ids=["1e308", "1e30", "1e400", "nan"]
)
def test_settings_that_no_tensor_holds(rate: float) -> None:
    with pytest.raises(ValueError, match="inner_lr: expected a number, got"):
        TrainConfig(inner_lr=rate)
