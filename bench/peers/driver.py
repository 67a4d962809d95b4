"""What a user would pick instead: one second-order meta-gradient by every peer, checked, then timed.

    python -m bench.peers.environments      # once: the peers' libraries, each in its own environment
    python -m bench.peers [--rounds 8] [--peers NAME,...] [--workloads NAME,...] [--device cuda] [--here] [--json FILE]

Workloads ending in ``-final`` are plain MAML, the others MAML++ by the peers that can be told it. FILE keeps the
workloads that it has from earlier runs. ``--here`` takes the driver's own interpreter for every peer.

Every peer is a process of its own at the same weights and tasks. Before any time is taken, its mean target loss and the
meta-gradient of every parameter must agree with textbook PyTorch's in float64 twice; a peer that fails gets none:

- run in float64, to 1e-6 of each tensor's largest value: the same function;
- run in float32, what is timed, the whole meta-gradient to 0.3 of its norm. Coarse, for in float32 any
  two ways differ so much: one value near a max-pool's or leaky ReLU's kink that falls to the other side moves the inner
  gradients, and the steps after it amplify that.

Then all take turns, a run each a round: one alone computes at a time. Before the first round each has run twice: once
to build and compile, timed apart from importing its libraries, and once more, discarded.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.harness import Times, by_rows, machine, parser_of
from bench.peers.client import Failed, Peer, Worker, differs, distance
from bench.peers.environments import ENVIRONMENTS, default_cache, python_of, recorded
from bench.peers.problem import SIZES, TINY, Arrays, Sizes, make
from bench.tables import held_up

_P = "bench.peers."
EXACT = Peer("exact", _P + "textbook")
PEERS = (
    Peer("textbook", _P + "textbook", None, "torch"),
    Peer("torch.func", _P + "functional", None, "torch"),
    Peer("torch.compile", _P + "functional", "compiled", "torch"),
    Peer("torch.compile-traced", _P + "functional", "traced", "torch", plus=False),
    Peer("textbook-compiled", _P + "textbook", "compiled", "torch", plus=False),
    Peer("textbook-compiled-net", _P + "textbook", "compiled-loss", "torch", plus=False),
    Peer("torchopt", _P + "with_torchopt", None, "torchopt", plus=False),
    Peer("higher", _P + "with_higher", None, "higher", plus=False),
    Peer("learn2learn", _P + "with_learn2learn", None, "learn2learn", plus=False),
    Peer("jax-vmap", _P + "with_jax", "vmap", "jax"),
    Peer("jax-vmap-patches", _P + "with_jax", "vmap-patches", "jax"),
    Peer("jax-map", _P + "with_jax", "map", "jax"),
    Peer("jax-map-patches", _P + "with_jax", "map-patches", "jax"),
    Peer("ours-reference", _P + "ours", "reference"),
    Peer("ours-autograd", _P + "ours", "autograd"),
    Peer("ours-fused", _P + "ours", "fused"),
)
# Without these a comparison says nothing; of the others some are there to show what fails.
_NEEDED = ("textbook", "ours-fused")
_TOLERANCE = 1e-6
_FLOAT32_TOLERANCE = 0.3
_LIMIT = 1200.0  # seconds a peer may take to build and compile


class Settings(argparse.Namespace):
    """The command line's options; without a cache folder every peer runs in the driver's own interpreter."""

    rounds: int
    threads: int
    device: str
    cache: Path | None


def compare(sizes: Sizes, peers: Sequence[Peer], settings: Settings) -> list[dict[str, Any]]:
    """A row for each peer: times, or the fault that keeps it from one."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        problem = folder / "problem.npz"
        make(sizes).save(problem)
        rows: dict[str, dict[str, Any]] = {}
        live: dict[str, Worker] = {}
        with _start(EXACT, settings) as worker:
            worker.ask("setup", path=str(problem), device=settings.device, dtype="float64")
            exact = worker.computed()
        for peer in peers:
            rows[peer.name], ready = _prepare(peer, problem, exact, settings)
            print(f"  {peer.name}: {_readiness(rows[peer.name])}", file=sys.stderr, flush=True)
            if ready is not None:
                live[peer.name] = stack.enter_context(ready)
        for _ in range(settings.rounds):
            for name, worker in list(live.items()):
                try:
                    answer = worker.ask("time", runs=1)
                except Failed as error:
                    del live[name], rows[name]["seconds"]
                    rows[name]["fault"] = str(error)
                    continue
                rows[name]["seconds"] += answer["seconds"]
                rows[name]["peak_mib"] = max(rows[name]["peak_mib"] or 0, answer["peak_mib"] or 0) or None
    for row in rows.values():
        if row.get("seconds"):
            row["quartiles"] = Times(row["seconds"]).quartiles()
    return list(rows.values())


