"""What is installed and what serves each operation."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from mamlpp_fast import _native
from mamlpp_fast.ops._library import OPERATIONS, served_by
from mamlpp_fast.train.build import versions

__all__ = ["describe", "info"]


_BFLOAT16 = {
    "amxbf16": "multiplied in AMX tiles",
    "avx512bf16": "multiplied in pairs in layers where that is faster than float32, which serves the others",
}


def info() -> dict[str, Any]:
    """Versions, devices, the native library, and for each operation what serves CPU and CUDA tensors.

    Where the closed form in PyTorch serves an operation, ``reason`` says why no kernel does.
    """
    status = _native.status()
    return {
        "versions": versions(),
        "devices": ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))],
        "device_names": {
            f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
        },
        "threads": torch.get_num_threads(),
        "native": {
            "loaded": status.loaded,
            "reason": status.reason,
            "isa": status.isa,
            "bfloat16": _BFLOAT16.get(status.isa or "", "not multiplied: float32 serves it"),
            "path": None if status.path is None else str(status.path),
        },
        "operations": {
            name: {"cpu": _served(name, "CPU"), "cuda": _served(name, "CUDA")} for name in OPERATIONS
        },
    }


def _served(name: str, key: str) -> dict[str, str | None]:
    backend = served_by(name, key)
    reason: str | None = None
    if key == "CPU" and backend == "python":
        status = _native.status()
        reason = "no C++ kernel for this operation" if status.loaded else f"native library: {status.reason}"
    if key == "CUDA":
        if backend == "python":
            reason = "no Triton kernel for this operation"
        elif not torch.cuda.is_available():
            backend, reason = "none", f"no CUDA device; {backend} would serve one"
        elif backend == "triton" and importlib.util.find_spec("triton") is None:
            backend, reason = "none", "triton is not installed"
    return {"backend": backend, "reason": reason}


def describe(found: dict[str, Any]) -> str:
    """The same for people."""
    native = found["native"]
    lines = [", ".join(f"{name} {version}" for name, version in found["versions"].items())]
    names = found["device_names"]
    devices = [f"{d} ({names[d]})" if d in names else d for d in found["devices"]]
    lines.append(f"devices: {', '.join(devices)}; {found['threads']} CPU threads")
    if native["loaded"]:
        lines.append(f"native library: {native['isa']}, {native['path']}")
        lines.append(f"bfloat16 in convolutions on the CPU: {native['bfloat16']}")
    else:
        lines.append(f"native library: not in use, {native['reason']}")
    lines.append("operations (CPU / CUDA):")
    width = max((len(name) for name in found["operations"]), default=0)
    for name, served in found["operations"].items():
        texts = [
            s["backend"] + (f" ({s['reason']})" if s["reason"] else "")
            for s in (served["cpu"], served["cuda"])
        ]
        lines.append(f"  {name:<{width}}  {texts[0]} / {texts[1]}")
    return "\n".join(lines)
