"""learn2learn's ``data.transforms``: what makes a task of a data set.

Each is called with a task's description, a list of :class:`DataDescription`, or None for all samples, and returns one.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mamlpp_fast.compat.learn2learn.data.task_dataset import DataDescription, Description

__all__ = [
    "ConsecutiveLabels",
    "FilterLabels",
    "FusedNWaysKShots",
    "KShots",
    "LoadData",
    "NWays",
    "RemapLabels",
    "TaskTransform",
]


class TaskTransform:
    """What all of them share.

    Args:
        dataset: a :class:`MetaDataset`, the one that descriptions index.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def new_task(self) -> Description:
        """All samples."""
        return [DataDescription(i) for i in range(len(self.dataset))]

    def __call__(self, task_description: Description | None) -> Description:
        return self.transform(self.new_task() if task_description is None else task_description)

    def transform(self, task_description: Description) -> Description:
        raise NotImplementedError

    def label(self, described: DataDescription) -> Any:
        return self.dataset.indices_to_labels[described.index]


class LoadData(TaskTransform):
    """Loads every sample from the data set."""

    def transform(self, task_description: Description) -> Description:
        for described in task_description:
            described.transforms.append(self.dataset.__getitem__)
        return task_description


class FilterLabels(TaskTransform):
    """Keeps the samples of some labels.

    Args:
        labels: the labels to keep.
    """

    def __init__(self, dataset: Any, labels: Sequence[Any]) -> None:
        super().__init__(dataset)
        self.labels = list(labels)
        kept = set(self.labels)
        self._kept = [dataset.indices_to_labels[i] in kept for i in range(len(dataset))]

    def transform(self, task_description: Description) -> Description:
        return [described for described in task_description if self._kept[described.index]]


class ConsecutiveLabels(TaskTransform):
    """Sorts the samples by their label in the data set."""

    def transform(self, task_description: Description) -> Description:
        return sorted(task_description, key=self.label)


class RemapLabels(TaskTransform):
    """Numbers a task's labels 0, 1, ...

    Args:
        shuffle: in random order.
    """

    def __init__(self, dataset: Any, shuffle: bool = True) -> None:
        super().__init__(dataset)
        self.shuffle = shuffle

    def transform(self, task_description: Description) -> Description:
        labels = list({self.label(described) for described in task_description})
        if self.shuffle:
            random.shuffle(labels)
        remap = partial(self.remap, mapping=labels.index)
        for described in task_description:
            described.transforms.append(remap)
        return task_description

    def remap(self, data: Sequence[Any], mapping: Callable[[Any], int]) -> list[Any]:
        """The sample with its second entry mapped."""
        first, label, *rest = data
        return [first, mapping(label), *rest]


class NWays(TaskTransform):
    """Keeps the samples of some labels at random.

    Args:
        n: how many labels.
    """

    def __init__(self, dataset: Any, n: int = 2) -> None:
        super().__init__(dataset)
        self.n = n

    def __call__(self, task_description: Description | None) -> Description:
        if task_description is None:
            classes = random.sample(self.dataset.labels, k=self.n)
            return [DataDescription(i) for c in classes for i in self.dataset.labels_to_indices[c]]
        return self.transform(task_description)

    def transform(self, task_description: Description) -> Description:
        labels = {self.label(described) for described in task_description}
        chosen = random.sample(list(labels), k=self.n)
        return [described for described in task_description if self.label(described) in chosen]


class KShots(TaskTransform):
    """Keeps some samples of each label at random.

    Args:
        k: how many of each.
        replacement: a sample may come more than once.
    """

    def __init__(self, dataset: Any, k: int = 1, replacement: bool = False) -> None:
        super().__init__(dataset)
        self.k = k
        self.replacement = replacement

    def transform(self, task_description: Description) -> Description:
        by_label: dict[Any, Description] = defaultdict(list)
        for described in task_description:
            by_label[self.label(described)].append(described)
        kept: Description = []
        for samples in by_label.values():
            if self.replacement:
                kept += map(_copy, random.choices(samples, k=self.k))
            else:
                kept += random.sample(samples, k=self.k)
        return kept


def _copy(described: DataDescription) -> DataDescription:
    """A description with a list of transforms of its own."""
    copied = DataDescription(described.index)
    copied.transforms += described.transforms
    return copied


class FusedNWaysKShots(TaskTransform):
    """:class:`FilterLabels`, :class:`NWays` and :class:`KShots` in one; as the first transform, in less time.

    Args:
        n, k, replacement: as there.
        filter_labels: the labels to draw from, all by default.
    """

    def __init__(
        self,
        dataset: Any,
        n: int = 2,
        k: int = 1,
        replacement: bool = False,
        filter_labels: list[Any] | None = None,
    ) -> None:
        super().__init__(dataset)
        self.n = n
        self.k = k
        self.replacement = replacement
        self.filter_labels = dataset.labels if filter_labels is None else filter_labels
        self.filter = FilterLabels(dataset, self.filter_labels)
        self.nways = NWays(dataset, n)
        self.kshots = KShots(dataset, k=k, replacement=replacement)

    def new_task(self) -> Description:
        """A new task of so many labels and shots."""
        task: Description = []
        for label in random.sample(self.filter_labels, k=self.n):
            indices = self.dataset.labels_to_indices[label]
            if self.replacement:
                chosen = [random.choice(indices) for _ in range(self.k)]
            else:
                chosen = random.sample(indices, k=self.k)
            task += map(DataDescription, chosen)
        return task

    def __call__(self, task_description: Description | None) -> Description:
        return self.new_task() if task_description is None else self.transform(task_description)

    def transform(self, task_description: Description) -> Description:
        return self.kshots(self.nways(self.filter(task_description)))
