"""Steps that are linear in their input: convolution, fully connected layer, sum, bias."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from mamlpp_fast.engine.fused.program import Emitter, Ref
from mamlpp_fast.engine.fused.steps.base import Gradients, OneBackward, Pass, Slot, Step, aten
from mamlpp_fast.ops.task_conv2d import pays_in_bfloat16

__all__ = ["Add", "Bias", "Conv", "Detach", "Flatten", "Linear", "Plain", "TransposedConv"]

ops = torch.ops.mamlpp_fast
_FEW_CHANNELS = 4


@dataclass
class Conv(OneBackward):
    """Convolution without bias; an axis along which the kernel is one pixel is not padded."""

    weight: Slot
    stride: int
    padding: int

    forward_op: ClassVar[str] = "task_conv2d"
    to_input_op: ClassVar[str] = "task_conv2d_to_input"
    gradients_op: ClassVar[str | None] = "task_conv2d_gradients"

    @property
    def convolves(self) -> bool:
        return True

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (self.weight,)

    def _flops(self, ps: Pass, pairs: int) -> int:
        kh, kw, ci = self.weight.shape[:3]
        return 2 * pairs * ps.tasks * ps.images * math.prod(self.shape) * kh * kw * ci

    def _weight_pair(self, x: Ref, g: Ref) -> tuple[Ref, Ref]:
        return x, g

    def _size(self, ps: Pass) -> tuple[int, ...]:
        """[H, W] of the convolution's input."""
        return ps.values[self.inputs[0]].shape[2:4]

    def _rounds(self, em: Emitter, ps: Pass) -> bool:
        """Whether products take rounded operands where such are asked for: on a CPU, if they are faster."""
        if em.device.type != "cpu":
            return True
        height, width = self._size(ps)
        w = self.weight.shape
        # A first layer waits for memory: rounding its large gradient costs more than faster products save.
        return w[2] > _FEW_CHANNELS and pays_in_bfloat16(
            ps.images, (height, width), w, self.stride, self.padding
        )

    def _product(self, em: Emitter, ps: Pass, op: str, pairs: list[tuple[Ref, Ref]], out: Ref) -> None:
        first, second = pairs[0], pairs[1] if len(pairs) > 1 else (None, None)
        rounds = em.operand_dtype is not None and self._rounds(em, ps)
        operands = [em.operand(r) if r is not None and rounds else r for r in (*first, *second)]
        em.call(ps.op(op), *operands, self.stride, self.padding, out, flops=self._flops(ps, len(pairs)))

    def forward(self, em: Emitter, ps: Pass) -> None:
        out = self.new_output(em, ps)
        x, w = ps.values[self.inputs[0]], ps.weights[self.weight.name]
        self._product(em, ps, self.forward_op, [(x, w)], out)
        ps.values[self.output] = out

    def tangent(self, em: Emitter, ps: Pass) -> None:
        x, w = ps.values[self.inputs[0]], ps.weights[self.weight.name]
        u, v = ps.tangents.get(self.inputs[0]), ps.directions.get(self.weight.name)
        pairs = ([] if u is None else [(u, w)]) + ([] if v is None else [(x, v)])
        out = self.new_output(em, ps, "tangent of ")
        self._product(em, ps, self.forward_op, pairs, out)
        ps.tangents[self.output] = out

    def gradients(self, em: Emitter, ps: Pass, g: Ref, g0: Ref | None, out: Gradients) -> None:
        source, name = self.inputs[0], self.weight.name
        x, w = ps.values[source], ps.weights[name]
        u, v = (None, None) if g0 is None else (ps.tangents.get(source), ps.directions.get(name))
        both = source in out.wanted_values and name in out.wanted_params and (u is None) == (v is None)
        if both and self.gradients_op is not None:
            gx, gw = self.new_gradient(em, ps, out), out.of(em, self.weight, ps.tasks)
            second = [None] * 3 if u is None else [u, v, g0]
            rounds = em.operand_dtype is not None and self._rounds(em, ps)
            operands = [em.operand(r) if r is not None and rounds else r for r in (x, w, g, *second)]
            flops = 2 * self._flops(ps, 1 if u is None else 2)
            em.call(ps.op(self.gradients_op), *operands, self.stride, self.padding, gx, gw, flops=flops)
            out.params[name] = gw
            return
        if source in out.wanted_values:
            pairs = [(g, w)] + ([] if v is None or g0 is None else [(g0, v)])
            self._product(em, ps, self.to_input_op, pairs, self.new_gradient(em, ps, out))
        if name in out.wanted_params:
            pairs = [self._weight_pair(x, g)]
            if u is not None and g0 is not None:
                pairs.append(self._weight_pair(u, g0))
            gw = out.of(em, self.weight, ps.tasks)
            self._product(em, ps, "task_conv2d_to_weight", pairs, gw)
            out.params[name] = gw


