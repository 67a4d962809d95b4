"""Random numbers for one thread alone: torch's generators are the process's.

Whoever seeds one, or puts its state back, takes other threads' numbers away: they draw another seed's, or some twice.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from mamlpp_fast._compiler import lean_mode

__all__ = ["OwnGenerators", "seeded"]

_lock = threading.Lock()


@lean_mode
class OwnGenerators(TorchDispatchMode):
    """Within it this thread draws from generators of its own, one a device; the process's stay where they stand.

    What names a generator draws from that one. The few operators that take none (fused dropout on a GPU) draw from the
    process's, whose state is put back.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Else torch notes process-wide that a mode is on, and forgets to take it back when threads leave by turns."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        device = next((t.device for t in args if isinstance(t, Tensor)), kwargs.get("device"))
        device = torch.device("cpu" if device is None else device)
        taking = _taking_generator(func)
        if taking is None:
            with _lock, torch.random.fork_rng([] if device.type == "cpu" else [device]):
                return func(*args, **kwargs)
        drawing, index = taking
        if len(args) > index or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return drawing(*args, **(kwargs | {"generator": self._generators[device]}))


@functools.cache
def _taking_generator(func: OpOverload[..., Any]) -> tuple[OpOverload[..., Any], int] | None:
    """The overload that draws the same from a generator that it is given, and the place of that argument."""
    packet = func.overloadpacket
    wanted = _arguments(func)
    for overload in (func, *(getattr(packet, name) for name in packet.overloads())):
        arguments = _arguments(overload)
        names = [name for name, _ in arguments]
        if "generator" in names and [a for a in arguments if a[0] != "generator"] == [
            a for a in wanted if a[0] != "generator"
        ]:
            keyword = [a.kwarg_only for a in overload._schema.arguments][names.index("generator")]
            return overload, len(names) if keyword else names.index("generator")
    return None


def _arguments(func: OpOverload[..., Any]) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in func._schema.arguments]


def seeded(seed: int) -> OwnGenerators:
    """Within it this thread draws what it would after ``torch.manual_seed(seed)``, and nothing of the process's."""
    return OwnGenerators(seed)
