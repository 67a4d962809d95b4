"""The loops of `bench.drop_in` that run in one process: MAML of a textbook and its kin, before and after.

Conv4 with five inner steps; with its batch norms fixed in the inner loop, or with "norms adapt" among what adapts. The
last two have no tasks: a WGAN's critic with batch norm and a gradient penalty (32×32, 16 images, by the examples), and
a heat equation's residual by a tanh MLP (256 points), whose second derivative by the inputs is PyTorch's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import mamlpp_fast as mf
from bench.peers.problem import Sizes
from mamlpp_fast.engine import EngineName, Precision
from mamlpp_fast.workloads import WORKLOADS

__all__ = ["LOOPS", "Build", "Loop"]

Step = Callable[[], list[Tensor]]
Build = Callable[[Sizes, torch.dtype], Step]
Task = tuple[Tensor, Tensor, Tensor, Tensor]
Held = dict[str, Tensor]
NORMS = ("1.", "5.", "9.", "13.")
HEAD = ("17.",)


class Loop(NamedTuple):
    """A loop, what is changed in it, and the sizes that it is timed at."""

    name: str
    changed: str
    jobs: dict[str, Build]
    sizes: tuple[Sizes, ...]


class Kind(NamedTuple):
    """What the inner loop adapts, by the beginnings of names, and how.

    Attributes:
        only: names that adapt; all by default.
        but: of these, what does not.
    """

    only: tuple[str, ...] = ("",)
    but: tuple[str, ...] = NORMS
    second_order: bool = True

    def fast(self, model: nn.Module) -> Held:
        return {
            n: p
            for n, p in model.named_parameters()
            if n.startswith(self.only) and not n.startswith(self.but)
        }


MAML, ADAPTING, FOMAML, ANIL = Kind(), Kind(but=("none",)), Kind(second_order=False), Kind(HEAD)


def conv4(sizes: Sizes, dtype: torch.dtype) -> nn.Sequential:
    """Conv4 of torch's own modules at seeded parameters, for grey images of 28 pixels or coloured larger ones."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (_channels(sizes), 64, 64, 64):
        layers += [nn.Conv2d(channels, 64, 3, padding=1), nn.BatchNorm2d(64), nn.LeakyReLU(), nn.MaxPool2d(2)]
    head = nn.Linear(64 * (sizes.image_size // 16) ** 2, sizes.ways)
    return nn.Sequential(*layers, nn.Flatten(), head).to(dtype)


def _channels(sizes: Sizes) -> int:
    return 1 if sizes.image_size == 28 else 3


def episodes(sizes: Sizes, dtype: torch.dtype) -> list[Task]:
    torch.manual_seed(1)
    pixels = _channels(sizes), sizes.image_size, sizes.image_size
    made = []
    for _ in range(sizes.tasks):
        x = [torch.randn(sizes.ways * n, *pixels, dtype=dtype) for n in (sizes.shots, sizes.targets)]
        y = [torch.arange(sizes.ways).repeat(n) for n in (sizes.shots, sizes.targets)]
        made.append((x[0], y[0], x[1], y[1]))
    return made


def _gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def _target_loss(model: nn.Module, task: Task, kind: Kind, sizes: Sizes) -> Tensor:
    """Of a task, as it stands in many a repository."""
    support_x, support_y, target_x, target_y = task
    fast = kind.fast(model)
    for _ in range(sizes.steps):
        loss = F.cross_entropy(functional_call(model, fast, (support_x,)), support_y)
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=kind.second_order)
        fast = {n: p - sizes.rate * g for (n, p), g in zip(fast.items(), grads, strict=True)}
    return F.cross_entropy(functional_call(model, fast, (target_x,)), target_y) / sizes.tasks


def textbook(
    sizes: Sizes, dtype: torch.dtype, kind: Kind = MAML, fast: bool = False, together: bool = False
) -> Step:
    """Before; ``fast``: accelerated, ``together``: by `map_tasks`."""
    model, tasks = conv4(sizes, dtype), episodes(sizes, dtype)
    model = mf.accelerate(model) if fast else model

    def step() -> list[Tensor]:
        model.zero_grad()
        if together:
            mf.map_tasks(lambda own, task: _target_loss(own, task, kind, sizes), tasks, model)
            return _gradients(model)
        for task in tasks:
            _target_loss(model, task, kind, sizes).backward()
        return _gradients(model)

    return step


def three_lines(sizes: Sizes, dtype: torch.dtype) -> Step:
    model, tasks = mf.convert_batch_norm(conv4(sizes, dtype), sizes.steps), episodes(sizes, dtype)
    rates = mf.LSLR(model, sizes.steps, sizes.rate)

    def step() -> list[Tensor]:
        model.zero_grad()
        for support_x, support_y, target_x, target_y in tasks:
            fast = mf.adapt(model, support_x, support_y, rates)
            loss = F.cross_entropy(mf.functional_call(model, fast, (target_x,)), target_y)
            (loss / len(tasks)).backward()
        own = dict(model.named_parameters())
        return [g for n in MAML.fast(model) if (g := own[n].grad) is not None]

    return step


def learner(sizes: Sizes, dtype: torch.dtype, kind: Kind = MAML, adapting: bool = False) -> Step:
    """`MAMLPlusPlus` on the same network and tasks; ``adapting``: of its gradients those of what adapts."""
    config = mf.MAMLConfig.maml(
        steps=sizes.steps,
        inner_lr=sizes.rate,
        second_order=kind.second_order,
        adapt=kind.only if kind.only != ("",) else "all",
        adapt_norm=kind.but != NORMS,
    )
    ours = mf.MAMLPlusPlus(conv4(sizes, dtype), config, precision=_precision(dtype))
    batch = mf.EpisodeBatch(*(torch.stack(parts) for parts in zip(*episodes(sizes, dtype), strict=True)))

    def step() -> list[Tensor]:
        ours.meta_gradient(batch)
        if not adapting:
            return _gradients(ours.model)
        return [p.grad for p in kind.fast(ours.model).values() if p.grad is not None]

    return step


def _precision(dtype: torch.dtype) -> Precision:
    return "float64" if dtype == torch.float64 else "float32"


def by_func(sizes: Sizes, dtype: torch.dtype, fast: bool = False) -> Step:
    """The gradient of the mean over tasks of a loss that calls `grad`, all tasks by `vmap`."""
    model = conv4(sizes, dtype)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):  # running statistics are refused by PyTorch under `vmap`
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    model = mf.accelerate(model) if fast else model
    own = {n: p.detach() for n, p in MAML.fast(model).items()}
    batch = [torch.stack(parts) for parts in zip(*episodes(sizes, dtype), strict=True)]

    def loss(held: Held, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, held, (x,)), y)

    def task(held: Held, x: Tensor, y: Tensor, target_x: Tensor, target_y: Tensor) -> Tensor:
        for _ in range(sizes.steps):
            grads = grad(loss)(held, x, y)
            held = {n: p - sizes.rate * grads[n] for n, p in held.items()}
        return loss(held, target_x, target_y)

    def mean(held: Held) -> Tensor:
        losses: Tensor = vmap(task, (None, 0, 0, 0, 0))(held, *batch)
        return losses.mean()

    return lambda: list(grad(mean)(own).values())


