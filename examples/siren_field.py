"""A field as a network's weights (Sitzmann et al. 2020; Tancik et al. 2021): a start that fits in a few steps.

    python examples/siren_field.py [--iterations 300] [--test-tasks 20]

Each task is a field of three soft blobs on a grid of 16 by 16: inputs are coordinates in [-1, 1]², targets the values
there. The network is a SIREN: layers of sin(30 (W x + b)). Prints the signal-to-noise ratio after 0, 1, 2 and 5 inner
steps, from the learned initialisation and from a fresh one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from few_shot import arguments
from torch import Tensor, nn

import mamlpp_fast as mf

STEPS, RATE, WIDTH, FREQUENCY = 3, 1e-3, 48, 30.0
REPORTED = (0, 1, 2, 5)


class Siren(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.head = nn.Linear(WIDTH, 1)
        with torch.no_grad():  # such that every layer's sines see phases of one spread
            self.layers[0].weight.uniform_(-1 / 2, 1 / 2)
            for layer in (*self.layers[1:], self.head):
                layer.weight.uniform_(*(s * math.sqrt(6 / WIDTH) / FREQUENCY for s in (-1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(FREQUENCY * layer(x))
        return self.head(x)


def fields(tasks: int, generator: torch.Generator) -> mf.EpisodeBatch:
    """Coordinates [tasks, 256, 2] and values [tasks, 256, 1]; what is fitted is what is judged."""
    line = torch.linspace(-1, 1, 16)
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).view(1, 256, 2).expand(tasks, 256, 2)
    centres = 1.6 * torch.rand(tasks, 3, 1, 2, generator=generator) - 0.8
    widths = 0.15 + 0.25 * torch.rand(tasks, 3, 1, generator=generator)
    blobs = torch.exp(-(grid[:, None] - centres).square().sum(-1) / (2 * widths.square()))
    values = blobs.sum(1).clamp(max=1)[..., None]
    return mf.EpisodeBatch(grid, values, grid, values)


def ratios(learner: mf.MAMLPlusPlus, held_out: mf.EpisodeBatch) -> dict[int, float]:
    """dB after so many steps, the mean over fields."""
    with torch.no_grad():
        untouched = learner.model(held_out.target_x)
    adapted = learner.evaluate(held_out, steps=max(REPORTED)).logits
    errors = ((untouched if k == 0 else adapted[k - 1]) - held_out.target_y for k in REPORTED)
    decibels = (-10 * torch.log10(e.square().mean((1, 2))).mean() for e in errors)
    return {k: float(db) for k, db in zip(REPORTED, decibels, strict=True)}


def main(argv: Sequence[str] | None = None) -> dict[str, dict[int, float]]:
    args = arguments(__doc__, argv, iterations=300, test_tasks=20, images=False)
    generator = torch.Generator().manual_seed(args.seed)
    held_out = fields(args.test_tasks, torch.Generator().manual_seed(args.seed + 1))
    config = mf.MAMLConfig(
        steps=STEPS, inner_lr=RATE, loss="mse", msl=False, iterations_per_epoch=100, epochs=3
    )
    learner = mf.MAMLPlusPlus(Siren(), config)
    found = {"fresh": ratios(learner, held_out)}
    for i in range(args.iterations):
        metrics = learner.meta_step(fields(4, generator))
        if i % max(1, args.iterations // 5) == 0:
            print(f"{i:6d}  mean squared error {metrics.loss:.4f}")
    print(f"{learner.engine.name} engine: {learner.engine_reason}")
    found["learned"] = ratios(learner, held_out)
    print(f"signal-to-noise ratio on {args.test_tasks} held-out fields after k steps, dB")
    print(f"{'k':>10}" + "".join(f"{k:8d}" for k in REPORTED))
    for name, decibels in found.items():
        print(f"{name:>10}" + "".join(f"{decibels[k]:8.1f}" for k in REPORTED))
    return found


if __name__ == "__main__":
    main()
