"""Lowering: from traced operations and the shape of an example to steps with shapes and parameter layouts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mamlpp_fast import reference
from mamlpp_fast.engine.fused.steps import (
    Activation,
    Add,
    AveragePool,
    Bias,
    Conv,
    FirstLayer,
    Flatten,
    FrozenNorm,
    Linear,
    MaxPool,
    NormActPool,
    Rows,
    ScaleShift,
    Slot,
    Step,
)
from mamlpp_fast.engine.fused.trace import Node, Unsupported
from mamlpp_fast.nn import InertBiasConv2d

__all__ = ["Network", "lower"]

# Colours; above, the covariance of a patch is no longer small beside the feature map.
_FEW_CHANNELS = 3


@dataclass(frozen=True)
class Network:
    """A lowered network for one shape of examples.

    Attributes:
        steps: in order.
        shapes: of every value, without the leading [tasks, images].
        output: the value that holds the predictions.
        norms: batch norms that use batch statistics: name to the convolution bias in front that was left out (it
            changes nothing but the running mean), or None, and the elements per image that a channel's statistics
            are taken over.
    """

    steps: tuple[Step, ...]
    shapes: dict[int, tuple[int, ...]]
    output: int
    norms: dict[str, tuple[str | None, int]]

    def slots(self) -> dict[str, Slot]:
        return {slot.name: slot for step in self.steps for slot in step.slots}

    def rows(self) -> dict[str, Rows]:
        return {step.rows.name: step.rows for step in self.steps if step.rows is not None}

    def table(self, images: int) -> str:
        """The steps with the shape, values in memory and parameters of each, for this many images."""
        lines = [f"{'step':<24} {'rule':<14} {'inputs':<10} {'output':<14} {'values':>10}  parameters"]
        for step in self.steps:
            shape = "x".join(map(str, step.shape))
            names = ", ".join(sorted(step.params())) or "-"
            inputs = ", ".join(map(str, step.inputs))
            values = images * math.prod(step.shape)
            lines.append(f"{step.name:<24} {step.kind:<14} {inputs:<10} {shape:<14} {values:>10}  {names}")
        return "\n".join(lines)

    def depends(self, params: frozenset[str]) -> frozenset[int]:
        """Values that change with any of these parameters."""
        found: set[int] = set()
        for step in self.steps:
            if step.params() & params or found.intersection(step.inputs):
                found.add(step.output)
        return frozenset(found)


def lower(
    nodes: Sequence[Node],
    output: int,
    model: nn.Module,
    example: tuple[int, ...],
    adapted: frozenset[str],
    batch_stats: Callable[[nn.Module], bool],
) -> Network:
    """Steps for examples of this shape: images (channels, height, width), or anything else, such as features (F,).

    Args:
        nodes, output: of :func:`trace`.
        model: holds the parameters.
        adapted: names of the parameters that the inner loop adapts.
        batch_stats: whether a batch norm normalises with the statistics of the batch, or with its running ones.

    Raises:
        Unsupported: when shapes do not fit the rules.
    """
    return _Lowering(nodes, output, model, example, adapted, batch_stats).run()


class _Lowering:
    def __init__(
        self,
        nodes: Sequence[Node],
        output: int,
        model: nn.Module,
        example: tuple[int, ...],
        adapted: frozenset[str],
        batch_stats: Callable[[nn.Module], bool],
    ) -> None:
        self.nodes = list(nodes)
        self.output = output
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.adapted = adapted
        self.batch_stats = batch_stats
        # Images are kept as [H, W, C].
        shape = (*example[1:], example[0]) if len(example) == 3 else example
        self.shapes: dict[int, tuple[int, ...]] = {0: shape}
        self.grids: dict[int, tuple[int, ...]] = {}
        self.steps: list[Step] = []
        self.norms: dict[str, tuple[str | None, int]] = {}
        self.uses = Counter(i for n in nodes for i in n.inputs) + Counter([output])
        self.next_value = 1 + max(n.output for n in nodes)
        self.skipped: dict[int, str] = {}

    def run(self) -> Network:
        position = 0
        while position < len(self.nodes):
            position += self._lower(position)
        shape = self.shapes[self.output]
        if len(shape) != 1:
            raise Unsupported(
                "output", f"expected predictions [N, ways], got [N, {', '.join(map(str, shape))}]"
            )
        return Network(tuple(self.steps), self.shapes, self.output, self.norms)

    def _lower(self, position: int) -> int:
        """Lowers the node there, and what fuses with it; returns how many nodes that took."""
        node = self.nodes[position]
        shape = self.shapes[node.inputs[0]]
        if node.kind not in ("linear", "act", "add", "flatten", "layer_norm") and len(shape) != 3:
            raise Unsupported(node.name, f"{node.kind}: expected images, got features of shape {shape}")
        if node.kind == "norm":
            return self._norm(position)
        getattr(self, f"_{node.kind}")(node, shape)
        return 1

    def _step(
        self,
        kind: Callable[..., Step],
        node: Node,
        output: int,
        shape: tuple[int, ...],
        *args: object,
        source: int | None = None,
    ) -> None:
        if any(size < 1 for size in shape):
            raise Unsupported(node.name, f"{node.kind}: the image is too small, its output would be {shape}")
        inputs = node.inputs if source is None else (source,)
        self.steps.append(kind(node.name, inputs, output, shape, *args))
        self.shapes[output] = shape
        if inputs[0] in self.grids and len(shape) == 1:
            self.grids.setdefault(output, self.grids[inputs[0]])

    def _value(self) -> int:
        self.next_value += 1
        return self.next_value - 1

    def _slot(
        self, p: Tensor, split: tuple[int, ...], order: tuple[int, ...], shape: tuple[int, ...]
    ) -> Slot:
        return Slot(self.names[id(p)], shape, split, order)

    def _vector(self, p: Tensor) -> Slot:
        return self._slot(p, tuple(p.shape), (0,), tuple(p.shape))

    def _conv(self, node: Node, shape: tuple[int, ...]) -> None:
        module = node.module
        assert isinstance(module, nn.Conv2d)
        co, ci, kh, kw = module.weight.shape
        if ci != shape[2]:
            raise Unsupported(node.name, f"convolution: expected {ci} channels, got {shape[2]}")
        stride, padding = node.attrs["stride"], node.attrs["padding"]
        height, width = ((s + 2 * padding - kh) // stride + 1 for s in shape[:2])
        weight = self._slot(module.weight, (co, ci, kh, kw), (2, 3, 1, 0), (kh, kw, ci, co))
        bias = None if module.bias is None or self._bias_vanishes(node) else module.bias
        product = node.output if bias is None else self._value()
        self._step(Conv, node, product, (height, width, co), weight, stride, padding)
        if bias is not None:
            inert = isinstance(module, InertBiasConv2d)
            self._step(
                Bias, node, node.output, (height, width, co), self._vector(bias), inert, source=product
            )
        elif module.bias is not None:
            self.skipped[node.output] = self.names[id(module.bias)]

    def _bias_vanishes(self, node: Node) -> bool:
        """Whether batch statistics take the bias out again."""
        readers = [n for n in self.nodes if node.output in n.inputs]
        return (
            node.output != self.output
            and len(readers) == 1
            and readers[0].kind == "norm"
            and readers[0].module is not None
            and self.batch_stats(readers[0].module)
        )

    def _follower(self, position: int, value: int, kind: str) -> Node | None:
        """The next node, when it is of this kind and the only reader of ``value``."""
        node = self.nodes[position] if position < len(self.nodes) else None
        if node is not None and node.kind == kind and node.inputs == (value,) and self.uses[value] == 1:
            return node
        return None

    def _norm(self, position: int) -> int:
        node = self.nodes[position]
        module, shape = node.module, self.shapes[node.inputs[0]]
        assert isinstance(module, (reference.PerStepBatchNorm2d, nn.BatchNorm2d))
        if module.num_features != shape[2]:
            raise Unsupported(
                node.name, f"batch norm: expected {module.num_features} channels, got {shape[2]}"
            )
        weight, bias = (None if p is None else self.names[id(p)] for p in (module.weight, module.bias))
        adapts = [n for n in (weight, bias) if n in self.adapted]
        per_step = isinstance(module, reference.PerStepBatchNorm2d) and module.per_step_affine
        rows = module.num_steps if isinstance(module, reference.PerStepBatchNorm2d) and per_step else 1
        affine = Rows(node.name, weight, bias, rows, per_step, shape[2])
        slope, used, output = node.attrs["slope"], 1, node.output
        if self.batch_stats(module) and not adapts:
            if slope is None and (act := self._follower(position + used, output, "act")) is not None:
                slope, used, output = act.attrs["slope"], used + 1, act.output
            pool = self._follower(position + used, output, "max_pool")
            if pool is not None:
                used, output = used + 1, pool.output
                shape = (shape[0] // 2, shape[1] // 2, shape[2])
            slope = 1.0 if slope is None else slope
            if pool is not None and slope >= 0 and (first := self._first_conv(node)) is not None:
                self._first_layer(node, first, output, shape, affine, module.eps, slope)
            else:
                self._batch_norm(node, output, shape, affine, module.eps, slope, pool is not None)
            return used
        normal = self._value() if adapts or slope is not None else output
        if self.batch_stats(module):
            self._batch_norm(node, normal, shape, None, module.eps, 1.0, False)
        else:
            self._step(FrozenNorm, node, normal, shape, affine, not adapts, module.eps)
        if adapts:
            scaled = self._value() if slope is not None else output
            vectors = (None if p is None else self._vector(p) for p in (module.weight, module.bias))
            self._step(ScaleShift, node, scaled, shape, *vectors, source=normal)
            normal = scaled
        if slope is not None:
            self._step(Activation, node, output, shape, slope, source=normal)
        return used

    def _first_conv(self, node: Node) -> Conv | None:
        """The convolution right in front of a norm, when it reads the images and its output need not be stored."""
        conv = self.steps[-1] if self.steps else None
        if not isinstance(conv, Conv) or conv.inputs != (0,) or conv.output != node.inputs[0]:
            return None
        fits = self.uses[conv.output] == 1 and conv.stride == 1 and conv.weight.shape[2] <= _FEW_CHANNELS
        return conv if fits else None

    def _first_layer(
        self,
        node: Node,
        conv: Conv,
        output: int,
        shape: tuple[int, ...],
        affine: Rows,
        eps: float,
        slope: float,
    ) -> None:
        self.steps.pop()
        self._keep_statistics(node)
        self._step(
            FirstLayer,
            node,
            output,
            shape,
            conv.weight,
            conv.padding,
            affine,
            eps,
            slope,
            node.name,
            source=0,
        )

    def _keep_statistics(self, node: Node) -> None:
        before = self.shapes[node.inputs[0]]
        self.norms[node.name] = (self.skipped.get(node.inputs[0]), before[0] * before[1])

    def _batch_norm(
        self,
        node: Node,
        output: int,
        shape: tuple[int, ...],
        affine: Rows | None,
        eps: float,
        slope: float,
        pool: bool,
    ) -> None:
        self._keep_statistics(node)
        self._step(NormActPool, node, output, shape, affine, eps, slope, pool, False, node.name)

    def _layer_norm(self, node: Node, shape: tuple[int, ...]) -> None:
        module = node.module
        assert isinstance(module, nn.LayerNorm)
        # Of images, stored [H, W, C], or of features.
        split, order = ((shape[2], *shape[:2]), (1, 2, 0)) if len(shape) == 3 else (shape, (0,))
        if node.inputs[0] in self.grids:
            raise Unsupported(node.name, "layer norm: expected images or features, got flattened images")
        if module.normalized_shape != split:
            raise Unsupported(
                node.name, f"layer norm: expected normalized_shape {split}, got {module.normalized_shape}"
            )
        slots = [
            None if p is None else self._slot(p, split, order, shape) for p in (module.weight, module.bias)
        ]
        affine = any(s is not None for s in slots)
        normal = self._value() if affine else node.output
        self._step(NormActPool, node, normal, shape, None, module.eps, 1.0, False, True)
        if affine:
            self._step(ScaleShift, node, node.output, shape, *slots, source=normal)

    def _act(self, node: Node, shape: tuple[int, ...]) -> None:
        self._step(Activation, node, node.output, shape, node.attrs["slope"])

    def _max_pool(self, node: Node, shape: tuple[int, ...]) -> None:
        self._step(MaxPool, node, node.output, (shape[0] // 2, shape[1] // 2, shape[2]))

    def _avg_pool(self, node: Node, shape: tuple[int, ...]) -> None:
        size = node.attrs["size"]
        self._step(
            AveragePool, node, node.output, (shape[0] // size, shape[1] // size, shape[2]), (size, size)
        )

    def _global_pool(self, node: Node, shape: tuple[int, ...]) -> None:
        out = (1, 1, shape[2]) if node.attrs["keepdim"] else (shape[2],)
        self._step(AveragePool, node, node.output, out, shape[:2])

    def _flatten(self, node: Node, shape: tuple[int, ...]) -> None:
        if len(shape) == 3:
            self.grids[node.output] = shape
        self._step(Flatten, node, node.output, (math.prod(shape),))

    def _add(self, node: Node, shape: tuple[int, ...]) -> None:
        other = self.shapes[node.inputs[1]]
        if other != shape or self.grids.get(node.inputs[0]) != self.grids.get(node.inputs[1]):
            raise Unsupported(
                node.name, f"sum: expected two activations of one shape, got {shape} and {other}"
            )
        self._step(Add, node, node.output, shape)

    def _linear(self, node: Node, shape: tuple[int, ...]) -> None:
        module = node.module
        assert isinstance(module, nn.Linear)
        if len(shape) != 1 or module.in_features != shape[0]:
            raise Unsupported(node.name, f"linear: expected {module.in_features} features, got {shape}")
        outputs, features = module.weight.shape
        # Flattened images are [H, W, C] here and [C, H, W] in the model.
        grid = self.grids.get(node.inputs[0])
        if grid is None:
            weight = self._slot(module.weight, (outputs, features), (1, 0), (features, outputs))
        else:
            height, width, channels = grid
            weight = self._slot(
                module.weight, (outputs, channels, height, width), (2, 3, 1, 0), (features, outputs)
            )
        bias = None if module.bias is None else self._vector(module.bias)
        self._step(Linear, node, node.output, (outputs,), weight, bias)
        self.grids.pop(node.output, None)
