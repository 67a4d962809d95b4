"""Registration of the operations with torch's dispatcher, in the namespace ``mamlpp_fast``.

An operation ``S`` is defined once, in Python, with a closed form that runs on any device. C++ kernels attach
themselves to the CPU key when the native library is loaded, Triton kernels serve the CUDA key; the dispatcher
chooses.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch._ops import OpOverload
from torch.autograd import forward_ad

__all__ = [
    "OPERATIONS",
    "Operation",
    "Shared",
    "define",
    "define_orders",
    "differentiate",
    "launcher",
    "mapped",
    "served_by",
    "transformed",
]

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


class Shared(NamedTuple):
    """Beside an operation, ``name_shared``: several roles' calls of it on the same weights, in one call.

    Of R roles and T weights the tensors have R·T tasks, those of the first role first. A GPU's kernels take all roles
    in one launch.

    Attributes:
        weights: arguments [T, ...] that all roles read.
        apart: arguments [R, ...] of which each role has its own, and how many axes that has: gradients of weights, with
            any stride from role to role, and rows; what lacks the axis in front is every role's.
    """

    weights: frozenset[str]
    apart: Mapping[str, int]


OPERATIONS: dict[str, Operation] = {}
"""Every operation by name, filled by :func:`define`."""


def define(
    schema: str,
    *,
    fallback: Callable[..., Any],
    fake: Callable[..., Any] = lambda *_: None,
    triton: Callable[..., Any] | None = None,
    check: Callable[..., None] | None = None,
    shared: Shared | None = None,
) -> OpOverload[..., Any]:
    """Registers an operation and returns its overload (faster to call than the packet).

    Arguments that the schema marks as written have their version counters raised, as in PyTorch itself.

    Args:
        schema: ``name(Tensor x, ...) -> ...`` without a namespace.
        fallback: closed form with the arguments of the schema; runs with autograd off, on any device.
        fake: shapes, types and strides of the results, without data; none where the schema returns nothing.
        triton: serves CUDA tensors. It imports its kernels when first called, never at import; :func:`launcher`.
        check: raises unless the arguments, given by their names in the schema, belong together. It is called before the
            closed form and before Triton's kernels; the native ones check for themselves.
        shared: what a call of several roles has in common; none where there is no such call.
    """
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    overload: OpOverload[..., Any] = getattr(torch.ops.mamlpp_fast, name).default
    launch = triton
    if check is not None:
        names = [argument.name for argument in overload._schema.arguments]
        fallback = _checked(check, names, fallback)
        triton = None if triton is None else _checked(check, names, triton)
    library.impl(name, fallback, "CompositeExplicitAutograd")
    if triton is not None:
        library.impl(name, _on_its_device(triton), "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    if overload._schema.is_mutable:
        _raise_versions(name, overload)
    OPERATIONS[name] = Operation(name, overload, fallback, triton)
    if shared is not None:
        _share(OPERATIONS[name], shared, launch, check)
    return overload


def define_orders(
    stem: str,
    *orders: tuple[Callable[..., None], str],
    check: Callable[..., None],
    shared: Shared | None = None,
    triton: Callable[[str, Callable[..., None]], Callable[..., Any]] | None = None,
) -> None:
    """Registers the orders of an operation whose results are among its arguments.

    Args:
        stem: the operation, and the module of its kernels.
        orders: closed forms ``_forward``, ``_backward``, ``_tangent``, ..., with their arguments as in a schema. They
            serve the operations ``stem``, ``stem_backward`` and so on; Triton's functions are named like them.
        check: as for :func:`define`.
        shared: likewise, of the forward and the backward pass.
        triton: an order's launcher, from its name and closed form, where it is not plainly the function of that name.
    """
    for closed, arguments in orders:
        order = closed.__name__.removeprefix("_")
        define(
            f"{stem if order == 'forward' else f'{stem}_{order}'}({arguments}) -> ()",
            fallback=closed,
            triton=launcher(stem, order) if triton is None else triton(order, closed),
            check=check,
            shared=shared if order in ("forward", "backward") else None,
        )


def _share(base: Operation, shared: Shared, triton: Any, check: Any) -> None:
    """Defines ``name_shared`` beside operation `name`: see :class:`Shared`."""
    arguments = [argument.name for argument in base.overload._schema.arguments]
    of_weights = next(name for name in arguments if name in shared.weights)
    of_tasks = next(name for name in arguments if name not in shared.weights and name not in shared.apart)

    def part(name: str, value: Any, role: int, count: int) -> Any:
        if not isinstance(value, Tensor) or name in shared.weights:
            return value
        if name in shared.apart:
            return value[role] if value.dim() > shared.apart[name] else value
        return value[role * count : (role + 1) * count]

    def each_role(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
        count, tasks = len(given[of_weights]), len(given[of_tasks])
        if tasks % count:
            raise ValueError(f"{of_tasks}: expected {count} tasks for each role, got {tasks} in all")
        for role in range(tasks // count):
            yield {name: part(name, value, role, count) for name, value in given.items()}

    def fallback(*args: Any) -> None:
        for role in each_role(dict(zip(arguments, args, strict=False))):
            base.overload(*role.values())

    def check_each(**given: Any) -> None:
        for role in each_role(given):
            check(**role)

    schema = (
        str(base.overload._schema).removeprefix(f"{NAMESPACE}::").replace(base.name, f"{base.name}_shared", 1)
    )
    define(schema, fallback=fallback, triton=triton, check=check_each)


def launcher(module: str, function: str) -> Callable[..., Any]:
    """A function of a module of the kernels' package, which is imported when it is first called."""

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"mamlpp_fast.kernels.{module}"), function)(*args)

    return launch


