"""What the operating system tells of this process."""

from __future__ import annotations

import ctypes
import os
import resource
import sys

import torch

__all__ = ["free_bytes", "peak_memory_mib", "release_memory"]


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


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 2**33
