"""Textbook MAML, nested autograd and one task at a time, before and after the three-line change.

    python examples/textbook_maml.py [--iterations 40] [--test-tasks 100] [--data OMNIGLOT]

The loop stays yours. `convert_batch_norm`, `LSLR` and `adapt` give it MAML++'s batch norm and learned inner rates. At
the first iteration nothing else has changed: the meta-gradients of both are compared in float64 before training.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from few_shot import arguments, samplers
from torch import Tensor, nn
from torch.func import functional_call

import mamlpp_fast as mf

STEPS, RATE, TASKS, FILTERS = 5, 0.1, 4, 32


def conv4(ways: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (1, FILTERS, FILTERS, FILTERS):
        layers += [nn.Conv2d(channels, FILTERS, 3, padding=1, bias=False), nn.BatchNorm2d(FILTERS)]
        layers += [nn.LeakyReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(FILTERS, ways))


def before(model: nn.Module) -> Callable[[mf.Episode], Tensor]:
    """Target predictions after five inner steps, as many a repository writes it."""
    adapting = {
        n: p for n, p in model.named_parameters() if p.ndim > 1 or n == "17.bias"
    }  # all but batch norm

    def predict(task: mf.Episode) -> Tensor:
        fast = dict(adapting)
        for _ in range(STEPS):
            loss = F.cross_entropy(functional_call(model, fast, (task.support_x,)), task.support_y)
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {n: p - RATE * g for (n, p), g in zip(fast.items(), grads, strict=True)}
        return functional_call(model, fast, (task.target_x,))

    return predict


def after(model: nn.Module) -> tuple[Callable[[mf.Episode], Tensor], mf.LSLR]:
    model = mf.convert_batch_norm(model, STEPS)  # 1. batch norm per inner step, fused
    rates = mf.LSLR(model, STEPS, RATE)  # 2. a learned rate per layer and step

    def predict(task: mf.Episode) -> Tensor:
        fast = mf.adapt(model, task.support_x, task.support_y, rates)  # 3. the five inner steps
        return mf.functional_call(model, fast, (task.target_x,))

    return predict, rates


def meta_gradient(
    model: nn.Module, predict: Callable[[mf.Episode], Tensor], batch: mf.EpisodeBatch
) -> list[Tensor]:
    loss = torch.stack([F.cross_entropy(predict(task), task.target_y) for task in batch]).mean()
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.ndim == 4]))


def difference(batch: mf.EpisodeBatch) -> float:
    """Largest relative difference of the convolutions' meta-gradients, in float64."""
    models = [conv4(5).double()]
    models.append(copy.deepcopy(models[0]))
    predictors = before(models[0]), after(models[1])[0]
    pair = [
        meta_gradient(m, p, batch.to(dtype=torch.float64)) for m, p in zip(models, predictors, strict=True)
    ]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*pair, strict=True))


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = arguments(__doc__, argv, iterations=40)
    train, test = samplers(args)
    found = {"difference": difference(train.batch(0, 1))}
    print(f"meta-gradients before and after the change differ by {found['difference']:.1e} (float64)")
    start = conv4(5)
    for name in ("before", "after"):
        model = copy.deepcopy(start)
        if name == "before":
            predict, learned = before(model), list(model.parameters())
        else:
            predict, rates = after(model)
            learned = [
                *model.parameters(),
                *rates.parameters(),
            ]  # after convert_batch_norm: its weights are new
        optimizer = torch.optim.Adam(learned, lr=1e-3)
        began = time.perf_counter()
        for i in range(args.iterations):
            optimizer.zero_grad()
            losses = []
            for task in train.batch(i * TASKS, TASKS):
                loss = F.cross_entropy(predict(task), task.target_y)
                (loss / TASKS).backward()
                losses.append(loss.detach())
            optimizer.step()
            if i % 10 == 0 or i == args.iterations - 1:
                print(f"{name:>6} {i:4d}  target loss {torch.stack(losses).mean():.3f}")
        ms = 1e3 * (time.perf_counter() - began) / args.iterations
        right = [
            (predict(t).argmax(-1) == t.target_y).double().mean() for t in test.batch(0, args.test_tasks)
        ]
        found[name] = float(torch.stack(right).mean())
        print(f"{name:>6}: test accuracy {100 * found[name]:.1f} %, {ms:.0f} ms an iteration")
    return found


if __name__ == "__main__":
    main()
