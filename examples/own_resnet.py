"""A ResNet of one's own, meta-trained by the learner on the fused engine. Nothing in the network knows of the package.

    python examples/own_resnet.py [--iterations 60] [--test-tasks 100] [--data OMNIGLOT]

Residual blocks with stride, nn.BatchNorm2d and a global pool lower to the fused engine as they stand; the learner makes
the batch norms per-step in place. `explain()` prints the plan; where the engine cannot take a network, it names the
module that stopped it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch.nn.functional as F
from few_shot import arguments, samplers, test_accuracy
from torch import Tensor, nn

import mamlpp_fast as mf

TASKS = 4


class Block(nn.Module):
    """Two 3x3 convolutions, the first with a stride, and a 1x1 shortcut where shapes change."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(filters)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != filters:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, filters, 1, stride, bias=False), nn.BatchNorm2d(filters)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class SmallResNet(nn.Module):
    def __init__(self, ways: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Block(16, 16, 2), Block(16, 32, 2), Block(32, 32, 1))
        self.head = nn.Linear(32, ways)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))
        return out


def main(argv: Sequence[str] | None = None) -> dict[str, float | str]:
    args = arguments(__doc__, argv, iterations=60)
    train, test = samplers(args)
    config = mf.MAMLConfig(steps=3, iterations_per_epoch=max(1, args.iterations // 10), epochs=10)
    learner = mf.MAMLPlusPlus(SmallResNet(5), config)
    losses, began = [], time.perf_counter()
    for i in range(args.iterations):
        metrics = learner.meta_step(train.batch(i * TASKS, TASKS))
        losses.append(float(metrics.loss))
        if i % 10 == 0 or i == args.iterations - 1:
            print(f"{i:4d}  target loss {metrics.loss:.3f}  accuracy {100 * metrics.accuracy:.0f} %")
    ms = 1e3 * (time.perf_counter() - began) / args.iterations
    explanation = learner.explain()
    print(explanation)
    print(f"{ms:.0f} ms an iteration of {TASKS} tasks and {config.steps} steps, second order")
    return {
        "engine": learner.engine.name,
        "explanation": explanation,
        "first loss": losses[0],
        "last loss": sum(losses[-5:]) / len(losses[-5:]),
        "accuracy": test_accuracy(learner, test, args.test_tasks),
    }


if __name__ == "__main__":
    main()
