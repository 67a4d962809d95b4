"""learn2learn's ``data.utils``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

__all__ = ["InfiniteIterator", "OnDeviceDataset", "partition_task"]


class InfiniteIterator:
    """Goes through an iterable again and again."""

    def __init__(self, dataloader: Iterable[Any]) -> None:
        self.dataloader = dataloader
        self.iterator = iter(dataloader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while True:
            try:
                return next(self.iterator)
            except StopIteration:
                self.iterator = iter(self.dataloader)


def partition_task(
    data: Tensor, labels: Tensor, shots: int = 1
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Splits a task: the first ``shots`` samples of each class, and the others; both sorted by label.

    Args:
        data: [N, ...].
        labels: [N]; as many of each.
        shots: support samples of each class.

    Returns:
        (support data, support labels), (query data, query labels).
    """
    assert data.size(0) == labels.size(0)
    classes = labels.unique()
    assert (data.size(0) - len(classes) * shots) % len(classes) == 0, (
        "Only query_shot == support_shot supported."
    )
    each = data.size(0) // len(classes)
    rows = [(labels == label).nonzero().flatten() for label in classes]
    assert all(len(row) == each for row in rows), "Only same number of query per label supported."
    support, query = torch.stack(rows).split((shots, each - shots), dim=1)
    return tuple((data[i], labels[i]) for i in (support.flatten(), query.flatten()))  # type: ignore[return-value]


class OnDeviceDataset(TensorDataset):
    """A whole data set in two tensors.

    Args:
        dataset: of (x, label).
        device: where the tensors live; beside a GPU those on the CPU are pinned.
        transform: applied to x whenever a sample is taken.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        device: torch.device | str | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        samples, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)  # type: ignore[arg-type]
        tensors = [torch.stack(samples).to(device), torch.tensor(labels).to(device)]
        if tensors[0].device.type == "cpu" and torch.cuda.is_available():
            tensors = [tensor.pin_memory() for tensor in tensors]
        super().__init__(*tensors)
        self.transform = transform
        if hasattr(dataset, "_bookkeeping_path"):
            self._bookkeeping_path = dataset._bookkeeping_path

    def sample_labels(self) -> list[int | float]:
        """The label of every sample."""
        return list(self.tensors[1].tolist())

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x, y = (tensor[index] for tensor in self.tensors)
        return (x if self.transform is None else self.transform(x)), y
