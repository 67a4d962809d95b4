"""The tensors of a call: what a model holds, and what its running statistics take in."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mamlpp_fast import reference
from mamlpp_fast.engine.counts import Count
from mamlpp_fast.engine.glances import Seen

__all__ = ["Counted", "Held", "Taken"]


class Taken(NamedTuple):
    """What running statistics take in of one pass: ``running`` becomes (1 - share) running + share new."""

    running: list[Tensor]
    new: list[Tensor]
    shares: list[float]
    counts: list[Tensor]

    def apply(self) -> None:
        torch._foreach_mul_(self.running, [1 - share for share in self.shares])
        torch._foreach_add_(self.running, torch._foreach_mul(self.new, self.shares))
        if self.counts:
            torch._foreach_add_(self.counts, 1)


@functools.lru_cache(maxsize=10_000)
def _path(name: str) -> tuple[str, str]:
    path, _, leaf = name.rpartition(".")
    return path, leaf


class Counted(NamedTuple):
    """A call that a module counts."""

    module: nn.Module
    name: str
    by: int

    def apply(self) -> None:
        vars(self.module)[self.name] += self.by


class Held:
    """What a model holds now, by name: its own tensors, or those that a functional call gives it.

    Args:
        fast: takes the place of parameters of these names.
        step: of per-step norms, where it is not theirs.
        later: takes what running statistics and counts are to take in, in place of them.
        seen: what a glance at the model has just found.
    """

    def __init__(
        self,
        model: nn.Module,
        fast: Mapping[str, Tensor] | None = None,
        step: int | None = None,
        later: list[Taken | Counted] | None = None,
        seen: Seen | None = None,
    ) -> None:
        self._modules = {"": model}
        self._seen = None if seen is None or fast or seen.glance.by_step else seen
        self._fast = {} if fast is None else fast
        self._step = step
        self.later = later

    def parameters(self, names: tuple[str, ...]) -> Sequence[Tensor]:
        return [self.parameter(name) for name in names] if self._seen is None else self._seen.picked(names)

    def buffers(self, names: tuple[str, ...]) -> Sequence[Tensor]:
        return [self.buffer(name) for name in names] if self._seen is None else self._seen.picked(names)

    def parameter(self, name: str) -> Tensor:
        if (found := self._fast.get(name)) is not None:
            return found
        module, leaf = self._module(name)
        return self._own(module, module._parameters[leaf], "per_step_affine")

    def buffer(self, name: str) -> Tensor:
        module, leaf = self._module(name)
        return self._own(module, module._buffers[leaf], "per_step_stats")

    def count(self, counts: Sequence[Count]) -> None:
        """Moves the model's counts as a call does; at once, or later."""
        for path, name, by in counts:
            counted = Counted(self._module(f"{path}.{name}".removeprefix("."))[0], name, by)
            counted.apply() if self.later is None else self.later.append(counted)

    def _own(self, module: nn.Module, held: Tensor | None, by_step: str) -> Tensor:
        """A module's tensor, or its row where the module says that it has one for every step."""
        assert held is not None
        if isinstance(module, reference.PerStepBatchNorm2d) and getattr(module, by_step):
            return held[self._row(module)]
        return held

    def _module(self, name: str) -> tuple[nn.Module, str]:
        path, leaf = _path(name)
        found = self._modules.get(path)
        if found is not None:
            return found, leaf
        module = self._modules[""]
        for part in path.split("."):
            module = module._modules[part]  # type: ignore[assignment]
        self._modules[path] = module
        return module, leaf

    def _row(self, norm: reference.PerStepBatchNorm2d) -> int:
        return norm.row if self._step is None else min(self._step, norm.num_steps - 1)
