"""The operations, each differentiable as often as its page in ``docs/derivations`` says.

Those that only the engine calls have no function here: ``torch.ops.mamlpp_fast.S``, described in the module S.
"""

from mamlpp_fast import _native
from mamlpp_fast.ops import (  # noqa: F401 - registers them
    conv_norm_act_pool,
    linear_cross_entropy,
    norm_act_pool,
    pointwise,
    running_blend,
    strided_sums,
    task_conv2d,
    window_pool,
)
from mamlpp_fast.ops.lslr_update import lslr_update
from mamlpp_fast.ops.per_step_batch_norm import (
    per_step_batch_norm,
    per_step_batch_norm_with_stats,
    update_running_stats,
)

__all__ = [
    "lslr_update",
    "per_step_batch_norm",
    "per_step_batch_norm_with_stats",
    "update_running_stats",
]

_native.load()
