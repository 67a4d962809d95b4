"""A gradient penalty through batch norm (WGAN-GP, Gulrajani et al. 2017): fused against PyTorch's own.

    python examples/gradient_penalty.py [--iterations 30]

The penalty is a function of the critic's gradient, so its backward pass is a double backward of every batch norm.
`mf.convert_batch_norm` makes that one operation a layer. Two critics, one of nn.BatchNorm2d and one converted, train
side by side in float64 on the same images; outputs and gradients are compared at the first update, weights after the
last. (WGAN-GP's authors avoid batch norm in critics, since it ties the examples of a batch; here it is the point.)
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

import torch
from few_shot import arguments, dataset
from torch import Tensor, nn

import mamlpp_fast as mf

BATCH, NOISE, PENALTY = 32, 16, 10.0


def critic() -> nn.Sequential:
    """Images [N, 1, 28, 28] to scores [N, 1]."""
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 7 * 7, 1))


def generator() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(NOISE, 64), nn.ReLU(), nn.Linear(64, 784), nn.Sigmoid(), nn.Unflatten(1, (1, 28, 28))
    )


def critic_loss(model: nn.Module, real: Tensor, fake: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
    """Wasserstein loss with its gradient penalty, and the scores of the real images."""
    scores = model(real)
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
    penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
    return model(fake).mean() - scores.mean() + PENALTY * penalty, scores


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Largest difference, relative to the largest value of all: gradients of biases in front of batch norm are zero."""
    scale = max(float(t.detach().abs().max()) for t in theirs)
    return max(float((a - b).detach().abs().max()) / scale for a, b in zip(ours, theirs, strict=True))


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = arguments(__doc__, argv, iterations=30)
    images = dataset(args.data).train.images
    plain, source = critic().double(), generator().double()
    # Without rows per inner step the weights keep their shapes [C].
    fused = mf.convert_batch_norm(copy.deepcopy(plain), 1, per_step_affine=False, per_step_stats=False)
    critics = {"nn.BatchNorm2d": plain, "fused": fused}
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.01) for name, model in critics.items()}
    draw = torch.optim.Adam(source.parameters(), lr=1e-3)
    seconds = dict.fromkeys(critics, 0.0)
    found: dict[str, float] = {}
    for i in range(args.iterations):
        real = images[torch.randint(len(images), (BATCH,))].double() / 255
        fake = source(torch.randn(BATCH, NOISE, dtype=torch.float64))
        mix = torch.rand(BATCH, 1, 1, 1, dtype=torch.float64)
        scores, losses = {}, {}
        for name, model in critics.items():
            optimizers[name].zero_grad()
            began = time.perf_counter()
            losses[name], scores[name] = critic_loss(model, real, fake.detach(), mix)
            losses[name].backward()
            seconds[name] += time.perf_counter() - began
        if i == 0:
            gradients = [
                [p.grad for p in model.parameters() if p.grad is not None] for model in (fused, plain)
            ]
            found["outputs"] = difference([scores["fused"]], [scores["nn.BatchNorm2d"]])
            found["gradients"] = difference(*gradients)
            print(
                f"first update: outputs differ by {found['outputs']:.1e}, gradients by {found['gradients']:.1e}"
            )
        for optimizer in optimizers.values():
            optimizer.step()
        if i % 5 == 4:  # the generator follows every fifth update of the critics
            draw.zero_grad()
            (-fused(fake).mean()).backward()
            draw.step()
        if i % 10 == 0 or i == args.iterations - 1:
            print(f"{i:4d}  critic loss {losses['nn.BatchNorm2d']:.6f} and {losses['fused']:.6f} (fused)")
    found["weights"] = difference([*fused.parameters()], [*plain.parameters()])
    print(f"after {args.iterations} updates the weights differ by {found['weights']:.1e}")
    for name, total in seconds.items():
        print(f"{name:>14}: {1e3 * total / args.iterations:.1f} ms a critic update (loss and backward)")
    return found


if __name__ == "__main__":
    main()
