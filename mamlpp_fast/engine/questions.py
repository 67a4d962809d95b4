"""What a forward may ask a tensor beside its shape, type, device and values: nothing that a form of a model tells."""

from __future__ import annotations

import sys
from typing import Any

from mamlpp_fast.engine.named import of_library_s_code

__all__ = ["OF_A_CALL", "asked_by_own_code"]

OF_A_CALL = frozenset(
    {
        *(
            "requires_grad",
            "is_leaf",
            "grad_fn",
            "grad",
            "_version",
            "_base",
            "_backward_hooks",
            "retains_grad",
        ),
        *(
            "output_nr",
            "stride",
            "is_contiguous",
            "storage_offset",
            "data_ptr",
            "untyped_storage",
            "dim_order",
        ),
        *("is_inference", "is_shared", "is_pinned", "is_neg", "is_set_to", "_post_accumulate_grad_hooks"),
    }
)
"""Names of questions about one call's tensors: where they lie, and of what graph they are."""


def asked_by_own_code() -> bool:
    """Whether a function of PyTorch is called by the user's code; for a mode that is told of it.

    Libraries ask such things to choose among ways to compute the same.
    """
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") in ("torch._tensor", "torch.overrides"):
        frame = frame.f_back
    return frame is not None and not of_library_s_code(frame.f_globals)
