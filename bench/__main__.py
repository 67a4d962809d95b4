"""Every measurement of this machine, one after the other, and then the tables and plots.

    python -m bench [PART ...] [--out DIR] [--quick] [--list]

All parts without a name. DIR is the machine's folder under bench/results unless given; only then the pages are
rewritten. ``--list`` says how long each takes on two cores. ``--quick`` rehearses: the smallest sizes and the shortest
times, in minutes, for nothing that is to be kept. A part that fails is named at the end and the next one runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench.harness import RESULTS, machine_name, parser_of
from bench.peers.driver import PEERS
from bench.tables import COMPILED


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        arguments: of ``python``; ``{out}`` is the folder.
        minutes: about what it takes on two cores.
        quick: replaces ``arguments`` in a rehearsal; None leaves the part out.
        variables: of the environment.
    """

    arguments: str
    minutes: float
    quick: str | None
    variables: tuple[tuple[str, str], ...] = ()


_KERNELS = "-m bench.kernels --json {out}/kernels.json"
_CLOSED = "-m bench.kernels --groups batch-norm,lslr,head,dispatch --json {out}/closed_form.json"
_PEERS = "-m bench.peers --rounds 6"


def _without(*names: str) -> str:
    return ",".join(peer.name for peer in PEERS if peer.name not in names)


_QUICK_PEERS = "textbook,torch.func,ours-reference,ours-autograd,ours-fused"
PARTS = {
    "environments": Part("-m bench.peers.environments --missing", 6, None),
    "kernels": Part(
        f"{_KERNELS} --seconds 0.3 --passes 3", 6, f"{_KERNELS} --groups lslr,head,dispatch --seconds 0.05"
    ),
    "closed-form": Part(
        f"{_CLOSED} --seconds 0.2 --passes 3",
        8,
        f"{_CLOSED} --groups lslr,dispatch --seconds 0.05",
        (("MAMLPP_FAST_NATIVE", "0"),),
    ),
    "direct": Part(
        "-m bench.kernels --groups conv --seconds 0.4 --passes 3 --json {out}/kernels_direct.json",
        1,
        None,
        (("MAMLPP_FAST_WINOGRAD", "0"),),
    ),
    "iterations": Part(
        "-m bench.iterations --seconds 6 --passes 2 --json {out}/iterations.json",
        40,
        "-m bench.iterations --workloads omniglot-5w1s-final --engines reference,fused --seconds 1 "
        "--json {out}/iterations.json",
    ),
    "networks": Part(
        "-m bench.networks --json {out}/networks.json",
        8,
        "-m bench.networks --seconds 0.2 --json {out}/networks.json",
    ),
    "load": Part("-m bench.load --json {out}/load.json", 6, None),
    "scaling": Part(
        "-m bench.iterations --scaling --seconds 8 --passes 3 --json {out}/scaling.json", 3, None
    ),
    "accuracy": Part(
        "-m bench.accuracy --json {out}/accuracy.json",
        2,
        "-m bench.accuracy --episodes 5 --updates 1 --json {out}/accuracy.json",
    ),
    "drop-in": Part("-m bench.drop_in --json {out}/drop_in.json", 5, None),
    "peers": Part(
        f"{_PEERS} --peers {_without(*COMPILED)} --workloads omniglot-5w1s-final --json {{out}}/peers.json",
        6,
        f"-m bench.peers --here --peers {_QUICK_PEERS} --workloads tiny-final --rounds 2 --json {{out}}/peers.json",
    ),
    # Into the same file, which keeps the workloads it has; without the forms of JAX that are ten times slower there.
    "peers-more": Part(
        f"{_PEERS} --peers {_without(*COMPILED, 'jax-vmap', 'jax-map')} "
        "--workloads omniglot-20w1s-final,omniglot-5w1s,omniglot-20w1s --json {out}/peers.json",
        15,
        f"-m bench.peers --here --peers {_QUICK_PEERS} --workloads tiny --rounds 2 --json {{out}}/peers.json",
    ),
    # Each compiles for five minutes and more, for its check in float64 once again.
    "peers-compile": Part(
        f"{_PEERS} --peers textbook,torch.func,{','.join(COMPILED)},ours-fused --workloads omniglot-5w1s-final "
        "--json {out}/peers_compile.json",
        26,
        None,
    ),
}


def main() -> int:
    parser = parser_of(__doc__, json=False, prog="python -m bench")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.parts if name not in PARTS]:
        parser.error(f"PART: expected one of {', '.join(PARTS)}, got {unknown[0]}")
    chosen = {name: part for name, part in PARTS.items() if name in (arguments.parts or PARTS)}
    if arguments.list:
        for name, part in chosen.items():
            print(f"{name:14} {part.minutes:4.0f} min  python {part.arguments.format(out='DIR')}")
        print(f"{'together':14} {sum(part.minutes for part in chosen.values()):4.0f} min")
        return 0
    scratch = Path(tempfile.gettempdir()) / "mamlpp_fast_bench"
    out = arguments.out or (scratch if arguments.quick else RESULTS / machine_name())
    failed = []
    for name, part in chosen.items():
        command = part.quick if arguments.quick else part.arguments
        if command is None:
            continue
        print(f"== {name}: python {command.format(out=out)}", flush=True)
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, *command.format(out=out).split()],
            cwd=RESULTS.parent.parent,
            env=os.environ | dict(part.variables),
        )
        if done.returncode:
            failed.append(name)
        print(
            f"== {name}: {'FAILED' if done.returncode else 'ok'}, {time.monotonic() - began:.0f} s",
            flush=True,
        )
    if out.parent == RESULTS:
        subprocess.run([sys.executable, "-m", "bench.report"], cwd=RESULTS.parent.parent, check=True)
    print(f"results: {out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
