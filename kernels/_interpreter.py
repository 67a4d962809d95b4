"""Repairs of Triton's interpreter (TRITON_INTERPRET=1), where kernels are tested; no part in compiled kernels."""

from __future__ import annotations

from typing import Any

import triton


def repair() -> None:
    """Makes the interpreter of Triton 3.6 run with numpy 2.4, and device functions faster.

    A loop bound that is an argument of the kernel goes through ``int()`` of a one-element array, which numpy 2.4
    refuses and older numpy warns of. And every call of a device function wraps all of ``triton.language`` anew;
    once for each module and launch is enough.
    """
    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    if getattr(interpreter, "_mamlpp_fast_repaired", False):
        return
    patch_tensor = interpreter._patch_lang_tensor
    run_kernel = interpreter.GridExecutor.__call__
    wrapped: set[str] = set()

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        wrapped.clear()
        run_kernel(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module not in wrapped:
            wrapped.add(module)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang_tensor = patch
    interpreter.GridExecutor.__call__ = run
    interpreter.InterpretedFunction.__call__ = call
    interpreter._mamlpp_fast_repaired = True
