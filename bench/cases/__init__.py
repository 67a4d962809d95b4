"""The operations that `bench.kernels` times, each beside what PyTorch offers for it."""

from __future__ import annotations

from collections.abc import Iterator

from bench.cases import batch_norm, conv, dispatch, first_layer, head, lslr, norm_act_pool
from bench.harness import Case

GROUPS = {
    "batch-norm": batch_norm.cases,
    "lslr": lslr.cases,
    "norm-act-pool": norm_act_pool.cases,
    "conv": conv.cases,
    "first-layer": first_layer.cases,
    "head": head.cases,
    "dispatch": dispatch.cases,
}


def all_cases(groups: list[str] | None = None) -> Iterator[Case]:
    for name in GROUPS if groups is None else groups:
        yield from GROUPS[name]()
