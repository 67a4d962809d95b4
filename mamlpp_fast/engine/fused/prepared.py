"""Programs of one form, ready to run on batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mamlpp_fast.engine import base, lanes
from mamlpp_fast.engine.base import Unsupported
from mamlpp_fast.engine.fused.form import Form, Memory
from mamlpp_fast.engine.fused.masks import Masks
from mamlpp_fast.engine.fused.network import Network
from mamlpp_fast.engine.fused.program import Program, Workspace
from mamlpp_fast.engine.fused.transfer import Gradients, Transfer
from mamlpp_fast.engine.lanes import NEVER, Halt, Share
from mamlpp_fast.engine.running import RunningStats
from mamlpp_fast.episodes import EpisodeBatch

__all__ = ["Prepared"]


@dataclass
class Prepared:
    """The programs of one form.

    Attributes:
        program: of a group of tasks; finish: of what is taken over all groups.
        losses, logits: of all tasks, [T] and [T, m, O] (evaluation: [K, T, m, O]); overwritten by the next run.
        axis: of the tasks in ``logits``.
        threads: that the lanes share; 0 without lanes: the calling thread alone, with all of torch's threads.
        lanes: groups that run at once.
    """

    program: Program
    finish: Program
    memory: Memory
    network: Network
    form: Form
    transfer: Transfer
    running: dict[str, RunningStats]
    masks: Masks
    losses: Tensor
    logits: Tensor
    axis: int
    threads: int
    lanes: int = 1

    @property
    def groups(self) -> int:
        return self.form.total_tasks // self.form.tasks

    @property
    def rounding(self) -> str:
        """In words, which convolutions take operands in bfloat16, where that is the precision."""
        kinds: dict[str, set[torch.dtype]] = {}
        for i in self.program.instructions:
            if i.name.startswith("task_conv2d"):
                kinds.setdefault(i.label, set()).add(i.args[0].dtype)
        rounded, kept = [
            [
                name if len(found) == 1 else f"{name} (some passes)"
                for name, found in kinds.items()
                if kind in found
            ]
            for kind in (torch.bfloat16, torch.float32)
        ]
        words = f"convolutions with operands rounded to bfloat16: {', '.join(rounded) or 'none'}"
        return f"{words}; in float32, which is faster here: {', '.join(kept)}" if kept else words

    @property
    def workspace_bytes(self) -> int:
        return max(self.lanes * self.program.workspace_bytes, self.finish.workspace_bytes)

    @property
    def owned_bytes(self) -> int:
        return self.program.owned_bytes(self.lanes) + self.finish.owned_bytes() + self.masks.nbytes

    def bind(self, workspace: Workspace) -> None:
        """Gives the programs memory."""
        workspace.reserve(self.workspace_bytes)
        self.program.bind(workspace, self.lanes)
        self.finish.bind(workspace)

    def run(
        self,
        batch: EpisodeBatch,
        statistics: Mapping[str, Tensor] | None = None,
        gradients: Gradients | None = None,
        generator: torch.Generator | None = None,
        step_weights: Tensor | None = None,
    ) -> None:
        """The programs on a whole batch, group after group, or group beside group on lanes.

        Args:
            batch: of the form.
            statistics: tensors of the model; running statistics among them are updated.
            gradients: filled with the meta-gradients. Where calls cost, the batch then comes with the parameters: what
                is trained on is captured, so always at the same place.
            generator: that dropout draws from; by default the process's.
            step_weights: multi-step weights [K]; those of the run before where None.

        Raises:
            Unsupported: where the loss is no more what it was recorded as; nothing is left of the run then.
        """

        one_call = gradients is not None and self.groups == 1 and base.launches_cost(self.transfer.device)

        def start() -> None:
            self.transfer.load_parameters(step_weights, batch if one_call else None)

        def end() -> None:
            self.finish.run()
            self._store(statistics, gradients)

        answers = [] if self.memory.answers is None else self.memory.answers.buffer.tensors
        drawn = torch.get_rng_state() if answers and generator is None else None
        for t in answers:  # of every lane
            t.fill_(True)
        self.masks.draw(generator)
        self._alone(start)
        for share in self._shares():
            self._groups(batch, share, examples=not one_call)
        if not all(bool(t.all()) for t in answers):
            if drawn is not None:
                torch.set_rng_state(drawn)
            # By a question of torch.distributions or F.gaussian_nll_loss.
            raise Unsupported("loss", "finds its arguments otherwise than in the first batch")
        self._alone(end)

    def _alone(self, work: Callable[[], None]) -> None:
        if self.threads == 0:
            work()
        else:
            lanes.run(lambda lane, halt: work())

    def _shares(self) -> list[Share]:
        if self.threads == 0 or lanes.here():
            return [(range(self.groups), 1, max(1, self.threads))]
        return lanes.shares(self.groups, self.lanes, self.threads)

    def _groups(self, batch: EpisodeBatch, share: Share, examples: bool) -> None:
        groups, count, threads = share
        left = deque(groups)

        def work(lane: int, halt: Halt) -> None:
            while not halt.wanted:
                try:
                    group = left.popleft()
                except IndexError:
                    return
                self._group(batch, group, lane, threads, halt, examples)

        if self.threads == 0:
            work(0, NEVER)
        else:
            lanes.run(work, count, threads)

    def _group(
        self, batch: EpisodeBatch, group: int, lane: int, threads: int, halt: Halt, examples: bool
    ) -> None:
        start = group * self.form.tasks
        own = batch.tasks(start, start + self.form.tasks)
        if examples:
            self.transfer.load_examples(own, lane)
        self.transfer.load_labels(own, lane)
        self.masks.load(group, lane)
        self.program.run(lane, threads, halt)
        if self.groups > 1:  # one group writes to the table itself
            self.memory.table.tensor()[group].copy_(self.memory.row.tensor(lane))

    def _store(self, statistics: Mapping[str, Tensor] | None, gradients: Gradients | None) -> None:
        left = {key: ref.tensor() for key, ref in self.memory.all.items()}
        logits = left["logits"].movedim(0, self.axis)
        results = [(self.logits.view(logits.shape), logits)]
        if "losses" in left:
            results.append((self.losses.view(left["losses"].shape), left["losses"]))
        if gradients is not None:
            results += self.transfer.gradients(gradients)
        self.transfer.move(results)
        if statistics is not None:
            for name, running in self.running.items():
                mean, rstd = (left[name, what].movedim(0, 2) for what in ("mean", "rstd"))
                running.update(statistics, mean, rstd)
