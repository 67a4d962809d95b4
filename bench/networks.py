"""28 networks that people meta-train: which engine takes each, and its time beside a textbook loop's.

    python -m bench.networks [NAME ...] [--seconds 4] [--json FILE]

Second-order MAML with a rate for each tensor, five inner steps, float32 on two threads, by ``engine="auto"`` (and
``"fused"`` where that is another), by the loop of ``bench.networks.textbook`` and by ``torch.func`` (``grad`` of
``grad`` under ``vmap``), in turn. Loss and every meta-gradient must equal the loop's in float64 to 1e-9 before any
time is taken. Memory is the peak of a process of its own over three of them, less what it held before the first.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import mamlpp_fast as mf
from bench.harness import interleaved, keep, parser_of
from mamlpp_fast.machine import peak_memory_mib

STEPS, RATE = 5, 0.01
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


# Networks ------------------------------------------------------------------------------------------------------------


class Then(nn.Module):
    """A module, and a function of what it gives."""

    def __init__(self, inner: nn.Module, after: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.inner, self.after = inner, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(x))


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * x)


class Graph(nn.Module):
    """A layer of a graph network on [N, features + N]: behind a node's features is its row of the adjacency."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        features, edges = x[:, :32], x[:, 32:]
        return self.last(edges @ torch.relu(self.first(edges @ features)))


class Context(nn.Module):
    """CAVIA: context parameters beside the input."""

    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.zeros(4))
        self.body = nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(torch.cat([x, self.context.expand(len(x), 4)], 1))


class UNet(nn.Module):
    """Two levels with a skip connection, averaged to a class."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.up, self.last = nn.ConvTranspose2d(32, 16, 2, 2), nn.Conv2d(32, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        high = F.relu(self.down(x))
        low = F.relu(self.deep(F.max_pool2d(high, 2)))
        return self.last(torch.cat([high, self.up(low)], 1)).mean((2, 3))


class Policy(nn.Module):
    """Means and log deviations of actions."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
        self.log_std = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.mean(x), self.log_std.expand(len(x), 2)], 1)


