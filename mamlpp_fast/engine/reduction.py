"""One all-reduce an iteration: gradients, running statistics, losses and accuracy of a meta-batch shared by ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from mamlpp_fast.distributed import Ranks
from mamlpp_fast.engine.running import decay, made_passes, row_of
from mamlpp_fast.lslr import LSLR
from mamlpp_fast.reference import Inputs, PerStepBatchNorm2d, called

__all__ = ["Reduction"]


@dataclass
class _Norm:
    """A batch norm with running statistics.

    n tasks of p passes each replace a row r by dⁿ r + c, with d = (1 − m)^p (:mod:`mamlpp_fast.engine.running`).

    Attributes:
        module: owner of the buffers.
        rows: of the buffers seen as [rows, C].
        passes: p of every row, [rows] float64, for tasks with (True) and without the multi-step loss.
    """

    module: Any
    rows: int
    passes: dict[bool, Tensor]

    def tables(self) -> tuple[Tensor, Tensor]:
        """Running mean and variance as [rows, C]."""
        mean, var = self.module.running_mean, self.module.running_var
        return mean.view(self.rows, -1), var.view(self.rows, -1)


class Reduction:
    """Turns what every rank computed for its share of the tasks into what one process computes for all of them.

    The result equals one process's up to the order of summation, running statistics included: the maps of the ranks
    are composed in the order of tasks. Buffers are set up by the first :meth:`begin`.

    Args:
        ranks: more than one.
        model: the network; broadcast with ``rates`` from rank 0, so all start at the same parameters.
        rates: its inner rates.

    Raises:
        ValueError: for a batch norm with a cumulative average (``momentum=None``).
    """

    def __init__(self, ranks: Ranks, model: nn.Module, rates: LSLR) -> None:
        self.ranks = ranks
        self.model = model
        self.steps = rates.num_steps
        self.parameters = [p for m in (model, rates) for p in m.parameters() if p.requires_grad]
        self.modules = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, PerStepBatchNorm2d | _NormBase) and module.running_mean is not None
        }
        for name, module in self.modules.items():
            if module.momentum is None:
                raise ValueError(
                    f"model: expected batch norms with a momentum to share tasks, {name} has momentum=None"
                )
        self.norms: list[_Norm] | None = None
        self._before: list[Tensor] = []
        self._others: dict[str, Tensor] = {}
        self._multi_step = False
        self._decays: dict[tuple[int, int, bool], Tensor] = {}
        ranks.broadcast(t for m in (model, rates) for t in (*m.parameters(), *m.buffers()))

    def begin(self, images: Inputs, multi_step: bool) -> None:
        """Called before the engine computes; ``images`` [n, ...] are those of one support set."""
        if self.norms is None:
            self.norms = self._count_passes(images)
            known = {id(b) for m in self.modules.values() for b in m.buffers()}
            self._others = {n: b.clone() for n, b in self.model.named_buffers() if id(b) not in known}
        self._multi_step = multi_step
        self._before = [table.clone() for norm in self.norms for table in norm.tables()]

    @torch.no_grad()
    def finish(self, task_losses: Tensor, accuracy: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Replaces gradients and running statistics by those of all ``total`` tasks.

        Args:
            task_losses: of this rank's share.
            accuracy: mean over this rank's share.
            total: tasks of the whole meta-batch.

        Returns:
            the losses of all tasks [total], and their mean accuracy.

        Raises:
            ValueError: when a buffer that no batch norm owns has changed, which cannot be put together.
            RankLostError: when another rank is gone.
        """
        self._check_others()
        share = self.ranks.share(total)
        weight = len(share) / total
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients: list[Tensor] = [p.grad for p in self.parameters if p.grad is not None]
        losses = task_losses.new_zeros(total)
        losses[share.start : share.stop] = task_losses
        notes = task_losses.new_zeros(self.ranks.size)
        notes[self.ranks.rank] = self.ranks.note
        flat = torch.cat(
            [
                *(g.reshape(-1).to(losses.dtype).mul(weight) for g in gradients),
                *(c.reshape(-1).to(losses.dtype) for c in self._contributions(share, total)),
                losses,
                accuracy.reshape(1).to(losses.dtype).mul(weight),
                notes,
            ]
        )
        self.ranks.sum(flat)
        sizes = [t.numel() for t in (*gradients, *self._before)]
        *parts, losses, mean_accuracy, self.ranks.notes = flat.split([*sizes, total, 1, self.ranks.size])
        for gradient, part in zip(gradients, parts[: len(gradients)], strict=True):
            gradient.copy_(part.view(gradient.shape))
        self._store_statistics(parts[len(gradients) :], total)
        return losses, mean_accuracy.reshape(()).to(accuracy.dtype)

    def _decay(self, norm: _Norm, tasks: int, like: Tensor) -> Tensor:
        """dⁿ of every row, [rows, 1]; kept, as a copy from the host would hold up a GPU every iteration."""
        key = (id(norm), tasks, self._multi_step)
        if key not in self._decays:
            kept = decay(norm.module.momentum, norm.passes[self._multi_step] * tasks)
            self._decays[key] = kept[:, None].to(like)
        return self._decays[key]

    def _contributions(self, share: range, total: int) -> list[Tensor]:
        """This rank's c, already scaled by what the tasks of later ranks will do to it."""
        found = []
        before = iter(self._before)
        for norm in self.norms or ():
            for now in norm.tables():
                old = next(before)
                own = now - self._decay(norm, len(share), now) * old
                found.append(self._decay(norm, total - share.stop, now) * own)
        return found

    def _store_statistics(self, parts: list[Tensor], total: int) -> None:
        pairs = iter(zip(self._before, parts, strict=True))
        for norm in self.norms or ():
            for now in norm.tables():
                old, part = next(pairs)
                now.copy_(self._decay(norm, total, now) * old + part.view(now.shape))
            # Instance norms have a counter too, but do not count.
            counted = norm.module.num_batches_tracked if isinstance(norm.module, _BatchNorm) else None
            if counted is not None:
                # This rank's own passes are in it already.
                each = int(norm.passes[self._multi_step].sum())
                counted.add_(each * (total - len(self.ranks.share(total))))

    def _count_passes(self, images: Inputs) -> list[_Norm]:
        """How often one task passes through every batch norm: calls of a forward pass times passes of a step."""
        calls = dict.fromkeys(self.modules, 0)

        def counts(name: str) -> Any:
            def hook(*_: Any) -> None:
                calls[name] += 1

            return hook

        handles = [m.register_forward_hook(counts(name)) for name, m in self.modules.items()]
        training = self.model.training
        try:
            self.model.eval()
            with torch.no_grad():
                called(self.model, images)
        finally:
            self.model.train(training)
            for handle in handles:
                handle.remove()
        norms = []
        for name, module in self.modules.items():
            rows = 1
            if isinstance(module, PerStepBatchNorm2d) and module.per_step_stats:
                rows = module.num_steps
            passes = {}
            for multi_step in (True, False):
                count = torch.zeros(rows, dtype=torch.float64)
                for step, made in enumerate(made_passes(self.steps, multi_step)):
                    count[row_of(step, rows)] += calls[name] * int(made.sum())
                passes[multi_step] = count
            norms.append(_Norm(module, rows, passes))
        return norms

    def _check_others(self) -> None:
        """Once: whether buffers change that nothing here puts together."""
        now = dict(self.model.named_buffers())
        for name, before in self._others.items():
            if not torch.equal(before, now[name]):
                raise ValueError(
                    f"model: expected no buffers that change in training but running statistics of batch norms, "
                    f"{name} does; ranks cannot put it together"
                )
        self._others = {}