def _checked(check: Callable[..., None], names: list[str], serve: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*args: Any) -> Any:
        check(**dict(zip(names, args, strict=False)))  # without the defaults at the end
        return serve(*args)

    return checked


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the process's current device, wherever the tensors are."""

    def launched(*args: Any) -> Any:
        with torch.cuda.device(_tensors(args)[0].device):
            return launch(*args)

    return launched


def _tensors(args: Iterable[Any]) -> list[Tensor]:
    """Those among arguments, and in lists of tensors among them."""
    found = []
    for value in args:
        found += [t for t in value if isinstance(t, Tensor)] if isinstance(value, (list, tuple)) else [value]
    return [t for t in found if isinstance(t, Tensor)]


def differentiate(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None
) -> None:
    """Gives operation `name` its derivative in reverse mode, and words against everything else.

    ``torch.library.register_autograd`` would let forward mode through without its tangents, so a derivative of zero,
    and ``torch.func.grad`` would fail with advice to us, not to the user. The dispatcher asks here, not the functions
    above the operations, so that compiled programs and the formulas' own calls are refused like any others.

    Args:
        name: of a defined operation, without the namespace.
        backward, setup_context: as for ``torch.library.register_autograd``.
    """
    kernel = make_autograd_impl(OPERATIONS[name].overload, Info(backward, setup_context))

    def differentiable(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(
            isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in args
        ):
            raise NotImplementedError(
                f"{name}: forward-mode derivatives (torch.func.jvp, jacfwd) are not implemented; "
                "use torch.autograd.grad"
            )
        if (
            torch._C._are_functorch_transforms_active()
            and torch.is_grad_enabled()
            and any(isinstance(t, Tensor) and t.requires_grad for t in args)
        ):
            raise NotImplementedError(
                f"{name}: torch.func.grad does not pass through it; "
                "use torch.autograd.grad(..., create_graph=True)"
            )
        return kernel(keyset, *args)

    library.impl(name, differentiable, "Autograd", with_keyset=True)


def transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work: the functions above the operations are plain PyTorch then."""
    return torch._C._are_functorch_transforms_active()


def mapped(t: Tensor) -> bool:
    """Whether a level of ``torch.func.vmap`` stands for several values of a tensor."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t):
            return True
        t = functorch.get_unwrapped(t)
    return False


def _raise_versions(name: str, overload: OpOverload[..., Any]) -> None:
    written = [
        index
        for index, argument in enumerate(overload._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    below = torch._C._after_ADInplaceOrView_keyset

    def raise_versions(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        torch.autograd.graph.increment_version(_tensors([args[i] for i in written]))
        return overload.redispatch(keyset & below, *args)

    library.impl(name, raise_versions, "ADInplaceOrView", with_keyset=True)


def served_by(name: str, key: str) -> str:
    """What serves operation `name` for dispatch key ``"CPU"`` or ``"CUDA"``: native, triton or python."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key):
        return "python"
    return "triton" if key == "CUDA" and OPERATIONS[name].triton is not None else "native"
