"""Holds ``MAMLPlusPlus(engine="auto")`` against a textbook loop on random models, in float64.

    python -m tests.random_models SEED [SEED ...]

prints the source of each model, its settings, and what differed.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import mamlpp_fast as mf
from tests.random_programs import Program, make_program
from tests.textbook import Batch, Textbook

__all__ = ["TOLERANCE", "Outcome", "check"]

TOLERANCE = 1e-9
"""Relative to each tensor's largest absolute value."""
_FLOOR = 1e-3
"""Stands in for that value where it is smaller: what is zero but for rounding is not compared by its noise."""


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


class _Comparison:
    """A learner and a textbook loop on two models of one source."""

    def __init__(self, program: Program, statistics: str, wrong: list[str]) -> None:
        self.program = program
        self.wrong = wrong
        self.settings = settings = program.settings | {"eval_stats": statistics}
        self.textbook = Textbook(program.build(), settings)
        self.learner = mf.MAMLPlusPlus(program.build(), mf.MAMLConfig(**settings), precision="float64")
        self.model = self.learner.model
        for generator, rate in enumerate(self.textbook.rates.values()):
            draw = torch.rand(
                rate.shape, generator=torch.Generator().manual_seed(generator), dtype=rate.dtype
            )
            rate.data.mul_(0.5 + draw)
        if tuple(self.textbook.rates) != self.learner.rates.names:
            self.wrong.append(f"adapts {self.learner.rates.names}, expected {tuple(self.textbook.rates)}")
            return
        self.learner.rates.rates.data.copy_(self._joined(self.textbook.rates))
        self.state("after construction", parameters=True)

    def _joined(self, rates: Mapping[str, Tensor]) -> Tensor:
        """Rates, or their gradients, in the learner's one tensor."""
        if self.program.settings["rates"] == "tensor":
            return torch.stack(list(rates.values()))
        return torch.cat([r.flatten(1) for r in rates.values()], 1)

    def close(self, what: str, ours: Tensor | None, expected: Tensor, tolerance: float = TOLERANCE) -> None:
        if ours is None or ours.shape != expected.shape:
            shape = None if ours is None else tuple(ours.shape)
            self.wrong.append(f"{what}: got shape {shape}, expected {tuple(expected.shape)}")
            return
        if not expected.numel():
            return
        expected, ours = expected.detach().double(), ours.detach().double()
        error = float((ours - expected).abs().max() / expected.abs().max().clamp(min=_FLOOR))
        if not error <= tolerance:
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
            elif parameters and not torch.equal(ours[name], value):
                self.wrong.append(f"parameter {name} {when}: moved")

    def gradient(self, batch: Batch, when: str, *, update: bool) -> None:
        """A meta-gradient of both, with Adam's update or without."""
        losses = self.textbook.gradient(batch)
        episodes = mf.EpisodeBatch(*batch)
        ours = self.learner.meta_step(episodes) if update else self.learner.meta_gradient(episodes)
        self.close(f"{when}: task losses", ours.task_losses, losses)
        self.close(f"{when}: loss", ours.loss, losses.mean())
        own = dict(self.model.named_parameters())
        for name, p in self.textbook.model.named_parameters():
            if p.requires_grad:
                assert p.grad is not None
                self.close(f"{when}: gradient of {name}", own[name].grad, p.grad)
        rates = self.textbook.rates
        if all(r.requires_grad for r in rates.values()):
            expected = self._joined({n: r.grad for n, r in rates.items() if r.grad is not None})
            self.close(f"{when}: gradient of the rates", self.learner.rates.rates.grad, expected)
        if update:
            self._update(when)
        self.state(when, parameters=True)

    def _update(self, when: str) -> None:
        """Compares Adam's update, and takes the learner's for what follows."""
        self.textbook.adam.step()
        own = dict(self.model.named_parameters())
        for name, p in self.textbook.model.named_parameters():
            if p.grad is not None:
                # Adam divides by the gradient's size: where that is rounding, its update is too.
                counts = p.grad.abs() > 1e-6 * p.grad.abs().max()
                counts &= p.grad.abs() > 1e-6
                self.close(f"{when}: updated {name}", own[name][counts], p[counts], 1e-7)
                p.data.copy_(own[name].data)
        if self.program.settings["rates"] == "tensor":
            parts = list(self.learner.rates.rates.data)
        else:
            parts = list(self.learner.rates.rates.data.split(self.learner.rates.sizes, 1))
        for rate, part in zip(self.textbook.rates.values(), parts, strict=True):
            rate.data.copy_(part.reshape(rate.shape))

    def evaluation(self, batch: Batch, when: str) -> None:
        steps = self.program.settings["steps"] + 1  # the last row and rate again
        statistics = self.settings["eval_stats"]
        expected = self.textbook.evaluate(batch, statistics, steps)
        ours = self.learner.evaluate(mf.EpisodeBatch(*batch), steps=steps).logits
        self.close(f"{when}: predictions with {statistics} statistics", ours, expected)
        if not self.program.volatile:
            predict = self.learner.adapt(batch[0][-1], batch[1][-1], steps=steps)
            self.close(
                f"{when}: predictor with {statistics} statistics", predict(batch[2][-1]), expected[-1, -1]
            )
            self.textbook.evaluate(tuple(t[-1:] for t in batch), statistics, steps)  # type: ignore[arg-type]
            self.state(f"after {when}", parameters=True)

    def calls(self) -> None:
        """What the model wrote down of its calls."""
        expected, ours = (getattr(m, "seen", ()) for m in (self.textbook.model, self.model))
        if len(ours) != len(expected):
            self.wrong.append(f"calls recorded: {len(ours)}, expected {len(expected)}")


def _train(both: _Comparison) -> None:
    """A meta-step, a change of the model, another meta-gradient, an evaluation."""
    program = both.program
    if program.draws:
        both.learner.meta_step(mf.EpisodeBatch(*program.batch(0)))
        both.learner.evaluate(mf.EpisodeBatch(*program.batch(1)))
        if both.learner.engine.name == "fused":
            both.wrong.append("random numbers drawn once for all")
        return
    both.gradient(program.batch(0), "first", update=True)
    change = program.namespace()["change"]
    for model in (both.model, both.textbook.model):
        with torch.no_grad():
            change(model)
    both.gradient(program.batch(1), "second", update=False)
    both.evaluation(program.batch(2), "evaluation")
    both.calls()


def check(seed: int) -> Outcome:
    """Two meta-gradients, an update between, a change of the model after it, and evaluations, each compared."""
    program = make_program(seed)
    engine = reason = "none"
    wrong: list[str] = []
    before = torch.get_rng_state()
    chosen = program.settings["eval_stats"]
    try:
        for statistics in (chosen, "running" if chosen == "batch" else "batch"):
            both = _Comparison(program, statistics, wrong)
            if statistics == chosen:
                if not wrong:
                    _train(both)
                engine, reason = both.learner.engine.name, both.learner.engine_reason
            elif not wrong and not program.draws:
                both.evaluation(program.batch(2), "evaluation before training")
    except Exception as error:
        wrong.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    if not program.draws and not torch.equal(before, torch.get_rng_state()):
        wrong.append("the global random generator moved")
    return Outcome(seed, engine, reason, program.features, program.plain, tuple(wrong))


def describe(seed: int) -> str:
    """The model's source, its settings, its tasks, and what differed."""
    program, outcome = make_program(seed), check(seed)
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
