"""The classes a run's best model takes for each other, counted over test tasks."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mamlpp_fast.data import FewShotData
from mamlpp_fast.train.run_folder import best_files, load_model, open_test, read_config

__all__ = ["Confusions", "Pair", "confusions"]


@dataclass(frozen=True)
class Pair:
    """A class taken for another.

    Attributes:
        true: name of the right class.
        predicted: name of the one it was taken for.
        count: target images of the first named as the second.
        met: target images of the first in tasks that had the second.
        probability: mean probability given to the second in these mistakes.
        image: one of these images, PNG in base 64.
        support: a support image of the second in the same task, ditto.
    """

    true: str
    predicted: str
    count: int
    met: int
    probability: float
    image: str
    support: str


@dataclass(frozen=True)
class Confusions:
    """The worst pairs, or the reason why there are none.

    Attributes:
        pairs: most mistakes first; of equals, the surer ones.
        tasks: tasks judged.
        images: their target images.
        wrong: those named wrongly.
        checkpoint: the file judged.
        reason: why nothing was judged.
    """

    pairs: tuple[Pair, ...] = ()
    tasks: int = 0
    images: int = 0
    wrong: int = 0
    checkpoint: str = ""
    reason: str | None = None


def confusions(
    folder: Path,
    *,
    tasks: int = 100,
    worst: int = 10,
    data_path: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Confusions:
    """Judges the best checkpoint of a run on its first test tasks and counts (right, predicted) pairs of real classes.

    Args:
        folder: the run's folder.
        tasks: test tasks.
        worst: pairs to return at most.
        data_path: where the data set lies; where the run found it without it.
        device: where to run.

    Returns:
        the pairs; a reason instead where checkpoint or data are not there or do not fit.
    """
    try:
        config, record = read_config(folder)
        checkpoint = best_files(folder)[0]
        if not (folder / "checkpoints" / checkpoint).exists():
            return Confusions(reason=f"the best checkpoint, checkpoints/{checkpoint}, was not kept.")
        data, learner, sampler = open_test(config, record, data_path=data_path, device=device)
        load_model(folder / "checkpoints" / checkpoint, learner)
    except (ValueError, OSError, KeyError) as error:
        return Confusions(reason=" ".join(str(error).split()))
    drawn, right, predicted, chances = [], [], [], []
    for start in range(0, tasks, config.tasks):
        count = min(config.tasks, tasks - start)
        batch = sampler.batch(start, count)
        probabilities = learner.evaluate(batch).logits[-1].double().softmax(-1).cpu()
        drawn.append([t.cpu() for t in sampler.draws(start, count)[:2]])
        right.append(batch.target_y.cpu())
        chance, way = probabilities.max(-1)
        predicted.append(way)
        chances.append(chance)
    classes, images = (torch.cat([d[i] for d in drawn]) for i in range(2))
    y, way, chance = torch.cat(right), torch.cat(predicted), torch.cat(chances)
    found: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for task, target in (y != way).nonzero().tolist():
        pair = (int(classes[task, y[task, target]]), int(classes[task, way[task, target]]))
        found[pair].append((task, target))

    def rank(pair: tuple[int, int]) -> tuple[float, ...]:
        return (-len(found[pair]), -_mean(chance, found[pair]), *pair)

    pairs = []
    for true, other in sorted(found, key=rank)[:worst]:
        places = found[true, other]
        task, target = max(places, key=lambda place: float(chance[place]))
        mistaken = images[task, y[task, target], config.shots + target % config.targets]
        together = ((classes == true).any(1) & (classes == other).any(1)).sum()
        pairs.append(
            Pair(
                data.test.names[true],
                data.test.names[other],
                len(places),
                int(together) * config.targets,
                _mean(chance, places),
                _png(data, true, int(mistaken)),
                _png(data, other, int(images[task, way[task, target], 0])),
            )
        )
    return Confusions(tuple(pairs), tasks, y.numel(), int((y != way).sum()), checkpoint)


def _mean(chance: Tensor, places: list[tuple[int, int]]) -> float:
    return sum(float(chance[place]) for place in places) / len(places)


def _png(data: FewShotData, class_: int, image: int) -> str:
    """An image of the test split as it is before mean and deviation are taken out."""
    split = data.test
    pixels = split.images[int(split.class_start[class_]) + image].cpu().double() / data.divisor
    grey = (255 * pixels.clamp(0, 1)).round().to(torch.uint8)
    array = grey[0] if len(grey) != 3 else grey.permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(array.numpy()).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
