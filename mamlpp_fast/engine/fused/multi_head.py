"""Attention of several heads, one function of PyTorch's, as its parts: projections with an attention between them.

As one generic step it has matrices of L x S for all heads in every rule; of long sequences the part that has them takes
a few heads at a time (:class:`mamlpp_fast.engine.fused.steps.Attention`). Short ones take a fifth less time in parts:
three projections for one that is sliced and copied, a softmax that minds no mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from mamlpp_fast.engine.operation import Operation, Value
from mamlpp_fast.engine.record import Recording

__all__ = ["taken_apart"]

_ARGUMENTS = inspect.signature(F.multi_head_attention_forward)
_ABSENT = ("bias_k", "bias_v", "key_padding_mask", "static_k", "static_v")
"""Arguments with which it stays one step."""


def taken_apart(recording: Recording) -> Recording:
    """The recording with the attentions of several heads as their parts.

    Not those with a mask (but a causal one that PyTorch is told of by ``is_causal``) or dropout, nor where somebody
    reads the probabilities that it returns.
    """
    if all(op.function is not F.multi_head_attention_forward for op in recording.operations):
        return recording
    read = {r.index for op in recording.operations for r in op.inputs() if isinstance(r, Value)}
    read.add(recording.output)
    count = 1 + max(*read, *(i for op in recording.operations for i in op.outputs))
    shapes, dtypes = dict(recording.shapes), dict(recording.dtypes)
    sides: tuple[list[Operation], list[Operation]] = ([], [])
    sizes: list[dict[int, tuple[int, ...]]] = [
        {i: (n, *shapes[i]) for i in range(recording.inputs)} for n in recording.examples
    ]
    for pair in zip(recording.operations, recording.others, strict=True):
        for found, op in zip(sizes, pair, strict=True):
            found.update((i, shape) for i, (shape, _) in zip(op.outputs, op.tensors, strict=True))
        calls = [_call(op, found, read) for op, found in zip(pair, sizes, strict=True)]
        first, second = calls
        if first is None or second is None or not _regular(first, second, recording.examples):
            for side, op in zip(sides, pair, strict=True):
                side.append(op)
            continue
        for side, op, call in zip(sides, pair, (first, second), strict=True):
            side += _parts(op, call, count)
        for i, shape in enumerate(first.shapes):
            shapes[count + i], dtypes[count + i] = shape[1:], pair[0].tensors[0][1]
        count += len(first.shapes)
    return replace(
        recording, operations=tuple(sides[0]), others=tuple(sides[1]), shapes=shapes, dtypes=dtypes
    )


class _Call(NamedTuple):
    """One that can be taken apart.

    Attributes:
        given: its arguments by name.
        shapes: of queries, keys, values and what the attention makes of them, [N, H, L or S, d].
        causal: whether a query sees no later key.
    """

    given: Mapping[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    causal: bool


def _call(op: Operation, sizes: Mapping[int, tuple[int, ...]], read: set[int]) -> _Call | None:
    if op.function is not F.multi_head_attention_forward or op.draws or op.constant:
        return None
    bound = _ARGUMENTS.bind(*op.args, **op.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    causal = given["is_causal"] and not given["need_weights"]  # else PyTorch goes by the mask
    if any(given[name] is not None for name in _ABSENT) or given["add_zero_attn"]:
        return None
    if given["use_separate_proj_weight"] or (given["attn_mask"] is not None and not causal):
        return None
    if (given["training"] and given["dropout_p"]) or any(i in read for i in op.outputs[1:]):
        return None
    tensors = [given[name] for name in ("query", "key", "value")]
    if not all(isinstance(t, Value) and len(sizes[t.index]) == 3 for t in tensors):
        return None
    (length, n, width), (keys, *_), _ = (sizes[t.index] for t in tensors)
    heads = given["num_heads"]
    queries, others = (n, heads, length, width // heads), (n, heads, keys, width // heads)
    return _Call(given, (queries, others, others, queries), causal)


def _regular(first: _Call, second: _Call, examples: tuple[int, int]) -> bool:
    """Whether each example attends to itself alone, and the sequences are as long for any number of them."""
    return all(
        (a[0], b[0]) == examples and a[1:] == b[1:] for a, b in zip(first.shapes, second.shapes, strict=True)
    )


def _parts(op: Operation, call: _Call, place: int) -> list[Operation]:
    """The operations that stand for one; their values begin at ``place``."""
    given, dtype = call.given, op.tensors[0][1]

    def part(i: int, function: Any, *args: Any, **kwargs: Any) -> Operation:
        tensors = ((call.shapes[i], dtype),)
        return replace(op, function=function, args=args, kwargs=kwargs, outputs=(place + i,), tensors=tensors)

    weights = given["in_proj_weight"], given["in_proj_bias"]
    q, k, v = (
        part(i, projected, given[name], *weights, i, given["num_heads"])
        for i, name in enumerate(("query", "key", "value"))
    )
    values = [Value(place + i) for i in range(4)]
    y = part(3, F.scaled_dot_product_attention, *values[:3], is_causal=call.causal)
    last = replace(
        op,
        function=joined_heads,
        args=(values[3], given["out_proj_weight"], given["out_proj_bias"]),
        kwargs={},
        outputs=op.outputs[:1],
        tensors=op.tensors[:1],
    )
    return [q, k, v, y, last]


def projected(x: Tensor, weight: Tensor, bias: Tensor | None, part: int, heads: int) -> Tensor:
    """Queries, keys or values (0, 1, 2) of [L, N, E], by their third of the weight [3E, E]: [N, H, L, d]."""
    size = len(weight) // 3
    rows = slice(part * size, (part + 1) * size)
    y: Tensor = F.linear(x, weight[rows], None if bias is None else bias[rows])
    return y.view(*y.shape[:2], heads, -1).permute(1, 2, 0, 3)


def joined_heads(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the heads [N, H, L, d] found, projected: [L, N, E]."""
    return F.linear(x.permute(2, 0, 1, 3).flatten(2), weight, bias)
