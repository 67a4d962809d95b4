"""The MAML++ learner: a model, its inner rates, the schedules, Adam, and an engine that does the work."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mamlpp_fast import _native, adam, labels, reference
from mamlpp_fast._modes import undisturbed
from mamlpp_fast.adaptation import adapt
from mamlpp_fast.config import MAMLConfig
from mamlpp_fast.copying import detached_memo, tied_function
from mamlpp_fast.distributed import Ranks
from mamlpp_fast.engine import Engine, EngineName, Precision, dtype_of, make_engine
from mamlpp_fast.engine.deterministic import one_thread
from mamlpp_fast.engine.graph import Graphed, graphed
from mamlpp_fast.engine.record import head_names
from mamlpp_fast.engine.reduction import Reduction
from mamlpp_fast.episodes import Episode, EpisodeBatch, as_input
from mamlpp_fast.lslr import LSLR
from mamlpp_fast.predictor import Predictor
from mamlpp_fast.prepare import adapting, own_share, prepared
from mamlpp_fast.results import Evaluation, NonFiniteLossError, StepMetrics
from mamlpp_fast.serving import Serving

__all__ = ["Evaluation", "MAMLPlusPlus", "NonFiniteLossError", "StepMetrics"]

_LOSSES: dict[str, reference.LossFn] = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}


class MAMLPlusPlus:
    """Meta-trains any ``nn.Module`` with MAML++ or any part of it ("How to train your MAML", 2018).

    The model may be changed between calls: layers frozen, thawed or replaced, hooks added, attributes set. The next
    call goes over to it: what adapts, the inner rates (those of names that stay keep their values), Adam (its state
    stays with a parameter, frozen ones do not move) and the engine follow; batch norms and dtypes are converted.

    A learner can be copied and pickled, unless it shares tasks in a process group, and used in
    ``torch.inference_mode``. ``torch.autocast`` around it has no effect: ``precision`` has.

    Args:
        model: the network, called as ``model(x)``, or with the inputs that an :class:`EpisodeBatch` has. Plain
            ``nn.BatchNorm2d`` in it are replaced in place by per-step ones as ``config`` asks.
        config: the settings; MAML++ by default.
        engine: ``"auto"``, ``"reference"``, ``"autograd"`` or ``"fused"``.
        precision: ``"float32"``, ``"float64"``, ``"tf32"`` or ``"bfloat16"`` (the last two keep float32 parameters).
        device: where to train; the model's own by default.
        loss_fn: (prediction, target) to a scalar mean; by default what ``config.loss`` names. The fused engine takes
            functions, ``functools.partial`` of them and modules that are one list of operations.
        process_group: the processes that share the tasks of every meta-batch, ``torch.distributed.group.WORLD`` say.
            All call :meth:`meta_step` alike and hold the same parameters, those of rank 0 to begin with.
        deterministic: the same bits on any number of CPU threads; by default what
            ``torch.use_deterministic_algorithms`` says. The fused engine has that anyway where there are convolutions;
            the others run on one thread.
        verify: the first meta-gradient of every form is compared with the reference loop in float64; False turns it
            off.

    Attributes:
        model: the network at its meta-parameters.
        rates: the inner learning rates (:class:`mamlpp_fast.LSLR`).
        iteration: meta-updates made so far; epochs and schedules follow from it.
        ranks: this process among those of ``process_group``.
        optimizer: Adam on the parameters of model and rates that require gradients.

    Raises:
        ValueError: when the engine asked for cannot serve the model (at the first batch at the latest), or its per-step
            rows do not fit ``config``.
    """

    @undisturbed()
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
        verify: bool = True,
    ) -> None:
        self.config = config = MAMLConfig() if config is None else config
        self.precision: Precision = precision
        self.dtype = dtype_of(precision)
        self.model = prepared(model, config, device, self.dtype)
        self.device = next(self.model.parameters()).device
        self.loss_fn = _LOSSES[config.loss] if loss_fn is None else loss_fn
        self.rates = LSLR(
            adapting(self.model, config),
            config.steps,
            config.inner_lr,
            rates=config.rates,
            learnable=config.lslr or config.rates == "element",
        )
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        self.deterministic = deterministic and self.device.type == "cpu"
        self._asked: EngineName = engine
        self._verify = verify
        self._head: tuple[str, ...] | None = None
        self._trainable = adam.trainable(self.model, self.rates)
        self._resting: adam.Resting = {}
        self.optimizer = adam.make_adam(self._trainable, config, self.device)
        self.iteration = 0
        self._weights: tuple[int, Tensor | None] = (-1, None)
        self.ranks = Ranks(process_group)
        self._bind()
        self._reduction: Reduction | None = (
            Reduction(self.ranks, self.model, self.rates) if self.ranks.size > 1 else None
        )

    def _bind(self) -> None:
        """Makes what is bound to the model as it is."""
        self._graphs: dict[str, tuple[int, Graphed[..., StepMetrics]]] = {}
        self._reduction = None
        self._serving = Serving(
            self.model,
            self.loss_fn,
            self._asked,
            functools.partial(
                make_engine,
                model=self.model,
                rates=self.rates,
                loss_fn=self.loss_fn,
                precision=self.precision,
                deterministic=self.deterministic,
                verify=self._verify,
            ),
            dtype=self.dtype,
            deterministic=self.deterministic,
            before=getattr(self, "_serving", None),
        )
        self._stale = False

    def _follow(self, training: bool | None = None, batch: EpisodeBatch | None = None) -> Serving:
        """Sets the model's mode, and goes over to what the model has become since the last call.

        Args:
            training: the mode; None leaves it.
            batch: what comes now, whose examples tell the head where that is what adapts.
        """
        if training is not None:
            self.model.train(training)
        if self._serving.outdated(self.model, self.loss_fn):
            self._stale, self._head = True, None
        if self.config.adapt == "head" and self._head is None and batch is not None:
            x = as_input(batch[0].support_x, self.device, self.dtype)
            self._head = head_names(self.model, x, self.config.adapt_norm)
            self._stale |= self._head != self.rates.names
        if self._stale:  # until all of this has succeeded
            self.model = prepared(self.model, self.config, self.device, self.dtype)
            self.rates.follow(adapting(self.model, self.config, self._head), self.config.inner_lr)
            before, self._trainable = self._trainable, adam.trainable(self.model, self.rates)
            adam.follow(self.optimizer, before, self._trainable, self._resting)
            frozen = {id(p) for p in self.model.parameters() if not p.requires_grad}
            self._resting = {key: kept for key, kept in self._resting.items() if key in frozen}
            self._bind()
        return self._serving

    @property
    def engine(self) -> Engine:
        """The engine that served last; before the first batch, the one to be tried first."""
        return self._serving.engine

    @property
    def training_engine(self) -> Engine:
        """The engine that computed the last meta-gradient; before the first, :attr:`engine`."""
        return self._serving.trained or self._serving.engine

    @property
    def engine_asked(self) -> EngineName:
        """What was asked for: a name or ``"auto"``."""
        return self._asked

    @property
    def engine_reason(self) -> str:
        """Why that engine."""
        return self._serving.reason

    @property
    def epoch(self) -> int:
        return self.iteration // self.config.iterations_per_epoch

    def schedule(self, epoch: int) -> dict[str, Any]:
        """What the schedules say of an epoch, as plain values: ``meta_lr``, ``second_order`` and ``msl_weights``."""
        c = self.config
        annealed = reference.cosine_annealing(min(epoch, c.epochs), c.epochs, c.meta_lr, c.min_meta_lr)
        return {
            "meta_lr": annealed if c.cosine_annealing else c.meta_lr,
            "second_order": reference.is_second_order(epoch, c.second_order, c.da_epoch),
            "msl_weights": reference.msl_weights(epoch, c.steps, c.msl_epochs) if c.msl else None,
        }

    def step_weights(self) -> Tensor | None:
        """Multi-step-loss weights [K] of this epoch, or None once only the last step counts."""
        if self._weights[0] != self.epoch:
            weights = self.schedule(self.epoch)["msl_weights"]
            with undisturbed():
                # Kept for the epoch: a copy from the host would hold up a GPU every iteration.
                tensor = (
                    None if weights is None else torch.tensor(weights, dtype=self.dtype, device=self.device)
                )
            self._weights = (self.epoch, tensor)
        return self._weights[1]

    def meta_lr(self) -> float:
        """Adam's learning rate of this epoch."""
        return float(self.schedule(self.epoch)["meta_lr"])

    def second_order(self) -> bool:
        """Whether this epoch differentiates through the inner updates."""
        return bool(self.schedule(self.epoch)["second_order"])

    @undisturbed()
    def meta_gradient(self, batch: EpisodeBatch, *, total_tasks: int | None = None) -> StepMetrics:
        """Sets the meta-gradients of a batch without updating; see :meth:`meta_step`.

        Where it raises they are zero, or None where there have been none yet.
        """
        total = batch.num_tasks if total_tasks is None else total_tasks
        batch = own_share(batch, self.ranks, total_tasks)
        self._follow(True, batch)
        if self.ranks.size == 1:
            return self._train(batch, self._gradient)
        if self._reduction is None:
            self._reduction = Reduction(self.ranks, self.model, self.rates)
        images = as_input(batch[0].support_x, self.device, self.dtype)
        self._reduction.begin(images, self.step_weights() is not None)
        own = self._train(batch, lambda *arguments: self._gradient(*arguments, clamp=False))
        losses, accuracy = self._reduction.finish(own.task_losses, own.accuracy, total)
        self._clamp()
        return StepMetrics(losses.mean(), accuracy, losses)

    def _train(
        self, batch: EpisodeBatch, run: Callable[[Engine, EpisodeBatch, Tensor | None, bool], StepMetrics]
    ) -> StepMetrics:
        weights, second_order = self.step_weights(), self.second_order()

        def call(engine: Engine, batch: EpisodeBatch) -> StepMetrics:
            self._serving.lend_gradients(self._trainable)
            return run(engine, batch, weights, second_order)

        try:
            return self._serving.serve(batch, ("train", weights is None, second_order), call)
        except BaseException:
            for p in self._trainable:  # of some tasks, or of the batch before
                if p.grad is not None:
                    p.grad.zero_()
            raise

    def _gradient(
        self,
        engine: Engine,
        batch: EpisodeBatch,
        step_weights: Tensor | None,
        second_order: bool,
        *,
        clamp: bool = True,
    ) -> StepMetrics:
        result = engine.meta_gradient(batch, step_weights, second_order)
        self._serving.check_prediction(result.target_logits, batch.target_y)
        if clamp:
            self._clamp()
        accuracy = labels.accuracy(result.target_logits, batch.target_y, self.loss_fn)
        return StepMetrics(result.loss, accuracy.mean(), result.task_losses)

    def _clamp(self) -> None:
        if (limit := self.config.clamp_meta_gradient) is not None:
            for p in self.model.parameters():
                if p.grad is not None:
                    p.grad.clamp_(-limit, limit)

    @undisturbed()
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
        if self.device.type != "cuda" or self._asked == "reference" or self.ranks.size > 1:
            metrics = self.meta_gradient(batch, total_tasks=total_tasks)
            self.apply_gradient()
            return metrics
        batch = own_share(batch, self.ranks, total_tasks)
        self._follow(True, batch)
        adam.set_learning_rate(self.optimizer, self.meta_lr())
        metrics = self._train(
            batch, lambda engine, *given: self._whole_step(engine, *given)(given[0].fields, *given[1:])
        )
        self.iteration += 1
        return StepMetrics(*(t.clone() for t in metrics))

    def _whole_step(
        self, engine: Engine, batch: EpisodeBatch, step_weights: Tensor | None, second_order: bool
    ) -> Graphed[..., StepMetrics]:
        engine.prepare(batch, step_weights is not None, second_order)
        generation = engine.generation
        if engine.name not in self._graphs or self._graphs[engine.name][0] != generation:
            # What was captured before the engine's memory moved would write to memory that is no longer its own.
            adam.start(self.optimizer)

            def update(
                fields: tuple[reference.Inputs, Tensor, reference.Inputs, Tensor],
                weights: Tensor | None,
                second_order: bool,
            ) -> StepMetrics:
                batch = EpisodeBatch(*fields, by_class=False)
                metrics = self._gradient(engine, batch, weights, second_order)
                adam.align(self.optimizer)
                self.optimizer.step()
                return metrics

            kept = functools.partial(adam.state, self.optimizer, self.model, self.rates)
            self._graphs[engine.name] = generation, graphed(update, preserve=kept)
        return self._graphs[engine.name][1]

    @undisturbed()
    def apply_gradient(self, step: Callable[[], Any] | None = None) -> None:
        """The Adam update for the gradients that :meth:`meta_gradient` left; advances the iteration.

        Args:
            step: makes the update in place of ``optimizer.step``: a framework's wrapper of it.
        """
        adam.set_learning_rate(self.optimizer, self.meta_lr())
        adam.align(self.optimizer)
        with one_thread(self.deterministic), _native.few(sum(p.numel() for p in self._trainable)):
            (self.optimizer.step if step is None else step)()
        self.iteration += 1

    @undisturbed()
    def adapt(self, support_x: reference.Inputs, support_y: Tensor, *, steps: int | None = None) -> Predictor:
        """Adapts to one support set, for inference.

        Args:
            support_x: inputs [n, ...], or a tuple or a dict of them.
            support_y: labels [n].
            steps: inner updates; ``config.eval_steps`` (or ``steps``) by default.

        Returns:
            A function from inputs [m, ...] to predictions [m, ...] of the adapted model, normalising as
            ``config.eval_stats`` says. It keeps a copy of the model: what happens to the learner later does not change
            it.

        Raises:
            ValueError: when the labels do not fit the model's predictions, or the model cannot be copied.
        """
        steps = self.config.evaluation_steps(steps)
        batch = EpisodeBatch.of(Episode(support_x, support_y, support_x, support_y))
        serving = self._follow(False, batch)
        batch = serving.as_taken(batch)
        x, y = batch[0].support_x, batch[0].support_y
        with serving.mistakes_named(batch), one_thread(self.deterministic):
            weights = adapt(self.model, x, y, self.rates, steps=steps, loss_fn=self.loss_fn, first_order=True)
        serving.settle()
        return Predictor(
            self.model,
            weights,
            step=steps - 1,
            stats=self.config.eval_stats,
            dtype=self.dtype,
            deterministic=self.deterministic,
        )

    @undisturbed()
    def evaluate(self, batch: EpisodeBatch | Episode, *, steps: int | None = None) -> Evaluation:
        """Adapts to every task of a batch and judges the target predictions; changes no state.

        Args:
            batch: tasks, or one task.
            steps: inner updates; ``config.eval_steps`` (or ``steps``) by default. Beyond ``config.steps`` the last
                rates and batch-norm rows are used again.
        """
        if isinstance(batch, Episode):
            batch = EpisodeBatch.of(batch)
        steps, stats = self.config.evaluation_steps(steps), self.config.eval_stats
        serving = self._follow(False, batch)

        def call(engine: Engine, batch: EpisodeBatch) -> Evaluation:
            logits = engine.evaluate(batch, steps=steps, stats=stats)
            serving.check_prediction(logits[-1], batch.target_y)
            with torch.no_grad():
                losses = [self.loss_fn(p, y) for p, y in zip(logits[-1], batch.target_y, strict=True)]
            accuracy = labels.accuracy(logits, batch.target_y, self.loss_fn, 2)
            return Evaluation(logits, torch.stack(losses), accuracy)

        return serving.serve(batch, ("evaluate", steps, stats), call)

    @undisturbed()
    def state_dict(self) -> dict[str, Any]:
        """Everything that training goes on from: model, rates, Adam, iteration."""
        self._follow()
        state = {
            "model": self.model.state_dict(),
            "rates": self.rates.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "iteration": self.iteration,
        }
        if self._head is not None and self._head != tuple(n for n, _ in adapting(self.model, self.config)):
            state["head"] = list(self._head)  # a learner made anew takes the last module registered at first
        return state

    @undisturbed()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`; what it is given stays its owner's.

        Raises:
            ValueError: when the state is of another model or configuration.
        """
        self._follow()
        if "head" in state and self._head is None:
            self._head, self._stale = tuple(state["head"]), True
            self._follow()
        try:
            self.model.load_state_dict(state["model"])
            self.rates.load_state_dict(state["rates"])
            adam.load(self.optimizer, state["optimizer"])
            self._resting.clear()
            self._graphs.clear()  # Adam's state lies elsewhere now
            self.iteration = int(state["iteration"])
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"state: expected the state of this model and configuration, {reason}"
            ) from error

    def explain(self) -> str:
        """Says which engine serves this model and why, and what it will do."""
        lines = [f"engine {self.engine.name}: {self.engine_reason}", f"adapts {', '.join(self.rates.names)}"]
        return "\n".join(filter(None, (*lines, self.engine.explain())))

    def __getstate__(self) -> dict[str, Any]:
        if self.ranks.group is not None:
            raise TypeError(
                "learner: expected one without a process group to copy or pickle, which belongs to this process; "
                "load its state_dict into another"
            )
        self._follow()
        bound = ("_serving", "_graphs", "_reduction")
        return {name: value for name, value in vars(self).items() if name not in bound}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._resting = {id(p): (p, moments) for p, moments in self._resting.values()}
        self._bind()

    @undisturbed()
    def __deepcopy__(self, memo: dict[int, Any]) -> MAMLPlusPlus:
        state = self.__getstate__()
        if (name := tied_function(self.model)) is not None:
            raise ValueError(
                f"model: expected functions that do not close over parts of it to copy, {name} does"
            )
        memo |= detached_memo(self.model)
        memo[id(self)] = new = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(state, memo))
        return new
