"""A small transformer whose low-rank weights alone adapt (LoRA, Hu et al. 2021), on sequences of tokens.

    python examples/lora_transformer.py [--iterations 80] [--test-tasks 40]

Each task draws a marker token for each of 3 classes; a sequence of 12 tokens belongs to the class whose marker is in
it twice. Which token that is, 5 sequences a class alone tell. Everything is meta-learned, but the inner loop moves the
low-rank factors of the linear layers and the head. Prints the accuracy on held-out tasks after 0 to 5 steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from few_shot import arguments
from torch import Tensor, nn

import mamlpp_fast as mf

STEPS, RATE, CLASSES, SHOTS, LENGTH, VOCABULARY, WIDTH, RANK = 5, 0.2, 3, 5, 12, 24, 32, 4


class LoRA(nn.Module):
    """A linear layer and a product of two thin matrices beside it: y = W x + b + B A x."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.lora_a = nn.Parameter(torch.randn(RANK, inputs) / math.sqrt(inputs))
        self.lora_b = nn.Parameter(torch.zeros(outputs, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.lora_a), self.lora_b)


class Transformer(nn.Module):
    """Token ids [N, L] to logits [N, classes]: one block of attention and one of two layers, the mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.qkv, self.out = LoRA(WIDTH, 3 * WIDTH), LoRA(WIDTH, WIDTH)
        self.up, self.down = LoRA(WIDTH, 2 * WIDTH), LoRA(2 * WIDTH, WIDTH)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(2)])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        q, k, v = self.qkv(self.norms[0](x)).view(*x.shape[:2], 3, 4, WIDTH // 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.out(mixed)
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return self.head(x.mean(1))


def sequences(tasks: int, generator: torch.Generator) -> mf.EpisodeBatch:
    """Ids [tasks, 15, 12] with labels [tasks, 15], and as many more; the classes' markers are in no other's."""
    count = 2 * SHOTS * CLASSES
    markers = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:CLASSES] for _ in range(tasks)])
    # Fillers are drawn among the tokens that are no markers of the task.
    free = torch.ones(tasks, VOCABULARY).scatter(1, markers, 0.0)
    ids = torch.multinomial(free, count * LENGTH, replacement=True, generator=generator).view(
        tasks, count, LENGTH
    )
    labels = torch.arange(CLASSES).repeat(2 * SHOTS).expand(tasks, count)
    places = torch.rand(tasks, count, LENGTH, generator=generator).argsort(-1)[..., :2]
    ids = ids.scatter(2, places, markers.gather(1, labels)[..., None].expand(-1, -1, 2))
    half = count // 2
    return mf.EpisodeBatch(ids[:, :half], labels[:, :half], ids[:, half:], labels[:, half:])


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    args = arguments(__doc__, argv, iterations=80, test_tasks=40, images=False)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    held_out = sequences(args.test_tasks, torch.Generator().manual_seed(args.seed + 1))
    model = Transformer()
    names = [n for n, _ in model.named_parameters() if "lora" in n or n.startswith("head")]
    config = mf.MAMLConfig(
        steps=STEPS,
        inner_lr=RATE,
        adapt=tuple(names),
        meta_lr=3e-3,
        msl_epochs=1,
        iterations_per_epoch=100,
        epochs=3,
    )
    learner = mf.MAMLPlusPlus(model, config)
    for i in range(args.iterations):
        metrics = learner.meta_step(sequences(4, generator))
        if i % max(1, args.iterations // 5) == 0:
            print(f"{i:6d}  target loss {metrics.loss:.3f}  accuracy {metrics.accuracy:.2f}")
    print(f"{learner.engine.name} engine: {learner.engine_reason}; {len(names)} tensors adapt")
    with torch.no_grad():
        untouched = learner.model(held_out.target_x.flatten(0, 1)).argmax(-1) == held_out.target_y.flatten()
    adapted = learner.evaluate(held_out).logits.argmax(-1) == held_out.target_y
    found = {"0": float(untouched.double().mean())}
    found |= {str(k + 1): float(right.double().mean()) for k, right in enumerate(adapted)}
    print(f"accuracy on {args.test_tasks} held-out tasks after k steps (chance {1 / CLASSES:.2f})")
    print("  ".join(f"{k}: {accuracy:.2f}" for k, accuracy in found.items()))
    return found


if __name__ == "__main__":
    main()
