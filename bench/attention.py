"""Memory of attention in second order: the fused engine beside a textbook loop on PyTorch's math kernel.

    python -m bench.attention [--lengths 512 1024] [--json FILE]

One task of two support and two target sequences, one inner step, float32. Each side runs in a process of its own: its
peak is the largest resident set of two meta-gradients, less what there was before the first; ours includes the writing
of the program, and "planned" is what the program itself holds. "whole" is the largest resident set as it
is, with what PyTorch has before. PyTorch's fused attention has no second derivative, so that a loop must take the math
kernel, which keeps matrices of L x L for each head.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_fast as mf
from bench.harness import keep, parser_of
from bench.networks import RATE, textbook
from mamlpp_fast.engine.fused.engine import FusedEngine
from mamlpp_fast.machine import peak_memory_mib

_SMALL = 8
_HEADS, _WIDTH = 8, 64


class SelfAttention(nn.Module):
    """Attention of sequences [N, L, heads * width] over themselves, averaged to five classes."""

    def __init__(self) -> None:
        super().__init__()
        size = _HEADS * _WIDTH
        self.queries, self.keys, self.values = (nn.Linear(size, size) for _ in range(3))
        self.last = nn.Linear(size, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (_HEADS, -1)).transpose(1, 2)
            for layer in (self.queries, self.keys, self.values)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.last(y.mean(1))


def peak(side: str, length: int) -> dict[str, Any]:
    """Of one side, in this process: MiB, and milliseconds of the second meta-gradient."""
    if length > _SMALL:  # what is loaded at a first meta-gradient is no part of it
        peak(side, _SMALL)
    torch.manual_seed(0)
    model = SelfAttention()
    x, y = torch.randn(2, 1, 2, length, _HEADS * _WIDTH), torch.randint(5, (2, 1, 2))
    batch = x[0], y[0], x[1], y[1]
    before = _resident()
    step: Callable[[], Any]
    if side == "textbook":
        step = textbook(model, batch, F.cross_entropy, steps=1)
    else:
        config = mf.MAMLConfig(steps=1, inner_lr=RATE, msl=False, da_epoch=-1)
        learner = mf.MAMLPlusPlus(model, config, engine="fused", verify=False)
        episodes = mf.EpisodeBatch(*batch, by_class=False)

        def step() -> object:
            return learner.meta_gradient(episodes)

    step()
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    whole = peak_memory_mib(torch.device("cpu"))
    found = {"mib": whole - before, "whole": whole, "ms": 1000 * seconds}
    if side == "ours":
        assert isinstance(learner.engine, FusedEngine)
        prepared = learner.engine.prepare(episodes, multi_step=False, second_order=True)
        found["planned"] = (prepared.workspace_bytes + prepared.owned_bytes) / 2**20
    return found


def _resident() -> float:
    """MiB."""
    text = Path("/proc/self/statm").read_text()
    return int(text.split()[1]) * resource.getpagesize() / 2**20


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024], metavar="L")
    parser.add_argument("--side", choices=["textbook", "ours"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is not None:
        print(json.dumps(peak(arguments.side, arguments.lengths[0])))
        return
    rows = []
    print(
        f"{'L':>6} {'loop MiB':>9} {'ours MiB':>9} {'planned':>8} {'share':>6} {'loop whole':>10} "
        f"{'ours whole':>10} {'loop ms':>8} {'ours ms':>8}"
    )
    for length in arguments.lengths:
        row: dict[str, Any] = {"length": length}
        for side in ("textbook", "ours"):
            command = [sys.executable, "-m", "bench.attention", "--lengths", str(length), "--side", side]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row[side] = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        loop, ours = row["textbook"], row["ours"]
        print(
            f"{length:>6} {loop['mib']:>9.0f} {ours['mib']:>9.0f} {ours['planned']:>8.0f} "
            f"{ours['mib'] / loop['mib']:>6.2f} "
            f"{loop['whole']:>10.0f} {ours['whole']:>10.0f} {loop['ms']:>8.0f} {ours['ms']:>8.0f}",
            flush=True,
        )
    keep(arguments.json, rows, heads=_HEADS, width=_WIDTH)


if __name__ == "__main__":
    main()