def mlp(*between: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """1 input, two hidden layers, 1 output."""

    def make() -> nn.Module:
        hidden = [m for size in (1, 40) for m in (nn.Linear(size, 40), *(b() for b in between))]
        return nn.Sequential(*hidden, nn.Linear(40, 1))

    return make


def conv(
    norm: Callable[[], nn.Module],
    act: Callable[[], nn.Module] = nn.ReLU,
    pool: Callable[[], nn.Module] = lambda: nn.MaxPool2d(2),
    kernel: int = 3,
    *,
    colours: int = 3,
    filters: int = 32,
    depth: int = 2,
) -> Callable[[], nn.Module]:
    """Blocks of filters on images 28x28, two of 32 unless said."""

    def make() -> nn.Module:
        blocks = [
            m
            for channels in (colours, *[filters] * (depth - 1))
            for m in (nn.Conv2d(channels, filters, kernel, padding=kernel // 2), norm(), act(), pool())
        ]
        side = 28 >> depth
        return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(filters * side * side, 5))

    return make


# Tasks ---------------------------------------------------------------------------------------------------------------


def curves(*, inputs: int = 1, outputs: int = 1, support: int = 10, tasks: int = 25) -> Callable[[], Batch]:
    """Regression: K support points a task and as many targets."""

    def make() -> Batch:
        xs = torch.rand(2, tasks, support, inputs) * 2 - 1
        phase = torch.rand(tasks, 1, outputs) * 3
        ys = torch.sin(3 * xs.sum(-1, keepdim=True) + phase)
        return xs[0], ys[0], xs[1], ys[1]

    return make


def classes(*shape: int, shots: int = 1, ids: int = 0) -> Any:
    """5-way classification, 4 tasks: inputs of this shape, token ids below ``ids``."""

    def make() -> Batch:
        def side(count: int) -> tuple[Tensor, Tensor]:
            y = torch.arange(5).repeat_interleave(count).expand(4, -1)
            size = 4, 5 * count, *shape
            return (torch.randint(ids, size) if ids else torch.randn(size)), y

        return (*side(shots), *side(5))

    return make


def graphs() -> Batch:
    """Node classification on a graph of 24 nodes a task."""
    edges = (torch.rand(2, 8, 24, 24) < 0.2).float() + torch.eye(24)
    x = torch.cat([torch.randn(2, 8, 24, 32), edges / edges.sum(-1, keepdim=True)], -1)
    y = torch.randint(4, (2, 8, 24))
    return x[0], y[0], x[1], y[1]


@dataclass(frozen=True)
class Case:
    model: Callable[[], nn.Module]
    tasks: Callable[[], Batch]
    loss: str = "cross_entropy"


def _recurrent(kind: Callable[..., nn.Module]) -> nn.Module:
    return nn.Sequential(Then(kind(8, 32, batch_first=True), lambda o: o[0][:, -1]), nn.Linear(32, 5))


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, Then(nn.Identity(), lambda h: h.mean(1)), nn.Linear(32, 5))


IMAGES = classes(3, 28, 28)
CASES = {
    "Conv4": Case(conv(lambda: nn.BatchNorm2d(64), colours=1, filters=64, depth=4), classes(1, 28, 28)),
    "MLP relu": Case(mlp(nn.ReLU), curves(), "mse"),
    "MLP tanh": Case(mlp(nn.Tanh), curves(), "mse"),
    "MLP sigmoid": Case(mlp(nn.Sigmoid), curves(), "mse"),
    "MLP gelu": Case(mlp(nn.GELU), curves(), "mse"),
    "MLP silu": Case(mlp(nn.SiLU), curves(), "mse"),
    "MLP elu": Case(mlp(nn.ELU), curves(), "mse"),
    "MLP batchnorm1d": Case(mlp(lambda: nn.BatchNorm1d(40), nn.ReLU), curves(), "mse"),
    "MLP dropout .1": Case(mlp(nn.ReLU, lambda: nn.Dropout(0.1)), curves(), "mse"),
    "SIREN": Case(
        lambda: nn.Sequential(nn.Linear(2, 64), Sine(), nn.Linear(64, 64), Sine(), nn.Linear(64, 3)),
        curves(inputs=2, outputs=3, support=256, tasks=4),
        "mse",
    ),
    "Conv1d": Case(
        lambda: nn.Sequential(
            *(nn.Conv1d(1, 32, 5, padding=2), nn.BatchNorm1d(32), nn.ReLU(), nn.MaxPool1d(2)),
            *(nn.Conv1d(32, 32, 5, padding=2), nn.BatchNorm1d(32), nn.ReLU(), nn.AdaptiveAvgPool1d(1)),
            *(nn.Flatten(), nn.Linear(32, 5)),
        ),
        classes(1, 128),
    ),
    "LSTM": Case(lambda: _recurrent(nn.LSTM), classes(20, 8)),
    "GRU": Case(lambda: _recurrent(nn.GRU), classes(20, 8)),
    "Transformer layer": Case(_transformer, classes(32, 32)),
    "Embedding+Linear": Case(
        lambda: nn.Sequential(Then(nn.Embedding(1000, 32), lambda h: h.mean(1)), nn.Linear(32, 5)),
        classes(24, shots=5, ids=1000),
    ),
    "GCN": Case(Graph, graphs),
    "CAVIA context": Case(Context, curves(), "mse"),
    "concat skip (U-Net)": Case(UNet, IMAGES),
    "RL policy tanh": Case(Policy, curves(inputs=8, outputs=4, support=40, tasks=20), "mse"),
    "GroupNorm": Case(conv(lambda: nn.GroupNorm(4, 32)), IMAGES),
    "InstanceNorm": Case(conv(lambda: nn.InstanceNorm2d(32, affine=True)), IMAGES),
    "conv5x5": Case(conv(lambda: nn.BatchNorm2d(32), kernel=5), IMAGES),
    "conv7x7": Case(conv(lambda: nn.BatchNorm2d(32), kernel=7), IMAGES),
    "MaxPool 3/2/1": Case(conv(lambda: nn.BatchNorm2d(32), pool=lambda: nn.MaxPool2d(3, 2, 1)), IMAGES),
    "AvgPool2d 2": Case(conv(lambda: nn.GroupNorm(32, 32), pool=lambda: nn.AvgPool2d(2)), IMAGES),
    "GELU conv": Case(conv(lambda: nn.BatchNorm2d(32), act=nn.GELU), IMAGES),
    "ConvTranspose": Case(
        lambda: nn.Sequential(
            nn.ConvTranspose2d(16, 16, 2, 2),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 8, 2, 2),
            nn.Flatten(),
            nn.Linear(8 * 28 * 28, 5),
        ),
        classes(16, 7, 7),
    ),
    "depthwise conv": Case(
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 32, 1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * 49, 5)),
        ),
        IMAGES,
    ),
}


# Loops ---------------------------------------------------------------------------------------------------------------

Results = list[Tensor]


