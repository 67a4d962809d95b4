"""The rules: for each function of PyTorch that the fused engine takes, the steps that it becomes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mamlpp_fast.engine.fused.window_rules  # noqa: F401 - the other rules
from mamlpp_fast import reference
from mamlpp_fast.engine.fused.lowering import Lowering, rule, said
from mamlpp_fast.engine.fused.network import Norm, Statistics
from mamlpp_fast.engine.fused.steps import (
    Activation,
    Add,
    Attention,
    Dropout,
    Flatten,
    FrozenNorm,
    Linear,
    NormActPool,
    Rows,
    ScaleShift,
    Scaling,
    Slot,
    Smooth,
    Times,
    attention,
)
from mamlpp_fast.engine.operation import Buffer, Value
from mamlpp_fast.ops.pointwise import FUNCTIONS

_BATCH_NORMS = (
    "of images, sequences or features, also of several an example ([N * B, ...]); weights per step, shared, adapted in "
    "the inner loop, one of them alone, or none; not with `momentum=None`"
)
_GROUP_NORMS = "of images and sequences, statistics of the input alone"
_POINTWISE = "of features, and of images and sequences behind other steps of this table"
_PLAIN = "anywhere"

# Products ------------------------------------------------------------------------------------------------------------


@rule(F.linear, takes="of features [N, F]")
def _linear(low: Lowering, input: Any, weight: Any, bias: Any = None) -> None:
    x = low.value(input)
    shape, name = low.shapes[x], low.parameter(weight)
    outputs, features = low.parameters[name].shape
    if len(shape) != 1:
        raise low.refusal(f"linear: expected features [N, {features}], got {shape}")
    grid = low.grids.get(x)
    if grid is None:
        slot = Slot(name, (features, outputs), (outputs, features), (1, 0))
    else:
        height, width, channels = grid
        slot = Slot(name, (features, outputs), (outputs, channels, height, width), (2, 3, 1, 0))
    vector = None if bias is None else low.vector(low.parameter(bias))
    low.step(Linear, (x,), (outputs,), slot, vector)


@rule(
    F.scaled_dot_product_attention,
    takes="of long sequences (2^18 probabilities of an example or more), causal or not; no mask, no dropout",
)
def _attention(
    low: Lowering,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    shapes = [_recorded(low, argument) for argument in (query, key, value)]
    (heads, length, width), (*_, keys, _) = shapes[:2]
    same = all(len(s) == 3 and s[0] == heads and s[1] == keys for s in shapes[1:])
    if attn_mask is not None or dropout_p or enable_gqa or not same or shapes[1][2] != width:
        raise low.refusal("attention: expected as many heads of keys as of queries, no mask and no dropout")
    if heads * length * keys < attention.LONG:
        raise low.refusal("attention: expected long sequences")
    inputs = tuple(low.native(argument.index) for argument in (query, key, value))
    factor = 1 / math.sqrt(width) if scale is None else float(scale)
    low.native_step(Attention, inputs, low.shape, keys, factor, is_causal)


# Norms ---------------------------------------------------------------------------------------------------------------


@rule(reference.per_step_norm, takes=_BATCH_NORMS, alone=True)
def _per_step_norm(
    low: Lowering,
    input: Any,
    *,
    num_steps: int,
    per_step_affine: bool,
    per_step_stats: bool,
    negative_slope: float | None,
    training: bool,
    **tensors: Any,
) -> None:
    by_batch = training or not low.running
    if by_batch and not training:
        tensors |= {"running_mean": None, "running_var": None}
    _batch_norm(
        low,
        input,
        training=by_batch,
        rows=num_steps if per_step_affine else 1,
        statistics_rows=num_steps if per_step_stats else 1,
        **tensors,
    )
    if negative_slope is not None:
        if low.rows > 1:
            raise low.refusal("batch norm: expected no activation in one with several rows an example")
        assert low.op.output is not None
        _activation(low, Value(low.op.output), negative_slope)


@rule(F.batch_norm, takes=_BATCH_NORMS, alone=True)
def _batch_norm(
    low: Lowering,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: Any = 0.1,
    eps: float = 1e-5,
    *,
    rows: int = 1,
    statistics_rows: int = 1,
) -> None:
    several = low.rows > 1
    x, shape = low.of_rows(input) if several else low.images(input, axes=(1, 2, 3, 4))
    names = [None if p is None else low.parameter(p) for p in (weight, bias)]
    slots = [None if n is None else low.vector(n) for n in names]
    adapting = bool(low.adapted.intersection(names))
    shared = Rows(low.name, names[0], names[1], rows, shape[2])
    statistics = None
    if running_mean is not None:
        for buffer in (running_mean, running_var):
            if not isinstance(buffer, Buffer):
                raise low.refusal(f"batch norm: expected buffers as running statistics, got {said(buffer)}")
        known = (n.statistics for n in low.norms.values() if n.statistics is not None)
        if training and any(running_mean.name == s.mean or running_var.name == s.var for s in known):
            raise low.refusal(f"shares {running_mean.name} with another call")
        if momentum is None:
            raise low.refusal("expected a momentum, got a cumulative average (momentum=None)")
        counted = f"{running_mean.name.rpartition('.')[0]}.num_batches_tracked".removeprefix(".")
        statistics = Statistics(
            running_mean.name,
            running_var.name,
            counted if counted in low.recording.counted else None,
            statistics_rows,
            momentum,
            eps,
        )
    if training:
        low.norms[low.name] = Norm(shape[0] * shape[1], statistics)
        affine: Rows | Scaling | None = None if weight is None and bias is None else shared
        if adapting:
            affine = None if slots[0] is None or slots[1] is None else Scaling(slots[0], slots[1])
        x = low.step(NormActPool, (x,), shape, affine, eps, 1.0, False, False, low.name)
    else:
        assert statistics is not None
        low.frozen[low.name] = statistics
        affine = shared
        x = low.step(FrozenNorm, (x,), shape, shared, not adapting, eps)
    if adapting and not isinstance(affine, Scaling):
        x = low.step(ScaleShift, (x,), shape, *slots)
    if several:
        low.to_rows(x)
    elif len(low.shape) == 1:  # features, not images of one pixel
        low.step(Flatten, (x,), low.shape)


@rule(F.layer_norm, takes="over [C, H, W] of images or [F] of features")
def _layer_norm(
    low: Lowering,
    input: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> None:
    x = low.value(input)
    shape = low.shapes[x]
    # Of images, stored [H, W, C], or of features.
    split, order = ((shape[2], *shape[:2]), (1, 2, 0)) if len(shape) == 3 else (shape, (0,))
    if x in low.grids:
        raise low.refusal("layer norm: expected images or features, got flattened images")
    if tuple(normalized_shape) != split:
        raise low.refusal(f"layer norm: expected normalized_shape {split}, got {tuple(normalized_shape)}")
    names = [None if p is None else low.parameter(p) for p in (weight, bias)]
    slots = [None if n is None else Slot(n, shape, split, order) for n in names]
    x = low.step(NormActPool, (x,), shape, None, eps, 1.0, False, True)
    if any(s is not None for s in slots):
        low.step(ScaleShift, (x,), shape, *slots)


@rule(F.group_norm, torch.group_norm, takes=_GROUP_NORMS)
def _group_norm(
    low: Lowering,
    input: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> None:
    slots = [None if p is None else low.vector(low.parameter(p)) for p in (weight, bias)]
    x, shape = low.images(input, axes=(2, 3, 4))
    both = None if slots[0] is None or slots[1] is None else Scaling(slots[0], slots[1])
    group = shape[2] // num_groups
    if group * shape[0] * shape[1] < 2:
        raise low.refusal("group norm: expected more than one value a group")
    x = low.step(NormActPool, (x,), shape, both, eps, 1.0, False, False, "", group)
    if both is None and any(slot is not None for slot in slots):
        low.step(ScaleShift, (x,), shape, *slots)


@rule(F.instance_norm, takes=_GROUP_NORMS)
def _instance_norm(
    low: Lowering,
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> None:
    if not use_input_stats or running_mean is not None:
        raise low.refusal("instance norm: expected statistics of the input alone")
    channels = _recorded(low, input)[0]
    _group_norm(low, input, channels, weight, bias, eps)


def _recorded(low: Lowering, input: Any) -> tuple[int, ...]:
    """The shape of an activation in the model, without the examples."""
    return low.recording.shapes[low.index(input)]


# Pointwise -----------------------------------------------------------------------------------------------------------


def _activation(low: Lowering, input: Any, slope: float) -> None:
    # Images of a generic step go over to the kernels here: pools and convolutions follow as a rule.
    images = isinstance(input, Value) and len(low.recording.shapes[input.index]) == 3
    x = low.images(input)[0] if images else low.value(input)
    low.step(Activation, (x,), low.shapes[x], slope, grid=low.grids.get(x))


@rule(F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, takes=_POINTWISE)
def _relu(low: Lowering, input: Any, inplace: bool = False) -> None:
    _activation(low, input, 0.0)


@rule(F.leaky_relu, F.leaky_relu_, takes=_POINTWISE)
def _leaky_relu(low: Lowering, input: Any, negative_slope: float = 0.01, inplace: bool = False) -> None:
    _activation(low, input, float(negative_slope))


def _floating(low: Lowering, input: Any) -> int:
    x = low.value(input)
    if not low.recording.dtypes[input.index].is_floating_point:
        raise low.refusal(f"{low.op.name}: expected real numbers")
    return x


def _smooth(low: Lowering, input: Any, name: str, a: float = 0.0) -> None:
    x = _floating(low, input)
    low.step(Smooth, (x,), low.shapes[x], FUNCTIONS.index(name), a, grid=low.grids.get(x))


@rule(F.gelu, takes=_POINTWISE)
def _gelu(low: Lowering, input: Any, *, approximate: str = "none") -> None:
    _smooth(low, input, "gelu" if approximate == "none" else "gelu_tanh")


@rule(F.silu, takes=_POINTWISE)
def _silu(low: Lowering, input: Any, inplace: bool = False) -> None:
    _smooth(low, input, "silu")


@rule(F.elu, F.elu_, takes=_POINTWISE)
def _elu(low: Lowering, input: Any, alpha: float = 1.0, inplace: bool = False) -> None:
    _smooth(low, input, "elu", float(alpha))


def _named(name: str, a: float = 0.0) -> Callable[[Lowering, Any], None]:
    return lambda low, input: _smooth(low, input, name, a)


for _name, _number in (("sigmoid", 0.0), ("tanh", 0.0), ("sin", 1.0), ("cos", 1.0)):
    _functions = [getattr(home, f"{_name}{end}") for home in (torch, Tensor) for end in ("", "_")]
    rule(*_functions, takes=_POINTWISE)(_named({"sin": "sine", "cos": "cosine"}.get(_name, _name), _number))


@rule(
    torch.mul,
    Tensor.mul,
    Tensor.mul_,
    Tensor.__mul__,
    Tensor.__rmul__,
    Tensor.__imul__,
    takes="with a number",
)
def _mul(low: Lowering, input: Any, other: Any) -> None:
    x = _floating(low, input)
    if isinstance(other, bool) or not isinstance(other, (int, float)):
        raise low.refusal(f"product: expected a number, got {said(other)}")
    low.step(Times, (x,), low.shapes[x], float(other), grid=low.grids.get(x))


@rule(
    torch.add,
    Tensor.add,
    Tensor.add_,
    Tensor.__add__,
    Tensor.__radd__,
    Tensor.__iadd__,
    takes="of two activations of one shape",
)
def _add(low: Lowering, input: Any, other: Any, *, alpha: Any = 1) -> None:
    x, y = low.value(input), low.value(other)
    if alpha != 1:
        raise low.refusal(f"sum: expected alpha 1, got {alpha}")
    recorded = low.recording.shapes
    same = recorded[input.index] == recorded[other.index]
    if not same or low.shapes[x] != low.shapes[y] or low.grids.get(x) != low.grids.get(y):
        raise low.refusal(
            f"sum: expected two activations of one shape, got {low.shapes[x]} and {low.shapes[y]}"
        )
    low.step(Add, (x, y), low.shapes[x], grid=low.grids.get(x))


@rule(
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    torch.dropout,
    torch.feature_dropout,
    takes="of elements and of channels, on a CPU ([masks](#dropout-and-noise))",
)
def _dropout(
    low: Lowering,
    input: Any,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    train: bool = True,
) -> None:
    if p == 0 or not (training and train):
        low.same(input)
        return
    x, shape = low.value(input), low.recording.shapes[input.index]
    draws = {n: op.draws for n, op in zip(low.recording.examples, (low.op, low.other), strict=True)}
    masks = [(n, [d.shape for d in found]) for n, found in draws.items()]
    whole = all(shapes == [(n, *shape)] for n, shapes in masks)
    if not whole and any(shapes != [(n, shape[0], *[1] * (len(shape) - 1))] for n, shapes in masks):
        raise low.refusal("dropout: expected a number for each element, or for each channel of each example")
    stored = low.shapes[x]
    grid = low.grids.get(x) or (stored if len(stored) == 3 else None)
    if not whole and (grid is None or x in low.grids):
        raise low.refusal("dropout: expected images, got features")
    by_examples = {n: found[0] for n, found in draws.items()}
    low.step(Dropout, (x,), stored, by_examples, 1 / (1 - p), grid, whole, grid=low.grids.get(x))


@rule(F.alpha_dropout, takes="of rate 0, or in evaluation")
def _alpha_dropout(
    low: Lowering, input: Any, p: float = 0.5, training: bool = False, inplace: bool = False
) -> None:
    if p != 0 and training:
        raise low.refusal("alpha dropout: expected none of it")
    low.same(input)


@rule(Tensor.contiguous, Tensor.clone, torch.clone, takes=_PLAIN)
def _same(low: Lowering, input: Any, *, memory_format: Any = None) -> None:
    low.same(input)


@rule(Tensor.detach, torch.detach, Tensor.data.__get__, takes=_PLAIN)  # type: ignore[attr-defined]
def _detach(low: Lowering, input: Any, *_: Any) -> None:
    # What takes part in no gradient becomes a step of its own for every operation (`constant`).
    low.same(input)


# Shapes --------------------------------------------------------------------------------------------------------------


@rule(
    torch.flatten, Tensor.flatten, Tensor.view, Tensor.reshape, torch.reshape, takes="of all but the examples"
)
def _reshape(low: Lowering, input: Any, *_: Any, **__: Any) -> None:
    x = low.value(input)
    before = low.recording.shapes[input.index]
    if low.shape == before:
        low.same(input)
        return
    if len(low.shape) != 1:
        raise low.refusal(
            f"{low.op.name}: expected to flatten all but the examples, got {before} to {low.shape}"
        )
    shape = low.shapes[x]
    low.step(Flatten, (x,), (math.prod(shape),), grid=shape if len(shape) == 3 else low.grids.get(x))
