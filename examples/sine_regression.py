"""Sine waves (Finn et al. 2017, section 5.1): regression from 10 points, by the learner and by a loop of one's own.

    python examples/sine_regression.py [--iterations 800] [--test-tasks 200]

Amplitudes are uniform in [0.1, 5], phases in [0, π], inputs in [-5, 5]; the network is an MLP with two hidden layers of
40. Prints the mean squared error on held-out waves after 0, 1, 5 and 10 inner steps, for both, and for the learner with
tanh in place of the paper's ReLU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from few_shot import arguments
from torch import Tensor, nn

import mamlpp_fast as mf

STEPS, RATE = 5, 0.01
REPORTED = (0, 1, 5, 10)


def mlp(act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, 40), act(), nn.Linear(40, 40), act(), nn.Linear(40, 1))


def waves(tasks: int, generator: torch.Generator, *, targets: int = 10) -> mf.EpisodeBatch:
    """Waves with 10 support points each: inputs and values [tasks, n, 1]."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    amplitude, phase = uniform(0.1, 5, tasks, 1, 1), uniform(0, math.pi, tasks, 1, 1)
    support_x, target_x = uniform(-5, 5, tasks, 10, 1), uniform(-5, 5, tasks, targets, 1)
    return mf.EpisodeBatch(
        support_x, amplitude * torch.sin(support_x - phase), target_x, amplitude * torch.sin(target_x - phase)
    )


def with_the_learner(
    iterations: int, held_out: mf.EpisodeBatch, generator: torch.Generator, act: type[nn.Module] = nn.ReLU
) -> dict[int, float]:
    config = mf.MAMLConfig(
        steps=STEPS,
        inner_lr=RATE,
        loss="mse",
        msl_epochs=2,  # the first 200 iterations weigh the loss after every step
        iterations_per_epoch=100,
        cosine_annealing=False,
    )
    learner = mf.MAMLPlusPlus(mlp(act), config)
    for i in range(iterations):
        metrics = learner.meta_step(waves(25, generator))
        if i % max(1, iterations // 5) == 0:
            print(f"{i:6d}  target loss {metrics.loss:.3f}")
    print(f"learner on the {learner.engine.name} engine: {learner.engine_reason}")
    with torch.no_grad():
        untouched = F.mse_loss(learner.model(held_out.target_x), held_out.target_y)
    # [steps, tasks, m, 1]; beyond the trained steps the last rate is used again.
    adapted = learner.evaluate(held_out, steps=max(REPORTED)).logits
    errors = (adapted - held_out.target_y).square().mean(dim=(1, 2, 3))
    return {k: float(errors[k - 1]) if k else float(untouched) for k in REPORTED}


def with_a_loop_of_ones_own(
    iterations: int, held_out: mf.EpisodeBatch, generator: torch.Generator
) -> dict[int, float]:
    model = mlp()
    rates = mf.LSLR(model, STEPS, RATE)
    optimizer = torch.optim.Adam([*model.parameters(), *rates.parameters()], lr=1e-3)
    for i in range(iterations):
        optimizer.zero_grad()
        batch = waves(5, generator)
        total = torch.zeros(())
        for task in batch:
            fast = mf.adapt(model, task.support_x, task.support_y, rates, loss_fn=F.mse_loss)
            total = total + F.mse_loss(mf.functional_call(model, fast, (task.target_x,)), task.target_y)
        (total / len(batch)).backward()
        optimizer.step()
        if i % max(1, iterations // 5) == 0:
            print(f"{i:6d}  target loss {total.detach() / len(batch):.3f}")
    found = {}
    with torch.no_grad():  # `adapt` still adapts, and returns constants
        for k in REPORTED:
            errors = []
            for task in held_out:
                fast = {}  # no step: the model as it is
                if k:
                    fast = mf.adapt(model, task.support_x, task.support_y, rates, steps=k, loss_fn=F.mse_loss)
                errors.append(F.mse_loss(mf.functional_call(model, fast, (task.target_x,)), task.target_y))
            found[k] = float(torch.stack(errors).mean())
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, dict[int, float]]:
    args = arguments(__doc__, argv, iterations=800, test_tasks=200, images=False)
    generator = torch.Generator().manual_seed(args.seed)
    held_out = waves(args.test_tasks, torch.Generator().manual_seed(args.seed + 1), targets=50)
    found = {"learner": with_the_learner(args.iterations, held_out, generator)}
    found["tanh"] = with_the_learner(args.iterations, held_out, generator, nn.Tanh)
    print("a loop of one's own")
    found["own loop"] = with_a_loop_of_ones_own(args.iterations, held_out, generator)
    print(f"mean squared error on {args.test_tasks} held-out waves after k steps")
    print(f"{'k':>10}" + "".join(f"{k:8d}" for k in REPORTED))
    for name, errors in found.items():
        print(f"{name:>10}" + "".join(f"{errors[k]:8.3f}" for k in REPORTED))
    return found


if __name__ == "__main__":
    main()
