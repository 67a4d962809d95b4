"""Pickles are read as data: arrays and containers come through, anything else is refused and never imported."""

import collections
import contextlib
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mamlpp_fast.data import DataError
from mamlpp_fast.data.pickles import read_pickle

CONTENT = {
    "image_data": np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "class_dict": collections.OrderedDict(a=[0, np.int64(1)], b=(True, None, 1.5, b"x")),
    "sets": [{1, 2}, frozenset({3}), bytearray(b"y")],
    "ragged": np.array([[1], [2, 3]], dtype=object),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_containers_come_through(protocol: int, tmp_path: Path) -> None:
    file = tmp_path / "a.pkl"
    file.write_bytes(pickle.dumps(CONTENT, protocol))
    read = read_pickle(file)
    assert read.keys() == CONTENT.keys()
    for key in ("image_data", "fortran", "ragged"):
        np.testing.assert_array_equal(read[key], CONTENT[key])
        assert read[key].dtype == CONTENT[key].dtype  # type: ignore[attr-defined]
    assert read["class_dict"] == CONTENT["class_dict"]
    assert read["sets"] == CONTENT["sets"]


@pytest.mark.parametrize("old", [b"numpy.core", b"numpy._core"], ids=["numpy1", "numpy2"])
def test_both_generations_of_numpy(old: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.pkl"
    new = np.arange(3).__reduce__()[0].__module__.split(".multiarray")[0].encode()
    file.write_bytes(pickle.dumps(CONTENT["image_data"], 0).replace(new, old))
    np.testing.assert_array_equal(read_pickle(file), CONTENT["image_data"])


def test_python_2_pickle(tmp_path: Path) -> None:
    """As Python 2 and numpy 1 wrote it: protocol 2, array bytes as a str."""
    raw = (
        b"\x80\x02}q\x00U\x04datacnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85U\x01b\x87"
        b"Rq\x03(K\x01K\x03\x85cnumpy\ndtype\nq\x04U\x02u1K\x00K\x01\x87Rq\x05(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff"
        b"\xff\xffK\x00tb\x89U\x03\x01\xff\x07tbs."
    )
    file = tmp_path / "a.pkl"
    file.write_bytes(raw)
    np.testing.assert_array_equal(read_pickle(file)["data"], np.array([1, 255, 7], np.uint8))


class Call:
    """A pickle that calls ``function(*arguments)`` when read by ``pickle.load``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, f"{os.name}.system"),
        (eval, "eval"),
        (getattr, "getattr"),
        (np.fromfile, "fromfile"),
        (print, "print"),
    ],
    ids=["system", "eval", "getattr", "fromfile", "print"],
)
def test_code_is_refused_by_name(function: Any, name: str, protocol: int, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    file = tmp_path / "a.pkl"
    file.write_bytes(pickle.dumps({"image_data": Call(function, f"touch {victim}")}, protocol))
    with pytest.raises(DataError) as raised:
        read_pickle(file)
    assert str(raised.value).startswith(
        f"{file}: expected a pickle of arrays and plain containers, got one that asks"
    )
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not victim.exists()


def test_array_subclasses_and_persistent_ids_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.pkl"
    file.write_bytes(pickle.dumps(np.zeros(2).view(np.recarray)))
    with pytest.raises(DataError, match="asks for numpy"):
        read_pickle(file)
    file.write_bytes(b"P1\n.")
    with pytest.raises(DataError, match="asks for persistent id"):
        read_pickle(file)


_SHORT = b"cnumpy\ndtype\nU\x02u2\x85R"
_EMPTY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
REFUSED = {
    "encoding": (b"c_codecs\nencode\nU\x01aU\x05utf-8\x86R.", "encoding 'utf-8'"),
    "dtype": (b"cnumpy\ndtype\nK\x01\x85R.", "dtype of int"),
    "array type": (_EMPTY.replace(b"cnumpy\nndarray\n", b"K\x01") + b".", "array type int"),
    "scalar": (b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nU\x02O8\x85RU\x01a\x86R.", "object scalar"),
    "bytes": (b"c__builtin__\nbytes\nK\x05\x85R.", "bytes of int"),
    "list": (b"c__builtin__\nlist\nK\x05\x85R.", "list of int"),
    "item": (b"}K\x01a.", "list items of dict"),
    "order": (_SHORT + b"(K\x03U\x01?NNNK\x00K\x00K\x00tb.", "byte order"),
    "state": (_EMPTY + b"(K\x01K\x01\x85NK\x00U\x01atb.", "array state"),
    "shape": (_EMPTY + b"(K\x01J\xff\xff\xff\xff\x85" + _SHORT + b"K\x00U\x01atb.", "array shape"),
    "size": (_EMPTY + b"(K\x01K\x01\x85" + _SHORT + b"K\x00U\x01atb.", "bytes of an array"),
}


@pytest.mark.parametrize(("program", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_no_data_need_is_refused(program: bytes, reason: str, tmp_path: Path) -> None:
    """Calls with other arguments than data have, and states that do not belong to what they are given to."""
    file = tmp_path / "a.pkl"
    file.write_bytes(b"\x80\x02" + program)
    with pytest.raises(DataError, match=rf"got a damaged one \(UnpicklingError: {re.escape(reason)}\)$"):
        read_pickle(file)


def test_texts_that_stand_for_bytes(tmp_path: Path) -> None:
    """As Python 3 writes bytes for Python 2, and dictionaries by their items."""
    file = tmp_path / "a.pkl"
    value = b"c__builtin__\nbytes\nU\x01\xffU\x06latin1\x86R"
    file.write_bytes(b"\x80\x02ccollections\nOrderedDict\n](U\x01k" + value + b"la\x85R.")
    assert read_pickle(file) == {"k": b"\xff"}


@pytest.mark.parametrize("cut", range(0, 400, 37))
def test_truncated(cut: int, tmp_path: Path) -> None:
    file = tmp_path / "a.pkl"
    file.write_bytes(pickle.dumps(CONTENT)[:cut])
    with pytest.raises(DataError, match="expected a whole pickle, got a damaged one"):
        read_pickle(file)


def test_garbage_only_ever_raises_data_errors(tmp_path: Path) -> None:
    rng = np.random.RandomState(0)
    whole = pickle.dumps(CONTENT)
    file = tmp_path / "a.pkl"
    for _ in range(100):
        data = bytearray(whole)
        data[rng.randint(len(data))] = rng.randint(256)
        file.write_bytes(data)
        with contextlib.suppress(DataError):
            read_pickle(file)
