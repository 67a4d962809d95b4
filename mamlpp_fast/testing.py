"""For tests and benchmarks: which backend serves the operations on CPU tensors."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mamlpp_fast.ops import _library

__all__ = ["backends", "use_backend"]


def backends(name: str) -> list[str]:
    """Backends that can serve operation `name` on CPU tensors here.

    ``"python"`` is the closed form, ``"native"`` the C++ kernel if the library is loaded, ``"triton"`` the
    Triton kernel if its interpreter is on (``TRITON_INTERPRET=1`` before Triton is first imported).
    """
    present = ["python"]
    if name in _native_names():
        present.append("native")
    if _library.OPERATIONS[name].triton is not None and _interprets():
        present.append("triton")
    return present


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within it, `backend` serves the operations on CPU tensors; those that lack it run their closed form.

    Args:
        backend: ``"python"``, ``"native"`` or ``"triton"`` (see :func:`backends`).

    Raises:
        ValueError: for another name.
        RuntimeError: if the backend is not present here.
    """
    if backend not in ("python", "native", "triton"):
        raise ValueError(f"backend: expected python, native or triton, got {backend!r}")
    if backend == "native" and not _native_names():
        raise RuntimeError("backend: expected the native library to be loaded, it is not")
    if backend == "triton" and not _interprets():
        raise RuntimeError("backend: expected Triton's interpreter (TRITON_INTERPRET=1), it is off")
    _native_names()
    override = torch.library.Library(_library.NAMESPACE, "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            for name, operation in _library.OPERATIONS.items():
                if not (backend == "native" and name in _native_names()):
                    # Of another choice around this one; PyTorch 2.11 refuses that unless told.
                    override.impl(name, _implementation(operation, backend), "CPU", allow_override=True)
                    if torch._C._dispatch_has_kernel_for_dispatch_key(_qualified(name), "AutogradCPU"):
                        override.impl(
                            name, _python_autograd(name), "AutogradCPU", with_keyset=True, allow_override=True
                        )
        yield
    finally:
        override._destroy()


def _implementation(operation: _library.Operation, backend: str) -> Callable[..., Any]:
    return operation.triton if backend == "triton" and operation.triton is not None else operation.fallback


def _qualified(name: str) -> str:
    return f"{_library.NAMESPACE}::{name}"


def _python_autograd(name: str) -> Callable[..., Any]:
    """The derivative registered in Python for every device, which C++ may hide on the CPU."""
    kernel = torch.library.get_kernel(_qualified(name), "AutogradCUDA")

    def call(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        return kernel.call_boxed(keyset, *args)

    return call


@functools.cache
def _native_names() -> frozenset[str]:
    """Operations with a C++ kernel; asked once, before any override can hide the answer."""
    return frozenset(name for name in _library.OPERATIONS if _library.served_by(name, "CPU") == "native")


def _interprets() -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)
