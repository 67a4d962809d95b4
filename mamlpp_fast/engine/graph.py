"""CUDA-graph capture of a whole meta-step: one launch instead of thousands."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Graphed", "capturing", "graphed"]

_Key = tuple[Any, ...]
_P = ParamSpec("_P")
_R = TypeVar("_R")


class _Capture(threading.local):
    """What this thread captures."""

    inside = False
    """Whether a step is run for its graph, warm-up included."""
    recording = False
    """Whether the stream is captured, so that nothing may wait for the device."""


_capture = _Capture()


def capturing() -> bool:
    """Whether a capture of this thread is under way, in which nothing may wait for the device."""
    return _capture.recording


class Graphed(Generic[_P, _R]):
    """A step captured as a CUDA graph, once for every form of its inputs; made by :func:`graphed`.

    Called by a step that is being captured itself, it calls through and becomes part of that graph.
    """

    def __init__(self, step: Callable[_P, _R], warmup: int, preserve: Callable[[], Iterable[Tensor]]) -> None:
        self.step = step
        self.warmup = warmup
        self.preserve = preserve
        self._captured: dict[_Key, tuple[torch.cuda.CUDAGraph, list[Tensor], Any]] = {}

    @property
    def graphs(self) -> int:
        """Graphs captured so far; 0 on the CPU."""
        return len(self._captured)

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        on_gpu = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda), None)
        if _capture.inside or on_gpu is None:
            return self.step(*args, **kwargs)
        with torch.cuda.device(on_gpu.device):  # whose streams and graphs are meant, not the process's first
            return self._replayed(leaves, spec)

    def _replayed(self, leaves: list[Any], spec: pytree.TreeSpec) -> _R:
        key: _Key = (spec, *(_form(leaf) for leaf in leaves))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if key not in self._captured:
            self._captured[key] = self._capture(leaves, spec)
        graph, static, outputs = self._captured[key]
        with torch.no_grad():  # else a buffer whose argument needs gradients gains a node with every call
            for buffer, tensor in zip(static, tensors, strict=True):
                buffer.copy_(tensor)
        graph.replay()
        result: _R = outputs
        return result

    def _capture(
        self, leaves: list[Any], spec: pytree.TreeSpec
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Any]:
        static = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(static, spec)
        _capture.inside = True
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.warm_up(args, kwargs)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            _capture.recording = True
            with torch.cuda.graph(graph), _no_collection():
                outputs = self.step(*args, **kwargs)
        finally:
            _capture.inside = _capture.recording = False
        return graph, [s for s in static if isinstance(s, Tensor)], outputs

    def warm_up(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> None:
        """Runs the step a few times and puts back what it must not change."""
        before = [(t, t.detach().clone()) for t in self.preserve()]
        try:
            for _ in range(self.warmup):
                self.step(*args, **(kwargs or {}))
        finally:
            with torch.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)


def graphed(
    step: Callable[_P, _R], *, warmup: int = 3, preserve: Callable[[], Iterable[Tensor]] = tuple
) -> Graphed[_P, _R]:
    """Captures a step of one's own as a CUDA graph; on the CPU it calls through.

    Equivalent to ``step``, but each new form of the arguments (structure, shapes, dtypes, plain values) is run
    ``warmup`` times, captured once and replayed from then on. The step must not synchronise with the host, and must
    leave its results in what it returns and in tensors that exist before the first call (gradients included: call
    ``zero_grad(set_to_none=False)`` inside). The warm-up runs are real; name what they must not change in ``preserve``.

    Args:
        step: any callable of tensors, nested containers of them and :class:`mamlpp_fast.EpisodeBatch`. Tensors that it
            reads otherwise (parameters, say) keep their place and may change their values.
        warmup: uncaptured runs before the capture, at least 1.
        preserve: gives the tensors (parameters, optimizer state, running statistics) that are put back to their values
            after the warm-up.

    Returns:
        A callable with the same arguments; its outputs are overwritten by the next call.

    Raises:
        TypeError: when ``step`` or ``preserve`` cannot be called.
        ValueError: when ``warmup`` is below 1.
    """
    for name, value in (("step", step), ("preserve", preserve)):
        if not callable(value):
            raise TypeError(f"{name}: expected a callable, got {type(value).__name__}")
    if warmup < 1:
        raise ValueError(f"warmup: expected at least 1, got {warmup}")
    return Graphed(step, warmup, preserve)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Within it no cycle is collected: another graph that is let go in mid-capture would end the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _form(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), leaf.dtype, leaf.device, leaf.requires_grad)
    return type(leaf), leaf  # 1, 1.0 and True are equal, what is computed with them is not