def engine(sizes: Sizes, dtype: torch.dtype, name: EngineName) -> Step:
    """A meta-gradient of the published workload."""
    data = "omniglot" if sizes.image_size == 28 else "miniimagenet"
    workload = WORKLOADS[f"{data}-{sizes.ways}w{sizes.shots}s"]
    batch = workload.batch().tasks(0, sizes.tasks)
    ours = workload.learner(name, _precision(dtype))

    def step() -> list[Tensor]:
        ours.meta_gradient(batch)
        return _gradients(ours.model)

    return step


def penalty(sizes: Sizes, dtype: torch.dtype, fast: bool = False) -> Step:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels, filters in ((3, 32), (32, 64), (64, 64)):
        conv = nn.Conv2d(channels, filters, 3, stride=2, padding=1)
        layers += [conv, nn.BatchNorm2d(filters), nn.LeakyReLU(0.2)]
    model: nn.Module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 1)).to(dtype)
    real, made = (torch.randn(16, 3, 32, 32, dtype=dtype) for _ in range(2))
    share = torch.rand(16, 1, 1, 1, dtype=dtype)
    model = mf.accelerate(model) if fast else model

    def step() -> list[Tensor]:
        between = (share * real + (1 - share) * made).requires_grad_()
        (slope,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
        loss = model(made).mean() - model(real).mean()
        loss = loss + 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean()
        model.zero_grad()
        loss.backward()
        return _gradients(model)

    return step


def physics(sizes: Sizes, dtype: torch.dtype, fast: bool = False) -> Step:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs in (2, 64, 64):
        layers += [nn.Linear(inputs, 64), nn.Tanh()]
    model: nn.Module = nn.Sequential(*layers, nn.Linear(64, 1)).to(dtype)
    points = torch.rand(256, 2, dtype=dtype)
    model = mf.accelerate(model) if fast else model

    def step() -> list[Tensor]:
        z = points.clone().requires_grad_()
        (du,) = torch.autograd.grad(model(z).sum(), z, create_graph=True)
        (ddu,) = torch.autograd.grad(du[:, 0].sum(), z, create_graph=True)
        model.zero_grad()
        (du[:, 1] - ddu[:, 0]).square().mean().backward()
        # The last bias takes no part: no gradient, or one of zeros.
        return [p.grad for n, p in model.named_parameters() if n != "6.bias" and p.grad is not None]

    return step


def _adapting(sizes: Sizes, dtype: torch.dtype) -> Step:
    """The textbook's gradients of what adapts."""
    step = textbook(sizes, dtype)
    chosen = [n.startswith(NORMS) for n, _ in conv4(sizes, dtype).named_parameters()]
    return lambda: [g for g, norm in zip(step(), chosen, strict=True) if not norm]


def _kind(kind: Kind, **after: Any) -> dict[str, Build]:
    return {
        "before": functools.partial(textbook, kind=kind),
        "after": functools.partial(textbook, kind=kind, fast=True, **after),
        "learner": functools.partial(learner, kind=kind),
    }


def _fast(build: Callable[..., Step]) -> dict[str, Build]:
    return {"before": build, "after": functools.partial(build, fast=True)}


_SMALL = Sizes(5), Sizes(20)
_ALL = *_SMALL, Sizes(5, shots=5, targets=15, image_size=84, rate=0.01)
_ENGINES = {
    "before": functools.partial(engine, name="reference"),
    "after": functools.partial(engine, name="autograd"),
}
LOOPS = (
    Loop("textbook", "three lines", {"before": _adapting, "after": three_lines}, _SMALL),
    Loop("textbook", "accelerate", _kind(MAML), _ALL),
    Loop("textbook, norms adapt", "accelerate", _kind(ADAPTING), _ALL),
    Loop("textbook", "accelerate, map_tasks", _kind(MAML, together=True), _SMALL),
    Loop(
        "torch.func, vmap over tasks",
        "accelerate",
        _fast(by_func) | {"learner": functools.partial(learner, adapting=True)},
        _SMALL,
    ),
    Loop("FOMAML", "accelerate", _kind(FOMAML), _SMALL),
    Loop("ANIL", "accelerate", _kind(ANIL), _SMALL),
    Loop("engine of a workload", "reference to autograd", _ENGINES, _ALL),
    Loop("gradient penalty", "accelerate", _fast(penalty), (Sizes(0, image_size=32),)),
    Loop("physics-informed loss", "accelerate", _fast(physics), (Sizes(0, image_size=0),)),
)
