"""Methods of PyTorch's that load all of ``torch.compile`` when they are first called, without that.

It takes seconds and some 100 MiB (``findings/optimizer_imports_compiler.sh``), for a mark that whoever compiles should
leave the method as it is.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import graph as autograd_graph
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["lean", "lean_mode", "lean_vjp"]

_Mode = TypeVar("_Mode", bound=TorchDispatchMode)


def _skip(code: types.CodeType) -> None:
    """Has a compiled function of the caller's not compile this too, anew for every operator that it meets.

    ``torch.compiler.disable`` does so as well, but loads the compiler. A torch without these names is slower alone.
    """
    with contextlib.suppress(AttributeError):
        frames: Any = torch._C._dynamo.eval_frame
        as_it_is = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
        frames.set_code_exec_strategy(code, as_it_is)


def lean(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method as it is where the compiler is loaded, else what its mark is around."""
    inner = inspect.unwrap(method)

    def call(*args: Any, **kwargs: Any) -> Any:
        return (method if "torch._dynamo" in sys.modules else inner)(*args, **kwargs)

    _skip(call.__code__)
    return functools.wraps(inner)(call)


def lean_mode(mode: type[_Mode]) -> type[_Mode]:
    """A class of dispatch modes, whose method PyTorch marks as it is made."""
    mode.__torch_dispatch__ = lean(mode.__torch_dispatch__)  # type: ignore[method-assign]
    return mode


def _grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    retain_graph: bool,
    create_graph: bool,
    allow_unused: bool,
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad`` for gradients that have the shapes of the outputs, which it would ask SymPy about."""
    found: tuple[Tensor | None, ...] = autograd_graph._engine_run_backward(
        tuple(outputs),
        tuple(grad_outputs),
        retain_graph,
        create_graph,
        tuple(inputs),
        allow_unused,
        accumulate_grad=False,
    )
    return found


class _WithoutCompiler:
    """``torch`` as a pulled back function reads it; the compiler's autograd is at rest where it was never loaded."""

    _dynamo = types.SimpleNamespace(compiled_autograd=types.SimpleNamespace(_disable=contextlib.nullcontext))
    autograd = types.SimpleNamespace(grad=_grad)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def lean_vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """``torch.func.vjp``, whose second result switches the compiler's autograd off, and asks SymPy about shapes."""
    made, pull = torch.func.vjp(function, *primals)  # type: ignore[misc]
    plain = getattr(eager_transforms, "_autograd_grad", None)
    run = getattr(autograd_graph, "_engine_run_backward", None)
    functions = all(isinstance(f, types.FunctionType) for f in (plain, pull, run))
    if "torch._dynamo" in sys.modules or not functions:  # another PyTorch, which is made otherwise
        return made, pull
    return made, _among(pull, _autograd_grad=_among(plain, torch=_WithoutCompiler()))


def _among(function: Any, **others: Any) -> Callable[..., Any]:
    """A function of Python's that finds other objects under some global names."""
    names = function.__globals__ | others
    own = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own
