"""Holds ``MAMLPlusPlus(engine="auto")`` against a textbook loop on random models, in float64.

    python -m tests.random_models SEED [SEED ...]

prints the source of each model, its settings, and what differed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import mamlpp_fast as mf
from tests.random_programs import Program, make_program
from tests.textbook import Batch, Textbook

__all__ = ["TOLERANCE", "Outcome", "check"]

_T = TypeVar("_T")
TOLERANCE = 1e-9
"""Relative to each tensor's largest absolute value."""
_FLOOR = 1e-3
"""Stands in for that value where it is smaller: what is zero but for rounding is not compared by its noise."""
_SHARE = 1e-6
"""Of the largest gradient of all, a floor for each: rounding is passed on between them."""


@dataclass(frozen=True)
class Outcome:
    """What one model gave.

    Attributes:
        engine: that served it in the end: fused or autograd.
        reason: why this engine.
        features: what the model was made of.
        wrong: what differed from the textbook, by how much; empty where all was right.
    """

    seed: int
    engine: str
    reason: str
    features: tuple[str, ...]
    plain: bool
    wrong: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _episodes(batch: Batch) -> mf.EpisodeBatch:
    """Of several inputs those of all tasks in one tensor each."""
    sides = (tree_map(lambda *ts: torch.stack(ts), *t) if isinstance(t, list) else t for t in batch)
    return mf.EpisodeBatch(*sides)


class _RaisedError(Exception):
    """The learner raised, or both diverged; what generator or textbook raise is their own fault, and passes."""


