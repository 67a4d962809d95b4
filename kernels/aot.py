"""Ahead-of-time compilation of every kernel, no GPU needed: ``python -m mamlpp_fast.kernels.aot``.

Each kernel module lists what its code can launch (``launch_configurations()``). Every configuration is compiled for
every architecture and the finished binary asked for its registers, spills and shared memory by NVIDIA's ``cuobjdump``,
which comes with Triton. Needs an environment without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ._launch import Configuration

SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory one block may use, by architecture (CUDA programming guide, compute capabilities)."""

_MATRIX_INSTRUCTIONS = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b")


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses.

    Attributes:
        module: kernel module.
        label: its configuration.
        arch: 80, 90 or 100.
        registers: of one thread.
        spilled: bytes of local memory of one thread (stack and spills).
        shared: bytes of shared memory of one program, static and dynamic.
        instructions: matrix instructions in the PTX, by name.
        tensor_cores: whether matrix instructions are meant.
    """

    module: str
    label: str
    arch: int
    registers: int
    spilled: int
    shared: int
    instructions: dict[str, int]
    tensor_cores: bool

    def problems(self) -> list[str]:
        """What is wrong with it, in words; empty when it may run."""
        found = []
        if self.spilled:
            found.append(f"{self.spilled} bytes of local memory")
        if self.shared > SHARED_MEMORY_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory of {SHARED_MEMORY_LIMIT[self.arch]}")
        if self.tensor_cores and not self.instructions:
            found.append("no matrix instructions")
        return found


def modules() -> list[str]:
    """Names of the kernel modules that list launch configurations."""
    package = importlib.import_module(__package__)
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
    return [n for n in names if n != "aot" and hasattr(_module(n), "launch_configurations")]


def _module(name: str) -> object:
    return importlib.import_module(f"{__package__}.{name}")


def _configurations(module: str) -> list[Configuration]:
    found: Iterable[Configuration] = _module(module).launch_configurations()  # type: ignore[attr-defined]
    return list(found)


def compile_one(module: str, configuration: Configuration, arch: int) -> Resources:
    """Compiles one configuration for one architecture and reads the binary's resources.

    Raises:
        RuntimeError: cuobjdump prints no resource usage.
    """
    names = configuration.kernel.arg_names
    source = ASTSource(
        fn=configuration.kernel,
        signature={n: configuration.types.get(n, "constexpr") for n in names},
        constexprs={
            (names.index(n),): v
            for n, v in (configuration.constants | configuration.by_arch.get(arch, {})).items()
        },
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in configuration.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=configuration.options())
    registers, local, static = usage(compiled.asm["cubin"])
    return Resources(
        module=module,
        label=configuration.label,
        arch=arch,
        registers=registers,
        spilled=local,
        shared=max(compiled.metadata.shared, static),
        instructions=dict(Counter(_MATRIX_INSTRUCTIONS.findall(compiled.asm["ptx"]))),
        tensor_cores=configuration.tensor_cores,
    )


def usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers, bytes of local memory and bytes of shared memory of a finished binary."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text))
    if set(numbers) != {"REG", "STACK", "SHARED", "LOCAL"}:
        raise RuntimeError(f"cuobjdump -res-usage: expected REG, STACK, SHARED and LOCAL, got {text!r}")
    return int(numbers["REG"]), int(numbers["STACK"]) + int(numbers["LOCAL"]), int(numbers["SHARED"])


def _job(job: tuple[str, int, int]) -> Resources:
    module, index, arch = job
    return compile_one(module, _configurations(module)[index], arch)


def compile_all(
    only: Sequence[str] | None = None, archs: Sequence[int] = tuple(SHARED_MEMORY_LIMIT), workers: int = 2
) -> Iterator[Resources]:
    """Compiles all configurations of the modules named (default: all) for `archs`, `workers` at a time.

    Raises:
        RuntimeError: under TRITON_INTERPRET, where there is nothing to compile.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET: expected it unset for ahead-of-time compilation, got 1")
    jobs = [
        (module, index, arch)
        for module in (only or modules())
        for index in range(len(_configurations(module)))
        for arch in archs
    ]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(_job, jobs, chunksize=4)


_HEADER = f"{'sm':>4} {'registers':>9} {'spilled':>8} {'shared':>7}  kernel"


def _line(r: Resources) -> str:
    matrix = ", ".join(f"{count} {name}" for name, count in r.instructions.items())
    trouble = "; ".join(r.problems())
    line = f"{r.arch:>4} {r.registers:>9} {r.spilled:>8} {r.shared:>7}  {r.module}: {r.label}"
    return line + (f" [{matrix}]" if matrix else "") + (f"  <- {trouble}" if trouble else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; exit status 1 when a kernel spills or asks for too much shared memory."""
    parser = argparse.ArgumentParser(prog="python -m mamlpp_fast.kernels.aot", description=main.__doc__)
    parser.add_argument("--module", action="append", help="kernel module (default: all); may be repeated")
    parser.add_argument("--arch", type=int, action="append", choices=list(SHARED_MEMORY_LIMIT))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", metavar="PATH", help="write the numbers there too")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    archs = options.arch or tuple(SHARED_MEMORY_LIMIT)
    rows = []
    print(_HEADER)
    for r in compile_all(options.module, archs, options.workers):
        rows.append(r)
        print(_line(r), flush=True)
    bad = [r for r in rows if r.problems()]
    print(f"{len(rows)} kernels, {len(bad)} with problems, {time.perf_counter() - start:.0f} s")
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(r) for r in rows]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
