"""What a user sees of a run: a progress bar, a line per epoch, and TensorBoard curves when it is installed."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

__all__ = ["Curves", "Progress", "duration"]


def duration(seconds: float) -> str:
    """A time in two figures: ``40 s``, ``12 min``, ``2.9 h``, ``3.1 days``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


class Progress:
    """A bar of tasks on a terminal; elsewhere only the lines.

    Args:
        total: iterations of the whole run.
        done: iterations made before this process.
        tasks: tasks of an iteration.
        quiet: print nothing at all.
    """

    def __init__(self, total: int, done: int, tasks: int, *, quiet: bool = False) -> None:
        self.tasks = tasks
        self.quiet = quiet
        self._bar = tqdm(
            total=total * tasks,
            initial=done * tasks,
            unit="task",
            disable=True if quiet else None,
            dynamic_ncols=True,
            file=sys.stderr,
        )
        self._shown = self._done = done
        self._total = total
        self._begun = time.monotonic()

    def update(self, iteration: int, epoch: int, loss: float, accuracy: float) -> None:
        """Moves the bar to ``iteration`` with the running epoch's figures."""
        self._bar.set_description_str(f"epoch {epoch}", refresh=False)
        self._bar.set_postfix_str(f"loss {loss:.4f}, accuracy {100 * accuracy:.1f} %", refresh=False)
        self._bar.update((iteration - self._shown) * self.tasks)
        self._shown = iteration

    def left(self, iteration: int) -> str:
        """Half a sentence on how long the rest takes at this process's speed so far; empty at the end."""
        made, rest = iteration - self._done, self._total - iteration
        if made < 1 or rest < 1:
            return ""
        return f", {duration(rest * (time.monotonic() - self._begun) / made)} to go"

    def say(self, text: str) -> None:
        """Prints a line above the bar, on standard output."""
        if not self.quiet:
            with self._bar.external_write_mode(file=sys.stdout):
                print(text, flush=True)

    def close(self) -> None:
        self._bar.close()


class Curves:
    """TensorBoard curves in ``folder``, where one is given and TensorBoard is installed; nothing otherwise."""

    def __init__(self, folder: Path | None, epochs_done: int) -> None:
        self._writer: Any = None
        if folder is not None and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=epochs_done)

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Adds every number of an epoch's metrics, and each inner rate of each step."""
        if self._writer is None:
            return
        epoch = metrics["epoch"]
        for key, value in metrics.items():
            if isinstance(value, int | float) and key != "epoch":
                self._writer.add_scalar(key, value, epoch)
        for name, rates in metrics["inner_rates"].items():
            for step, rate in enumerate(rates):
                self._writer.add_scalar(f"inner_rates/{name}/step{step}", rate, epoch)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