def textbook(
    model: nn.Module, batch: Batch, loss_fn: Callable[[Tensor, Tensor], Tensor], steps: int = STEPS
) -> Callable[[], Results]:
    """MAML as it stands in many a repository: task after task, ``create_graph``, norms at the batch's statistics."""
    own = dict(model.named_parameters())
    names = [n for n, p in own.items() if not _of_norm(model, n)]
    rates = torch.full((len(names),), RATE, dtype=next(model.parameters()).dtype, requires_grad=True)

    def step() -> Results:
        with sdpa_kernel(SDPBackend.MATH):  # the only attention with second derivatives
            return whole()

    def whole() -> Results:
        losses = []
        for support_x, support_y, target_x, target_y in zip(*batch, strict=True):
            fast = {n: own[n] for n in names}
            for _ in range(steps):
                loss = loss_fn(functional_call(model, own | fast, (support_x,)), support_y)
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True, allow_unused=True)
                fast = {
                    n: p if g is None else p - rates[i] * g
                    for i, ((n, p), g) in enumerate(zip(fast.items(), grads, strict=True))
                }
            losses.append(loss_fn(functional_call(model, own | fast, (target_x,)), target_y))
        total = torch.stack(losses).mean()
        grads = torch.autograd.grad(total, [*own.values(), rates], allow_unused=True)
        return [
            total.detach(),
            *(
                torch.zeros_like(p) if g is None else g
                for g, p in zip(grads, [*own.values(), rates], strict=True)
            ),
        ]

    return step


def transformed(
    model: nn.Module, batch: Batch, loss_fn: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[], Results]:
    """The same by ``torch.func``, all tasks under one ``vmap``; PyTorch's norms without running statistics."""
    own = {n: p.detach() for n, p in model.named_parameters()}
    names = [n for n in own if not _of_norm(model, n)]
    rates = torch.full((len(names),), RATE, dtype=next(iter(own.values())).dtype)

    def loss_of(fast: dict[str, Tensor], fixed: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss_fn(functional_call(model, fixed | fast, (x,)), y)

    def task_loss(own: dict[str, Tensor], rates: Tensor, *task: Tensor) -> Tensor:
        support_x, support_y, target_x, target_y = task
        fast = {n: own[n] for n in names}
        for _ in range(STEPS):
            grads = torch.func.grad(loss_of)(fast, own, support_x, support_y)
            fast = {n: p - rates[i] * grads[n] for i, (n, p) in enumerate(fast.items())}
        return loss_of(fast, own, target_x, target_y)

    def mean_loss(own: dict[str, Tensor], rates: Tensor) -> Tensor:
        of_one = functools.partial(task_loss, own, rates)
        return torch.func.vmap(of_one, randomness="different")(*batch).mean()

    whole = torch.func.grad_and_value(mean_loss, argnums=(0, 1))

    def step() -> Results:
        with sdpa_kernel(SDPBackend.MATH):
            (grads, of_rates), loss = whole(own, rates)
        return [loss, *grads.values(), of_rates]

    return step


def _of_norm(model: nn.Module, name: str) -> bool:
    module = model.get_submodule(name.rpartition(".")[0])
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, mf.reference.PerStepBatchNorm2d)
    return isinstance(module, norms)


def ours(
    model: nn.Module, batch: Batch, loss: str, engine: str
) -> tuple[mf.MAMLPlusPlus, Callable[[], Results]]:
    config = mf.MAMLConfig(
        steps=STEPS, inner_lr=RATE, loss=loss, msl=False, bnwb=False, bnrs=False, da_epoch=-1
    )
    precision = "float64" if next(model.parameters()).dtype is torch.float64 else "float32"
    learner = mf.MAMLPlusPlus(model, config, engine=engine, precision=precision)  # type: ignore[arg-type]
    episodes = mf.EpisodeBatch(*batch, by_class=False)

    def step() -> Results:
        metrics = learner.meta_gradient(episodes)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in learner.model.parameters()]
        assert learner.rates.rates.grad is not None
        return [metrics.loss, *grads, learner.rates.rates.grad.sum(1)]

    return learner, step


# The table -----------------------------------------------------------------------------------------------------------


def difference(case: Case) -> tuple[float, str]:
    """The largest error in float64, relative to the largest value of all, and why ``auto`` took what engine."""
    learner, step = _job(case, "ours", torch.float64)
    assert learner is not None
    return _error(case, step), f"{learner.engine.name}: {learner.engine_reason}"


