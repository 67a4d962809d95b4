"""Trains for hours in every form the fused engine has, and judges whether memory, files or threads grow.

    python -m bench.soak [--minutes 120] [--share 0.25] [--json FILE]

One process: two learners that live as long as it does go through first and second order, multi-step loss on and off,
an evaluation, a checkpoint and its reading back; every few minutes a whole ``train`` run starts and ends in a fresh
folder. Once a minute resident memory, open files, threads and Python's objects are written down. The verdict is the
least-squares slope after the warm-up, the first quarter of the time: at most 2 MiB an hour, no file or thread more.
Exits with 1 where something grows. ``--share`` of one core is used: it sleeps the rest.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness import keep, parser_of
from mamlpp_fast.learner import MAMLPlusPlus
from mamlpp_fast.train import TrainConfig, load_checkpoint, train
from mamlpp_fast.train.build import build_learner, load_data, make_sampler
from mamlpp_fast.train.checkpoint import save_checkpoint

ALLOWED_MIB_AN_HOUR = 2.0
WARM_UP = 0.25
_RUN_EVERY_SECONDS = 240.0
_SMALL: dict[str, Any] = {"dataset": "strokes", "filters": 16, "tasks": 4, "val_tasks": 8, "test_tasks": 8}
# An epoch an iteration: the iteration number alone chooses the form. First order with and without multi-step loss,
# then second order with and without.
_FORMS = (
    TrainConfig(**_SMALL, iterations_per_epoch=1, epochs=4, da_epoch=1, msl_epochs=1),
    TrainConfig(**_SMALL, iterations_per_epoch=1, epochs=4, da_epoch=0, msl_epochs=2),
)
_RUN = TrainConfig(**_SMALL, epochs=2, iterations_per_epoch=2, checkpoint_seconds=0.0)


def sample() -> dict[str, float]:
    """Resident memory [MiB], open files, threads and Python objects of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "rss_mib": int(status["VmRSS"].split()[0]) / 1024,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "objects": len(gc.get_objects()),
    }


def slope(rows: Sequence[dict[str, float]], key: str) -> float:
    """Least-squares slope of a column, an hour."""
    hours = torch.tensor([r["seconds"] / 3600 for r in rows], dtype=torch.float64)
    values = torch.tensor([r[key] for r in rows], dtype=torch.float64)
    hours = hours - hours.mean()
    return float((hours * (values - values.mean())).sum() / (hours * hours).sum())


def verdict(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """What grew after the warm-up; ``ok`` where nothing did."""
    settled = [r for r in rows if r["seconds"] >= WARM_UP * rows[-1]["seconds"]]
    if len(settled) < 3:
        return {"ok": False, "reason": "expected at least three samples after the warm-up"}
    growth = slope(settled, "rss_mib")
    more = {key: settled[-1][key] - settled[0][key] for key in ("files", "threads")}
    return {
        "ok": growth <= ALLOWED_MIB_AN_HOUR and all(n <= 0 for n in more.values()),
        "rss_mib_an_hour": growth,
        "allowed_mib_an_hour": ALLOWED_MIB_AN_HOUR,
        "rss_mib": [min(r["rss_mib"] for r in settled), max(r["rss_mib"] for r in settled)],
        "objects_an_hour": slope(settled, "objects"),
        "more_files": more["files"],
        "more_threads": more["threads"],
        "warm_up_seconds": settled[0]["seconds"],
        "samples": len(settled),
        "iterations": rows[-1]["iterations"],
        "runs": rows[-1]["runs"],
    }


class Work:
    """The two learners and what is done with them; a step is one meta-update with something beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.iterations = 0
        self.runs = 0
        self.learners: list[tuple[MAMLPlusPlus, Any]] = []
        data = load_data(_FORMS[0], None)
        for config in _FORMS:
            learner = build_learner(config, data.channels, data.image_size, engine="fused")
            sampler = make_sampler(config, data, "train", torch.device("cpu"), "float32")
            self.learners.append((learner, sampler))

    def steps(self) -> Iterator[None]:
        while True:
            for index, (learner, sampler) in enumerate(self.learners):
                start = learner.state_dict()["iteration"] % 4
                for form in range(start, start + 4):
                    learner.iteration = form % 4
                    learner.meta_step(sampler.batch(self.iterations * 4, 4))
                    self.iterations += 1
                    yield
                learner.evaluate(sampler.batch(self.iterations * 4, 4))
                yield
                path = self.folder / f"learner-{index}.pt"
                save_checkpoint(path, "training", {"learner": learner.state_dict()})
                learner.load_state_dict(load_checkpoint(path, "training")["learner"])
                yield

    def run(self) -> None:
        """A whole training run with everything it writes, in a folder of its own."""
        with tempfile.TemporaryDirectory(dir=self.folder) as out:
            train(_RUN, out=out, engine="fused", quiet=True)
        self.runs += 1


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--share", type=float, default=0.25, help="of one core")
    options = parser.parse_args()
    rows: list[dict[str, float]] = []
    about = {"seconds": 60 * options.minutes, "share": options.share}
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder))
        steps = work.steps()
        start = time.monotonic()
        sampled = ran = start - 60
        while (now := time.monotonic()) < start + 60 * options.minutes:
            busy = time.thread_time()
            next(steps)
            if now - ran >= _RUN_EVERY_SECONDS:
                ran = now
                work.run()
            if now - sampled >= 60:
                sampled = now
                gc.collect()
                counts = {"iterations": work.iterations, "runs": work.runs}
                rows.append({"seconds": now - start} | counts | sample())
                keep(options.json, rows, **about, verdict=verdict(rows))
            time.sleep((time.thread_time() - busy) * (1 / options.share - 1))
    result = verdict(rows)
    keep(options.json, rows, **about, verdict=result)
    print(result)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