@dataclass
class TransposedConv(Conv):
    """The gradient of a convolution to its input as a layer: rules and products in each other's places.

    Attributes:
        source: shape of an example of the input, which is the output of that convolution.
    """

    source: tuple[int, ...]

    forward_op: ClassVar[str] = "task_conv2d_to_input"
    to_input_op: ClassVar[str] = "task_conv2d"
    gradients_op: ClassVar[str | None] = None

    def _flops(self, ps: Pass, pairs: int) -> int:
        kh, kw, co = self.weight.shape[:3]
        return 2 * pairs * ps.tasks * ps.images * math.prod(self.source) * kh * kw * co

    def _size(self, ps: Pass) -> tuple[int, ...]:
        return self.shape[:2]

    def _weight_pair(self, x: Ref, g: Ref) -> tuple[Ref, Ref]:
        return g, x


@dataclass
class Bias(Step):
    """Adds a bias per channel; an inert one takes no gradient."""

    bias: Slot
    inert: bool

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (self.bias,)

    def params(self) -> frozenset[str]:
        return frozenset() if self.inert else super().params()

    def _broadcast(self, ps: Pass, bias: Ref) -> Ref:
        return bias.reshape(ps.tasks, *([1] * len(self.shape)), self.shape[-1])

    def forward(self, em: Emitter, ps: Pass) -> None:
        out = self.new_output(em, ps)
        em.call(
            aten.add.out, ps.values[self.inputs[0]], self._broadcast(ps, ps.weights[self.bias.name]), out=out
        )
        ps.values[self.output] = out

    def tangent(self, em: Emitter, ps: Pass) -> None:
        u, b = ps.tangents.get(self.inputs[0]), ps.directions.get(self.bias.name)
        if b is None or self.inert:
            ps.tangents[self.output] = ps.tangents[self.inputs[0]]
            return
        out = self.new_output(em, ps, "tangent of ")
        if u is None:
            em.call(aten.copy_.default, out, self._broadcast(ps, b))
        else:
            em.call(aten.add.out, u, self._broadcast(ps, b), out=out)
        ps.tangents[self.output] = out

    def backward(self, em: Emitter, ps: Pass, gy: Ref, out: Gradients) -> None:
        if self.inputs[0] in out.wanted_values:
            out.add(self.inputs[0], gy)
        if self.bias.name in out.wanted_params and not self.inert:
            gb = out.of(em, self.bias, ps.tasks)
            em.call(aten.sum.IntList_out, gy, list(range(1, 1 + len(self.shape))), out=gb)
            out.params[self.bias.name] = gb

    def backward_tangent(self, em: Emitter, ps: Pass, gy: Ref | None, gy_dot: Ref, out: Gradients) -> None:
        self.backward(em, ps, gy_dot, out)


