"""Several processes for one run: each takes its share of the tasks of every meta-batch.

Every rank knows the whole meta-batch (episodes follow from counters), works on a contiguous share of its tasks, and one
all-reduce an iteration gives all of them the same gradients. :func:`launched` finds what ``torchrun`` started.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ElsewhereError", "RankError", "RankLostError", "Ranks", "launched", "own_device"]

T = TypeVar("T")

# Longer than any rank works alone (reading data, writing a checkpoint): a rank silent for so long hangs.
TIMEOUT = timedelta(minutes=5)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RankError(RuntimeError):
    """The ranks of a run cannot go on together."""


class RankLostError(RankError):
    """Another rank ended, or has not answered within the group's timeout."""


class ElsewhereError(Exception):
    """Another rank failed and says why; ``status`` is the exit status to end with."""

    def __init__(self, status: int) -> None:
        super().__init__("another rank failed and says why")
        self.status = status


class _Failed(NamedTuple):
    status: int


class Ranks:
    """The processes that share the tasks of every meta-batch; one process alone without a group.

    Args:
        group: ``torch.distributed.group.WORLD`` or a part of it; None for one process.

    Attributes:
        rank: this process's number in the group.
        size: number of processes.
        note: a small number sent along with the next reduction of gradients.
        notes: what every rank sent with the last one, [size], on the device.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.note = 0
        self.notes = torch.zeros(self.size)
        on_host = group is None or "cpu:" in dist.get_backend_config(group)
        self._plain = torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """This rank's share of tasks 0 .. total - 1: contiguous, in the order of ranks, as equal as can be."""
        return self.shares(total)[self.rank]

    def shares(self, total: int) -> list[range]:
        """Every rank's :meth:`share`; the first ``total % size`` ranks have one task more."""
        each, more = divmod(total, self.size)
        starts = [rank * each + min(rank, more) for rank in range(self.size + 1)]
        return [range(a, b) for a, b in itertools.pairwise(starts)]

    def sum(self, tensor: Tensor) -> None:
        """Adds up a tensor over ranks, in place, with the same result on all of them.

        Raises:
            RankLostError: when another rank is gone.
        """
        if self.size > 1:
            with _answering():
                dist.all_reduce(tensor, group=self.group)

    def largest(self, value: int) -> int:
        """The largest of the ranks' numbers; they wait for each other.

        Raises:
            RankLostError: when another rank is gone.
        """
        if self.size == 1:
            return value
        found = torch.tensor(value, device=self._plain)
        with _answering():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return int(found)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors, in place, by those of rank 0."""
        if self.size > 1:
            with _answering(), torch.no_grad():
                for tensor in tensors:
                    whole = tensor.detach().contiguous()
                    dist.broadcast(whole, group_src=0, group=self.group)
                    tensor.copy_(whole)

    def agree(self, tensors: Iterable[Tensor]) -> bool:
        """Whether all ranks hold the same bits, by a sum of them (reads from the device)."""
        if self.size == 1:
            return True
        total = 0
        for tensor in tensors:
            bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
            total += int(bits.to(torch.int64).sum())
        check = total % 2**62
        return self.largest(check) == -self.largest(-check)

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns on rank 0, on every rank; for all that reads or writes files.

        Args:
            make: called on rank 0 alone; its result must be pickled, with tensors on the CPU.

        Raises:
            Exception: what ``make`` raises, on rank 0.
            ElsewhereError: on the other ranks then.
            RankLostError: when another rank is gone.
        """
        if self.size == 1:
            return make()
        said: list[Any] = [None]
        failure: Exception | None = None
        if self.first:
            try:
                said = [make()]
            except Exception as error:
                failure = error
                said = [_Failed(2 if isinstance(error, ValueError | OSError | MemoryError) else 1)]
        with _answering():
            dist.broadcast_object_list(said, group_src=0, group=self.group, device=self._plain)
        if failure is not None:
            raise failure
        if isinstance(said[0], _Failed):
            raise ElsewhereError(said[0].status)
        result: T = said[0]
        return result


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """Gives what a collective raises one name."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RankLostError(f"ranks: expected all to answer, one ended or hangs ({reason})") from error


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process where several share a machine: ``cuda`` becomes ``cuda:LOCAL_RANK``.

    Raises:
        ValueError: when there are fewer GPUs than processes, or all were given the same one.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type != "cuda" or here == 1:
        return device
    if device.index is not None:
        raise ValueError(f"--device: expected cuda or cpu for {here} processes on a machine, got {device}")
    count, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if here > count:
        raise ValueError(f"--nproc-per-node: expected at most {count}, the GPUs of this machine, got {here}")
    return torch.device("cuda", local)


@contextlib.contextmanager
def launched(device: torch.device | str = "cpu") -> Iterator[dist.ProcessGroup | None]:
    """The group of the processes that ``torchrun`` started together with this one; None where it is alone.

    NCCL for GPUs, gloo for CPUs and for what the hosts tell each other. Of several ranks that fail together, only the
    first to get here raises its own error.

    Args:
        device: this process's own (:func:`own_device`).

    Raises:
        RankLostError: when another rank ended without a word.
        ElsewhereError: when another rank ended and says why.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield None
        return
    from torch.distributed.rendezvous import rendezvous  # not in a torch without distributed

    device = torch.device(device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    with _answering():
        store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
        )
    try:
        yield dist.group.WORLD
    except ElsewhereError:
        raise
    except Exception as error:
        alone = _claims(store)
        if isinstance(error, RankError) and not alone:
            raise ElsewhereError(1) from error
        raise
    finally:
        dist.destroy_process_group()


def _claims(store: Any) -> bool:
    """Whether no other rank has failed before; True too where the store is gone."""
    try:
        return int(store.add("mamlpp_fast/failed", 1)) == 1
    except RuntimeError:
        return True
