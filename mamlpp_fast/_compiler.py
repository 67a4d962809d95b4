"""Methods of PyTorch's that load all of ``torch.compile`` when they are first called, without that.

It takes seconds and some 100 MiB (``findings/optimizer_imports_compiler.sh``), for a mark that whoever compiles should
leave the method as it is.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["lean", "lean_mode"]

_Mode = TypeVar("_Mode", bound=TorchDispatchMode)


def lean(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method as it is where the compiler is loaded, else what its mark is around."""
    inner = inspect.unwrap(method)

    @functools.wraps(inner)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (method if "torch._dynamo" in sys.modules else inner)(*args, **kwargs)

    return call


def lean_mode(mode: type[_Mode]) -> type[_Mode]:
    """A class of dispatch modes, whose method PyTorch marks as it is made."""
    mode.__torch_dispatch__ = lean(mode.__torch_dispatch__)  # type: ignore[method-assign]
    return mode
