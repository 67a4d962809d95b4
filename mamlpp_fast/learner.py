"""The MAML++ learner: a model, its inner rates, the schedules, Adam, and an engine that does the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mamlpp_fast import reference
from mamlpp_fast.adaptation import adapt
from mamlpp_fast.config import MAMLConfig
from mamlpp_fast.distributed import Ranks
from mamlpp_fast.engine import Engine, EngineName, Precision, dtype_of, make_engine
from mamlpp_fast.engine.deterministic import one_thread
from mamlpp_fast.engine.fused import Unsupported
from mamlpp_fast.engine.graph import Graphed, graphed
from mamlpp_fast.engine.reduction import Reduction
from mamlpp_fast.episodes import Episode, EpisodeBatch
from mamlpp_fast.lslr import LSLR
from mamlpp_fast.nn import convert_batch_norm

__all__ = ["Evaluation", "MAMLPlusPlus", "NonFiniteLossError", "StepMetrics"]

_T = TypeVar("_T")
_LOSSES: dict[str, reference.LossFn] = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}


class StepMetrics(NamedTuple):
    """Result of one meta-update, as tensors on the device: reading one waits for it.

    Attributes:
        loss: weighted target loss, mean over tasks, scalar.
        accuracy: share of target examples predicted right after the last update, scalar; NaN where predictions are not
            logits [..., ways] for integer labels (regression).
        task_losses: loss of each task, [tasks].
    """

    loss: Tensor
    accuracy: Tensor
    task_losses: Tensor


class Evaluation(NamedTuple):
    """Result of evaluating a batch of tasks.

    Attributes:
        logits: target predictions after every inner step, [steps, tasks, m, ways].
        loss: target loss after the last step, [tasks].
        accuracy: share of target examples predicted right after every step, [steps, tasks]; NaN as in
            :class:`StepMetrics`.
    """

    logits: Tensor
    loss: Tensor
    accuracy: Tensor


class NonFiniteLossError(ArithmeticError):
    """A meta-loss is NaN or infinite; ``iteration`` and ``task`` (position in the batch) say where."""

    def __init__(self, iteration: int, epoch: int, task: int) -> None:
        super().__init__(
            f"loss: expected finite, got NaN or infinity at epoch {epoch}, iteration {iteration}, task {task}"
        )
        self.iteration = iteration
        self.epoch = epoch
        self.task = task


class MAMLPlusPlus:
    """Meta-trains any ``nn.Module`` with MAML++ or any part of it ("How to train your MAML", 2018).

    Args:
        model: the network, called as ``model(x)``. Plain ``nn.BatchNorm2d`` in it are replaced in place by per-step
            ones as ``config`` asks.
        config: the settings; MAML++ by default.
        engine: ``"auto"``, ``"reference"``, ``"autograd"`` or ``"fused"``.
        precision: ``"float32"``, ``"float64"``, ``"tf32"`` or ``"bfloat16"`` (the last two keep float32 parameters).
        device: where to train; the model's own by default.
        loss_fn: (prediction, target) to a scalar mean; by default what ``config.loss`` names. The fused engine knows
            ``F.cross_entropy`` (``functools.partial`` with ``label_smoothing`` too) and ``F.mse_loss``.
        process_group: the processes that share the tasks of every meta-batch, ``torch.distributed.group.WORLD`` say.
            All call :meth:`meta_step` alike and hold the same parameters, those of rank 0 to begin with.
        deterministic: the same bits on any number of CPU threads; by default what
            ``torch.use_deterministic_algorithms`` says. Costs the fused engine little; the others run on one thread.

    Attributes:
        model: the network at its meta-parameters.
        rates: the inner learning rates (:class:`mamlpp_fast.LSLR`).
        iteration: meta-updates made so far; epochs and schedules follow from it.
        ranks: this process among those of ``process_group``.
        engine: the engine in use; ``engine_reason`` says why it was chosen.

    Raises:
        ValueError: when the engine asked for cannot serve the model, or its per-step rows do not fit ``config``.
    """

    def __init__(
        self,
        model: nn.Module,
        config: MAMLConfig | None = None,
        *,
        engine: EngineName = "auto",
        precision: Precision = "float32",
        device: torch.device | str | None = None,
        loss_fn: reference.LossFn | None = None,
        process_group: dist.ProcessGroup | None = None,
        deterministic: bool | None = None,
    ) -> None:
        self.config = config = MAMLConfig() if config is None else config
        self.precision: Precision = precision
        self.dtype = dtype_of(precision)
        model = convert_batch_norm(
            model, config.steps, per_step_affine=config.bnwb, per_step_stats=config.bnrs
        )
        _check_rows(model, config.steps)
        self.model = model.to(device=device, dtype=self.dtype)
        self.device = next(self.model.parameters()).device
        self.loss_fn = _LOSSES[config.loss] if loss_fn is None else loss_fn
        own = dict(self.model.named_parameters())
        names = reference.adapted_names(self.model, config.adapt, config.adapt_norm)
        self.rates = LSLR(
            ((name, own[name]) for name in names),
            config.steps,
            config.inner_lr,
            rates=config.rates,
            learnable=config.lslr or config.rates == "element",
        )
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        self.deterministic = deterministic and self.device.type == "cpu"
        self._asked: EngineName = engine
        self.engine, self.engine_reason = make_engine(
            engine, self.model, self.rates, self.loss_fn, precision, self.deterministic
        )
        trainable = [p for m in (self.model, self.rates) for p in m.parameters() if p.requires_grad]
        on_gpu = self.device.type == "cuda"
        # A tensor learning rate lets the schedule change it inside a captured graph.
        lr = torch.tensor(config.meta_lr, device=self.device) if on_gpu else config.meta_lr
        self.optimizer = torch.optim.Adam(
            trainable, lr=lr, betas=config.adam_betas, fused=True, capturable=on_gpu
        )
        self.iteration = 0
        self._graph: Graphed[..., StepMetrics] | None = None
        self._graph_generation = 0
        self._weights: tuple[int, Tensor | None] = (-1, None)
        self.ranks = Ranks(process_group)
        self._reduction = Reduction(self.ranks, self.model, self.rates) if self.ranks.size > 1 else None

    @property
    def epoch(self) -> int:
        return self.iteration // self.config.iterations_per_epoch

    def step_weights(self) -> Tensor | None:
        """Multi-step-loss weights [K] of this epoch, or None once only the last step counts."""
        if self._weights[0] != self.epoch:
            weights = None
            if self.config.msl:
                weights = reference.msl_weights(self.epoch, self.config.steps, self.config.msl_epochs)
            # Kept for the epoch: a copy from the host would hold up a GPU every iteration.
            tensor = None if weights is None else torch.tensor(weights, dtype=self.dtype, device=self.device)
            self._weights = (self.epoch, tensor)
        return self._weights[1]

    def meta_lr(self) -> float:
        """Adam's learning rate of this epoch."""
        c = self.config
        if not c.cosine_annealing:
            return c.meta_lr
        return reference.cosine_annealing(min(self.epoch, c.epochs), c.epochs, c.meta_lr, c.min_meta_lr)

    def second_order(self) -> bool:
        """Whether this epoch differentiates through the inner updates."""
        return reference.is_second_order(self.epoch, self.config.second_order, self.config.da_epoch)

    def meta_gradient(self, batch: EpisodeBatch, *, total_tasks: int | None = None) -> StepMetrics:
        """Sets the meta-gradients of a batch without updating; see :meth:`meta_step`."""
        total = batch.num_tasks if total_tasks is None else total_tasks
        batch = self._own_share(batch, total_tasks).to(self.device, self.dtype)
        if self._reduction is None:
            return self._gradient(batch, self.step_weights(), self.second_order())
        self._reduction.begin(batch.support_x[0], self.step_weights() is not None)
        own = self._gradient(batch, self.step_weights(), self.second_order(), clamp=False)
        losses, accuracy = self._reduction.finish(own.task_losses, own.accuracy, total)
        self._clamp()
        return StepMetrics(losses.mean(), accuracy, losses)

    def _own_share(self, batch: EpisodeBatch, total_tasks: int | None) -> EpisodeBatch:
        size = self.ranks.size
        total = batch.num_tasks if total_tasks is None else total_tasks
        if total < size:
            raise ValueError(f"batch: expected at least one task for each of {size} ranks, got {total}")
        share = self.ranks.share(total)
        if total_tasks is None:
            return batch if size == 1 else batch.tasks(share.start, share.stop)
        if batch.num_tasks != len(share):
            raise ValueError(
                f"batch: expected the {len(share)} tasks of rank {self.ranks.rank} of {total_tasks} in all, "
                f"got {batch.num_tasks}"
            )
        return batch

    def _gradient(
        self, batch: EpisodeBatch, step_weights: Tensor | None, second_order: bool, *, clamp: bool = True
    ) -> StepMetrics:
        result = self._serve(lambda engine: engine.meta_gradient(batch, step_weights, second_order))
        if clamp:
            self._clamp()
        return StepMetrics(
            result.loss, self._accuracy(result.target_logits, batch.target_y, 1).mean(), result.task_losses
        )

    def _clamp(self) -> None:
        if (limit := self.config.clamp_meta_gradient) is not None:
            for p in self.model.parameters():
                if p.grad is not None:
                    p.grad.clamp_(-limit, limit)

    def meta_step(self, batch: EpisodeBatch, *, total_tasks: int | None = None) -> StepMetrics:
        """One meta-update: meta-gradients of a batch of tasks, then Adam; on a GPU one CUDA graph.

        With several ranks the gradients alone are one graph, and each rank computes its share of the tasks
        (``learner.ranks.share``): the update is one process's up to the order of summation.

        Args:
            batch: tasks, the same on every rank; moved to the learner's device and dtype.
            total_tasks: number of tasks on all ranks, where ``batch`` holds this rank's share alone.

        Returns:
            Loss and accuracy of the whole batch before the update, as device tensors.

        Raises:
            ValueError: for fewer tasks than ranks, or a batch that is not this rank's share of ``total_tasks``.
            mamlpp_fast.distributed.RankLostError: when another rank is gone.
        """
        if self.device.type != "cuda" or self.engine.name == "reference" or self._reduction is not None:
            metrics = self.meta_gradient(batch, total_tasks=total_tasks)
            self.apply_gradient()
            return metrics
        batch = self._own_share(batch, total_tasks).to(self.device, self.dtype)
        fields = (batch.support_x, batch.support_y, batch.target_x, batch.target_y)
        self._set_learning_rate()
        metrics = self._whole_step()(fields, self.step_weights(), self.second_order())
        self.iteration += 1
        return StepMetrics(*(t.clone() for t in metrics))

    def _whole_step(self) -> Graphed[..., StepMetrics]:
        generation = getattr(self.engine, "generation", 0)
        if self._graph is None or self._graph_generation != generation:
            # What was captured before the engine's memory moved would write to memory that is no longer its own.
            self._start_adam()
            self._graph = graphed(self._update, preserve=self._state)
            self._graph_generation = generation
        return self._graph

    def _update(
        self, fields: tuple[Tensor, Tensor, Tensor, Tensor], step_weights: Tensor | None, second_order: bool
    ) -> StepMetrics:
        metrics = self._gradient(EpisodeBatch(*fields), step_weights, second_order)
        self.optimizer.step()
        return metrics

    def _start_adam(self) -> None:
        """Gives Adam the state that its first step would, so that it exists before a capture."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if not self.optimizer.state[p]:
                    self.optimizer.state[p] = {
                        "step": torch.zeros((), device=p.device),
                        "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                        "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
                    }

    def _state(self) -> Iterator[Tensor]:
        """Every tensor that :meth:`meta_step` changes, but for gradients."""
        for module in (self.model, self.rates):
            yield from module.parameters()
            yield from module.buffers()
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    def _set_learning_rate(self) -> None:
        lr = self.meta_lr()
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def apply_gradient(self, step: Callable[[], Any] | None = None) -> None:
        """The Adam update for the gradients that :meth:`meta_gradient` left; advances the iteration.

        Args:
            step: makes the update in place of ``optimizer.step``: a framework's wrapper of it.
        """
        self._set_learning_rate()
        with one_thread(self.deterministic):
            (self.optimizer.step if step is None else step)()
        self.iteration += 1

    def check_finite(self, task_losses: Tensor) -> None:
        """Raises when a task's loss of the last step is not finite (reads from the device).

        Raises:
            NonFiniteLossError: names epoch, iteration and task.
        """
        bad = (~torch.isfinite(task_losses)).nonzero()
        if len(bad):
            last = self.iteration - 1
            raise NonFiniteLossError(last, last // self.config.iterations_per_epoch, int(bad[0]))

    def adapt(
        self, support_x: Tensor, support_y: Tensor, *, steps: int | None = None
    ) -> Callable[[Tensor], Tensor]:
        """Adapts to one support set, for inference.

        Args:
            support_x: inputs [n, ...].
            support_y: labels [n].
            steps: inner updates; ``config.eval_steps`` (or ``steps``) by default.

        Returns:
            A function from inputs [m, ...] to predictions [m, ...] of the adapted model, normalising as
            ``config.eval_stats`` says.
        """
        steps = self._eval_steps(steps)
        self.model.eval()
        with torch.enable_grad(), one_thread(self.deterministic):
            fast = adapt(
                self.model,
                support_x.to(self.device, self.dtype),
                support_y.to(self.device),
                self.rates,
                steps=steps,
                loss_fn=self.loss_fn,
                first_order=True,
            )
        frozen = {name: t.detach().clone() for name, t in fast.items()}

        def predict(x: Tensor) -> Tensor:
            self.model.eval()
            reference.set_step(self.model, steps - 1)
            reference.set_eval_stats(self.model, self.config.eval_stats)
            try:
                with torch.no_grad(), one_thread(self.deterministic):
                    prediction: Tensor = reference.functional_call(
                        self.model, frozen, (x.to(self.device, self.dtype),)
                    )
            finally:
                reference.set_eval_stats(self.model, "batch")
            return prediction

        return predict

    def evaluate(self, batch: EpisodeBatch | Episode, *, steps: int | None = None) -> Evaluation:
        """Adapts to every task of a batch and judges the target predictions; changes no state.

        Args:
            batch: tasks, or one task.
            steps: inner updates; ``config.eval_steps`` (or ``steps``) by default. Beyond ``config.steps`` the last
                rates and batch-norm rows are used again.
        """
        if isinstance(batch, Episode):
            fields = (batch.support_x, batch.support_y, batch.target_x, batch.target_y)
            batch = EpisodeBatch(*(t.unsqueeze(0) for t in fields))
        batch = batch.to(self.device, self.dtype)
        steps = self._eval_steps(steps)
        logits = self._serve(lambda engine: engine.evaluate(batch, steps=steps, stats=self.config.eval_stats))
        losses = torch.stack([self.loss_fn(p, y) for p, y in zip(logits[-1], batch.target_y, strict=True)])
        return Evaluation(logits, losses, self._accuracy(logits, batch.target_y, 2))

    def state_dict(self) -> dict[str, Any]:
        """Everything that training goes on from: model, rates, Adam, iteration."""
        return {
            "model": self.model.state_dict(),
            "rates": self.rates.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "iteration": self.iteration,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`.

        Raises:
            ValueError: when the state is of another model or configuration.
        """
        try:
            self.model.load_state_dict(state["model"])
            self.rates.load_state_dict(state["rates"])
            self.optimizer.load_state_dict(state["optimizer"])
            self._graph = None  # Adam's state lies elsewhere now
            self.iteration = int(state["iteration"])
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"state: expected the state of this model and configuration, {reason}"
            ) from error

    def explain(self) -> str:
        """Says which engine serves this model and why, and what it will do."""
        text = f"engine {self.engine.name}: {self.engine_reason}"
        describe = getattr(self.engine, "explain", None)
        return text if describe is None else f"{text}\n{describe()}"

    def _serve(self, call: Callable[[Engine], _T]) -> _T:
        """Calls the engine; where it cannot take the shapes of a batch, ``auto`` goes over to the autograd engine."""
        try:
            with one_thread(self._one_thread):
                return call(self.engine)
        except Unsupported as error:
            if self._asked != "auto":
                raise
            self.engine, _ = make_engine("autograd", self.model, self.rates, self.loss_fn, self.precision)
            self.engine_reason = f"not fused: {error}"
            with one_thread(self._one_thread):
                return call(self.engine)

    @property
    def _one_thread(self) -> bool:
        """Whether the engine runs on one thread whole; the fused one parts itself what may run on several."""
        return self.deterministic and self.engine.name != "fused"

    def _eval_steps(self, steps: int | None) -> int:
        if steps is None:
            steps = self.config.steps if self.config.eval_steps is None else self.config.eval_steps
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        return steps

    def _accuracy(self, prediction: Tensor, target: Tensor, lead: int) -> Tensor:
        """Share of right answers over all but the first ``lead`` axes of the predictions, the last of them tasks."""
        if target.is_floating_point() or prediction.shape[lead:-1] != target.shape[1:]:
            return torch.full(prediction.shape[:lead], float("nan"), device=self.device)
        return (prediction.argmax(-1) == target).to(torch.float32).flatten(lead).mean(-1)


def _check_rows(model: nn.Module, steps: int) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, reference.PerStepBatchNorm2d):
            continue
        per_step = module.per_step_affine or module.per_step_stats
        if per_step and module.num_steps != steps:
            raise ValueError(
                f"model: expected per-step batch norms of {steps} steps, {name} has {module.num_steps}"
            )