class _Comparison:
    """A learner and a textbook loop on two models of one source."""

    def __init__(self, program: Program, statistics: str, wrong: list[str], engine: Any = "auto") -> None:
        self.program = program
        self.wrong = wrong
        self.settings = settings = program.settings | {"eval_stats": statistics}
        self.textbook = Textbook(program.build(), settings)
        model, config = program.build(), mf.MAMLConfig(**settings)
        self.learner = self.ours(lambda: mf.MAMLPlusPlus(model, config, engine=engine, precision="float64"))
        self.model = self.learner.model
        for generator, rate in enumerate(self.textbook.rates.values()):
            draw = torch.rand(
                rate.shape, generator=torch.Generator().manual_seed(generator), dtype=rate.dtype
            )
            rate.data.mul_(0.5 + draw)
        if tuple(self.textbook.rates) != self.learner.rates.names:
            differ = sorted(set(self.textbook.rates) ^ set(self.learner.rates.names))
            self.wrong.append(f"what adapts: differs by {differ}")
            return
        self.learner.rates.rates.data.copy_(self._joined(self.textbook.rates))
        self.state("after construction", parameters=True)

    def _joined(self, rates: Mapping[str, Tensor]) -> Tensor:
        """Rates, or their gradients, in the learner's one tensor."""
        if self.program.settings["rates"] == "tensor":
            return torch.stack(list(rates.values()))
        return torch.cat([r.reshape(len(r), -1) for r in rates.values()], 1)

    def ours(self, call: Callable[[], _T]) -> _T:
        """What the learner answers."""
        try:
            return call()
        except Exception as error:
            self.wrong.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            raise _RaisedError from error

    def close(
        self,
        what: str,
        ours: Tensor | None,
        expected: Tensor,
        tolerance: float = TOLERANCE,
        floor: float = _FLOOR,
        noise: Callable[[], float] = lambda: 0.0,
    ) -> None:
        if not isinstance(ours, Tensor) or ours.shape != expected.shape:
            got = tuple(ours.shape) if isinstance(ours, Tensor) else type(ours).__name__
            self.wrong.append(f"{what}: expected shape {tuple(expected.shape)}, got {got}")
            return
        if not expected.numel():
            return
        expected, ours = expected.detach().double(), ours.detach().double()
        finite = expected.isfinite()
        if not bool(
            finite.all()
        ):  # the textbook diverged: so must the learner, and there is no more to compare
            if not torch.equal(ours.isfinite(), finite):
                self.wrong.append(f"{what}: expected to be finite where the textbook's are alone")
                return
            expected, ours = (torch.where(finite, t, 0.0) for t in (expected, ours))
        difference = float((ours - expected).abs().max())
        error = difference / max(float(expected.abs().max()), floor)
        if not error <= tolerance and not difference <= noise():
            self.wrong.append(f"{what} off by {error:.1e}")

    def state(self, when: str, *, parameters: bool) -> None:
        """Compares buffers, and parameters, which only a meta-step may move, bit for bit."""
        expected, ours = (
            {**dict(m.named_parameters()), **dict(m.named_buffers())}
            for m in (self.textbook.model, self.model)
        )
        if ours.keys() != expected.keys():
            self.wrong.append(f"names {when}: differ by {sorted(ours.keys() ^ expected.keys())}")
            return
        for name, value in expected.items():
            if not isinstance(value, nn.Parameter):
                self.close(f"buffer {name} {when}", ours[name], value)
            elif parameters and not torch.allclose(ours[name], value, rtol=0, atol=0, equal_nan=True):
                self.wrong.append(f"parameter {name} {when}: moved")

    def gradient(self, batch: Batch, when: str, *, update: bool) -> None:
        """A meta-gradient of both, with Adam's update or without."""
        noise = _Noise(self.textbook, batch)
        losses = self.textbook.gradient(batch)
        step = self.learner.meta_step if update else self.learner.meta_gradient
        ours = self.ours(lambda: step(_episodes(batch)))
        self.close(f"{when}: task losses", ours.task_losses, losses)
        self.close(f"{when}: loss", ours.loss, losses.mean())
        if not bool(losses.isfinite().all()):
            raise _RaisedError  # diverged, both: no gradient is right then
        own = dict(self.model.named_parameters())
        expected = {n: p.grad for n, p in self.textbook.model.named_parameters() if p.grad is not None}
        found = {name: own[name].grad for name in expected}
        rates = {name: r.grad for name, r in self.textbook.rates.items() if r.grad is not None}
        if rates:
            expected["the rates"] = self._joined(rates)
            found["the rates"] = self.learner.rates.rates.grad
        floor = max(_FLOOR, _SHARE * max(float(g.abs().max()) for g in expected.values()))
        for name, gradient in expected.items():
            own_noise = functools.partial(noise.of, name)
            self.close(f"{when}: gradient of {name}", found[name], gradient, floor=floor, noise=own_noise)
        if update:
            self._update(when, max(1e-6, 1e-3 * floor))
        self.state(when, parameters=True)

    def _update(self, when: str, least: float) -> None:
        """Compares Adam's update for gradients above ``least``, and takes the learner's for what follows."""
        self.textbook.adam.step()
        own = dict(self.model.named_parameters())
        for name, p in self.textbook.model.named_parameters():
            if p.grad is not None:
                # Adam divides by the gradient's size: where that is rounding, its update is too.
                counts = p.grad.abs() > max(least, 1e-6 * float(p.grad.abs().max()))
                self.close(f"{when}: updated {name}", own[name][counts], p[counts], 1e-7)
                p.data.copy_(own[name].data)
        if self.program.settings["rates"] == "tensor":
            parts = list(self.learner.rates.rates.data)
        else:
            parts = list(self.learner.rates.rates.data.split(self.learner.rates.sizes, 1))
        for rate, part in zip(self.textbook.rates.values(), parts, strict=True):
            rate.data.copy_(part.reshape(rate.shape))

    def evaluation(self, batch: Batch, when: str) -> None:
        # One step more than there are rates: the last row and rate again.
        steps = self.program.settings["steps"] + (self.program.seed % 3 == 0)
        statistics = self.settings["eval_stats"]
        expected = self.textbook.evaluate(batch, statistics, steps)
        ours = self.ours(lambda: self.learner.evaluate(_episodes(batch), steps=steps).logits)
        self.close(f"{when}: predictions with {statistics} statistics", ours, expected)
        recorded, due = (len(getattr(m, "seen", ())) for m in (self.model, self.textbook.model))
        if recorded != due:
            self.wrong.append(f"calls recorded: {recorded}, expected {due}")
        if not self.program.volatile:
            sx, sy, tx, _ = (t[-1] for t in batch)
            ours = self.ours(lambda: self.learner.adapt(sx, sy, steps=steps)(tx))
            self.close(f"{when}: predictor with {statistics} statistics", ours, expected[-1, -1])
            self.state(f"after {when}", parameters=True)


