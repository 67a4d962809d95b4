"""What a meta-iteration launches on a GPU: compiled, checked and counted on a machine that has none.

    python -m bench.launches [WORKLOAD ...] [--engine fused] [--precision float32 ...] [--arch 90] [--tasks N]
                             [--evaluate] [--json FILE] [--kept FILE]

In Triton's driver's place stands one that compiles every kernel for the architecture with the arguments that the
program gives it (sizes, alignment), holds the launch against the limits of a grid and of a block's shared memory, and
launches nothing. The operations of PyTorch run on the CPU, on whatever is in the buffers, and are counted: each is a
node of the captured graph (an index or a reduction with a second stage can be two). Needs an environment without
TRITON_INTERPRET. Exits with 1 where a launch would fail or a kernel spills. ``--kept`` is for ``bench/launches.json``,
which ``docs/kernels.md`` tells of: of ``omniglot-20w1s miniimagenet-5w1s`` by ``--precision float32 tf32 bfloat16``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import sys
import types
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["MAMLPP_FAST_NATIVE"] = "0"

import torch
import triton
from mamlpp_fast.kernels import aot
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from bench import instructions, predicted
from bench.predicted import Call, Kernel
from mamlpp_fast import adam, labels, testing
from mamlpp_fast._modes import float32_products
from mamlpp_fast.engine import EngineName, Precision, base
from mamlpp_fast.engine.base import PRECISIONS
from mamlpp_fast.engine.fused.engine import FusedEngine
from mamlpp_fast.engine.fused.steps import linear
from mamlpp_fast.ops._library import OPERATIONS
from mamlpp_fast.workloads import WORKLOADS, Workload


class Standin(DriverBase):
    """Triton's driver of a GPU that is not there.

    Attributes:
        kernels: all that would have been launched.
        launched: takes kernel and number of programs of every launch.
    """

    def __init__(self, arch: int) -> None:
        super().__init__()
        self.arch = arch
        self.kernels: list[Kernel] = []
        self.launched: list[tuple[Kernel, int]] = []
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": aot.SHARED_MEMORY_LIMIT[arch]},
            load_binary=self._load,
        )

    @classmethod
    def is_active(cls) -> bool:  # type: ignore[override]
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def _load(self, name: str, binary: bytes, shared: int, _: int) -> tuple[int, Kernel, int, int, int]:
        registers, spilled, static = aot.usage(binary)
        kernel = Kernel(name, registers, spilled, max(shared, static), binary)
        self.kernels.append(kernel)
        return 1, kernel, registers, spilled, 1024

    def launcher_cls(self, *_: Any) -> Any:
        def launch(x: int, y: int, z: int, stream: int, kernel: Kernel, *_: Any) -> None:
            kernel.grids[x, y, z] += 1
            self.launched.append((kernel, x * y * z))

        return launch


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations that compute or copy, and takes down what each of ours launches.

    Attributes:
        found: of PyTorch, those within our launchers too.
        calls: of our operations and of PyTorch's, in order.
    """

    def __init__(self, standin: Standin | None = None, flops: Iterable[tuple[str, int]] = ()) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.calls: list[Call] = []
        self._standin = standin
        self._flops = list(flops)[::-1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if func.namespace == "mamlpp_fast" and self._standin is not None:
            operation = OPERATIONS[name]
            if operation.triton is not None:
                call = Call(name, nbytes=_nbytes((args, kwargs)))
                if self._flops and self._flops[-1][0] == name:
                    call.flops = self._flops.pop()[1]
                self.calls.append(call)
                self._standin.launched = call.launched
                with self:
                    return operation.triton(*args, **kwargs)
        if func.namespace == "aten" and not func.is_view and name not in _FREE:
            self.found[name] += 1
            if self._standin is not None:
                self.calls.append(Call(f"PyTorch's {name}", nbytes=_nbytes((args, kwargs))))
        return func(*args, **kwargs)


def _nbytes(arguments: Any) -> int:
    """Of all tensors given, what several places share once."""
    given = [t for t in tree_leaves(arguments) if isinstance(t, torch.Tensor)]
    return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in given}.values())


_FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "detach", "_reshape_alias", "resize_", "set_"),
    *("promote_types", "broadcast_tensors"),
}
"""What is no view and launches nothing."""


