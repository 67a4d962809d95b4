"""Random models as source text: each a class that a user might write, from one integer.

Half of them keep to what the fused engine knows, in many spellings (``random_writer.py``); the others have one to three
features that it cannot know, or that a reader of ``forward`` easily misses (``random_features.py``). The text runs by
itself; nothing of the package is imported.
"""

from __future__ import annotations

import linecache
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.random_features import CUTS, INSIDE, WHOLE, random_numbers
from tests.random_writer import (
    Writer,
    activation,
    container,
    convolution,
    flatten,
    linear,
    loop,
    norm,
    nothing,
    pool,
    residual,
)
from tests.textbook import Batch

__all__ = ["Program", "make_program"]


@dataclass(frozen=True)
class Program:
    """A random model, the settings it is trained with and its tasks.

    Attributes:
        source: the text of a module with ``build()``, and ``change(model)`` for between two meta-steps.
        features: names of what was drawn.
        plain: whether nothing but layers with fused rules was drawn.
        changes: whether ``change`` does anything.
        draws: whether ``forward`` draws random numbers: no two runs are alike.
        volatile: whether ``forward`` changes the model in evaluation too.
        settings: keywords of ``MAMLConfig``.
        shape: of an example, (C, H, W) or (F,).
        images: support and target examples of a task.
        beside: what the model is given beside the examples: names and kinds; ``by_name``: whether all by name.
    """

    seed: int
    source: str
    features: tuple[str, ...]
    plain: bool
    changes: bool
    draws: bool
    volatile: bool
    settings: dict[str, Any]
    shape: tuple[int, ...]
    ways: int
    tasks: int
    images: tuple[int, int]
    permuted: bool
    beside: dict[str, str]
    by_name: bool

    def namespace(self) -> dict[str, Any]:
        """The module of the source, run anew; tracebacks quote it."""
        name = f"<random model {self.seed}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(keepends=True), name)
        names: dict[str, Any] = {"__name__": "random_model"}
        exec(compile(self.source, name, "exec"), names)
        return names

    def build(self) -> nn.Module:
        """The model, always with the same values; leaves the global generator as it was."""
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = self.namespace()["build"]()
        return model

    def batch(self, index: int) -> Batch:
        """A meta-batch in float64."""
        generator = torch.Generator().manual_seed(100 * self.seed + index)
        sides = []
        for count in self.images:
            shape = (self.tasks, count, *self.shape)
            if self.permuted:  # pictures as files hold them: [H, W, C] in memory
                shape = (*shape[:2], *self.shape[1:], self.shape[0])
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            x = x.movedim(-1, 2) if self.permuted else x
            sides.append(self._inputs(x, generator) if self.beside else x)
            if self.settings["loss"] == "mse":
                size = (self.tasks, count, self.ways)
                sides.append(torch.randn(size, generator=generator, dtype=torch.float64))
            else:
                sides.append(torch.randint(self.ways, (self.tasks, count), generator=generator))
        return sides[0], sides[1], sides[2], sides[3]

    def _inputs(self, x: Tensor, generator: torch.Generator) -> list[Any]:
        """What the model is called with, of each task."""
        lead, inputs = x.shape[:2], {"x": x}
        for name, kind in self.beside.items():
            drawn = torch.rand(lead if kind == "ids" else x.shape, generator=generator, dtype=torch.float64)
            inputs[name] = {"ids": (4 * drawn).long(), "mask": drawn < 0.7, "values": drawn}[kind]
        tasks = [{name: t[i] for name, t in inputs.items()} for i in range(len(x))]
        return tasks if self.by_name else [tuple(task.values()) for task in tasks]


def _harmless(w: Writer) -> None:
    """What changes no value: frozen parts, memory order, parts that nothing calls."""
    names = [name for name in w.layers if name != "head"]
    if names and w.chance(0.15):
        w.after.append(f"model.{w.pick(*names)}.requires_grad_(False)")
        w.features.append("frozen")
    if w.strided:
        w.features.append("strided parameters")
        if w.chance(0.4):
            w.after.append("model.to(memory_format=torch.channels_last)")
        else:
            w.after += ["for p in list(model.parameters()):", "    if p.dim() > 1:"]
            w.after.append("        p.data = p.data.transpose(0, 1).contiguous().transpose(0, 1)")
    if w.chance(0.08):
        w.member("spare", w.pick("nn.Linear(2, 3)", "nn.BatchNorm2d(3)", "nn.Parameter(torch.ones(2))"))
        w.features.append("unused part")
    if names and w.chance(0.05):
        w.init.append(f"self.alias = self.{w.pick(*(n for n in names if n.isidentifier()))}")
        w.features.append("unused alias")
    if w.chance(0.2):
        w.change.append("model.head.weight.data.mul_(0.9)")


def _settings(rng: random.Random, names: list[str], steps: int) -> dict[str, Any]:
    bnwb = rng.random() < 0.6
    adapt: Any = "all"
    if rng.random() < 0.25:  # the head at least: something must depend on what adapts
        adapt = ("head.", *(f"{name}." for name in names if rng.random() < 0.5))
    loss = "mse" if rng.random() < 0.3 else "cross_entropy"
    return {
        "steps": steps,
        # Steps that diverge would compare rounding.
        "inner_lr": rng.choice([0.02, 0.05] if loss == "mse" else [0.05, 0.1, 0.2]),
        "lslr": rng.random() < 0.9,
        "rates": "element" if rng.random() < 0.1 else "tensor",
        "second_order": rng.random() < 0.7,
        "msl": rng.random() < 0.6,
        "bnwb": bnwb,
        "bnrs": rng.random() < 0.6,
        "adapt": adapt,
        "adapt_norm": not bnwb and rng.random() < 0.4,
        "loss": loss,
        "eval_stats": rng.choice(["batch", "running"]),
        "meta_lr": 0.01,
    }


