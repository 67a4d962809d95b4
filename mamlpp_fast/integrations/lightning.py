"""MAML++ under PyTorch Lightning 2: a module around the learner, and the tasks of a data set as a data module.

Needs ``lightning`` or ``pytorch_lightning`` (``pip install 'mamlpp_fast[lightning]'``); where both are there, the one
that was imported before.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from mamlpp_fast.config import MAMLConfig
from mamlpp_fast.data import EpisodeSampler
from mamlpp_fast.distributed import Ranks
from mamlpp_fast.engine import EngineName, Precision
from mamlpp_fast.episodes import EpisodeBatch
from mamlpp_fast.learner import MAMLPlusPlus
from mamlpp_fast.reference import Inputs, LossFn

__all__ = ["EpisodeDataModule", "MAMLPlusPlusModule"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_KEY = "mamlpp_fast"


def _lightning() -> Any:
    for name in _PACKAGES:
        if name in sys.modules:
            return sys.modules[name]
    for name in _PACKAGES:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            return importlib.import_module(name)
    raise ImportError(
        "mamlpp_fast.integrations.lightning: expected the package lightning or pytorch_lightning, found neither; "
        "pip install 'mamlpp_fast[lightning]'"
    )


if TYPE_CHECKING:

    class _Module(nn.Module):
        automatic_optimization: bool
        trainer: Any
        global_rank: int
        optimizers: Callable[[], Any]
        log: Callable[..., None]
        log_dict: Callable[..., None]

    class _DataModule:
        trainer: Any
else:
    _pl = _lightning()
    _Module, _DataModule = _pl.LightningModule, _pl.LightningDataModule


class MAMLPlusPlusModule(_Module):
    """A learner as a ``LightningModule``: training equals :meth:`mamlpp_fast.MAMLPlusPlus.meta_step`, step by step.

    A batch is an :class:`mamlpp_fast.EpisodeBatch` or its four tensors. Logs ``train_loss``, ``train_accuracy`` and
    ``meta_lr``, and loss and accuracy of validation and test. With several devices (strategy ``"ddp"``) every process
    brings as many tasks as the others; together, in the order of ranks, they are the meta-batch. Lightning's
    checkpoints hold parameters, running statistics, inner rates, Adam and the iteration.

    Args:
        model: see :class:`mamlpp_fast.MAMLPlusPlus`, as for the others.
        config: ditto; its ``epochs`` and ``iterations_per_epoch`` drive the schedules, whatever Lightning's epochs are.
        engine: ditto.
        precision: ditto; the trainer's own precision stays ``"32-true"``.
        loss_fn: ditto.

    Attributes:
        learner: the learner; on the trainer's device from its ``setup`` on.

    Raises:
        ValueError: in a trainer with another precision.
    """

    def __init__(
        self,
        model: nn.Module,
        config: MAMLConfig | None = None,
        *,
        engine: EngineName = "auto",
        precision: Precision = "float32",
        loss_fn: LossFn | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self._options: dict[str, Any] = {"engine": engine, "precision": precision, "loss_fn": loss_fn}
        self._adopt(MAMLPlusPlus(model, config, **self._options))

    def _adopt(self, learner: MAMLPlusPlus) -> None:
        self.learner = learner
        # As submodules: Lightning moves and saves them.
        self.model, self.rates = learner.model, learner.rates

    def setup(self, stage: str) -> None:
        """Builds the learner anew where the trainer trains, with the processes it has."""
        trainer = self.trainer
        if trainer.precision != "32-true":
            raise ValueError(
                f"Trainer(precision=...): expected 32-true, got {trainer.precision}; "
                "give the module itself a precision"
            )
        group = dist.group.WORLD if trainer.world_size > 1 else None
        before = self.learner
        state = before.state_dict()
        learner = MAMLPlusPlus(
            before.model,
            before.config,
            device=trainer.strategy.root_device,
            process_group=group,
            **self._options,
        )
        learner.rates.load_state_dict(state["rates"])
        if before.iteration:
            learner.optimizer.load_state_dict(state["optimizer"])
        learner.iteration = before.iteration
        self._adopt(learner)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.learner.optimizer

    def forward(self, support_x: Inputs, support_y: Tensor, x: Inputs, *, steps: int | None = None) -> Tensor:
        """Predictions for ``x`` after adapting to a support set; see :meth:`mamlpp_fast.MAMLPlusPlus.adapt`."""
        with torch.inference_mode(False):
            prediction = self.learner.adapt(support_x, support_y, steps=steps)(x)
        return prediction

    def training_step(self, batch: Any, batch_idx: int) -> None:
        batch, learner = _episodes(batch), self.learner
        total = batch.num_tasks * learner.ranks.size
        metrics = learner.meta_gradient(batch, total_tasks=total)
        # Through Lightning's wrapper, which counts the steps.
        learner.apply_gradient(self.optimizers().step)
        values = {
            "train_loss": metrics.loss,
            "train_accuracy": metrics.accuracy,
            "meta_lr": learner.meta_lr(),
        }
        self.log_dict(values, batch_size=total, prog_bar=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._judge("val", _episodes(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._judge("test", _episodes(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Target predictions after the last inner step, [tasks, m, ways]."""
        with torch.inference_mode(False):
            return self.learner.evaluate(_episodes(batch)).logits[-1]

    def _judge(self, stage: str, batch: EpisodeBatch) -> None:
        with torch.inference_mode(False):
            result = self.learner.evaluate(batch)
        values = {f"{stage}_loss": result.loss.mean(), f"{stage}_accuracy": result.accuracy[-1].mean()}
        self.log_dict(values, batch_size=batch.num_tasks, prog_bar=True, on_epoch=True, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[_KEY] = {"iteration": self.learner.iteration, "config": self.learner.config.to_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the iteration over; Lightning itself restores parameters and Adam.

        Raises:
            ValueError: for a checkpoint of something else or of another configuration.
        """
        if _KEY not in checkpoint:
            raise ValueError(
                f"ckpt_path: expected a checkpoint of {type(self).__name__}, got another module's"
            )
        found, own = checkpoint[_KEY], self.learner.config
        if MAMLConfig.from_dict(found["config"]) != own:
            raise ValueError(f"ckpt_path: expected a checkpoint of {own}, got one of {found['config']}")
        self.learner.iteration = int(found["iteration"])


class EpisodeDataModule(_DataModule):
    """The tasks of samplers as a ``LightningDataModule``; a resumed run goes on with the task it stopped before.

    Training tasks follow from the learner's iteration: batch ``i`` is tasks ``i * tasks`` .. ``(i + 1) * tasks - 1``,
    each process drawing its share. Needs a :class:`MAMLPlusPlusModule`.

    Args:
        train: sampler of the training tasks.
        val: sampler of the validation tasks, the same ones every time; None for none.
        test: ditto for the test.
        tasks: tasks of a meta-batch over all processes, a multiple of their number.
        iterations: batches of a Lightning epoch.
        val_tasks: tasks of a validation.
        test_tasks: tasks of the test.
    """

    def __init__(
        self,
        train: EpisodeSampler,
        val: EpisodeSampler | None = None,
        test: EpisodeSampler | None = None,
        *,
        tasks: int = 8,
        iterations: int = 500,
        val_tasks: int = 600,
        test_tasks: int = 600,
    ) -> None:
        super().__init__()
        self.train, self.val, self.test = train, val, test
        self.tasks, self.iterations = tasks, iterations
        self.val_tasks, self.test_tasks = val_tasks, test_tasks

    def train_dataloader(self) -> DataLoader[EpisodeBatch]:
        ranks = self._ranks()
        if self.tasks % ranks.size:
            raise ValueError(
                f"tasks: expected a multiple of the {ranks.size} processes, got {self.tasks} "
                "(Lightning's processes take as many tasks each)"
            )
        share = ranks.share(self.tasks)

        def batches() -> Iterator[EpisodeBatch]:
            first = self.trainer.lightning_module.learner.iteration
            # Resumed within an epoch, the trainer stops before the end.
            for i in range(first, first + self.iterations):
                yield self.train.batch(i * self.tasks + share.start, len(share))

        return _loader(batches, self.iterations)

    def val_dataloader(self) -> Sequence[DataLoader[EpisodeBatch]]:
        return self._judged(self.val, self.val_tasks)

    def test_dataloader(self) -> Sequence[DataLoader[EpisodeBatch]]:
        return self._judged(self.test, self.test_tasks)

    def _judged(self, sampler: EpisodeSampler | None, tasks: int) -> Sequence[DataLoader[EpisodeBatch]]:
        if sampler is None:
            return []
        ranks = self._ranks()
        if tasks % ranks.size:
            raise ValueError(f"val_tasks, test_tasks: expected a multiple of {ranks.size}, got {tasks}")
        share = ranks.share(tasks)
        starts = range(share.start, share.stop, self.tasks)

        def batches() -> Iterator[EpisodeBatch]:
            for start in starts:
                yield sampler.batch(start, min(self.tasks, share.stop - start))

        return [_loader(batches, len(starts))]

    def _ranks(self) -> Ranks:
        return Ranks(dist.group.WORLD if self.trainer.world_size > 1 else None)


class _Batches(IterableDataset[EpisodeBatch]):
    """Iterable, so that Lightning puts no sampler of its own in front."""

    def __init__(self, make: Callable[[], Iterator[EpisodeBatch]], length: int) -> None:
        self.make = make
        self.length = length

    def __iter__(self) -> Iterator[EpisodeBatch]:
        return self.make()

    def __len__(self) -> int:
        return self.length


class _Loader(DataLoader[EpisodeBatch]):
    """Tells Lightning that it can be resumed within an epoch: the learner's iteration says where."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _loader(make: Callable[[], Iterator[EpisodeBatch]], length: int) -> DataLoader[EpisodeBatch]:
    return _Loader(_Batches(make, length), batch_size=None)


def _episodes(batch: Any) -> EpisodeBatch:
    if isinstance(batch, EpisodeBatch):
        return batch
    if isinstance(batch, list | tuple) and len(batch) == 4:
        return EpisodeBatch(*batch)
    raise TypeError(
        "batch: expected an EpisodeBatch or (support_x, support_y, target_x, target_y), "
        f"got {type(batch).__name__}"
    )
