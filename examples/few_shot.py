"""What the examples share: their arguments, tasks of images, and a test accuracy.

Tasks come from ``strokes``, made on the spot, or with ``--data PATH`` from Omniglot (the folder, or its zip files).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

import torch

import mamlpp_fast as mf
from mamlpp_fast import data
from mamlpp_fast.train.evaluate import mean_and_interval


def arguments(
    text: str | None,
    argv: Sequence[str] | None,
    *,
    iterations: int,
    test_tasks: int = 100,
    images: bool = True,
) -> argparse.Namespace:
    """The command line of an example, with its own defaults; ``argv`` None reads the real one."""
    parser = argparse.ArgumentParser(description=(text or "").splitlines()[0])
    parser.add_argument("--iterations", type=int, default=iterations, metavar="N", help="meta-updates")
    parser.add_argument(
        "--test-tasks", type=int, default=test_tasks, metavar="N", help="held-out tasks at the end"
    )
    parser.add_argument("--seed", type=int, default=0)
    if images:
        parser.add_argument("--data", metavar="PATH", help="Omniglot instead of the embedded strokes")
    found = parser.parse_args(argv)
    for name in ("iterations", "test_tasks"):
        if (value := getattr(found, name)) < 1:
            parser.error(f"argument --{name.replace('_', '-')}: expected at least 1, got {value}")
    if images:
        try:
            dataset(found.data)
        except data.DataError as error:
            parser.error(f"argument --data: {error}")
    torch.manual_seed(found.seed)
    return found


@functools.cache
def dataset(path: str | None) -> data.FewShotData:
    return data.load("omniglot", path) if path else data.load("strokes")


def samplers(args: argparse.Namespace, *, shots: int = 1) -> tuple[data.EpisodeSampler, data.EpisodeSampler]:
    """5-way training and test tasks: ``sampler.batch(first, count)`` is an ``mf.EpisodeBatch``."""
    images = dataset(args.data)
    train, test = (
        images.sampler(split, ways=5, shots=shots, targets=targets, seed=args.seed)
        for split, targets in (("train", 3), ("test", 5))
    )
    return train, test


def test_accuracy(learner: mf.MAMLPlusPlus, sampler: data.EpisodeSampler, tasks: int) -> float:
    """Share of right answers after adaptation on tasks 0 … ``tasks`` - 1 (transductive), printed with its interval."""
    each = torch.cat(
        [learner.evaluate(sampler.batch(i, min(10, tasks - i))).accuracy[-1] for i in range(0, tasks, 10)]
    )
    mean, spread = mean_and_interval(each)
    print(f"test accuracy {100 * mean:.1f} % ± {100 * spread:.1f} % (95 % interval over {tasks} tasks)")
    return mean


test_accuracy.__test__ = False  # type: ignore[attr-defined]  # a name that pytest would collect
