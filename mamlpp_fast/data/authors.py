"""The random draws of the MAML++ authors' code, repeated bit for bit on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["authors_class_split", "authors_episode", "authors_seed"]

OMNIGLOT_FRACTIONS = (0.70918052988, 0.03080714725, 0.2606284658)


def authors_seed(config_seed: int) -> int:
    """The seed their code makes of a ``train_seed`` or ``val_seed``: 0 -> 985773, 1 -> 128038, 2 -> 875689.

    Training task t uses this plus t; validation and test both use 985773 plus 0 .. 599.
    """
    return int(np.random.RandomState(config_seed).randint(1, 999999))


def authors_episode(
    class_sizes: Sequence[int], ways: int, images: int, seed: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """One task of their ``get_set`` from its integer seed.

    Args:
        class_sizes: images of each class, in the order of the split's class list.
        ways: classes of the task.
        images: support plus target images of a class, the support first.
        seed: ``authors_seed(s) + task number``.

    Returns:
        classes [ways], images [ways, images] (numbers within the class) and quarter-turns [ways]; the turns
        are drawn whether or not they are applied.
    """
    rng = np.random.RandomState(seed)
    classes = rng.choice(len(class_sizes), size=ways, replace=False)
    rng.shuffle(classes)
    turns = rng.randint(0, 4, size=ways)
    drawn = [rng.choice(class_sizes[c], size=images, replace=False) for c in classes]
    return classes, np.stack(drawn), turns


def authors_class_split(
    num_classes: int, fractions: Sequence[float] = OMNIGLOT_FRACTIONS
) -> tuple[list[int], list[int], list[int]]:
    """Their split of a sorted class list: shuffled by RandomState(985773) and cut by fractions.

    Returns:
        class numbers of train, val and test, in the order their code keeps them (1150, 50 and 423 of
        Omniglot's 1623).
    """
    order = np.arange(num_classes, dtype=np.int32)
    np.random.RandomState(authors_seed(0)).shuffle(order)
    first = int(fractions[0] * num_classes)
    second = int(float(np.sum(fractions[:2])) * num_classes)
    listed: list[int] = order.tolist()
    return listed[:first], listed[first:second], listed[second:]
