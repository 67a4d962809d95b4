"""How long an H200 should take for what has been launched: a floor, from bytes, operations and instructions.

``python -m bench.predicted FILE`` prints the tables of ``docs/kernels.md`` from what ``bench.launches --json`` left for
workloads in each precision.

The rule, for every call of an operation: the larger of

- its bytes (every tensor it is given, once) over 4.0 TB/s, and
- its operations over the peak of their precision: 67 TFLOP/s for float32, 390 for tf32 (a third of it for float32 by
  three products), 780 for bfloat16 (what was measured of large products there, tf32 half of it). Of that only the share
  of multiprocessors that have a program, of 132, and the share of instructions that are products: of an exact float32
  loop what is FFMA; on tensor cores the clocks that the loop's HGMMA take, N / 2 for 64 x N, over its instructions, of
  which one a clock is issued. Other float32 arithmetic counts at half the peak;

plus 1.5 microseconds for each node of the graph. Nothing of it was measured on a GPU: what waits for memory or for the
end of another program takes longer.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import instructions

BYTES = 4.0e12
PEAK = {"float32": 67e12, "tf32": 390e12, "bfloat16": 780e12, "float64": 34e12}
MULTIPROCESSORS = 132
NODE = 1.5e-6

_GRID = (2**31 - 1, 65_535, 65_535)
"""Most programs along the axes of a grid (CUDA programming guide, compute capabilities)."""


@dataclass
class Kernel:
    """A compiled form of a kernel, and its launches.

    Attributes:
        name: of the kernel.
        registers, spilled, shared: of a thread, in bytes of a thread, in bytes of a program.
        binary: the machine code.
        grids: programs of a launch, with how many launches had as many.
    """

    name: str
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    binary: bytes = b""
    grids: Counter[tuple[int, ...]] = field(default_factory=Counter)

    def faults(self) -> list[str]:
        found = [f"{self.name}: {self.spilled} bytes of local memory"] if self.spilled else []
        for grid in self.grids:
            if not all(0 < n <= limit for n, limit in zip(grid, _GRID, strict=True)):
                found.append(f"{self.name}: grid {grid}, of at most {_GRID}")
        return found

    @functools.cached_property
    def loop(self) -> dict[str, float] | None:
        """See :func:`bench.instructions.products`."""
        return instructions.products(self.binary)


@dataclass
class Call:
    """One call of an operation.

    Attributes:
        name: of the operation.
        nbytes: of its tensors.
        flops: of its products.
        launched: kernels and programs; none for an operation of PyTorch, which is a node itself.
    """

    name: str
    nbytes: int
    flops: int = 0
    launched: list[tuple[Kernel, int]] = field(default_factory=list)

    @property
    def nodes(self) -> int:
        return len(self.launched) if not self.name.startswith("PyTorch") else 1

    def seconds(self, precision: str) -> float:
        memory = self.nbytes / BYTES
        if not self.flops or not self.launched:
            return memory + NODE * self.nodes
        kernel, programs = max(self.launched, key=lambda launch: launch[1])
        loop = kernel.loop if "product" in kernel.name and "patch" not in kernel.name else None
        peak, share = PEAK["float32"], 0.5
        if loop is not None and "ffma share" in loop:
            share = loop["ffma share"]
        elif loop is not None:
            peak = PEAK["tf32"] / 3 if precision == "float32" else PEAK[precision]
            share = min(1.0, loop["clocks"] / loop["instructions"]) if "clocks" in loop else 0.5
        busy = min(1.0, programs / MULTIPROCESSORS)
        return max(memory, self.flops / (peak * share * busy)) + NODE * self.nodes


def table(calls: Iterable[Call], precision: str) -> list[dict[str, Any]]:
    """Rows by operation, longest first: calls, nodes, bytes, operations and predicted seconds."""
    rows: dict[str, dict[str, Any]] = {}
    for call in calls:
        name = "PyTorch's operations" if call.name.startswith("PyTorch") else call.name
        row = rows.setdefault(
            name, {"operation": name, "calls": 0, "nodes": 0, "bytes": 0, "flops": 0, "seconds": 0.0}
        )
        row["calls"] += 1
        row["nodes"] += call.nodes
        row["bytes"] += call.nbytes
        row["flops"] += call.flops
        row["seconds"] += call.seconds(precision)
    return sorted(rows.values(), key=lambda row: -row["seconds"])


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{'operation':40} {'calls':>5} {'nodes':>5} {'MB':>8} {'GFLOP':>8} {'predicted us':>12}"
    total = {key: sum(row[key] for row in rows) for key in ("calls", "nodes", "bytes", "flops", "seconds")}
    for row in (*rows, {"operation": "all"} | total):
        yield (
            f"{row['operation']:40} {row['calls']:5} {row['nodes']:5} {row['bytes'] / 1e6:8.1f} "
            f"{row['flops'] / 1e9:8.2f} {row['seconds'] * 1e6:12.1f}"
        )


def markdown(rows: list[dict[str, Any]], workload: str) -> Iterator[str]:
    """A workload's table: by operation, and of each precision the predicted time."""
    found = {row["precision"]: row for row in rows if row["workload"] == workload}
    exact = next(iter(found.values()))
    times = {
        precision: {r["operation"]: r["seconds"] for r in row["predicted"]}
        for precision, row in found.items()
    }
    yield f"| {workload} | nodes | MB | GFLOP | {' | '.join(f'µs {p}' for p in found)} |"
    yield "| --- |" + " ---: |" * (3 + len(found))
    for r in exact["predicted"]:
        each = " | ".join(f"{of[r['operation']] * 1e6:.0f}" for of in times.values())
        yield f"| {r['operation']} | {r['nodes']} | {r['bytes'] / 1e6:.1f} | {r['flops'] / 1e9:.2f} | {each} |"
    total = {key: sum(r[key] for r in exact["predicted"]) for key in ("nodes", "bytes", "flops")}
    each = " | ".join(f"{sum(of.values()) * 1e6:.0f}" for of in times.values())
    yield f"| all | {total['nodes']} | {total['bytes'] / 1e6:.1f} | {total['flops'] / 1e9:.2f} | {each} |"


if __name__ == "__main__":
    kept = json.loads(Path(sys.argv[1]).read_text())
    for name in dict.fromkeys(row["workload"] for row in kept):
        print("\n".join(markdown(kept, name)), end="\n\n")
