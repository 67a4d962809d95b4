"""What the operating system tells of this process."""

from __future__ import annotations

import ctypes
import resource
import sys

import torch

__all__ = ["peak_memory_mib", "release_memory"]


def release_memory() -> None:
    """Gives memory that was freed back to the operating system, where the C library keeps it until it is asked."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(ctypes.c_size_t(0))


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory in MiB: what torch had allocated on a GPU, else the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        # Of this program alone: what getrusage says goes back to the process that started it.
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) / 2**10
    except (OSError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
