"""CUDA-graph capture of a whole meta-step: one launch instead of thousands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Graphed", "graphed"]

_Key = tuple[Any, ...]


class Graphed:
    """A step captured as a CUDA graph, once for every form of its inputs; made by :func:`graphed`.

    Called by a step that is being captured itself, it calls through and becomes part of that graph.
    """

    _inside = False

    def __init__(
        self, step: Callable[..., Any], warmup: int, preserve: Callable[[], Iterable[Tensor]]
    ) -> None:
        self.step = step
        self.warmup = warmup
        self.preserve = preserve
        self._captured: dict[_Key, tuple[torch.cuda.CUDAGraph, list[Tensor], Any]] = {}

    def __call__(self, *args: Any) -> Any:
        leaves, spec = pytree.tree_flatten(args)
        if Graphed._inside or not any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in leaves):
            return self.step(*args)
        key: _Key = (spec, *(_form(leaf) for leaf in leaves))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if key not in self._captured:
            self._captured[key] = self._capture(leaves, spec)
        graph, static, outputs = self._captured[key]
        for buffer, tensor in zip(static, tensors, strict=True):
            buffer.copy_(tensor)
        graph.replay()
        return outputs

    def _capture(
        self, leaves: list[Any], spec: pytree.TreeSpec
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Any]:
        static = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args = pytree.tree_unflatten(static, spec)
        Graphed._inside = True
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.warm_up(args)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = self.step(*args)
        finally:
            Graphed._inside = False
        return graph, [s for s in static if isinstance(s, Tensor)], outputs

    def warm_up(self, args: Sequence[Any]) -> None:
        """Runs the step a few times and puts back what it must not change."""
        before = [(t, t.detach().clone()) for t in self.preserve()]
        for _ in range(self.warmup):
            self.step(*args)
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)


def graphed(
    step: Callable[..., Any], *, warmup: int = 3, preserve: Callable[[], Iterable[Tensor]] = tuple
) -> Graphed:
    """Captures a step of one's own as a CUDA graph; on the CPU it calls through.

    Equivalent to ``step``, but each new form of the arguments (structure, shapes, dtypes, plain values) is run
    ``warmup`` times, captured once and replayed from then on. The step must not synchronise with the host, and must
    leave its results in what it returns and in tensors that exist before the first call (gradients included: call
    ``zero_grad(set_to_none=False)`` inside). The warm-up runs are real; name what they must not change in ``preserve``.

    Args:
        step: any callable of tensors and nested containers of them.
        warmup: uncaptured runs before the capture.
        preserve: gives the tensors (parameters, optimizer state, running statistics) that are put back to their values
            after the warm-up.

    Returns:
        A callable with the same arguments; its outputs are overwritten by the next call.
    """
    return Graphed(step, warmup, preserve)


def _form(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), leaf.dtype, leaf.device, leaf.requires_grad)
    return leaf
