"""What is known of ATen's operators: which make numbers of nothing, views, the same in place, or zeros of zeros."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch._ops import OpOverload

__all__ = ["FILLS", "PLACED", "SAME", "SUMS", "alias_of", "functional", "packet_of", "vanishes"]

aten = torch.ops.aten

# Only sizes, types and places of their tensors decide what they give.
FILLS = {
    aten.zeros_like.default: 0,
    aten.zeros.default: 0,
    aten.new_zeros.default: 0,
    aten._efficientzerotensor.default: 0,
    aten._new_zeros_with_same_feature_meta.default: 0,
    aten.ones_like.default: 1,
    aten.ones.default: 1,
    aten.new_ones.default: 1,
    # Overwritten before they are read, or of no elements.
    aten.empty_like.default: 0,
    aten.empty.memory_format: 0,
    aten.new_empty.default: 0,
    aten.new_empty_strided.default: 0,
    aten.empty_strided.default: 0,
}
# Not views by their schemas, but of fresh tensors that nobody else has.
SAME = frozenset({aten._unsafe_view.default, aten.lift_fresh_copy.default})
# Of zeros in the place of what has no derivative they make such again: PyTorch computes nothing with these.
_PRODUCTS = frozenset({aten.mul.Tensor, aten.mul.Scalar})
_LINEAR = frozenset(
    {aten.div.Tensor, aten.div.Scalar, aten.neg.default, aten.clone.default, aten._to_copy.default}
)
SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})
# What they give depends on where their argument lies in memory, which is another place in a program.
PLACED = ("as_strided", "_reshape_alias", "set_", "resize_")


@functools.cache
def alias_of(op: OpOverload) -> bool:
    """Whether an operator that changes nothing returns views of its first argument."""
    returns = op._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def vanishes(func: OpOverload, absent: Sequence[bool]) -> bool:
    """Whether a call makes zeros that stand for no derivative, of such ones.

    They are none to compute with: a product with infinity (a mask's) would be no number.

    Args:
        absent: which of the arguments are such zeros.
    """
    if func in _PRODUCTS:
        return any(absent)
    if func in SUMS:
        return all(absent[:2])
    return any(absent[:1]) and (func in _LINEAR or alias_of(func))


def packet_of(func: OpOverload) -> str:
    """The name of an operator, without its overload's."""
    return str(func.overloadpacket.__name__)


def functional(func: OpOverload) -> OpOverload | None:
    """The operator that gives what ``func`` leaves in its first argument; None where there is none."""
    packet = getattr(aten, packet_of(func).removesuffix("_"), None)
    names = [] if func.namespace != "aten" or packet is None else packet.overloads()
    # By its arguments, not by its name: `pow_.Scalar` takes a tensor's power, `pow.Scalar` that of a number.
    for name in sorted(names, key=lambda name: name != func._overloadname):
        found: OpOverload = getattr(packet, name)
        if _types_of(found) == _types_of(func):
            return found
    return None


def _types_of(func: OpOverload) -> list[str]:
    return [str(argument.type) for argument in func._schema.arguments]
