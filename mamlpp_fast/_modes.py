"""Modes of PyTorch that a caller may be in, and that meta-training must not follow; switches of the whole process."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Generic, TypeVar

import torch

from mamlpp_fast.reference.orders import Watch, norms_of_any_order

__all__ = [
    "Switch",
    "float32_products",
    "function_modes",
    "plainly",
    "pytorchs_norms",
    "quiet",
    "takes_pytorchs_norms",
    "undisturbed",
    "unnoted",
]

_T = TypeVar("_T")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Outside ``torch.inference_mode``, ``no_grad`` and ``autocast``, in which nothing could adapt as it should."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # turns gradients on as well
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


class Within(threading.local):
    """A context of the calling thread; ``now`` says whether it is in there."""

    now = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        before, self.now = self.now, True
        try:
            yield
        finally:
            self.now = before


pytorchs_norms = Within()
"""In which batch norms run PyTorch's operations: ours have no third derivative."""
plainly = Within()
"""In which models run as PyTorch runs them."""


def takes_pytorchs_norms() -> bool:
    """Whether the calling thread is in :data:`pytorchs_norms`, or where norms have derivatives of any order."""
    return pytorchs_norms.now or any(isinstance(m, norms_of_any_order) for m in function_modes())


def function_modes() -> Iterator[Any]:
    """The torch-function modes that the calling thread is in."""
    return map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))


@contextmanager
def unnoted() -> Iterator[None]:
    """Within it gradients may be taken that are no part of a forward that is being watched."""
    before = [(mode, mode.asked) for mode in function_modes() if isinstance(mode, Watch)]
    try:
        yield
    finally:
        for mode, asked in before:
            mode.asked = asked


class Switch(Generic[_T]):
    """A setting of the process that threads need at a value: those of one value share it, those of another wait.

    Were each to set and restore it by itself, threads that leave in another order than they came would compute under
    each other's values, and leave one of them behind.

    Args:
        setting: the context in which the process is at a value.
    """

    def __init__(self, setting: Callable[[_T], AbstractContextManager[object]]) -> None:
        self._setting = setting
        self._turn = threading.Condition()
        self._within = 0
        self._value: _T | None = None
        self._held = ExitStack()

    @contextmanager
    def at(self, value: _T) -> Iterator[None]:
        """Within it the process is at ``value``; not to be entered again at another value by the same thread."""
        with self._turn:
            self._turn.wait_for(lambda: not self._within or self._value == value)
            if not self._within:
                self._held.enter_context(self._setting(value))
                self._value = value
            self._within += 1
        try:
            yield
        finally:
            with self._turn:
                self._within -= 1
                if not self._within:
                    self._held.close()
                    self._turn.notify_all()


@contextmanager
def _without_warnings(_: bool) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_warnings = Switch(_without_warnings)


def quiet() -> AbstractContextManager[None]:
    """Within it nothing warns: Python's filters are the process's."""
    return _warnings.at(False)


@contextmanager
def _products(tf32: bool) -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    # All by the one name that each has of its own. Of those that cover several (``allow_tf32``, ``cudnn.flags``) torch
    # raises where the user has set one of them apart.
    settings = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    before = [s.fp32_precision for s in settings]
    try:
        for s in settings:
            s.fp32_precision = "tf32" if tf32 else "ieee"
        yield
    finally:
        for s, precision in zip(settings, before, strict=True):
            s.fp32_precision = precision


_float32_products = Switch(_products)


def float32_products(device: torch.device, *, tf32: bool = False) -> AbstractContextManager[None]:
    """Within it a GPU's convolutions and matrix products of float32 are exact, or round their operands to TF32.

    PyTorch's own default rounds in convolutions and not in matrix products. A backward pass needs it as well.
    """
    return _float32_products.at(tf32) if device.type == "cuda" else nullcontext()
