"""Functions whose own operators lack derivatives or batching, out of some that have them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamlpp_fast import reference

__all__ = ["COMPOSITES", "DENSE"]


def _recurrent(cell: Callable[..., tuple[Tensor, ...]], states: int) -> Callable[..., tuple[Tensor, ...]]:
    """``torch.gru`` and its like from a cell, (products of the input and of the state, states) to states."""

    def run(
        input: Tensor,
        hx: Any,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        start = (hx,) if states == 1 else tuple(hx)
        xs = input.transpose(0, 1) if batch_first else input
        each = len(params) // (num_layers * (1 + bidirectional))
        last: list[tuple[Tensor, ...]] = []
        for layer in range(num_layers):
            directions = []
            for direction in range(1 + bidirectional):
                number = len(last)
                own = params[number * each : (number + 1) * each]
                state = tuple(s[number] for s in start)
                outputs, state = _unrolled(cell, xs, state, own, has_biases, direction == 1)
                directions.append(outputs)
                last.append(state)
            xs = torch.cat(directions, -1) if bidirectional else directions[0]
            if layer + 1 < num_layers:
                xs = F.dropout(xs, dropout, train)
        finals = tuple(torch.stack([s[i] for s in last]) for i in range(states))
        return (xs.transpose(0, 1) if batch_first else xs, *finals)

    return run


def _unrolled(
    cell: Callable[..., tuple[Tensor, ...]],
    xs: Tensor,
    state: tuple[Tensor, ...],
    params: Sequence[Tensor],
    has_biases: bool,
    backwards: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    w_x, w_h = params[:2]
    b_x, b_h = params[2:4] if has_biases else (None, None)
    project = params[-1] if len(params) in (3, 5) else None
    products = F.linear(xs, w_x, b_x)  # of all time steps at once
    outputs = []
    for product in reversed(products.unbind(0)) if backwards else products.unbind(0):
        state = cell(product, F.linear(state[0], w_h, b_h), *state)
        if project is not None:
            state = (F.linear(state[0], project), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


def _once(cell: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """``torch.gru_cell`` and its like, one time step, from a cell."""

    def run(
        input: Tensor, hx: Any, w_x: Tensor, w_h: Tensor, b_x: Tensor | None = None, b_h: Tensor | None = None
    ) -> Any:
        state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        made = cell(F.linear(input, w_x, b_x), F.linear(state[0], w_h, b_h), *state)
        return made if len(made) > 1 else made[0]

    return run


def _gru_cell(x: Tensor, h: Tensor, state: Tensor) -> tuple[Tensor]:
    size = state.shape[-1]
    gates = torch.sigmoid(x[..., : 2 * size] + h[..., : 2 * size])
    reset, update = gates.split(size, -1)
    new = torch.tanh(x[..., 2 * size :] + reset * h[..., 2 * size :])
    return (new + update * (state - new),)


def _lstm_cell(x: Tensor, h: Tensor, state: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    size = memory.shape[-1]
    gates = x + h
    into, forget = torch.sigmoid(gates[..., : 2 * size]).split(size, -1)
    new = torch.tanh(gates[..., 2 * size : 3 * size])
    memory = forget * memory + into * new
    return torch.sigmoid(gates[..., 3 * size :]) * torch.tanh(memory), memory


def _tanh_cell(x: Tensor, h: Tensor, state: Tensor) -> tuple[Tensor]:
    return (torch.tanh(x + h),)


def _relu_cell(x: Tensor, h: Tensor, state: Tensor) -> tuple[Tensor]:
    return (torch.relu(x + h),)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(repeats, -3) for t in (key, value))
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            scores = scores.masked_fill(attn_mask.logical_not(), -math.inf)
        else:
            scores = scores + attn_mask
    return F.dropout(torch.softmax(scores, -1), dropout_p) @ value


def _binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    inverse = -F.logsigmoid(input)
    if pos_weight is not None:
        inverse = inverse * (1 + (pos_weight - 1) * target)
    terms = (1 - target) * input + inverse
    if weight is not None:
        terms = terms * weight
    if size_average is not None or reduce is not None:
        raise RuntimeError("size_average and reduce are deprecated")
    return terms if reduction == "none" else terms.mean() if reduction == "mean" else terms.sum()


def _gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    if not isinstance(var, Tensor):
        var = torch.full_like(input, var)
    if var.shape != input.shape and var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    # Variances are raised to eps where no gradient is taken, so the gradient passes as if they had not been.
    var = torch.where(var < eps, var - var.detach() + eps, var)
    terms = (var.log() + (input - target).square() / var) / 2
    if full:
        terms = terms + math.log(2 * math.pi) / 2
    return terms if reduction == "none" else terms.mean() if reduction == "mean" else terms.sum()


def _one_hot(input: Tensor, num_classes: int = -1) -> Tensor:
    zeros = torch.zeros(*input.shape, num_classes, dtype=torch.int64, device=input.device)
    return zeros.scatter(-1, input.unsqueeze(-1), 1)  # which raises for other classes, too


def _padded(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    """``F.pad``, whose own way around a circle writes into slices of what it makes."""
    if mode != "circular" or min(pad) < 0:
        return F.pad(input, list(pad), mode, value)
    for i in range(0, len(pad), 2):
        axis = input.ndim - 1 - i // 2
        size, (before, behind) = input.shape[axis], pad[i : i + 2]
        if max(before, behind) > size:
            raise RuntimeError("circular padding wraps around more than once")
        parts = (size - before, before), (0, size), (0, behind)
        input = torch.cat([input.narrow(axis, begin, count) for begin, count in parts if count], axis)
    return input


def _affine_grid(theta: Tensor, size: Sequence[int], align_corners: bool | None = None) -> Tensor:
    """``F.affine_grid``, whose own operator has no batching rule and writes into slices of what it makes."""
    sides = []
    for n in size[2:]:  # places from -1 to 1 along an axis: of corners, or of the middles of pixels
        places = torch.linspace(-1, 1, n, dtype=theta.dtype, device=theta.device)
        places = places * ((1 if align_corners else (n - 1) / n) if n > 1 else 0)
        sides.append(places)
    grid = torch.stack(
        [*reversed(torch.meshgrid(*sides, indexing="ij")), torch.ones_like(theta[0, 0, 0]).expand(*size[2:])],
        -1,
    )
    made = grid.reshape(-1, len(sides) + 1) @ theta.transpose(1, 2)
    return made.reshape(len(theta), *size[2:], len(sides))


def _adaptive_mean(axes: int) -> Callable[..., Tensor]:
    """``F.adaptive_avg_pool*d``: over all pixels a mean, without a view of memory that only its own has."""
    plain = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[axes - 1]

    def run(input: Tensor, output_size: Any) -> Tensor:
        sizes = output_size if isinstance(output_size, (tuple, list)) else (output_size,) * axes
        if all(size == 1 for size in sizes):
            return input.mean(list(range(-axes, 0)), keepdim=True)
        return plain(input.contiguous(), output_size)

    return run


def _assigned(input: Tensor, key: Any, value: Any) -> Tensor:
    """What ``input[key] = value`` leaves: by the places of its elements, not by a view of memory.

    By a mask they differ in number from call to call; where one value is for all of them, that does not matter.
    """
    if isinstance(key, Tensor) and key.dtype == torch.bool and key.ndim:
        rest = input.ndim - key.ndim
        if not isinstance(value, Tensor) or value.ndim <= rest:
            mask = key.reshape(*key.shape, *[1] * rest)
            return torch.where(mask, value, input).to(input.dtype)
    places = torch.arange(input.numel(), device=input.device).view(input.shape)[key]
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=input.dtype, device=input.device)
    value = value.to(input.dtype).expand(places.shape).reshape(-1)
    return input.reshape(-1).index_put((places.reshape(-1),), value).view(input.shape)


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *rest: Any, **more: Any
) -> Tensor:
    """``F.embedding``, whose row of the padding has no gradient: so that no tangent comes of that row either."""
    made = F.embedding(input, weight, None, *rest, **more)
    if padding_idx is None:
        return made
    return torch.where((input == padding_idx % len(weight)).unsqueeze(-1), made.detach(), made)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, which adds the bias to a single row in place, under another name."""
    if input.ndim > 1:
        return F.linear(input, weight, bias)
    return weight @ input if bias is None else weight @ input + bias


