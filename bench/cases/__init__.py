"""The operations that `bench.kernels` times, each beside what PyTorch offers for it."""

from __future__ import annotations

from collections.abc import Iterator

from bench.cases import batch_norm, conv, head, lslr, norm_act_pool
from bench.harness import Case

__all__ = ["GROUPS", "all_cases"]

GROUPS = {
    "batch-norm": batch_norm.cases,
    "lslr": lslr.cases,
    "norm-act-pool": norm_act_pool.cases,
    "conv": conv.cases,
    "head": head.cases,
}


def all_cases(groups: list[str] | None = None) -> Iterator[Case]:
    for name in GROUPS if groups is None else groups:
        yield from GROUPS[name]()