@dataclass
class Linear(OneBackward):
    """Fully connected layer; its weights are stored [in, out]."""

    weight: Slot
    bias: Slot | None

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def _flops(self, ps: Pass) -> int:
        return 2 * ps.tasks * ps.images * math.prod(self.weight.shape)

    def _product(
        self, em: Emitter, ps: Pass, terms: list[tuple[Ref, Ref]], start: Ref | None, out: Ref
    ) -> None:
        """``out`` = sum of matrix products of ``terms`` (+ ``start``)."""
        for i, (a, b) in enumerate(terms):
            if i == 0 and start is None:
                em.call(aten.bmm.out, a, b, out=out, flops=self._flops(ps))
            else:
                em.call(aten.baddbmm.out, start if i == 0 else out, a, b, out=out, flops=self._flops(ps))

    def forward(self, em: Emitter, ps: Pass) -> None:
        out = self.new_output(em, ps)
        bias = None if self.bias is None else ps.weights[self.bias.name].view(lambda t: t.unsqueeze(1))
        self._product(em, ps, [(ps.values[self.inputs[0]], ps.weights[self.weight.name])], bias, out)
        ps.values[self.output] = out

    def tangent(self, em: Emitter, ps: Pass) -> None:
        x, w = ps.values[self.inputs[0]], ps.weights[self.weight.name]
        u, v = ps.tangents.get(self.inputs[0]), ps.directions.get(self.weight.name)
        b = None if self.bias is None else ps.directions.get(self.bias.name)
        terms = ([] if u is None else [(u, w)]) + ([] if v is None else [(x, v)])
        start = None if b is None else b.view(lambda t: t.unsqueeze(1))
        out = self.new_output(em, ps, "tangent of ")
        if not terms:
            assert start is not None
            em.call(aten.copy_.default, out, start)
        self._product(em, ps, terms, start, out)
        ps.tangents[self.output] = out

    def gradients(self, em: Emitter, ps: Pass, g: Ref, g0: Ref | None, out: Gradients) -> None:
        source, name = self.inputs[0], self.weight.name
        x, w = ps.values[source], ps.weights[name]
        u, v = ps.tangents.get(source), ps.directions.get(name)
        if source in out.wanted_values:
            terms = [(g, _transposed(w))] + ([] if v is None or g0 is None else [(g0, _transposed(v))])
            self._product(em, ps, terms, None, self.new_gradient(em, ps, out))
        if name in out.wanted_params:
            terms = [(_transposed(x), g)] + ([] if u is None or g0 is None else [(_transposed(u), g0)])
            gw = out.of(em, self.weight, ps.tasks)
            self._product(em, ps, terms, None, gw)
            out.params[name] = gw
        if self.bias is not None and self.bias.name in out.wanted_params:
            gb = out.of(em, self.bias, ps.tasks)
            em.call(aten.sum.IntList_out, g, [1], out=gb)
            out.params[self.bias.name] = gb


def _transposed(ref: Ref) -> Ref:
    return ref.view(lambda t: t.transpose(1, 2))


class Plain(Step):
    """A step without parameters that is linear: one rule forward, one backward."""

    def apply(self, em: Emitter, ps: Pass, xs: list[Ref], prefix: str) -> Ref:
        raise NotImplementedError

    def forward(self, em: Emitter, ps: Pass) -> None:
        ps.values[self.output] = self.apply(em, ps, [ps.values[i] for i in self.inputs], "")

    def tangent(self, em: Emitter, ps: Pass) -> None:
        xs = [ps.tangents[i] for i in self.inputs if i in ps.tangents]
        ps.tangents[self.output] = self.apply(em, ps, xs, "tangent of ")

    def backward_tangent(self, em: Emitter, ps: Pass, gy: Ref | None, gy_dot: Ref, out: Gradients) -> None:
        self.backward(em, ps, gy_dot, out)


class Add(Plain):
    """Sum of two activations (a residual connection); an input without a tangent adds nothing to the tangent."""

    def apply(self, em: Emitter, ps: Pass, xs: list[Ref], prefix: str) -> Ref:
        return em.sum(f"{prefix}{self.name}", xs)

    def backward(self, em: Emitter, ps: Pass, gy: Ref, out: Gradients) -> None:
        for i in self.inputs:
            if i in out.wanted_values:
                out.add(i, gy)


class Detach(Step):
    """The same value as a constant: ``detach``, or what ``no_grad`` made. It has neither a tangent nor a gradient."""

    @property
    def constant(self) -> bool:
        return True

    def forward(self, em: Emitter, ps: Pass) -> None:
        ps.values[self.output] = ps.values[self.inputs[0]]


class Flatten(Plain):
    """[H, W, C] to [H * W * C]; no work."""

    def apply(self, em: Emitter, ps: Pass, xs: list[Ref], prefix: str) -> Ref:
        return xs[0].reshape(ps.tasks, ps.images, *self.shape)

    def backward(self, em: Emitter, ps: Pass, gy: Ref, out: Gradients) -> None:
        if self.inputs[0] in out.wanted_values:
            out.add(self.inputs[0], gy.reshape(*ps.values[self.inputs[0]].shape))
