"""The fused engine: all tasks at once, an explicit adjoint, one static program per form of the iteration.

``trace`` reads the model, ``network`` lowers it to steps, ``sweep`` writes the iteration down as a program of
operations on fixed buffers, ``program`` places and runs it, ``engine`` serves the learner. See ``docs/engine.md``.
"""

from mamlpp_fast.engine.fused.engine import FusedEngine
from mamlpp_fast.engine.fused.trace import Unsupported

__all__ = ["FusedEngine", "Unsupported"]
