"""learn2learn's ``data``: data sets indexed by class, and tasks drawn from them."""

from mamlpp_fast.compat.learn2learn.data import transforms
from mamlpp_fast.compat.learn2learn.data.meta_dataset import (
    FilteredMetaDataset,
    MetaDataset,
    UnionMetaDataset,
)
from mamlpp_fast.compat.learn2learn.data.task_dataset import DataDescription, TaskDataset, Taskset
from mamlpp_fast.compat.learn2learn.data.utils import InfiniteIterator, OnDeviceDataset, partition_task

__all__ = [
    "DataDescription",
    "FilteredMetaDataset",
    "InfiniteIterator",
    "MetaDataset",
    "OnDeviceDataset",
    "TaskDataset",
    "Taskset",
    "UnionMetaDataset",
    "partition_task",
    "transforms",
]
