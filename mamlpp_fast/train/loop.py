"""The training loop: meta-updates, validation, checkpoints, the final test."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from mamlpp_fast.distributed import RankError, Ranks
from mamlpp_fast.engine import EngineName, Precision
from mamlpp_fast.learner import NonFiniteLossError
from mamlpp_fast.machine import peak_memory_mib
from mamlpp_fast.train._resumable import check_training
from mamlpp_fast.train.build import build_learner, device_name, fingerprint, load_data, make_sampler, versions
from mamlpp_fast.train.config import TrainConfig
from mamlpp_fast.train.evaluate import Predictions, Score, predict, score, score_models
from mamlpp_fast.train.files import run_lock
from mamlpp_fast.train.learned import batch_norms, inner_rates
from mamlpp_fast.train.progress import Curves, Progress
from mamlpp_fast.train.record import Record
from mamlpp_fast.train.run_folder import finished_summary, open_folder, put_model, ranked
from mamlpp_fast.train.signals import Interrupted, StopSignal

__all__ = ["NonFiniteParametersError", "train"]

# Iterations between two reads from a GPU; on the CPU every loss is looked at.
_GPU_WINDOW = 25


class NonFiniteParametersError(ArithmeticError):
    """A meta-update made a parameter NaN or infinite although its losses were finite."""


def train(
    config: TrainConfig,
    *,
    out: str | Path,
    preset: str | None = None,
    data_path: str | Path | None = None,
    engine: EngineName = "auto",
    precision: Precision = "float32",
    device: torch.device | str = "cpu",
    max_iters: int | None = None,
    quiet: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Trains, validates each epoch, keeps the best checkpoints and tests; goes on where ``out`` holds a stopped run.

    A run that was killed at any moment ends, started again, with the result of an undisturbed one, bit for bit on the
    same machine. Uses torch's global random generators.

    Args:
        config: the settings of the run.
        out: the run's folder, made if need be.
        preset: name of the settings, for the record.
        data_path: where the data set lies; see :func:`mamlpp_fast.data.load`.
        engine: see :class:`mamlpp_fast.MAMLPlusPlus`, as for precision and device.
        precision: ditto.
        device: ditto.
        max_iters: stop after so many meta-updates in all, then test; a later call goes on.
        quiet: print nothing.
        process_group: the processes that share the tasks of every meta-batch, of validation and test; all call this
            alike, rank 0 alone writes and prints. Another number of them may go on with a run.

    Returns:
        the content of ``summary.json``.

    Raises:
        ValueError: when ``out`` holds a run with other settings or is in use, or data and settings do not fit.
        OSError: when ``out`` cannot be written; the last checkpoint stays whole.
        NonFiniteLossError: names epoch, iteration and task; the last good checkpoint stays.
        mamlpp_fast.train.signals.Interrupted: after SIGINT or SIGTERM on any rank, with everything saved.
        mamlpp_fast.distributed.RankError: when another rank is gone; the last checkpoint stays.
    """
    folder = Path(out)
    ranks = Ranks(process_group)
    with ExitStack() as held:
        target = config.iterations if max_iters is None else min(max_iters, config.iterations)
        identity = config.deciding() | {
            "engine": engine,
            "precision": precision,
            "device": torch.device(device).type,
        }
        record = {"preset": preset, "data": None if data_path is None else str(data_path), **identity}

        def begin() -> dict[str, Any] | None:
            if config.tasks < ranks.size:
                raise ValueError(
                    f"tasks: expected at least one for each of {ranks.size} ranks, got {config.tasks}"
                )
            held.enter_context(run_lock(folder))
            open_folder(folder, identity, record)
            return finished_summary(folder, target)

        finished = ranks.from_first(begin)
        if finished is not None:
            if ranks.first and not quiet:
                print(f"{folder} holds this run, finished after {finished['iterations']} iterations.")
            return finished
        trainer = _Trainer(
            config, folder, preset, data_path, engine, precision, torch.device(device), target, quiet, ranks
        )
        with StopSignal() as trainer.stop:
            return trainer.run()


