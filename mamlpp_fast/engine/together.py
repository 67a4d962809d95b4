"""Tasks side by side through autograd: of models whose every pass is one operation of ours, which runs no Python.

What a model's Python might do in between (draw, count, write, run hooks) would come in another order in threads; a
recording (:mod:`mamlpp_fast.engine.record`) has found that there is none of it, in the model and in the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from mamlpp_fast import accelerated
from mamlpp_fast.engine import lanes
from mamlpp_fast.engine.base import Unsupported
from mamlpp_fast.engine.fused.differentiable import DifferentiableNetwork
from mamlpp_fast.engine.fused.held import Counted, Held, Taken
from mamlpp_fast.engine.record import hooks, of_a_thread, record_loss
from mamlpp_fast.episodes import Episode, EpisodeBatch
from mamlpp_fast.inputs import form_of_inputs
from mamlpp_fast.lslr import LSLR
from mamlpp_fast.machine import free_bytes
from mamlpp_fast.reference import Inputs, LossFn, check_recomputation

__all__ = ["Apart", "Passes", "Together"]

_T = TypeVar("_T")


class Apart(Exception):
    """Why tasks are to be taken one after the other."""


class Passes:
    """The passes of one task, beside those of others.

    Args:
        networks: by the form of the examples.

    Attributes:
        later: what running statistics and counts are to take in, in order.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, networks: Mapping[Hashable, DifferentiableNetwork]
    ) -> None:
        self._model = model
        self._loss_fn = loss_fn
        self._networks = networks
        self.later: list[Taken | Counted] = []

    def call(self, fast: Mapping[str, Tensor], x: Inputs, step: int) -> Tensor:
        """The model's prediction with the fast weights, per-step norms at a step."""
        network = self._networks[form_of_inputs(x)]
        return network.call(Held(self._model, fast, step, self.later), x)

    def loss(self, prediction: Tensor, y: Tensor) -> Tensor:
        """The loss of a prediction.

        Raises:
            Apart: for a loss that has parameters of its own.
        """
        loss = self._loss_fn(prediction, y)
        ahead, seen = [loss.grad_fn], {prediction.grad_fn, None}
        for node in ahead:  # grows meanwhile
            if node in seen:
                continue
            seen.add(node)
            assert node is not None
            if node.name().endswith("AccumulateGrad"):
                raise Apart("the loss has parameters of its own")
            ahead += (following for following, _ in node.next_functions)
        return loss

    def gradients(
        self, fast: Mapping[str, Tensor], x: Inputs, y: Tensor, step: int, second_order: bool
    ) -> tuple[Tensor | None, ...]:
        """As :func:`mamlpp_fast.reference.support_gradients`."""
        loss = self.loss(self.call(fast, x, step), y)
        if step == 0:
            check_recomputation(loss)
        return torch.autograd.grad(loss, list(fast.values()), create_graph=second_order, allow_unused=True)


class Together:
    """Whether and how the tasks of batches go side by side.

    Args:
        model: on a CPU.
        rates: its inner rates.
        loss_fn: (prediction, target) to a scalar.
    """

    def __init__(self, model: nn.Module, rates: LSLR, loss_fn: LossFn) -> None:
        self._model = model
        self._rates = rates
        self._loss_fn = loss_fn
        self._losses: dict[tuple[object, ...], str | None] = {}

    def run(self, batch: EpisodeBatch, kept: int, work: Callable[[Passes, Episode], _T]) -> list[_T]:
        """``work`` of every task, by as many threads as there are; then running statistics follow, task by task.

        A single task, and tasks without the memory for a second one beside, have all threads to themselves.

        Args:
            kept: passes of a task whose values stay until its end.

        Raises:
            Apart: where a pass is none of our operations, or the loss or a hook might do more than compute. Nothing
                has changed then.
        """
        networks = self._networks(batch)
        passes = [Passes(self._model, self._loss_fn, networks) for _ in range(batch.num_tasks)]
        found: dict[int, _T] = {}

        def on_lane(task: int, _: int) -> None:
            with torch.enable_grad():
                found[task] = work(passes[task], batch[task])

        width = min(batch.num_tasks, torch.get_num_threads(), _room(networks, kept))
        if width > 1 or torch.get_num_threads() == 1:
            lanes.each(on_lane, batch.num_tasks, width)
        else:
            for task in range(batch.num_tasks):
                on_lane(task, 0)
        with torch.no_grad():
            for taken in (t for own in passes for t in own.later):
                taken.apply()
        return [found[task] for task in range(batch.num_tasks)]

    def _networks(self, batch: EpisodeBatch) -> dict[Hashable, DifferentiableNetwork]:
        """What takes the passes, by the form of the examples, in the mode that the model is in."""
        if any(t.requires_grad for t in batch.tensors):
            raise Apart("inputs: require gradients")
        for module in (self._model, self._rates):
            if (hook := hooks(module)) is not None:
                raise Apart(str(hook))
        if other := set(self._rates.names) - {name for name, _ in self._model.named_parameters()}:
            raise Apart(f"{min(other)}: is another name of a parameter")
        networks: dict[Hashable, DifferentiableNetwork] = {}
        task = batch[0]
        sides = ((task.support_x, task.support_y), (task.target_x, task.target_y))
        with torch.enable_grad():
            for x, y in sides:
                network = accelerated.network_of(self._model, x)
                if isinstance(network, str):
                    raise Apart(network)
                networks[form_of_inputs(x)] = network
                self._check_loss(network.like_result(x), y)
        return networks

    def _check_loss(self, prediction: Tensor, y: Tensor) -> None:
        key = (self._model.training, prediction.shape, prediction.dtype, y.shape, y.dtype)
        if key not in self._losses:
            try:
                record_loss(self._loss_fn, (prediction, y), (prediction, y), self._model)
                self._losses[key] = (
                    "loss: reads what each thread has its own of" if of_a_thread(self._loss_fn) else None
                )
            except Unsupported as error:
                self._losses[key] = f"loss: {error.why}"
        if (why := self._losses[key]) is not None:
            raise Apart(why)


def _room(networks: Mapping[Hashable, DifferentiableNetwork], kept: int) -> int:
    """How many tasks have memory at once, at least one: what they have had before is theirs again."""
    programs = [(n.sections.program.workspace_bytes, n.sections.lanes) for n in networks.values()]
    each = kept * max(size for size, _ in programs)
    free = free_bytes(torch.device("cpu")) + sum(size * count for size, count in programs)
    return max(1, free // max(each, 1))