def _start(peer: Peer, settings: Settings) -> Worker:
    """The peer's process.

    Raises:
        Failed: when its environment could not be made.
    """
    python = Path(sys.executable)
    if peer.environment is not None and settings.cache is not None:
        if (fault := recorded(settings.cache, peer.environment)["fault"]) is not None:
            raise Failed(fault)
        python = python_of(settings.cache / peer.environment)
    return Worker(peer, python, settings.threads, _LIMIT)


def _prepare(
    peer: Peer, problem: Path, exact: Arrays, settings: Settings
) -> tuple[dict[str, Any], Worker | None]:
    """Sets the peer up and checks it; its row so far, and the worker if it may be timed."""
    row: dict[str, Any] = {"peer": peer.name}
    request = {"path": str(problem), "device": settings.device}
    with ExitStack() as stack:
        try:
            with _start(peer, settings) as worker:
                worker.ask("setup", dtype="float64", **request)
                row["error"], row["error_in"] = differs(worker.computed(), exact)
            if not row["error"] <= _TOLERANCE:
                raise Failed(f"check: float64 error {row['error']:.1e} in {row['error_in']}")
            worker = stack.enter_context(_start(peer, settings))
            row |= worker.ask("setup", dtype="float32", **request)
            row["float32_error"] = distance(worker.computed(), exact)
            if not row["float32_error"] <= _FLOAT32_TOLERANCE:
                raise Failed(f"check: float32 error {row['float32_error']:.1e}")
            (row["second_seconds"],) = worker.ask("time", runs=1)["seconds"]
        except Failed as error:
            return row | {"fault": str(error)}, None
        stack.pop_all()
    return row | {"seconds": [], "peak_mib": None}, worker


def _readiness(row: dict[str, Any]) -> str:
    if "fault" in row:
        return str(row["fault"])
    errors = (
        f"float64 error {row['error']:.1e} in {row['error_in']}, float32 error {row['float32_error']:.1e}"
    )
    return f"{errors}, first run {row['first_seconds']:.1f} s{held_up(row)}"


def describe(row: dict[str, Any], textbook: float | None) -> str:
    if "fault" in row:
        return f"{row['peer']:22} {row['fault']}"
    low, median, high = row["quartiles"]
    ratio = f"{textbook / median:6.2f} x" if textbook else ""
    memory = f"{row['peak_mib']:7.0f} MiB" if row["peak_mib"] else ""
    return (
        f"{row['peer']:22} {1e3 * median:8.1f} ms [{1e3 * low:.1f}, {1e3 * high:.1f}] {ratio} {memory} "
        f"first {row['first_seconds']:.1f} s, errors {row['error']:.1e}, {row['float32_error']:.1e}"
    )


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--workloads", default=",".join(SIZES))
    parser.add_argument("--peers", default=",".join(peer.name for peer in PEERS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--here", dest="cache", action="store_const", const=None, default=default_cache())
    settings = parser.parse_args(namespace=Settings())
    torch.set_num_threads(settings.threads)
    wanted = settings.peers.split(",")
    if unknown := set(wanted) - {peer.name for peer in PEERS}:
        parser.error(f"--peers: expected names of peers, got {', '.join(sorted(unknown))}")
    if unknown := set(settings.workloads.split(",")) - set(SIZES | TINY):
        parser.error(f"--workloads: expected {', '.join(SIZES | TINY)}, got {', '.join(sorted(unknown))}")
    peers = [peer for peer in PEERS if peer.name in wanted]
    result: dict[str, Any] = {"workloads": {}}
    if settings.json and settings.json.exists():
        result = json.loads(settings.json.read_text())
    result |= {
        "machine": machine(),
        "device": settings.device,
        "tolerance": _TOLERANCE,
        "float32_tolerance": _FLOAT32_TOLERANCE,
    }
    if settings.cache is not None:
        result["environments"] = {name: recorded(settings.cache, name) for name in ENVIRONMENTS}
    failed = False
    for name in settings.workloads.split(","):
        print(name, flush=True)
        sizes = (SIZES | TINY)[name]
        rows = compare(sizes, [peer for peer in peers if peer.plus or not sizes.plus], settings)
        medians = {row["peer"]: row["quartiles"][1] for row in rows if "quartiles" in row}
        for row in rows:
            print(describe(row, medians.get("textbook")), flush=True)
            failed = failed or ("fault" in row and row["peer"] in _NEEDED)
        result["workloads"][name] = {"machine": machine(), "sizes": asdict(sizes), "rows": rows}
        if settings.json:
            settings.json.parent.mkdir(parents=True, exist_ok=True)
            settings.json.write_text(by_rows(result) + "\n")
    return int(failed)