def _several(w: Writer, rng: random.Random) -> dict[str, str]:
    """Gives the model one or two inputs beside the first, which meet it in front of all else."""
    text = {"ids": "x * self.codes(NAME).view(len(NAME), *EACH)", "mask": "x.masked_fill(~NAME, 0.0)"}
    text |= {"values": rng.choice(["x + 0.5 * NAME", "x * NAME", "torch.where(NAME > 0.5, x, NAME)"])}
    beside = {f"{kind}_beside": kind for kind in rng.sample(sorted(text), rng.randint(1, 2))}
    each = [w.shape[0], *[1] * (len(w.shape) - 1)]
    lines = []
    for name, kind in beside.items():
        if kind == "ids":
            w.init.append(f"self.codes = nn.Embedding(4, {w.shape[0]})")
        lines.append("x = " + text[kind].replace("NAME", name).replace("EACH", str(each)))
    w.forward[:0] = lines
    w.arguments = ", ".join(["x", *beside])
    w.features.append("several inputs")
    return beside


def make_program(seed: int, several: bool = False) -> Program:
    """The random model of this number; ``several``: another of several inputs."""
    rng = random.Random(seed)
    kind = rng.choices(["plain", "features", "draws"], [0.45, 0.5, 0.05])[0]
    image = rng.random() < 0.75
    shape: tuple[int, ...] = (rng.randint(3, 8),)
    if image:
        shape = (rng.randint(1, 4), rng.randint(6, 12), rng.randint(6, 12))
    images = (rng.randint(3, 6), rng.randint(2, 6))
    w = Writer(rng, shape)
    w.strided = w.chance(0.08)
    permuted = image and w.chance(0.08)
    # Where the features go: among the parts, in this order.
    chosen = rng.sample([*INSIDE, *WHOLE], rng.randint(1, 3)) if kind == "features" else []
    inside = [name for name in chosen if name in INSIDE]
    stages = rng.randint(1, 3 if image else 2)
    own = random.Random(f"inputs of {seed}")  # what else is drawn stays as it is
    beside = _several(w, own) if several else {}
    _stages(w, stages, images, inside, permuted, kind == "draws")
    for name in CUTS:  # not behind the head: something must depend on what adapts
        if name in inside:
            inside.remove(name)
            INSIDE[name](w)
    ways = rng.randint(2, 5)
    w.init.append(f"self.head = nn.Linear({w.shape[0]}, {ways})")
    w.layers["head"] = "product"
    w.lines("h = self.head(h)", writable=True)
    w.shape = (ways,)
    for name in inside:
        INSIDE[name](w)
    w.prune()
    for name in chosen:
        if name in WHOLE:
            WHOLE[name](w)
    _harmless(w)
    source = w.text(seed)
    if w.before:
        head, tail = source.split("\n\nclass Model", 1)
        source = head + "\n\n" + "\n".join(w.before) + "\n\n\nclass Model" + tail
    names = [name for name in w.layers if name != "head" and "." not in name and "[" not in name]
    return Program(
        seed=seed,
        source=source,
        features=tuple(sorted({*chosen, *w.features, *(["random numbers"] if kind == "draws" else [])})),
        plain=kind == "plain",
        changes=bool(w.change),
        draws=kind == "draws",
        volatile=w.volatile,
        settings=_settings(rng, names, rng.choice([1, 2, 2, 3])),
        shape=shape,
        ways=w.shape[0],
        tasks=rng.choice([2, 2, 2, 3]),
        images=images,
        permuted=permuted,
        beside=beside,
        by_name=own.random() < 0.5,
    )


def _stages(
    w: Writer, stages: int, images: tuple[int, int], inside: list[str], permuted: bool, draws: bool
) -> None:
    """The parts in front of the head; takes from ``inside`` what it places."""
    strided, w.strided = w.strided, w.strided or permuted

    def feature() -> None:
        if inside and w.chance(0.5):
            INSIDE[inside.pop()](w)

    position = w.rng.randrange(stages)
    if w.image and w.chance(0.08):
        flatten(w)
    for stage in range(stages):
        if w.image:
            convolution(w)
            feature()
            if w.chance(0.7):
                norm(w, min(images))
            feature()
            if w.chance(0.85):
                activation(w)
            if min(w.shape[1:]) >= 4 and w.chance(0.6):
                pool(w)
            if w.chance(0.25):
                residual(w)
        else:
            linear(w)
            feature()
            if w.chance(0.5):
                norm(w, min(images))
            if w.chance(0.85):
                activation(w)
            if w.chance(0.25):
                residual(w)
        if w.chance(0.12):
            loop(w)
        if w.chance(0.15):
            container(w)
        if w.chance(0.12):
            nothing(w)
        if draws and stage == position:
            random_numbers(w)
        feature()
    if w.image:
        flatten(w)
        if w.chance(0.3):
            linear(w)
            activation(w)
    feature()
    w.strided = strided
