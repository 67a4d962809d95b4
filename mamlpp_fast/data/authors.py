"""The random draws of the MAML++ authors' code, repeated bit for bit on the host, and the order they draw from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamlpp_fast.data.archives import one_line, shown
from mamlpp_fast.data.errors import DataError

__all__ = ["AuthorsIndex", "authors_class_split", "authors_episode", "authors_seed", "read_index"]

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


def authors_class_split(num_classes: int) -> tuple[list[int], list[int], list[int]]:
    """Their split of a sorted class list: shuffled by RandomState(985773) and cut by :data:`OMNIGLOT_FRACTIONS`.

    Returns:
        class numbers of train, val and test, in the order their code keeps them (1150, 50 and 423 of
        Omniglot's 1623).
    """
    order = np.arange(num_classes, dtype=np.int32)
    np.random.RandomState(authors_seed(0)).shuffle(order)
    first = int(OMNIGLOT_FRACTIONS[0] * num_classes)
    second = int(float(np.sum(OMNIGLOT_FRACTIONS[:2])) * num_classes)
    listed: list[int] = order.tolist()
    return listed[:first], listed[first:second], listed[second:]


@dataclass(frozen=True)
class AuthorsIndex:
    """The order of images in each class, as ``omniglot_dataset.json`` and the like keep it.

    Their code draws from it, and makes it from a walk of the folders only where it is not there. The file that they
    publish has none of the 1623 classes of Omniglot in the order of file names.

    Args:
        file: where it was read, for messages.
        listed: the images' file names of each class ``"alphabet/character01"``.
    """

    file: Path
    listed: Mapping[str, Sequence[str]]

    def order(self, label: str, present: Sequence[str]) -> list[int]:
        """Numbers of the files ``present`` in class ``label``, in the order that the index lists them in.

        Raises:
            DataError: for an index that lists other files.
        """
        names = self.listed.get(label, ())
        number = {name: i for i, name in enumerate(present)}
        if sorted(names) != sorted(present) or len(number) != len(present):
            raise DataError(
                f"{self.file}: expected the {len(present)} images of class {shown(label)} as they are found, "
                f"got a list of {len(names)}, {len(number.keys() & set(names))} of them there"
            )
        return [number[name] for name in names]


def read_index(folder: Path, name: str) -> AuthorsIndex | None:
    """The index ``name`` in the folder of the images or beside it, where their code keeps it; None where there is none.

    Raises:
        DataError: for a file that lists no images by class.
    """
    file = next((f for f in (folder / name, folder.absolute().parent / name) if f.is_file()), None)
    if file is None:
        return None
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: expected lists of images by class, got {one_line(error)}") from error
    lists = list(content.values()) if isinstance(content, dict) else [content]
    if not all(isinstance(paths, list) and all(isinstance(p, str) for p in paths) for paths in lists):
        raise DataError(f"{file}: expected lists of images by class, got {shown(content)}")
    listed: dict[str, list[str]] = {}
    for path in (PurePosixPath(p) for paths in lists for p in paths):
        # Of a class their keys are numbers; its name is in the paths.
        listed.setdefault("/".join(path.parts[-3:-1]), []).append(path.name)
    return AuthorsIndex(file, listed)
