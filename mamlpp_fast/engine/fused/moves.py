"""What goes between the tensors of a call and the memory of its program: parameters in, gradients out, statistics.

One call of the native library each (``csrc/cpu/moves.cpp``), where a call from Python for each tensor takes a small
network as long as its kernels do; PyTorch's operators where there is no library, elsewhere than on a CPU, and where
something watches the caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamlpp_fast import _native
from mamlpp_fast.engine.fused.held import Held, Taken
from mamlpp_fast.engine.fused.network import Norm, Statistics
from mamlpp_fast.engine.fused.steps import Slot
from mamlpp_fast.engine.lanes import watched

__all__ = ["Follower", "Moves"]


class Moves:
    """Of the parameters of a call, or of what is like them, to the places that they have in a program's memory.

    Args:
        slots: how each lies for the kernels.
        places: theirs, with the axes of that.

    Attributes:
        native: the native library's object for the same, None where there is none.
    """

    def __init__(self, slots: Sequence[Slot], places: Sequence[Tensor]) -> None:
        self.places = list(places)
        self._how = [(s.split, s.order) for s in slots]
        self.native: Any = None
        if all(place.device.type == "cpu" for place in places) and _native.status().loaded:
            splits, orders = [list(s.split) for s in slots], [list(s.order) for s in slots]
            self.native = torch.classes.mamlpp_fast.Moves(splits, orders, self.places)

    def load(self, given: Sequence[Tensor | None], scale: float = 1.0) -> None:
        """Copies times a number to the places, zeros where there is nothing; what is beyond them is left out."""
        if self.native is not None and not watched():
            self.native.load(list(given), scale)
            return
        zero = self.places[0].new_zeros(())
        rows = zip(self.places, given, self._how, strict=False)
        laid = [zero.expand_as(held) if t is None else _laid(t, how) for held, t, how in rows]
        torch._foreach_copy_(self.places, laid)
        if scale != 1:
            torch._foreach_mul_(self.places, scale)

    def take(
        self, like: Sequence[Tensor], plus: Sequence[Tensor | None] | None = None, scale: float = 1.0
    ) -> list[Tensor]:
        """Copies of what lies in the places, like the parameters; zeros like those beyond them.

        Args:
            plus: for each of ``like`` what is added, or None.
            scale: what the places have is multiplied by this.
        """
        if self.native is not None and not watched():
            made: list[Tensor] = self.native.take(list(like), [] if plus is None else list(plus), scale)
            return made
        count = len(self.places)
        made = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in like[:count]]
        self.give(made)
        made += [torch.zeros_like(p) for p in like[count:]]
        if scale != 1:
            torch._foreach_mul_(made, scale)
        if plus is not None:
            for m, p in zip(made, plus, strict=True):
                if p is not None:
                    m.add_(p)
        return made

    def give(self, own: Sequence[Tensor | None]) -> None:
        """Copies what lies in the places to tensors like the parameters, where there are any."""
        if self.native is not None and not watched():
            self.native.give(list(own))
            return
        each = zip(own, self._how, self.places, strict=True)
        rows = [(_laid(t, how), place) for t, how, place in each if t is not None]
        if rows:
            torch._foreach_copy_([laid for laid, _ in rows], [place for _, place in rows])


def _laid(t: Tensor, how: tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
    return t.reshape(how[0]).permute(how[1])


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
        kept = [k.statistics for k in self._kept]
        self._means, self._variances = tuple(s.mean for s in kept), tuple(s.var for s in kept)
        self._counts = tuple(s.counted for s in kept if s.counted is not None)
        self._biases = tuple(k.norm.bias for k in self._kept if k.norm.bias is not None)
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
        means, variances, counts = (
            list(tensors.buffers(names)) for names in (self._means, self._variances, self._counts)
        )
        given = iter(tensors.parameters(self._biases))
        biases = [None if k.norm.bias is None else next(given) for k in self._kept]
        batch, rstds = zip(*(statistics[k.name] for k in self._kept), strict=True)
        native = self._native if tensors.later is None and not watched() else None
        if native is not None and native.follow(means, variances, list(batch), list(rstds), biases, counts):
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
