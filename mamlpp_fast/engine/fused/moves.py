"""What goes between the tensors of a call and the memory of its program: parameters in, gradients out, statistics.

One call of the native library each (``csrc/cpu/moves.cpp``), where a call from Python for each tensor takes a small
network as long as its kernels do; PyTorch's operators where there is no library, elsewhere than on a CPU, and where
something watches the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamlpp_fast import _native
from mamlpp_fast.engine.fused.held import Held, Taken
from mamlpp_fast.engine.fused.network import Norm, Statistics
from mamlpp_fast.engine.fused.program import Section
from mamlpp_fast.engine.fused.steps import Slot
from mamlpp_fast.engine.lanes import watched

__all__ = ["Follower", "Moves"]


class Moves:
    """Of the parameters of a call, in the order of ``slots``.

    Args:
        slots: how each lies for the kernels.
        shapes: of the parameters.
        device: of both.
    """

    def __init__(
        self, slots: Sequence[Slot], shapes: Sequence[tuple[int, ...]], device: torch.device
    ) -> None:
        # How each gets the axes of the kernels' layout; None for one that has them.
        self._how = [
            None if s.split == shape and s.order == tuple(range(len(s.split))) else (s.split, s.order)
            for s, shape in zip(slots, shapes, strict=True)
        ]
        self._native: Any = None
        if device.type == "cpu" and _native.status().loaded:
            orders = [list(s.order) for s in slots]
            self._native = torch.classes.mamlpp_fast.Moves([list(s.split) for s in slots], orders)

    def load(self, places: Sequence[Tensor], given: Sequence[Tensor | None]) -> None:
        """Copies to the places, zeros where there is nothing; what is given beyond them is left out."""
        if self._native is not None and not watched():
            self._native.load(list(places), list(given))
            return
        zero = places[0].new_zeros(())
        rows = zip(places, given, self._how, strict=False)
        laid = [zero.expand_as(held) if t is None else _laid(t, how) for held, t, how in rows]
        torch._foreach_copy_(list(places), laid)

    def loading(self, places: Sequence[Tensor], given: Sequence[Tensor | None]) -> Section:
        """What :meth:`load` does, as one of the calls of a list."""
        return self._later("load_places", self.load, places, given)

    def giving(self, places: Sequence[Tensor], own: Sequence[Tensor]) -> Section:
        """Copies of what lies in the places to tensors like the parameters, as one of the calls of a list."""
        return self._later("give_places", self._give, places, own)

    def _give(self, places: Sequence[Tensor], own: Sequence[Tensor]) -> None:
        laid = [_laid(t, how) for t, how in zip(own, self._how, strict=True)]
        torch._foreach_copy_(laid, list(places))

    def _later(
        self, name: str, method: Callable[..., None], places: Sequence[Tensor], own: Sequence[Tensor | None]
    ) -> Section:
        listed = None
        if self._native is not None:
            listed = torch.classes.mamlpp_fast.Calls()
            listed.add(f"mamlpp_fast::{name}", "", [self._native, list(places), list(own)], [])
        return Section([lambda: method(places, own)], listed)

    def take(self, places: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """Copies of what lies in the places, like the parameters; zeros like those beyond them."""
        if self._native is not None and not watched():
            made: list[Tensor] = self._native.take(list(places), list(like))
            return made
        made = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in like[: len(places)]]
        self._give(places, made)
        return made + [torch.zeros_like(p) for p in like[len(places) :]]


def _laid(t: Tensor, how: tuple[tuple[int, ...], tuple[int, ...]] | None) -> Tensor:
    return t if how is None else t.reshape(how[0]).permute(how[1])


class _Kept(NamedTuple):
    name: str
    norm: Norm
    statistics: Statistics
    unbiased: float


class Follower:
    """Lets running statistics take in those of a batch, as ``F.batch_norm`` does it.

    Args:
        norms: of the network, by name.
        images: examples a call.
        device: of the statistics.
    """

    def __init__(self, norms: Mapping[str, Norm], images: int, device: torch.device) -> None:
        self._kept = []
        for name, norm in norms.items():
            if norm.statistics is not None:
                count = norm.elements * images
                # A single value has no variance; PyTorch refuses it in the model's own forward.
                self._kept.append(_Kept(name, norm, norm.statistics, count / max(count - 1, 1)))
        self._native: Any = None
        if self._kept and device.type == "cpu" and _native.status().loaded:
            self._native = torch.classes.mamlpp_fast.Statistics(
                [k.statistics.eps for k in self._kept],
                [k.statistics.momentum for k in self._kept],
                [k.unbiased for k in self._kept],
            )

    def __call__(self, tensors: Held, statistics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Of a batch's mean and reciprocal deviation by norm; at once, or when ``tensors`` says so."""
        if not self._kept:
            return
        means = [tensors.buffer(k.statistics.mean) for k in self._kept]
        variances = [tensors.buffer(k.statistics.var) for k in self._kept]
        biases = [None if (b := k.norm.bias) is None else tensors.parameter(b) for k in self._kept]
        counts = [tensors.buffer(c) for k in self._kept if (c := k.statistics.counted) is not None]
        batch, rstds = zip(*(statistics[k.name] for k in self._kept), strict=True)
        native = self._native if tensors.later is None and not watched() else None
        if native is not None and native.follow(means, variances, list(batch), list(rstds), biases):
            if counts:
                torch._foreach_add_(counts, 1)
            return
        taken = Taken([], [], [], counts)
        for k, mean, var, new, rstd, bias in zip(
            self._kept, means, variances, batch, rstds, biases, strict=True
        ):
            # By `data`, as PyTorch's kernel: the graph of a plain pass beside may have kept the buffers' versions.
            taken.running.extend((mean.data, var.data))
            taken.new.extend(
                (
                    new if bias is None else new + bias.detach(),
                    (rstd.pow(-2) - k.statistics.eps).mul_(k.unbiased),
                )
            )
            taken.shares.extend((k.statistics.momentum,) * 2)
        if tensors.later is None:
            taken.apply()
        else:
            # Not the place's memory, which other passes write to meanwhile.
            tensors.later.append(taken._replace(new=[t.clone() for t in taken.new]))
