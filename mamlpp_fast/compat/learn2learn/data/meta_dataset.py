"""learn2learn's ``data.meta_dataset``: classification data sets that know the samples of each class."""

from __future__ import annotations

import os
import pickle
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from torch.utils.data import Dataset, TensorDataset

__all__ = ["FilteredMetaDataset", "MetaDataset", "UnionMetaDataset"]

Label = Any


class MetaDataset(Dataset[Any]):
    """A data set of (x, label) with the samples of each class.

    Args:
        dataset: a torch data set. Where it has a ``_bookkeeping_path``, the indices are read from that pickle, or
            written to it; only a file of one's own should be there.
        labels_to_indices: samples of each label, if known.
        indices_to_labels: or the label of each sample.

    Attributes:
        labels: the labels, in order of appearance.
        labels_to_indices: samples of each label.
        indices_to_labels: label of each sample.

    Raises:
        TypeError: for what is no torch data set.
        ValueError: for labels that are no scalars.
    """

    dataset: Any
    labels: list[Label]
    labels_to_indices: Mapping[Label, Sequence[int]]
    indices_to_labels: Mapping[int, Label]

    def __init__(
        self,
        dataset: Dataset[Any],
        labels_to_indices: Mapping[Label, Sequence[int]] | None = None,
        indices_to_labels: Mapping[int, Label] | None = None,
    ) -> None:
        if not isinstance(dataset, Dataset):
            raise TypeError("MetaDataset only accepts a torch dataset as input")
        self.dataset = dataset
        if hasattr(dataset, "_bookkeeping_path"):
            self.load_bookkeeping(dataset._bookkeeping_path)
        else:
            self.create_bookkeeping(labels_to_indices, indices_to_labels)

    def __getitem__(self, item: int) -> Any:
        return self.dataset[item]

    def __len__(self) -> int:
        return len(self.dataset)

    def create_bookkeeping(
        self,
        labels_to_indices: Mapping[Label, Sequence[int]] | None = None,
        indices_to_labels: Mapping[int, Label] | None = None,
    ) -> None:
        """Indexes the data set: by what is given, else by the label of every sample."""
        assert hasattr(self.dataset, "__getitem__"), "Requires iterable-style dataset."
        if labels_to_indices is not None:
            indices_to_labels = {i: label for label, indices in labels_to_indices.items() for i in indices}
        else:
            if indices_to_labels is None:
                indices_to_labels = defaultdict(int, enumerate(_labels(self.dataset)))
            labels_to_indices = _by_label(indices_to_labels.items())
        self._keep(labels_to_indices, indices_to_labels)

    def _keep(
        self, labels_to_indices: Mapping[Label, Sequence[int]], indices_to_labels: Mapping[int, Label]
    ) -> None:
        self.labels_to_indices = labels_to_indices
        self.indices_to_labels = indices_to_labels
        self.labels = list(labels_to_indices)
        self._bookkeeping = {
            "labels_to_indices": labels_to_indices,
            "indices_to_labels": indices_to_labels,
            "labels": self.labels,
        }

    def load_bookkeeping(self, path: str | os.PathLike[str]) -> None:
        """Reads the indices from a pickle; where there is none, makes them and writes it."""
        if not os.path.exists(path):
            self.create_bookkeeping()
            self.serialize_bookkeeping(path)
            return
        with open(path, "rb") as file:
            self._bookkeeping = pickle.load(file)
        for name in ("labels_to_indices", "indices_to_labels", "labels"):
            setattr(self, name, self._bookkeeping[name])

    def serialize_bookkeeping(self, path: str | os.PathLike[str]) -> None:
        """Writes the indices to a pickle."""
        with open(path, "wb") as file:
            pickle.dump(self._bookkeeping, file, protocol=-1)


def _labels(dataset: Any) -> Iterable[Label]:
    """The label of every sample; of what keeps them in an array, without loading the samples."""
    if type(dataset) is TensorDataset and len(dataset.tensors) > 1:
        if dataset.tensors[1].dim() != 1:
            raise ValueError(
                f"Requires scalar labels. \n expected [{len(dataset)}], got {list(dataset.tensors[1].shape)}"
            )
        return list(dataset.tensors[1].tolist())
    known = getattr(dataset, "sample_labels", None)  # of this package's own data sets
    return known() if known is not None else (_scalar(dataset[i][1]) for i in range(len(dataset)))


def _scalar(label: Any) -> Label:
    if not hasattr(label, "item"):
        return label
    try:
        return label.item()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"Requires scalar labels. \n{error}") from error


def _by_label(pairs: Iterable[tuple[int, Label]]) -> dict[Label, list[int]]:
    indices: dict[Label, list[int]] = defaultdict(list)
    for i, label in pairs:
        indices[label].append(i)
    return indices


class UnionMetaDataset(MetaDataset):
    """Several data sets as one; labels are numbered anew, those of the first first, so none is shared.

    Args:
        datasets: data sets; those that are no :class:`MetaDataset` are made one.
    """

    def __init__(self, datasets: Iterable[Dataset[Any]]) -> None:
        self.datasets = [d if isinstance(d, MetaDataset) else MetaDataset(d) for d in datasets]
        pairs: dict[int, Label] = defaultdict(int)
        first_label = first_index = 0
        for dataset in self.datasets:
            number = {label: first_label + i for i, label in enumerate(dataset.labels)}
            pairs.update((first_index + i, number[label]) for i, label in dataset.indices_to_labels.items())
            first_index += len(dataset.indices_to_labels)
            first_label += len(dataset.labels_to_indices)
        self._keep(_by_label(pairs.items()), pairs)
        self._ends = list(accumulate(len(dataset) for dataset in self.datasets))

    def __getitem__(self, item: int) -> Any:
        for dataset, end in zip(self.datasets, self._ends, strict=True):
            if end > item:
                data = list(dataset[item - end + len(dataset)])
                data[1] = self.indices_to_labels[item]
                return data
        return None

    def __len__(self) -> int:
        return len(self.indices_to_labels)


class FilteredMetaDataset(MetaDataset):
    """The samples of some labels, which keep their names.

    Args:
        dataset: a data set; one that is no :class:`MetaDataset` is made one.
        labels: the labels to keep, in the order that samples shall have.
    """

    def __init__(self, dataset: Dataset[Any], labels: Iterable[Label]) -> None:
        self.dataset = dataset if isinstance(dataset, MetaDataset) else MetaDataset(dataset)
        whole = self.dataset.labels_to_indices
        chosen = [(i, label) for label in labels for i in whole[label]]
        self.to_true_indices = [i for i, _ in chosen]
        pairs = defaultdict(int, enumerate(label for _, label in chosen))
        self._keep(_by_label(pairs.items()), pairs)

    def __getitem__(self, item: int) -> Any:
        return self.dataset[self.to_true_indices[item]]

    def __len__(self) -> int:
        return len(self.indices_to_labels)