class _Trainer:
    """One process's share of a run."""

    stop: StopSignal

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        preset: str | None,
        data_path: str | Path | None,
        engine: EngineName,
        precision: Precision,
        device: torch.device,
        target: int,
        quiet: bool,
        ranks: Ranks,
    ) -> None:
        self.config = config
        self.folder = folder
        self.record = Record(folder, ranks, device)
        self.preset = preset
        self.precision: Precision = precision
        self.device = device
        self.target = target
        data = load_data(config, data_path)
        self.fingerprint = fingerprint(data)
        if ranks.from_first(lambda: self.fingerprint) != self.fingerprint:
            raise ValueError(f"--data: expected the data of rank 0, rank {ranks.rank} has other ones")
        self.samplers = {
            split: make_sampler(config, data, split, device, precision) for split in ("train", "val", "test")
        }
        if device.type == "cuda":
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.benchmark = False
        self.learner = build_learner(
            config,
            data.channels,
            data.image_size,
            engine=engine,
            precision=precision,
            device=device,
            process_group=ranks.group,
        )
        self.ranks = self.learner.ranks
        torch.manual_seed(config.training_seed)
        self.epochs_done = 0
        self.best: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.train_seconds = 0.0
        # Iterations that other code made, before an import.
        self.untimed = 0
        # Iterations from which a process went on with the run.
        self.resumed_at: list[int] = []
        # Sums over the epoch's iterations: loss, accuracy.
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        window = _GPU_WINDOW if device.type == "cuda" else 1
        self.losses = torch.zeros(window, config.tasks, dtype=self.learner.dtype, device=device)
        self.unread = 0
        self.resumed = self._resume()
        self.clock = self.saved_at = time.perf_counter()
        self.progress = Progress(target, self.learner.iteration, config.tasks, quiet=quiet or not ranks.first)
        self.curves = Curves(folder / "tensorboard" if ranks.first else None, self.epochs_done)

    def run(self) -> dict[str, Any]:
        try:
            self._introduce()
            per_epoch = self.config.iterations_per_epoch
            while True:
                if self.learner.iteration == (self.epochs_done + 1) * per_epoch:
                    self._end_epoch()
                if self.learner.iteration >= self.target:
                    break
                self._step()
            return self._finish()
        finally:
            self.progress.close()
            self.curves.close()

    def _introduce(self) -> None:
        c, say = self.config, self.progress.say
        split = self.samplers["train"].split
        say(
            f"{self.preset or 'run'}: {c.ways}-way {c.shots}-shot, {c.tasks} tasks a batch, {self.target} iterations; "
            f"{c.dataset}, {split.num_classes} training classes"
        )
        shared = f", shared by {self.ranks.size} ranks" if self.ranks.size > 1 else ""
        say(self.learner.explain().splitlines()[0] + f"; {self.precision} on {self.device}{shared}")
        if self.resumed:
            say(f"going on from iteration {self.learner.iteration} in {self.folder}")

    def _step(self) -> None:
        tasks = self.config.tasks
        share = self.ranks.share(tasks)
        batch = self.samplers["train"].batch(self.learner.iteration * tasks + share.start, len(share))
        self.ranks.note = self.stop.received or 0
        metrics = self.learner.meta_step(batch, total_tasks=tasks)
        self.losses[self.unread].copy_(metrics.task_losses)
        self.sums += torch.stack([metrics.loss.detach(), metrics.accuracy.to(metrics.loss.dtype)])
        self.unread += 1
        if self.unread == len(self.losses):
            self._read()
        if number := self._asked_to_stop():
            self._leave(number)
        if time.perf_counter() - self.saved_at >= self.config.checkpoint_seconds:
            self._save()

    def _asked_to_stop(self) -> int:
        """The signal that this process or, when the ranks next compare notes, any other received; 0 without."""
        if self.ranks.size == 1:
            return self.stop.received or 0
        due = self.learner.iteration % len(self.losses) == 0
        return int(self.ranks.notes.max()) if due else 0

    def _leave(self, number: int) -> NoReturn:
        """Saves and stops, all ranks together: a launcher ends the others once one has left."""
        if self.learner.iteration > self._saved_iteration:
            self._save()
        self.ranks.largest(0)
        raise Interrupted(number)

    def _read(self) -> None:
        """Looks at the losses since the last look, and shows them.

        Raises:
            NonFiniteLossError: names epoch, iteration and task of the first that is not finite.
        """
        if self.unread == 0:
            return
        first = self.learner.iteration - self.unread
        bad = (~torch.isfinite(self.losses[: self.unread])).nonzero().tolist()
        self.unread = 0
        if bad:
            row, task = bad[0]
            iteration = first + row
            raise NonFiniteLossError(iteration, iteration // self.config.iterations_per_epoch, task)
        self._tick(training=True)
        made = self.learner.iteration - self.epochs_done * self.config.iterations_per_epoch
        loss, accuracy = (self.sums / made).tolist()
        self.progress.update(self.learner.iteration, self.epochs_done, loss, accuracy)

    def _tick(self, *, training: bool) -> None:
        now = time.perf_counter()
        self.seconds += now - self.clock
        if training:
            self.train_seconds += now - self.clock
        self.clock = now

    def _check_ranks(self) -> None:
        modules = (self.learner.model, self.learner.rates)
        if not self.ranks.agree(t for m in modules for t in m.state_dict().values()):
            raise RankError(
                f"parameters: expected the same on every rank, they differ at iteration {self.learner.iteration}"
            )

    def _check_parameters(self) -> None:
        """A checkpoint is only ever written of finite parameters."""
        modules = {"model": self.learner.model, "rates": self.learner.rates}
        for kind, module in modules.items():
            for name, p in module.named_parameters():
                if not bool(torch.isfinite(p).all()):
                    last = self.learner.iteration - 1
                    raise NonFiniteParametersError(
                        f"{kind}.{name}: expected finite after the update, got NaN or infinity at "
                        f"epoch {last // self.config.iterations_per_epoch}, iteration {last}, "
                        f"tasks 0 to {self.config.tasks - 1}"
                    )

    def _end_epoch(self) -> None:
        self._read()
        self._check_ranks()
        c, epoch = self.config, self.epochs_done
        if time.perf_counter() - self.saved_at >= c.checkpoint_seconds:
            self._save()
        validation, steps = self._validate()
        entry = self._save_model(f"epoch-{epoch:04d}.pt", epoch, validation)
        best = ranked([*self.best, entry])
        self.best = best[: c.ensemble]
        metrics = self._metrics(epoch, validation, steps, best[0] is entry)
        self.record.metrics_bytes = self.record.append(metrics)
        self.epochs_done += 1
        self.sums.zero_()
        self._save()
        for dropped in best[c.ensemble :]:
            self.record.drop(dropped["file"])
        self.curves.add(metrics)
        self._announce(metrics)

    def _announce(self, metrics: Mapping[str, Any]) -> None:
        rate = self.config.tasks / metrics["seconds_per_iteration"]
        self.progress.say(
            f"epoch {metrics['epoch']}: loss {metrics['train_loss']:.4f}, "
            f"training accuracy {100 * metrics['train_accuracy']:.2f} %, "
            f"validation {100 * metrics['val_accuracy']:.2f} %{' (best)' if metrics['best'] else ''}, "
            f"{rate:.1f} tasks/s{self.progress.left(metrics['iteration'])}"
        )

    def _metrics(self, epoch: int, validation: Score, steps: list[float], best: bool) -> dict[str, Any]:
        """The epoch's line; called while the learner's schedules may already stand at the next epoch."""
        learner, c = self.learner, self.config
        made = learner.iteration - epoch * c.iterations_per_epoch
        loss, accuracy = (self.sums / made).tolist()
        after = learner.iteration
        return {
            "epoch": epoch,
            "iteration": after,
            "train_loss": loss,
            "train_accuracy": accuracy,
            "val_loss": validation.loss,
            "val_accuracy": validation.accuracy,
            "val_accuracy_ci95": validation.ci95,
            "best": best,
            **learner.schedule(epoch),
            "val_step_accuracy": steps,
            "inner_rates": inner_rates(learner),
            "batch_norm": batch_norms(learner.model),
            "peak_memory_mib": round(peak_memory_mib(self.device), 1),
            "seconds": self.seconds,
            "seconds_per_iteration": self.train_seconds / max(after - self.untimed, 1),
        }

    def _validate(self) -> tuple[Score, list[float]]:
        """The validation's score, and the accuracy after every inner step."""
        logits, labels, accuracy = self._predict("val")
        return score(logits, labels, models=1, **self.config.conditions()), accuracy.tolist()

    def _predict(self, split: str) -> Predictions:
        c = self.config
        num_tasks = c.val_tasks if split == "val" else c.test_tasks
        result = predict(self.learner, self.samplers[split], num_tasks, c.tasks, between=self._give_way)
        self._tick(training=False)
        return result

    def _give_way(self) -> None:
        """Stops between evaluation batches; training itself stands at a whole iteration then."""
        if number := self.ranks.largest(self.stop.received or 0):
            self._leave(number)

    def _finish(self) -> dict[str, Any]:
        """Tests the best checkpoint and the ensemble, and writes the summary."""
        c, learner = self.config, self.learner
        models = list(self.best)
        if learner.iteration % c.iterations_per_epoch:
            # Cut short within an epoch: what it reached is judged too, beside the checkpoint that a longer run goes
            # on from.
            self._read()
            self._save()
            validation, steps = self._validate()
            entry = self._save_model(f"iteration-{learner.iteration:07d}.pt", self.epochs_done, validation)
            models = ranked([*models, entry])
            self.record.append(self._metrics(self.epochs_done, validation, steps, models[0] is entry))
            models = models[: c.ensemble]
        iterations = learner.iteration

        def put(file: str) -> None:
            path = self.record.checkpoints / file
            put_model(path, self.record.load(path, "model"), learner)

        single, ensemble = score_models(
            (partial(put, entry["file"]) for entry in models),
            partial(self._predict, "test"),
            self.config.conditions(),
        )
        self.progress.close()
        summary = {
            "preset": self.preset,
            "test_accuracy": single.accuracy,
            "test_accuracy_ci95": single.ci95,
            "test_loss": single.loss,
            "ensemble_test_accuracy": ensemble.accuracy,
            "ensemble_test_accuracy_ci95": ensemble.ci95,
            "ensemble_size": ensemble.models,
            "best_val_accuracy": models[0]["val_accuracy"],
            "best_epoch": models[0]["epoch"],
            "iterations": iterations,
            "seconds": self.seconds,
            "seconds_per_iteration": self.train_seconds / max(iterations - self.untimed, 1),
            "resumed_at": self.resumed_at,
            "engine": learner.training_engine.name,
            "precision": self.precision,
            "device": device_name(self.device),
            "ranks": self.ranks.size,
            "seed": c.seed,
            "init_seed": c.initial_seed,
            "task_seed": c.training_seed,
            "dataset": c.dataset,
            "ways": c.ways,
            "shots": c.shots,
            "targets": c.targets,
            "test_tasks": c.test_tasks,
            "eval_stats": c.eval_stats,
            "eval_steps": single.steps,
            "models": [m["file"] for m in models],
            "versions": versions(),
        }
        self.record.summarise(summary)
        self.progress.say(f"test accuracy: {single.describe()}")
        if ensemble.models > 1:
            self.progress.say(f"test accuracy: {ensemble.describe()}")
        return summary

    # Checkpoints ---------------------------------------------------------------------------------------------------

    def _save_model(self, name: str, epoch: int, validation: Score) -> dict[str, Any]:
        entry = {
            "file": name,
            "epoch": epoch,
            "iteration": self.learner.iteration,
            "val_accuracy": validation.accuracy,
        }
        self._check_parameters()
        state = {"model": self.learner.model.state_dict(), "rates": self.learner.rates.state_dict()}
        content = state | entry | {"config": self.config.deciding()}
        self.record.save(self.record.checkpoints / name, "model", content)
        return entry

    def _save(self) -> None:
        """Writes everything that training goes on from."""
        self._read()
        self._check_parameters()
        self._tick(training=False)
        on_gpu = self.device.type == "cuda"
        content = {
            "config": self.config.deciding(),
            "engine": self.learner.training_engine.name,
            "data": self.fingerprint,
            "learner": self.learner.state_dict(),
            "epochs_done": self.epochs_done,
            "sums": self.sums,
            "best": self.best,
            "metrics_bytes": self.record.metrics_bytes,
            "seconds": self.seconds,
            "train_seconds": self.train_seconds,
            "untimed": self.untimed,
            "resumed_at": self.resumed_at,
            "rng_cpu": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self.device) if on_gpu else None,
            "environment": self._environment(),
        }
        self.record.save(self.record.latest, "training", content)
        self._saved_iteration = self.learner.iteration
        self.saved_at = time.perf_counter()

    _saved_iteration = 0

    def _environment(self) -> dict[str, Any]:
        return {
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "device": device_name(self.device),
            "ranks": self.ranks.size,
        }

    def _resume(self) -> bool:
        """Goes back to the last checkpoint, and undoes what was written after it; False where there is none."""
        content = self.record.load_latest()
        if content is not None:
            self._load(content)
        self.record.undo(entry["file"] for entry in self.best)
        return content is not None

    def _load(self, content: Mapping[str, Any]) -> None:
        check_training(self.record.latest, content, self.config, self.fingerprint, self.learner)
        self.learner.load_state_dict(content["learner"])
        self.epochs_done = content["epochs_done"]
        self.sums = content["sums"].to(self.device)
        self.best = content["best"]
        self.record.metrics_bytes = content["metrics_bytes"]
        self.seconds = content["seconds"]
        self.train_seconds = content["train_seconds"]
        self.untimed = content.get("untimed", 0)
        self.resumed_at = [*content.get("resumed_at", ()), self.learner.iteration]
        torch.set_rng_state(content["rng_cpu"].cpu())
        if content["rng_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(content["rng_cuda"].cpu(), self.device)
        self._saved_iteration = self.learner.iteration
