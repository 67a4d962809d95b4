"""What float32 costs a meta-gradient: its relative error against float64, by form of the convolutions, and PyTorch's.

Each form runs in a process of its own on the same episodes: the network and steps of omniglot-5w1s on the embedded
strokes, a new random network for each of the first four fifths, a trained one for the rest. "default" is what the
engine chooses, "PyTorch" the reference engine in float32.

python -m bench.accuracy [--episodes 100] [--updates 60] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys

import torch

from bench.harness import keep, parser_of
from bench.iterations import gradient_on
from mamlpp_fast import data
from mamlpp_fast.data import EpisodeSampler
from mamlpp_fast.engine import EngineName
from mamlpp_fast.episodes import EpisodeBatch
from mamlpp_fast.learner import MAMLPlusPlus
from mamlpp_fast.workloads import WORKLOADS

# Engine, and MAMLPP_FAST_WINOGRAD.
_FORMS = {
    "PyTorch": ("reference", ""),
    "direct": ("fused", "0"),
    "default": ("fused", ""),
    "F(4x4)": ("fused", "4"),
}
_WORKLOAD = dataclasses.replace(WORKLOADS["omniglot-5w1s"], tasks=1)


def trained(updates: int) -> MAMLPlusPlus:
    """A learner in float64 after some updates, alike for every form."""
    learner = _WORKLOAD.learner("fused", "float64")
    for update in range(updates):
        learner.meta_step(episode(10_000 + update))
    return learner


def episode(index: int) -> EpisodeBatch:
    return sampler().batch(index, 1)


@functools.cache
def sampler() -> EpisodeSampler:
    return data.load("strokes").sampler("train", ways=5, shots=1, targets=1, seed=0, dtype=torch.float64)


def errors(engine: EngineName, episodes: int, updates: int) -> list[float]:
    """Relative errors (Euclidean norm of all gradients) of this process's form, episode by episode."""
    fresh = episodes - episodes // 5
    exact, ours = _WORKLOAD.learner("fused", "float64"), _WORKLOAD.learner(engine, "float32")
    found = []
    for seed in range(episodes):
        if seed < fresh:
            exact.load_state_dict(_WORKLOAD.learner("reference", "float64", seed=seed).state_dict())
        elif seed == fresh:
            exact.load_state_dict(trained(updates).state_dict())
        ours.load_state_dict(exact.state_dict())
        expected, result = gradient_on(exact, episode(seed)), gradient_on(ours, episode(seed))
        found.append(float((result - expected).norm() / expected.norm()))
    return found


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--updates", type=int, default=60, help="of the trained network")
    parser.add_argument("--alone", metavar="ENGINE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = ["--episodes", str(options.episodes), "--updates", str(options.updates)]
    if options.alone:
        print(json.dumps(errors(options.alone, options.episodes, options.updates)))
        return 0
    rows = []
    for form, (engine, setting) in _FORMS.items():
        done = subprocess.run(
            [sys.executable, "-m", "bench.accuracy", "--alone", engine, *sizes],
            env={**os.environ, "MAMLPP_FAST_WINOGRAD": setting},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        every = torch.tensor(json.loads(done.stdout), dtype=torch.float64)
        fresh = options.episodes - options.episodes // 5
        for weights, part in (("random", every[:fresh]), ("trained", every[fresh:]), ("all", every)):
            quartiles = part.quantile(torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)).tolist()
            row = dict(zip(("lower", "median", "upper", "largest"), quartiles, strict=True))
            rows.append({"form": form, "weights": weights, "episodes": len(part)} | row)
            print(f"{form:<8} {weights:<8} " + "  ".join(f"{k} {v:.2e}" for k, v in row.items()), flush=True)
        keep(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
