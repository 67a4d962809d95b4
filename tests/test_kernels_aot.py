"""Every Triton kernel, in every configuration the code can launch, compiled for three architectures; no GPU needed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ARCHS = (80, 90, 100)

if importlib.util.find_spec("triton") is None:
    pytest.skip("no Triton: kernels cannot be compiled", allow_module_level=True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The table of ``python -m mamlpp_fast.kernels.aot``, which runs apart because the interpreter is on here."""
    path = tmp_path_factory.mktemp("aot") / "resources.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "MAMLPP_FAST_NATIVE": "0"
    }
    command = [sys.executable, "-m", "mamlpp_fast.kernels.aot", "--json", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert path.exists(), done.stdout + done.stderr
    rows: list[dict[str, Any]] = json.loads(Path(path).read_text())
    return rows


def _named(rows: list[dict[str, Any]]) -> list[str]:
    return [f"sm_{r['arch']} {r['module']}: {r['label']}" for r in rows]


def test_every_kernel_compiles_for_every_architecture(compiled: list[dict[str, Any]]) -> None:
    labels = [{(r["module"], r["label"]) for r in compiled if r["arch"] == arch} for arch in ARCHS]
    assert labels[0] == labels[1] == labels[2]
    assert len(compiled) == len(ARCHS) * len(labels[0])
    modules = {
        "per_step_batch_norm", "norm_act_pool", "conv_norm_act_pool", "linear_cross_entropy", "task_conv2d",
        "strided_sums", "running_blend",
    }  # fmt: skip
    assert modules <= {r["module"] for r in compiled}


def test_no_kernel_spills_registers(compiled: list[dict[str, Any]]) -> None:
    assert _named([r for r in compiled if r["spilled"]]) == []


def test_shared_memory_fits_a_block(compiled: list[dict[str, Any]]) -> None:
    limits = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
    assert _named([r for r in compiled if r["shared"] > limits[r["arch"]]]) == []


def test_tensor_cores_are_used_exactly_where_meant(compiled: list[dict[str, Any]]) -> None:
    float64 = [r for r in compiled if "fp64" in r["label"]]  # has tensor cores too, used or not
    rows = [r for r in compiled if r not in float64]
    assert _named([r for r in rows if bool(r["instructions"]) != r["tensor_cores"]]) == []


def test_bfloat16_products_use_warpgroup_instructions_on_hopper(compiled: list[dict[str, Any]]) -> None:
    rows = [
        r
        for r in compiled
        if r["arch"] == 90 and r["module"] == "task_conv2d" and " dense bf16" in r["label"]
    ]
    assert rows
    assert _named([r for r in rows if "wgmma.mma_async" not in r["instructions"]]) == []


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, "tf32"), (torch.float32, "tf32x3"), (torch.float32, "ieee"), (torch.bfloat16, "ieee")],
)
def test_a_step_of_any_channels_fits_shared_memory(dtype: torch.dtype, precision: str) -> None:
    """Whole blocks of channels, as many stages of which lie in shared memory as the launch asks for."""
    from mamlpp_fast.kernels import aot, task_conv2d

    for channels in range(16, 1040, 16):
        tile = task_conv2d._tile(dtype, True, precision, weight=False, arch=90)
        held = task_conv2d._stepped(tile, channels, 90)
        depth = held["BK"] * held["UNROLL"]
        assert channels % depth == 0
        taken = tile.num_stages * (held["BM"] + held["BN"]) * depth * dtype.itemsize
        assert taken <= aot.SHARED_MEMORY_LIMIT[90], channels


def test_interpreter_is_refused() -> None:
    from mamlpp_fast.kernels import aot

    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        list(aot.compile_all())
