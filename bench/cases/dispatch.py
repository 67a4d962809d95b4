"""What a call costs beside its work: every operation at sizes that leave nothing else to time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from bench.cases import batch_norm, conv, head, lslr, norm_act_pool
from bench.harness import Case


def cases() -> Iterator[Case]:
    for case in _smallest():
        yield dataclasses.replace(case, size=f"dispatch, {case.size}")


def _smallest() -> Iterator[Case]:
    for order in batch_norm.TENSORS_MOVED:
        # Not two values a channel: there second derivatives are all rounding.
        yield batch_norm.case(order, (2, 4, 2, 2), "contiguous", torch.float32)
    for order in lslr.BUFFERS:
        yield lslr.case(order, [torch.Size((4,)), torch.Size((2, 2))], 1)
    for order in norm_act_pool.OPERATIONS:
        yield norm_act_pool.case(order, (1, 2, 2, 2, 16))
    for order in head.PRODUCTS:
        yield head.case(order, "head", (1, 2, 4, 2))
    for order in conv.ORDERS:
        yield conv.case(order, "2x2", (1, 1, 2, 16, 16), torch.float32)
