"""The CUDA C++ kernels, compiled by nvcc for three architectures; no GPU needed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
SOURCES = sorted(FOLDER.glob("*.cu"))
ARCHS = (80, 90, 100)
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

if NVCC is None:
    pytest.skip(
        "no nvcc on PATH or in /usr/local/cuda/bin: CUDA C++ cannot be compiled", allow_module_level=True
    )


@pytest.mark.parametrize("source", SOURCES, ids=[s.stem for s in SOURCES])
def test_compiles_without_warnings_or_spills(source: Path, tmp_path: Path) -> None:
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
    strict = ["-Werror", "all-warnings", "-Xcompiler", "-Wall"]
    command = [NVCC, "-std=c++17", "-c", "-O3", "-Xptxas", "-v", "--threads", "2", *strict, *targets]
    done = subprocess.run([*command, source, "-o", tmp_path / "kernels.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled = re.findall(r"Compiling entry function '(\S+)' for 'sm_(\d+)'", done.stderr)
    assert {int(arch) for _, arch in compiled} == set(ARCHS)
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr
    )
    assert len(frames) >= len(compiled)
    assert {n for frame in frames for n in frame} == {"0"}, done.stderr


@pytest.mark.parametrize("header", sorted(FOLDER.glob("*.h")), ids=lambda h: h.stem)
def test_header_stands_alone(header: Path, tmp_path: Path) -> None:
    source = tmp_path / "include.cu"
    source.write_text(f'#include "{header.name}"\n')
    command = [NVCC, "-std=c++17", "-c", "-I", FOLDER, source, "-o", tmp_path / "include.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
