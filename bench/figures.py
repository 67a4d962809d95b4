"""Figures of docs/how_it_works.md, one a part of MAML++, and of learned rates: by the package itself and kept runs.

`python -m bench.report` writes them, so a figure never says what the code does not do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

import mamlpp_fast as mf
from bench.kept import RESULTS
from bench.plots import GREY, OURS, THEIRS, drawn
from mamlpp_fast import data, reference
from mamlpp_fast.report.runs import read_run
from mamlpp_fast.train import TrainConfig, preset

_SIZE = (6.4, 2.6)
_TASKS = 32


def _one() -> tuple[Figure, Axes]:
    return plt.subplots(figsize=_SIZE, layout="constrained")


@drawn
def msl() -> Figure:
    """Weights of the multi-step loss by epoch, as a preset has them, and the last step alone behind them."""
    config = preset("omniglot-20w1s")
    epochs = range(config.msl_epochs + 4)
    weights = [reference.msl_weights(e, config.steps, config.msl_epochs) for e in epochs]
    last = [1.0 if w is None else w[-1] for w in weights]
    early = [0.0 if w is None else w[0] for w in weights]
    figure, ax = _one()
    ax.step(epochs, last, where="post", color=OURS, label=f"step {config.steps}, the last")
    ax.step(epochs, early, where="post", color=THEIRS, label=f"steps 1 to {config.steps - 1}, each")
    ax.axvline(config.msl_epochs, ls=":", lw=1, color=GREY)
    ax.text(config.msl_epochs, 0.5, " the last step alone, weight 1", fontsize=8, color=GREY)
    ax.set_xlabel("epoch")
    ax.set_ylabel("weight of the target loss")
    ax.legend(frameon=False, fontsize=8)
    return figure


@drawn
def da() -> Figure:
    """Order of the meta-gradient by epoch, as published and by default."""
    figure, ax = _one()
    named = (("omniglot-20w1s-paper", OURS, "-"), ("omniglot-20w1s", THEIRS, "--"))
    for name, color, style in named:
        config = preset(name)
        epochs = range(config.epochs)
        order = [1 + reference.is_second_order(e, config.second_order, config.da_epoch) for e in epochs]
        label = f"{name} (da_epoch={config.da_epoch})"
        ax.step(epochs, order, style, where="post", color=color, label=label)
    ax.set_yticks([1, 2], ["first", "second"])
    ax.set_ylim(0.8, 2.2)
    ax.set_xlabel("epoch")
    ax.set_ylabel("order of derivatives")
    ax.legend(frameon=False, fontsize=8, loc="center right")
    return figure


@drawn
def ca() -> Figure:
    """Meta learning rate by epoch of three presets."""
    figure, ax = _one()
    named = (
        ("omniglot-20w1s-paper", OURS, "-"),
        ("omniglot-20w1s", THEIRS, "-"),
        ("miniimagenet-5w1s", GREY, "--"),
    )
    for name, color, style in named:
        config = preset(name)
        epochs = range(config.epochs)
        ax.step(epochs, [_meta_lr(e, config) for e in epochs], style, where="post", color=color, label=name)
    ax.set_xlabel("epoch")
    ax.set_ylabel("meta learning rate")
    ax.set_ylim(0)
    ax.legend(frameon=False, fontsize=8)
    return figure


def _meta_lr(epoch: int, config: TrainConfig) -> float:
    if not config.cosine_annealing:
        return config.meta_lr
    return reference.cosine_annealing(epoch, config.epochs, config.meta_lr, config.min_meta_lr)


@drawn
def rates(folder: Path) -> Figure:
    """Inner rates of the weights by step that a kept run learned."""
    run = read_run(folder)
    last, start = run.epochs[-1], run.config["inner_lr"]
    learned = {n: r for n, r in last["inner_rates"].items() if n.endswith("weight")}
    figure, ax = _one()
    for i, (name, values) in enumerate(learned.items()):
        shade = plt.get_cmap("viridis")(i / len(learned))
        ax.plot(range(len(values)), values, "o-", ms=3, lw=1, color=shade, label=name)
    ax.axhline(start, ls=":", lw=1, color=GREY)
    ax.axhline(0, lw=0.6, color=GREY)
    ax.set_xticks(range(len(values)))
    ax.set_xlabel(f"inner step, after {last['iteration']} meta-updates of {folder.name}")
    ax.set_ylabel("inner rate")
    figure.legend(frameon=False, fontsize=8, loc="outside right center")
    return figure


@contextmanager
def _reproducible() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@functools.cache
def _episodes(tasks: int) -> mf.EpisodeBatch:
    sampler = data.load("strokes").sampler("train", ways=5, shots=1, targets=1, seed=0, dtype=torch.float64)
    return sampler.batch(0, tasks)


def _small(**options: bool) -> tuple[mf.Conv4, dict[str, torch.Tensor]]:
    """A Conv4 of 8 filters in float64 as it is initialised, and its rates."""
    with _reproducible():
        model = mf.Conv4(1, 5, filters=8, **options).double()
    return model, {n: torch.full((5,), 0.1, dtype=torch.float64) for n in reference.adapted_names(model)}


def _train_on(model: mf.Conv4, rates: dict[str, torch.Tensor], task: mf.Episode) -> None:
    """The passes of an inner loop with a target pass after every step."""
    own = dict(model.named_parameters())
    options = {"steps": 5, "step_weights": [0.2] * 5, "loss_fn": F.cross_entropy, "second_order": False}
    reference.task_loss(model, {n: own[n] for n in rates}, rates, task, **options)


@drawn
def bnwb() -> Figure:
    """The row that each pass of an inner loop reads, recorded; training, then evaluation with steps to spare."""
    figure, axes = plt.subplots(1, 2, figsize=_SIZE, layout="constrained", sharey=True)
    for ax, training in zip(axes, (True, False), strict=True):
        for k, (support, target) in enumerate(_rows_read(training)):
            ax.plot(k - 0.12, support, "s", ms=6, color=THEIRS, label="support pass")
            ax.plot(k + 0.12, target, "o", ms=6, color=OURS, label="target pass after the update")
        ax.set_xticks(range(k + 1))
        ax.set_yticks(range(5))
        ax.set_xlabel("inner step")
        ax.grid(lw=0.3)
        ax.set_title("training, K = 5" if training else "evaluation, 7 steps", loc="left", fontsize=9)
    axes[0].set_ylabel("row of weight [K, C]")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[:2], labels[:2], loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def _rows_read(training: bool) -> list[tuple[int, int]]:
    """The row of every support and target pass, in their order."""
    model, rates = _small()
    model.train(training)
    norm = next(m for m in model.modules() if isinstance(m, mf.PerStepBatchNorm2d))
    seen: list[int] = []
    norm.register_forward_pre_hook(lambda module, _: seen.append(module.row))
    task = _episodes(_TASKS)[0]
    if training:
        _train_on(model, rates, task)
    else:
        reference.evaluate_task(model, rates, task, steps=7)
    return list(zip(seen[::2], seen[1::2], strict=True))


@drawn
def bnrs() -> Figure:
    """Running variances by step after a few tasks, beside the one that all steps would share."""
    figure, axes = plt.subplots(1, 4, figsize=_SIZE, layout="constrained")
    per_step, shared = (_running_variances(per_step_stats=p) for p in (True, False))
    for i, ax in enumerate(axes):
        ax.plot(
            range(len(per_step[i])), per_step[i], "o-", ms=3, lw=1, color=OURS, label="a row a step (BNRS)"
        )
        ax.axhline(shared[i][0], ls="--", lw=1, color=THEIRS, label="one for all steps")
        ax.set_xticks(range(len(per_step[i])))
        ax.set_title(f"stage {i + 1}", loc="left", fontsize=9)
        ax.set_xlabel("inner step")
    axes[0].set_ylabel("running variance")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def _running_variances(**options: bool) -> list[list[float]]:
    """By stage and row, the mean over channels, after enough passes to forget the initial 1.

    To four digits, so that every machine draws the same bytes.
    """
    model, rates = _small(**options)
    batch = _episodes(_TASKS)
    for task in range(batch.num_tasks):
        _train_on(model, rates, batch[task])
    return [_rows(m) for m in model.modules() if isinstance(m, mf.PerStepBatchNorm2d)]


def _rows(norm: nn.Module) -> list[float]:
    variance = norm.running_var
    assert isinstance(variance, torch.Tensor)
    return [float(f"{v:.4g}") for v in torch.atleast_2d(variance).mean(1).tolist()]


FIGURES: dict[str, Callable[[], bytes]] = {
    **{f"part-{draw.__name__}": functools.cache(draw) for draw in (msl, da, bnrs, bnwb, ca)},
    "part-lslr": functools.partial(rates, RESULTS / "omniglot-5w1s"),
    "omniglot-20w1s-rates": functools.partial(rates, RESULTS / "omniglot-20w1s"),
}
