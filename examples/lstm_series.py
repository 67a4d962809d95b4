"""Time series of a kind each: an LSTM that learns to forecast a new one from a few windows.

    python examples/lstm_series.py [--iterations 300] [--test-tasks 40]

Each task is a noisy oscillation with its own period, damping and level: 8 windows of 16 values each with the value that
follows. Prints the mean squared error of the next value on other windows of held-out series, after 0, 1, 3 and 5 inner
steps, beside that of repeating the last value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from few_shot import arguments
from torch import Tensor, nn

import mamlpp_fast as mf

STEPS, RATE, WINDOW = 3, 0.05, 16
REPORTED = (0, 1, 3, 5)


class Forecaster(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 24, batch_first=True)
        self.head = nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x)
        return x[:, -1] + self.head(states[:, -1])


def series(tasks: int, generator: torch.Generator) -> mf.EpisodeBatch:
    """Windows [tasks, 8, 16, 1] with the next values [tasks, 8, 1], and as many more of the same series."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(tasks, 1, generator=generator)

    length = 16 * (WINDOW + 1)
    time = torch.arange(length, dtype=torch.float32)
    period, second, level, drift = uniform(5, 14), uniform(2.5, 5), uniform(-1, 1), uniform(-0.3, 0.3)
    clean = torch.sin(2 * torch.pi * time / period) + uniform(0, 0.6) * torch.sin(
        2 * torch.pi * time / second
    )
    noise = 0.05 * torch.randn(tasks, length, generator=generator)
    values = clean + level + drift * torch.sin(time / 40) + noise
    windows = values.view(tasks, 16, WINDOW + 1, 1)
    x, y = windows[:, :, :WINDOW], windows[:, :, WINDOW]
    return mf.EpisodeBatch(x[:, ::2], y[:, ::2], x[:, 1::2], y[:, 1::2])


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = arguments(__doc__, argv, iterations=300, test_tasks=40, images=False)
    generator = torch.Generator().manual_seed(args.seed)
    held_out = series(args.test_tasks, torch.Generator().manual_seed(args.seed + 1))
    config = mf.MAMLConfig(
        steps=STEPS, inner_lr=RATE, loss="mse", meta_lr=3e-3, msl_epochs=1, iterations_per_epoch=100, epochs=3
    )
    learner = mf.MAMLPlusPlus(Forecaster(), config)
    for i in range(args.iterations):
        metrics = learner.meta_step(series(8, generator))
        if i % max(1, args.iterations // 5) == 0:
            print(f"{i:6d}  target loss {metrics.loss:.3f}")
    print(f"{learner.engine.name} engine: {learner.engine_reason}")
    with torch.no_grad():
        x = held_out.target_x.flatten(0, 1)
        untouched = F.mse_loss(learner.model(x), held_out.target_y.flatten(0, 1))
        last = F.mse_loss(x[:, -1], held_out.target_y.flatten(0, 1))
    adapted = learner.evaluate(held_out, steps=max(REPORTED)).logits
    errors = (adapted - held_out.target_y).square().mean((1, 2, 3))
    found = {"last value": float(last)}
    found |= {f"{k} steps": float(untouched if k == 0 else errors[k - 1]) for k in REPORTED}
    print(f"mean squared error of the next value, {args.test_tasks} held-out series")
    for name, error in found.items():
        print(f"{name:>12} {error:.3f}")
    return found


if __name__ == "__main__":
    main()
