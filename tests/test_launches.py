"""Every launch of whole meta-steps and evaluations, compiled as it would be on a GPU; nothing runs there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("triton", reason="no Triton: kernels cannot be compiled")


def launched(tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    """In a process of its own, as the interpreter is on here."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MAMLPP_FAST_NATIVE")}
    path = tmp_path / "launches.json"
    command = [sys.executable, "-m", "bench.launches", *options, "--tasks", "2", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


LOOPS = {
    "float32": {
        "_product": ("instructions per 4 matrix", 20, 96),
        "_gradient_products": ("instructions per 4 matrix", 20, 110),
    },
    "ieee": {"_product": ("ffma share", 0.8, 1.0), "_weight_product": ("ffma share", 0.8, 1.0)},
    "tf32": {
        "_product": ("instructions per 4 matrix", 20, 110),
        "_gradient_products": ("instructions per 4 matrix", 20, 110),
    },
    "bfloat16": {
        "_product": ("instructions per 4 matrix", 20, 110),
        "_gradient_products": ("instructions per 4 matrix", 20, 110),
    },
}
"""What the loops of the products spend their instructions on: the measure, and what it lies between.

At most 110 for 4 matrix instructions; three products of one pair of operands spend less forward, where they load,
cut and find pixels once for all: 96 holds them to that.
"""


@pytest.mark.parametrize(
    ("precision", "nodes"), [("float32", 239), ("ieee", 272), ("tf32", 239), ("bfloat16", 338)]
)
def test_a_whole_meta_step_could_be_launched(
    tmp_path: Path, precision: str, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled without spills, within the limits of grids and of shared memory; no more nodes than there were."""
    if precision == "ieee":
        monkeypatch.setenv("MAMLPP_FAST_PRODUCTS", "ieee")
    named = "float32" if precision == "ieee" else precision
    omniglot, mini = launched(tmp_path, "omniglot-5w1s", "miniimagenet-5w1s", "--precision", named)
    for row in (omniglot, mini):
        assert row["faults"] == []
        assert {*LOOPS[precision], "forward_apply", "_update"} <= {k["name"] for k in row["kernels"]}
    assert omniglot["triton"] + omniglot["aten"] <= nodes
    # Operands are rounded by operations of PyTorch, whatever the CPU at hand would rather do.
    assert (omniglot["aten"] > 50) == (precision == "bfloat16")
    rows = omniglot["predicted"]
    assert sum(row["nodes"] for row in rows) == omniglot["triton"] + omniglot["aten"]
    assert {row["operation"] for row in rows if row["flops"]} >= {"task_conv2d", "task_conv2d_gradients"}
    for kernel in (*omniglot["kernels"], *(mini["kernels"] if precision != "ieee" else ())):
        if kernel["name"] in LOOPS[precision]:
            measure, least, most = LOOPS[precision][kernel["name"]]
            assert least <= kernel["loop"][measure] <= most, kernel


def test_an_evaluation_could_be_launched(tmp_path: Path) -> None:
    (row,) = launched(tmp_path, "omniglot-5w1s", "--evaluate")
    assert row["faults"] == []
    assert row["triton"] > 0


def test_a_step_of_the_autograd_engine_could_be_launched(tmp_path: Path) -> None:
    (row,) = launched(tmp_path, "omniglot-5w1s", "--engine", "autograd")
    assert row["faults"] == []
    assert row["triton"] > 0


def test_what_cannot_be_launched_is_named() -> None:
    from bench.predicted import Kernel

    kernel = Kernel("k", spilled=8)
    kernel.grids[1, 70_000, 1] += 1
    assert kernel.faults() == [
        "k: 8 bytes of local memory",
        "k: grid (1, 70000, 1), of at most (2147483647, 65535, 65535)",
    ]


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IADD3 R4, R4, 0x1, RZ ;
        /*0020*/                   FFMA R2, R2, R3, R2 ;
        /*0030*/               @P1 FFMA R2, R2, R3, R2 ;
        /*0040*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8].tnspA.tnspB, R24 ;
        /*0050*/                   NOP ;
        /*0060*/              @!P0 BRA 0x20 ;
        /*0070*/                   ISETP.GE.AND P0, PT, R4, R5, PT ;
        /*0080*/              @!P0 BRA 0x10 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0 ;
"""


def test_only_innermost_loops_are_counted() -> None:
    from bench.instructions import read

    assert read(SASS) == [{"FFMA": 2, "HGMMA.64x32": 1, "BRA": 1}]


def test_what_a_loop_spends_on_products(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import instructions

    loop = instructions.read(SASS)[0]
    monkeypatch.setattr(instructions, "loops", lambda _: [loop, Counter(FFMA=8, BRA=1)])
    assert instructions.products(b"") == {
        "instructions": 4,
        "matrix": 1,
        "instructions per 4 matrix": 16,
        "clocks": 16,
    }
    unrolled, other = Counter({"HGMMA.64x64": 72, "LDS": 360}), Counter({"HGMMA.64x64": 8, "LDS": 92})
    monkeypatch.setattr(instructions, "loops", lambda _: [unrolled, other, Counter(FFMA=800)])
    found = instructions.products(b"")
    assert found is not None
    assert (found["instructions"], found["clocks"]) == (100, 256)
    monkeypatch.setattr(instructions, "loops", lambda _: [Counter(FFMA=8, BRA=2)])
    assert instructions.products(b"") == {"instructions": 10, "ffma": 8, "ffma share": 0.8}
    monkeypatch.setattr(instructions, "loops", lambda _: [Counter(HMMA=2, BRA=2)])
    assert instructions.products(b"") == {"instructions": 4, "matrix": 2, "instructions per 4 matrix": 8}


def test_a_prediction_is_the_larger_of_bytes_and_operations_and_a_time_for_each_node() -> None:
    from bench.predicted import NODE, Call, Kernel, table

    kernel = Kernel("_product")
    kernel.__dict__["loop"] = {"instructions": 128, "clocks": 64}
    assert Call("x", 8_000_000_000).seconds("tf32") == pytest.approx(2e-3)
    assert Call("PyTorch's add", 8_000_000_000).seconds("tf32") == pytest.approx(2e-3 + NODE)
    half = Call("x", 0, flops=390_000_000, launched=[(kernel, 66)])  # of the machine, and of its instructions
    assert half.seconds("tf32") == pytest.approx(4e-6 + NODE)
    assert half.seconds("float32") == pytest.approx(12e-6 + NODE)  # three products for one
    (row,) = table([half, half], "tf32")
    assert (row["calls"], row["nodes"], row["flops"]) == (2, 2, 780_000_000)


def test_the_tables_are_those_of_the_kept_counts() -> None:
    from bench.predicted import markdown

    rows = json.loads((ROOT / "bench" / "launches.json").read_text())
    page = (ROOT / "docs" / "kernels.md").read_text()
    assert "\n".join(markdown(rows, "omniglot-20w1s")) in page
    *_, total = markdown(rows, "miniimagenet-5w1s")
    times = total.strip("| ").split(" | ")[-3:]
    assert "{} µs in float32, {} in tf32, {} in bfloat16".format(*times) in page
