"""The fused engine: all tasks at once, an explicit adjoint, one static program per form of the iteration.

``lowering`` turns a recording into steps by a table, ``fusions`` joins them, ``sweep`` writes the iteration down as
a program of operations on fixed buffers, ``program`` places and runs it, ``transfer`` moves tensors in and out,
``engine`` serves the learner. See ``docs/engine.md``.
"""

from mamlpp_fast.engine.base import Unsupported
from mamlpp_fast.engine.fused.engine import FusedEngine

__all__ = ["FusedEngine", "Unsupported"]