class _Noise:
    """What rounding alone does to a textbook's gradients: all that a bias in front of a batch norm has."""

    def __init__(self, textbook: Textbook, batch: Batch) -> None:
        self.batch = batch
        # Hooks of a copy append to the original's list.
        self._seen: list[Any] = getattr(textbook.model, "seen", [])
        self.textbook: Textbook | None = None
        with contextlib.suppress(
            RuntimeError
        ):  # a model that keeps a tensor with a graph has no copies, and no noise
            self.textbook = copy.deepcopy(textbook)

    def of(self, name: str) -> float:
        """Ten times the most that a gradient moves when the parameters do in their last digits."""
        return 10 * self._moves.get(name, 0.0)

    @functools.cached_property
    def _moves(self) -> dict[str, float]:
        if self.textbook is None:
            return {}
        results, recorded = [], len(self._seen)
        for seed in range(4):
            textbook = copy.deepcopy(self.textbook)
            draws = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for p in textbook.model.parameters():
                    digits = torch.randint(-2, 3, p.shape, generator=draws, dtype=p.dtype)
                    p.mul_(1 + torch.finfo(p.dtype).eps * (digits if seed else 0 * digits))
            textbook.gradient(self.batch)
            named = textbook.model.named_parameters()
            results.append({n: p.grad.detach().clone() for n, p in named if p.grad is not None})
        del self._seen[recorded:]
        first, *others = results
        return {n: max(float((r[n] - g).abs().max()) for r in others) for n, g in first.items()}


def _draw(both: _Comparison) -> None:
    """Dropout in the fused engine: the numbers of the reference after the same seed, others after another."""
    learner, batch = both.learner, _episodes(both.program.batch(1))
    reference = mf.MAMLPlusPlus(
        copy.deepcopy(learner.model), learner.config, engine="reference", precision="float64"
    )
    reference.rates.load_state_dict(learner.rates.state_dict())
    losses = []
    for seed in (1, 2):
        results = []
        for own in (learner, reference):
            torch.manual_seed(seed)
            metrics = both.ours(lambda own=own: own.meta_gradient(batch))  # type: ignore[misc]
            grads = {n: p.grad for n, p in own.model.named_parameters() if p.grad is not None}
            results.append({"loss": metrics.task_losses, **grads})
        ours, expected = results
        largest = _SHARE * max(float(t.abs().max()) for t in expected.values())
        for name, value in expected.items():
            both.close(f"{name}, drawn", ours.get(name), value, floor=max(_FLOOR, largest))
        losses.append(metrics.task_losses)
    if torch.equal(*losses):
        both.wrong.append("random numbers drawn once for all")


def _train(both: _Comparison) -> None:
    """A meta-step, a change of the model, another meta-gradient, an evaluation."""
    program = both.program
    if program.draws:
        both.ours(lambda: both.learner.meta_step(_episodes(program.batch(0))))
        if both.learner.engine.name == "fused":
            _draw(both)
        both.ours(lambda: both.learner.evaluate(_episodes(program.batch(1))))
        return
    both.gradient(program.batch(0), "first", update=True)
    if program.changes:
        change = program.namespace()["change"]
        for model in (both.model, both.textbook.model):
            with torch.no_grad():
                change(model)
    if program.changes or program.seed % 4 == 0:
        both.gradient(program.batch(1), "second", update=False)
    both.evaluation(program.batch(2), "evaluation")


def check(seed: int, asked: str = "auto", several: bool = False) -> Outcome:
    """Two meta-gradients, an update between, a change of the model after it, and evaluations, each compared."""
    program = make_program(seed, several)
    engine = reason = "none"
    wrong: list[str] = []
    before = torch.get_rng_state()
    chosen = program.settings["eval_stats"]
    with contextlib.suppress(_RaisedError):
        both = _Comparison(program, chosen, wrong, asked)
        engine, reason = both.learner.engine.name, both.learner.engine_reason
        if not wrong:
            _train(both)
            engine, reason = both.learner.engine.name, both.learner.engine_reason
        if not wrong and not program.draws:
            both = _Comparison(program, "running" if chosen == "batch" else "batch", wrong, asked)
            both.evaluation(program.batch(2), "evaluation before training")
    if not program.draws and not torch.equal(before, torch.get_rng_state()):
        wrong.append("the global random generator moved")
    return Outcome(seed, engine, reason, program.features, program.plain, tuple(wrong))


def describe(seed: int, several: bool = False) -> str:
    """The model's source, its settings, its tasks, and what differed."""
    program, outcome = make_program(seed, several), check(seed, several=several)
    about = f"examples {program.shape}, {program.tasks} tasks of {program.images[0]} and {program.images[1]}"
    lines = [
        program.source,
        f"settings: {program.settings}",
        about + (", permuted" if program.permuted else ""),
    ]
    lines += [f"features: {', '.join(outcome.features) or 'none'}", f"{outcome.engine}: {outcome.reason}"]
    return "\n".join([*lines, *(outcome.wrong or ("equal to the textbook",))])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for seed in sys.argv[1:]:
        print(describe(int(seed)))
