"""Repairs of Triton's interpreter (TRITON_INTERPRET=1), where kernels are tested; no part in compiled kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl


def repair() -> None:
    """Makes Triton's interpreter run with numpy 2.4, multiply bfloat16 matrices, and call device functions faster.

    A loop bound that is an argument of the kernel goes through ``int()`` of a one-element array, which numpy 2.4
    refuses and older numpy warns of (Triton 3.7 does not). bfloat16 lies in memory as 16-bit integers, which
    ``tl.dot`` would multiply as such; widened to float32 its products are exact, as on a tensor core. And every
    call of a device function wraps all of ``triton.language`` anew; once for each module and launch is enough.
    """
    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    if getattr(interpreter, "_mamlpp_fast_repaired", False):
        return
    patch_tensor = interpreter._patch_lang_tensor
    run_kernel = interpreter.GridExecutor.__call__
    multiply = interpreter.InterpreterBuilder.create_dot
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

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widened(a), widened(b), *rest)

    interpreter._patch_lang_tensor = patch
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.GridExecutor.__call__ = run
    interpreter.InterpretedFunction.__call__ = call
    interpreter._mamlpp_fast_repaired = True