def _viewed(input: Tensor, *shape: Any, **more: Any) -> Tensor:
    """``Tensor.view``: of a tensor whose copy into order (``contiguous``) may have been left out."""
    if more or isinstance(shape[0], torch.dtype):
        return input.view(*shape, **more)
    return input.reshape(*shape)


def _filled(input: Tensor, value: Any) -> Tensor:
    return (
        value.to(input.dtype).expand(input.shape)
        if isinstance(value, Tensor)
        else torch.full_like(input, value)
    )


COMPOSITES: Mapping[Any, Callable[..., Any]] = {
    torch._weight_norm: reference.weight_norm,
    F.layer_norm: reference.layer_norm,
    torch.layer_norm: reference.layer_norm,
    F.group_norm: reference.group_norm,
    torch.group_norm: reference.group_norm,
    F.instance_norm: reference.instance_norm,
    torch.gru: _recurrent(_gru_cell, 1),
    torch.lstm: _recurrent(_lstm_cell, 2),
    torch.rnn_tanh: _recurrent(_tanh_cell, 1),
    torch.rnn_relu: _recurrent(_relu_cell, 1),
    torch.gru_cell: _once(_gru_cell),
    torch.lstm_cell: _once(_lstm_cell),
    torch.rnn_tanh_cell: _once(_tanh_cell),
    torch.rnn_relu_cell: _once(_relu_cell),
    F.scaled_dot_product_attention: _attention,
    F.one_hot: _one_hot,
    torch._is_all_true: torch.all,
    F.embedding: _embedding,
    F.linear: _linear,
    Tensor.view: _viewed,
    Tensor.view_as: Tensor.reshape_as,
    F.binary_cross_entropy_with_logits: _binary_cross_entropy_with_logits,
    F.gaussian_nll_loss: _gaussian_nll_loss,
    Tensor.__setitem__: _assigned,
    Tensor.copy_: lambda input, src, non_blocking=False: _filled(input, src),
    Tensor.fill_: _filled,
    Tensor.zero_: torch.zeros_like,
    F.pad: _padded,
    F.affine_grid: _affine_grid,
    F.adaptive_avg_pool1d: _adaptive_mean(1),
    torch.adaptive_avg_pool1d: _adaptive_mean(1),
    F.adaptive_avg_pool2d: _adaptive_mean(2),
    F.adaptive_avg_pool3d: _adaptive_mean(3),
}

# Faster where their operands and gradients lie contiguous, by more than the copies take.
DENSE = frozenset({F.group_norm, torch.group_norm})