@contextlib.contextmanager
def on_a_gpu(precision: str) -> Iterator[None]:
    """Within it operations on CPU tensors take the way of a GPU's, and the fused engine decides as on one."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(float32_products(torch.device("cuda"), tf32=precision == "tf32"))
        stack.enter_context(mock.patch.object(testing, "_interprets", return_value=True))
        stack.enter_context(mock.patch.object(FusedEngine, "_convolves", return_value=False))
        stack.enter_context(mock.patch.object(linear, "_FEW_CHANNELS", 0))
        stack.enter_context(mock.patch.object(linear, "pays_in_bfloat16", return_value=True))
        stack.enter_context(mock.patch.object(base, "launches_cost", return_value=True))
        # Labels are looked at on a CPU alone.
        stack.enter_context(mock.patch.object(FusedEngine, "_plain", lambda self, _: self._plain_loss))
        stack.enter_context(mock.patch.object(labels, "unsuited", return_value=None))
        stack.enter_context(mock.patch.object(labels, "out_of_range", return_value=None))
        stack.enter_context(testing.use_backend("triton"))
        yield


def launches(
    standin: Standin, workload: Workload, engine: EngineName, precision: Precision, *, evaluate: bool = False
) -> dict[str, Any]:
    """The nodes of one meta-step, Adam included, or of an evaluation."""
    learner = workload.learner(engine, "float64" if precision == "float64" else "float32", "cpu")
    used: Any = learner.engine
    # After the learner has been made, which refuses tf32 on a CPU. What the kernels leave is not to be checked.
    used.precision, used.verify = precision, False
    batch = workload.batch(0)
    adam.start(learner.optimizer)
    job = functools.partial(learner.evaluate if evaluate else learner.meta_step, batch)
    with on_a_gpu(precision):
        job()  # what is prepared once
        for kernel in standin.kernels:
            kernel.grids.clear()
        program = used._current.program if engine == "fused" and not evaluate else None
        flops = [(i.name, i.flops) for i in program.instructions if i.flops] if program else []
        with Operations(standin, flops) as operations:
            job()
    kernels = [k for k in standin.kernels if k.grids]
    return {
        "workload": workload.name,
        "engine": engine,
        "precision": precision,
        "arch": standin.arch,
        "pass": "evaluation" if evaluate else "meta-step",
        "triton": sum(sum(k.grids.values()) for k in kernels),
        "aten": sum(operations.found.values()),
        "faults": [fault for k in standin.kernels for fault in k.faults()],
        "kernels": [
            {
                "name": k.name,
                "registers": k.registers,
                "spilled": k.spilled,
                "shared": k.shared,
                "grids": [[*g, n] for g, n in k.grids.most_common()],
            }
            | ({"loop": instructions.products(k.binary)} if "product" in k.name else {})
            for k in kernels
        ],
        "operations": dict(operations.found.most_common()),
        "predicted": predicted.table(operations.calls, precision),
    }


def kept(row: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a row: counts, predicted times, and what the products' loops spend."""
    loops = [
        {"kernel": k["name"], "launches": sum(g[3] for g in k["grids"])} | k["loop"]
        for k in row["kernels"]
        if k.get("loop") and "patch" not in k["name"]
    ]
    left_out = ("faults", "kernels", "operations")
    return {key: value for key, value in row.items() if key not in left_out} | {"loops": loops}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", default=["omniglot-20w1s"], metavar="WORKLOAD")
    parser.add_argument("--engine", default="fused", choices=["fused", "autograd"])
    parser.add_argument("--precision", default=["float32"], nargs="+", choices=PRECISIONS)
    parser.add_argument("--arch", type=int, default=90, choices=list(aot.SHARED_MEMORY_LIMIT))
    parser.add_argument("--tasks", type=int, help="in place of the workload's")
    parser.add_argument("--evaluate", action="store_true", help="an evaluation in place of a meta-step")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--kept", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET: expected it unset, in an environment that compiles")
    # One for all: what has been compiled once is known to Triton with the driver that loaded it.
    standin = Standin(arguments.arch)
    triton.runtime.driver.set_active(standin)
    rows = []
    for precision, name in itertools.product(arguments.precision, arguments.workloads):
        workload = WORKLOADS[name]
        if arguments.tasks:
            workload = dataclasses.replace(workload, tasks=arguments.tasks)
        row = launches(standin, workload, arguments.engine, precision, evaluate=arguments.evaluate)
        rows.append(row)
        about = " ".join(str(row[key]) for key in ("workload", "engine", "precision", "pass"))
        nodes = row["triton"] + row["aten"]
        print(
            f"{about}, sm_{row['arch']}: {nodes} nodes, {row['triton']} of Triton, {row['aten']} of PyTorch"
        )
        for k in sorted(row["kernels"], key=lambda k: -sum(g[3] for g in k["grids"])):
            count = sum(g[3] for g in k["grids"])
            programs = " ".join(f"{x * y * z}" for x, y, z, _ in k["grids"][:4])
            loop = ", ".join(f"{name} {value:.3g}" for name, value in (k.get("loop") or {}).items())
            print(f"{count:5} {k['name']:28} {k['registers']:4} registers, programs {programs}  {loop}")
        print("      " + ", ".join(f"{name} {count}" for name, count in row["operations"].items()))
        for line in predicted.lines(row["predicted"]):
            print(line)
        print("\n".join(row["faults"]))
        for path, shown in ((arguments.json, rows), (arguments.kept, list(map(kept, rows)))):
            if path:
                path.write_text(json.dumps(shown, indent=1) + "\n")
    return int(any(row["faults"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
