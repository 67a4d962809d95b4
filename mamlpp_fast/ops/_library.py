"""Registration of the operations with torch's dispatcher, in the namespace ``mamlpp_fast``.

An operation ``S`` is defined once, in Python, with a closed form that runs on any device. C++ kernels attach
themselves to the CPU key when the native library is loaded, Triton kernels serve the CUDA key; the dispatcher
chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

__all__ = ["OPERATIONS", "Operation", "define", "served_by"]

NAMESPACE = "mamlpp_fast"
library = torch.library.Library(NAMESPACE, "FRAGMENT")


@dataclass(frozen=True)
class Operation:
    """One registered operation.

    Attributes:
        name: without the namespace.
        overload: the callable, ``torch.ops.mamlpp_fast.<name>.default``.
        fallback: closed form in PyTorch, for any device.
        triton: launcher of the Triton kernel with the operation's own signature, or None.
    """

    name: str
    overload: OpOverload[..., Any]
    fallback: Callable[..., Any]
    triton: Callable[..., Any] | None


OPERATIONS: dict[str, Operation] = {}
"""Every operation by name, filled by :func:`define`."""


def define(
    schema: str,
    *,
    fallback: Callable[..., Any],
    fake: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
) -> OpOverload[..., Any]:
    """Registers an operation and returns its overload (faster to call than the packet).

    Arguments that the schema marks as written have their version counters raised, as in PyTorch itself.

    Args:
        schema: ``name(Tensor x, ...) -> ...`` without a namespace.
        fallback: closed form with the arguments of the schema; runs with autograd off, on any device.
        fake: shapes, types and strides of the results, without data.
        triton: serves CUDA tensors. It imports its kernels when first called, never at import.
    """
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    library.impl(name, fallback, "CompositeExplicitAutograd")
    if triton is not None:
        library.impl(name, triton, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    overload: OpOverload[..., Any] = getattr(torch.ops.mamlpp_fast, name).default
    if overload._schema.is_mutable:
        _raise_versions(name, overload)
    OPERATIONS[name] = Operation(name, overload, fallback, triton)
    return overload


def _raise_versions(name: str, overload: OpOverload[..., Any]) -> None:
    written = [
        index
        for index, argument in enumerate(overload._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    below = torch._C._after_ADInplaceOrView_keyset

    def raise_versions(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        torch.autograd.graph.increment_version([args[i] for i in written if args[i] is not None])
        return overload.redispatch(keyset & below, *args)

    library.impl(name, raise_versions, "ADInplaceOrView", with_keyset=True)


def served_by(name: str, key: str) -> str:
    """What serves operation `name` for dispatch key ``"CPU"`` or ``"CUDA"``: native, triton or python."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key):
        return "python"
    return "triton" if key == "CUDA" and OPERATIONS[name].triton is not None else "native"
