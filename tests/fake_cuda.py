"""CUDA's graph interface without a GPU: what is captured is written down and leaves memory as it was; a replay does it.

A tensor made by :func:`on_gpu` says it is CUDA's. All work stays on the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mamlpp_fast as mf

# What CUDA refuses while a stream is captured, as the host would have to wait for its result.
SYNCHRONISES = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "_unique2", "masked_select")


class OnGpu(Tensor):
    """A tensor of the CPU that says it is CUDA's, as do its clones and results."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


def on_gpu(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(OnGpu)


def batch_on_gpu(batch: mf.EpisodeBatch) -> mf.EpisodeBatch:
    return mf.EpisodeBatch(
        *(on_gpu(t) for t in (batch.support_x, batch.support_y, batch.target_x, batch.target_y))
    )


class Graph(TorchDispatchMode):
    """The operations between the beginning and the end of a capture, to be done by every replay."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[tuple[Tensor, int]]]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in SYNCHRONISES:
            raise RuntimeError("operation not permitted when stream is capturing")
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        arguments = func._schema.arguments
        named = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
        writes = [named.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        before = [(t, t.clone()) for t in tree_leaves(writes) if isinstance(t, Tensor)]
        result = func(*args, **kwargs)
        for tensor, value in before:
            tensor.copy_(value)
        known = {t.untyped_storage().data_ptr() for t in given}
        fresh = [
            (t, i)
            for i, t in enumerate(tree_leaves(result))
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known
        ]
        self.calls.append((func, args, kwargs, fresh))
        return result

    def end(self) -> None:
        """A capture computes nothing: its results are anything until a replay."""
        for _, _, _, fresh in self.calls:
            for tensor, _ in fresh:
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, fresh in self.calls:
            results = tree_leaves(func(*args, **kwargs))
            for tensor, i in fresh:
                tensor.copy_(results[i])


class FakeCuda:
    """Stands for ``torch.cuda`` where :mod:`mamlpp_fast.engine.graph` uses it.

    Attributes:
        events: streams waiting for each other, what ran beside the main stream, captures, in order.
        captured: the graphs, in order.
        devices: made current, in order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.captured: list[Graph] = []
        self._here = "main"
        self.devices: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "device", self._device)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: _Stream("side", self.events))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: _Stream(self._here, self.events))
        monkeypatch.setattr(torch.cuda, "stream", self._stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", self._capture)

    @contextlib.contextmanager
    def _device(self, device: torch.device) -> Iterator[None]:
        self.devices.append(device)
        yield

    @contextlib.contextmanager
    def _stream(self, stream: _Stream) -> Iterator[None]:
        self._here = stream.name
        try:
            yield
        finally:
            self._here = "main"

    @contextlib.contextmanager
    def _capture(self, graph: Graph) -> Iterator[None]:
        self.events.append("capture")
        self.captured.append(graph)
        self._here = "capture"
        try:
            with graph:
                yield
        finally:
            self._here = "main"
        with torch.no_grad():
            graph.end()

    def ran(self) -> None:
        """Called by a step: notes the stream it runs on."""
        self.events.append(f"step on {self._here}")


class _Stream:
    def __init__(self, name: str, events: list[str]) -> None:
        self.name = name
        self._events = events

    def wait_stream(self, other: _Stream) -> None:
        self._events.append(f"{self.name} waits for {other.name}")
