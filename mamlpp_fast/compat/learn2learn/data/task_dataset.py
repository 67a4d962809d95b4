"""learn2learn's ``data.task_dataset``: tasks drawn from a data set."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import Dataset, default_collate

from mamlpp_fast.compat.learn2learn.data.meta_dataset import MetaDataset
from mamlpp_fast.compat.learn2learn.utils import warn_once

__all__ = ["DataDescription", "Description", "TaskDataset", "Taskset"]


class DataDescription:
    """A sample of a task: its index, and what is applied to that in turn.

    Args:
        index: of the sample in the data set.
    """

    __slots__ = ("index", "transforms")

    def __init__(self, index: int) -> None:
        self.index = index
        self.transforms: list[Callable[[Any], Any]] = []


Description = list[DataDescription]
Transform = Callable[[Any], Any]


class Taskset:
    """Tasks drawn from a data set, each when it is asked for.

    Draws come from ``random``, in learn2learn's order: the same seed gives the same tasks.

    Args:
        dataset: a data set; one that is no :class:`MetaDataset` is made one.
        task_transforms: called in turn on a task's description, the first on None (all samples); or one function.
        num_tasks: as many tasks, the description of each kept once drawn; -1 for ever new ones (length 1).
        task_collate: makes a batch of a task's samples.

    Raises:
        ValueError: for a ``num_tasks`` that is neither -1 nor positive.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        task_transforms: Sequence[Transform] | Transform | None = None,
        num_tasks: int = -1,
        task_collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        if num_tasks < -1 or num_tasks == 0:
            raise ValueError("num_tasks needs to be -1 (infinity) or positive.")
        self.dataset = dataset if isinstance(dataset, MetaDataset) else MetaDataset(dataset)
        self.num_tasks = num_tasks
        self.task_transforms = [] if task_transforms is None else task_transforms
        self.sampled_descriptions: dict[int, Description] = {}
        self.task_collate = default_collate if task_collate is None else task_collate
        self._task_id = 0

    def sample_task_description(self) -> Any:
        """The description of a new task."""
        description = None
        if callable(self.task_transforms):
            return self.task_transforms(description)
        for transform in self.task_transforms:
            description = transform(description)
        return description

    def get_task(self, task_description: Description) -> Any:
        """The batch of a description."""
        samples = []
        for described in task_description:
            data: Any = described.index
            for transform in described.transforms:
                data = transform(data)
            samples.append(data)
        return self.task_collate(samples)

    def sample(self) -> Any:
        """A task at random."""
        return self[random.randint(0, len(self) - 1)]

    def __len__(self) -> int:
        return 1 if self.num_tasks == -1 else self.num_tasks

    def __getitem__(self, i: int) -> Any:
        if self.num_tasks == -1:
            return self.get_task(self.sample_task_description())
        if i not in self.sampled_descriptions:
            self.sampled_descriptions[i] = self.sample_task_description()
        return self.get_task(self.sampled_descriptions[i])

    def __iter__(self) -> Iterator[Any]:
        self._task_id = 0
        return self

    def __next__(self) -> Any:
        if self.num_tasks != -1 and self._task_id >= self.num_tasks:
            raise StopIteration
        task = self[self._task_id]
        self._task_id += 1
        return task

    def __add__(self, other: Any) -> Any:
        raise NotImplementedError("Adding datasets not yet supported for TaskDatasets.")


class TaskDataset(Taskset):
    """:class:`Taskset` by its former name; warns of that once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        warn_once("TaskDataset is deprecated, use Taskset instead.", severity="deprecation")
