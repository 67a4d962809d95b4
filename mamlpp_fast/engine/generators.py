"""Whether code seeds one of PyTorch's random generators, or asks where it stands.

What a forward draws is drawn before its passes; a forward that seeds, or puts a state back, draws other numbers.
"""

from __future__ import annotations

import contextvars
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import torch

from mamlpp_fast import _seeded

__all__ = ["handles"]


def handles(work: Callable[[], object]) -> bool:
    """Whether ``work``, which this runs in a thread of its own, calls a method of a ``torch.Generator``.

    No operator of ATen tells of such a call, but Python's profiler, which a thread of the caller's may have already.
    Draws are none, nor what :mod:`mamlpp_fast._seeded` does for them. What ``work`` raises ends it.
    """
    found: list[str] = []

    def see(frame: types.FrameType, event: str, function: Any) -> None:
        own = frame.f_globals.get("__name__") == _seeded.__name__
        if event == "c_call" and isinstance(getattr(function, "__self__", None), torch.Generator) and not own:
            found.append(function.__name__)

    def run() -> None:
        sys.setprofile(see)
        try:
            work()
        except Exception:
            pass
        finally:
            sys.setprofile(None)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,))
    thread.start()
    thread.join()
    return bool(found)