def _error(case: Case, step: Callable[[], Results]) -> float:
    _, loop = _job(case, "textbook", torch.float64)
    torch.manual_seed(1)  # dropout draws the same numbers in both
    expected = loop()
    torch.manual_seed(1)
    found = step()
    scale = max(float(g.abs().max()) for g in expected[1:])
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) / scale


def _fault(case: Case) -> str | None:
    """Why ``torch.func`` is not timed."""
    try:
        error = _error(case, _job(case, "torch.func", torch.float64)[1])
    except RuntimeError as reason:
        return str(reason).partition("\n")[0]
    return None if error < 1e-9 else f"{error:.1e} off the textbook's in float64"


def _job(case: Case, way: str, dtype: torch.dtype) -> tuple[mf.MAMLPlusPlus | None, Callable[[], Results]]:
    """A meta-gradient by one of ``WAYS``, and the learner where there is one."""
    torch.manual_seed(0)
    model = case.model().to(dtype)
    if way != "torch.func":
        model = mf.convert_batch_norm(model, STEPS, per_step_affine=False, per_step_stats=False)
    x, y, tx, ty = (t.to(dtype) if t.is_floating_point() else t for t in case.tasks())
    batch, loss_fn = (x, y, tx, ty), F.mse_loss if case.loss == "mse" else F.cross_entropy
    if way == "ours":
        return ours(model, batch, case.loss, "auto")
    if way == "torch.func":
        return None, transformed(torch.func.replace_all_batch_norm_modules_(model), batch, loss_fn)
    return None, textbook(model, batch, loss_fn)


WAYS = ("ours", "textbook", "torch.func")


def grown(case: Case, way: str) -> float:
    """MiB that three meta-gradients add to this process's peak."""
    _, step = _job(case, way, torch.float32)
    before = peak_memory_mib(torch.device("cpu"))
    for _ in range(3):
        step()
    return peak_memory_mib(torch.device("cpu")) - before


def measured(name: str, seconds: float) -> dict[str, Any]:
    """A row: which engine, whether it is right, milliseconds, ratios of the others to ours, MiB."""
    case = CASES[name]
    error, _ = difference(case)
    if not error < 1e-9:
        raise SystemExit(f"{name}: {error:.1e} off the textbook's in float64")
    fault = _fault(case)
    learner, step = _job(case, "ours", torch.float32)
    assert learner is not None
    step()
    others = [way for way in WAYS if way != "ours" and not (fault and way == "torch.func")]
    jobs = {"ours": step} | {way: _job(case, way, torch.float32)[1] for way in others}
    times = interleaved(jobs, seconds)
    generic: list[str] = []
    if learner.engine.name == "fused":
        network = next(iter(learner.engine._prepared.values())).network  # type: ignore[attr-defined]
        generic = [s.kind.removeprefix("generic ") for s in network.steps if s.kind.startswith("generic")]
    memory = {}
    for way in jobs:
        command = [sys.executable, "-m", "bench.networks", name, "--grown", way]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        memory[way] = float(json.loads(done.stdout))
    return {
        "name": name,
        "engine": learner.engine.name,
        "reason": learner.engine_reason,
        "error": error,
        "generic": generic,
        "ms": {job: 1000 * t.median for job, t in times.items()},
        "ratio": {way: times[way].over(times["ours"]) for way in others},
        "torch.func": fault,
        "mib": memory,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--grown", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in CASES]:
        parser.error(f"NAME: expected one of {', '.join(CASES)}, got {unknown[0]}")
    torch.set_num_threads(2)
    if arguments.grown:
        print(grown(CASES[arguments.names[0]], arguments.grown))
        return
    rows = []
    print(
        f"{'network':<20} {'engine':<9} {'ours ms':>8} {'loop ms':>8} {'times':>6} {'func':>6}  generic steps"
    )
    for name in arguments.names or CASES:
        row = measured(name, arguments.seconds)
        rows.append(row)
        generic = ", ".join(row["generic"]) or "-"
        if row["engine"] != "fused":
            generic = row["reason"]
        func = "-" if row["torch.func"] else f"{row['ratio']['torch.func'][1]:.2f}"
        print(
            f"{name:<20} {row['engine']:<9} {row['ms']['ours']:>8.1f} {row['ms']['textbook']:>8.1f} "
            f"{row['ratio']['textbook'][1]:>6.2f} {func:>6}  {generic}",
            flush=True,
        )
    taken = [row for row in rows if row["engine"] == "fused"]
    print(f"{len(taken)} of {len(rows)} taken by the fused engine")
    keep(arguments.json, rows, networks=len(rows))


if __name__ == "__main__":
    main()
