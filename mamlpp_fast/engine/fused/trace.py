"""From an ``nn.Module`` to a list of the operations that the fused engine has rules for."""

from __future__ import annotations

import operator
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from mamlpp_fast import reference
from mamlpp_fast.nn import InertBiasConv2d

__all__ = ["Node", "Unsupported", "trace"]


class Unsupported(ValueError):
    """The fused engine cannot take a model; ``module`` is the part of it that is the reason."""

    def __init__(self, module: str, why: str) -> None:
        super().__init__(f"{module}: {why}")
        self.module = module
        self.why = why


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        kind: conv, norm, layer_norm, act, max_pool, avg_pool, global_pool, flatten, linear or add.
        name: of the module, or of the call in the traced graph.
        inputs: values read; value 0 is the input of the network.
        output: value written.
        module: the module that holds the parameters, if any.
        attrs: stride, padding, slope, size, keepdim: as the kind needs.
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    output: int
    module: nn.Module | None = None
    attrs: dict[str, Any] = field(default_factory=dict)


# While it traces, torch.fx has its own nn.Module.__call__ in the whole process: one trace at a time.
_lock = threading.RLock()


class _Tracer(fx.Tracer):
    """Descends into all modules but the ones with rules and PyTorch's own; remembers where it was.

    Modules that other threads call meanwhile are called as ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self.path = ""
        self.thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Conv2d, reference.PerStepBatchNorm2d)) or super().is_leaf_module(
            m, module_qualified_name
        )

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        before, self.path = self.path, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.path = before
        return result


_BATCH = object()
"""Stands for the batch size in a reshape."""


def trace(model: nn.Module) -> tuple[list[Node], int]:
    """Operations of ``model`` in order, and the value that it returns.

    Args:
        model: takes one batch of images [N, C, H, W] or features [N, F] and returns predictions [N, ways].

    Raises:
        Unsupported: names the first module or call without rules.
    """
    tracer = _Tracer()
    try:
        with _lock:
            graph = tracer.trace(model)
    except Exception as error:  # whatever a user's forward raises when it meets a proxy
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unsupported(
            tracer.path or type(model).__name__, f"torch.fx cannot trace it, {reason}"
        ) from error
    return _Reader(model, graph).read()


class _Reader:
    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model = model
        self.graph = graph
        self.nodes: list[Node] = []
        self.values: dict[fx.Node, Any] = {}
        self.count = 1

    def read(self) -> tuple[list[Node], int]:
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        if len(inputs) != 1:
            raise Unsupported(type(self.model).__name__, f"expected one input, forward takes {len(inputs)}")
        self.values[inputs[0]] = 0
        result = None
        for node in self.graph.nodes:
            if node.op == "output":
                result = node.args[0]
            elif node.op == "call_module":
                self._module(node)
            elif node.op in ("call_function", "call_method"):
                self._call(node)
            elif node.op == "get_attr":
                raise Unsupported(
                    self._where(node), f"uses the tensor {node.target} outside a module with rules"
                )
        output = self.values.get(result) if isinstance(result, fx.Node) else None
        if not isinstance(output, int) or output == 0:
            raise Unsupported(
                type(self.model).__name__, "expected forward to return one tensor of predictions"
            )
        self._check_sharing()
        return self.nodes, output

    def _check_sharing(self) -> None:
        owners = Counter(n.name for n in self.nodes if n.module is not None)
        for name, uses in owners.items():
            if uses > 1:
                raise Unsupported(name, f"is called {uses} times in one pass")
        seen: dict[int, str] = {}
        for n in self.nodes:
            for p in () if n.module is None else n.module.parameters(recurse=False):
                if seen.setdefault(id(p), n.name) != n.name:
                    raise Unsupported(n.name, f"shares a parameter with {seen[id(p)]}")

    def _where(self, node: fx.Node) -> str:
        stack = node.meta.get("nn_module_stack")
        path = next(reversed(stack)) if stack else ""
        return path or node.name

    def _input(self, node: fx.Node, position: int = 0) -> int:
        source = node.args[position] if len(node.args) > position else None
        value = self.values.get(source) if isinstance(source, fx.Node) else None
        if not isinstance(value, int):
            raise Unsupported(self._where(node), f"{node.target}: expected an activation, got {source!r}")
        return value

    def _emit(
        self, node: fx.Node, kind: str, inputs: tuple[int, ...], module: nn.Module | None = None, **attrs: Any
    ) -> None:
        name = str(node.target) if node.op == "call_module" else node.name
        self.nodes.append(Node(kind, name, inputs, self.count, module, attrs))
        self.values[node] = self.count
        self.count += 1

    def _module(self, node: fx.Node) -> None:
        name = str(node.target)
        module = self.model.get_submodule(name)
        if node.kwargs or len(node.args) != 1:
            raise Unsupported(name, "expected to be called with one activation")
        x = (self._input(node),)
        if type(module) in (nn.Conv2d, InertBiasConv2d):
            assert isinstance(module, nn.Conv2d)
            stride, padding = _conv(name, module)
            self._emit(node, "conv", x, module, stride=stride, padding=padding)
        elif isinstance(module, reference.PerStepBatchNorm2d):
            self._emit(node, "norm", x, module, slope=module.negative_slope)
        elif type(module) is nn.BatchNorm2d:
            if module.momentum is None:
                raise Unsupported(name, "expected a momentum, got a cumulative average (momentum=None)")
            self._emit(node, "norm", x, module, slope=None)
        elif type(module) is nn.LayerNorm:
            self._emit(node, "layer_norm", x, module)
        elif type(module) is nn.Linear:
            self._emit(node, "linear", x, module)
        elif isinstance(module, (nn.ReLU, nn.LeakyReLU)):
            self._emit(
                node, "act", x, slope=module.negative_slope if isinstance(module, nn.LeakyReLU) else 0.0
            )
        elif type(module) is nn.MaxPool2d:
            self._max_pool(
                node,
                name,
                x,
                module.kernel_size,
                module.stride,
                module.padding,
                module.dilation,
                module.ceil_mode,
            )
        elif type(module) is nn.AvgPool2d:
            if module.divisor_override is not None:
                raise Unsupported(name, "expected no divisor_override")
            self._avg_pool(node, name, x, module.kernel_size, module.stride, module.padding, module.ceil_mode)
        elif type(module) is nn.AdaptiveAvgPool2d:
            self._adaptive(node, name, x, module.output_size)
        elif type(module) is nn.Flatten:
            self._flatten(node, name, x, module.start_dim, module.end_dim)
        elif type(module) is nn.Identity or (
            isinstance(module, nn.modules.dropout._DropoutNd) and module.p == 0
        ):
            self.values[node] = x[0]
        else:
            raise Unsupported(name, f"{type(module).__name__} has no fused rules")

    def _call(self, node: fx.Node) -> None:
        where, target = self._where(node), node.target
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        if self._batch_size(node, name):
            return
        args: dict[str, Any] = dict(zip(_SIGNATURES.get(name, ()), node.args[1:], strict=False)) | dict(
            node.kwargs
        )
        args.pop("inplace", None)
        args.pop("training", None)
        known = target in _FUNCTIONS or node.op == "call_method"
        if known and name in ("relu", "relu_"):
            self._emit(node, "act", (self._input(node),), slope=0.0)
        elif known and name == "leaky_relu":
            self._emit(node, "act", (self._input(node),), slope=float(args.get("negative_slope", 0.01)))
        elif known and name in ("add", "iadd", "add_") and args.get("alpha", 1) == 1:
            self._emit(node, "add", (self._input(node), self._input(node, 1)))
        elif known and name == "max_pool2d":
            options = (
                args.get(k, d)
                for k, d in (("stride", None), ("padding", 0), ("dilation", 1), ("ceil_mode", False))
            )
            self._max_pool(node, where, (self._input(node),), args.get("kernel_size"), *options)
        elif known and name == "avg_pool2d" and args.get("divisor_override") is None:
            options = (args.get(k, d) for k, d in (("stride", None), ("padding", 0), ("ceil_mode", False)))
            self._avg_pool(node, where, (self._input(node),), args.get("kernel_size"), *options)
        elif known and name == "adaptive_avg_pool2d":
            self._adaptive(node, where, (self._input(node),), args.get("output_size"))
        elif known and name == "mean":
            dims = args.get("dim")
            if not isinstance(dims, (tuple, list)) or sorted(d % 4 for d in dims) != [2, 3]:
                raise Unsupported(where, f"mean: expected height and width (dim=(2, 3)), got dim={dims!r}")
            self._emit(node, "global_pool", (self._input(node),), keepdim=bool(args.get("keepdim", False)))
        elif known and name == "flatten":
            self._flatten(
                node, where, (self._input(node),), args.get("start_dim", 0), args.get("end_dim", -1)
            )
        elif node.op == "call_method" and name in ("view", "reshape"):
            shape = node.args[1] if len(node.args) == 2 else node.args[1:]
            sizes = (
                [self.values.get(s, s) if isinstance(s, fx.Node) else s for s in shape]
                if isinstance(shape, (tuple, list))
                else []
            )
            if len(sizes) != 2 or sizes[0] is not _BATCH or sizes[1] != -1:
                raise Unsupported(where, f"{name}: expected (x.size(0), -1)")
            self._emit(node, "flatten", (self._input(node),))
        elif node.op == "call_method" and name == "contiguous":
            self.values[node] = self._input(node)
        else:
            raise Unsupported(where, f"{name} has no fused rules")

    def _batch_size(self, node: fx.Node, name: str) -> bool:
        """Recognises ``x.size(0)``, ``x.size()[0]`` and ``x.shape[0]``."""
        source = node.args[0] if node.args else None
        inner = self.values.get(source) if isinstance(source, fx.Node) else None
        if (name == "getattr" and node.args[1:] == ("shape",)) or (name == "size" and len(node.args) == 1):
            self.values[node] = ("shape",)
        elif (name == "size" and node.args[1:] == (0,)) or (
            node.target is operator.getitem and inner == ("shape",) and node.args[1] == 0
        ):
            self.values[node] = _BATCH
        else:
            return False
        return True

    def _max_pool(
        self,
        node: fx.Node,
        name: str,
        x: tuple[int, ...],
        size: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        ceil: Any,
    ) -> None:
        stride = size if stride is None or stride == [] else stride
        if (_pair(size), _pair(stride), _pair(padding), _pair(dilation), ceil) != (
            (2, 2),
            (2, 2),
            (0, 0),
            (1, 1),
            False,
        ):
            raise Unsupported(name, "max-pooling: expected windows 2x2, stride 2, no padding, floor")
        self._emit(node, "max_pool", x)

    def _avg_pool(
        self, node: fx.Node, name: str, x: tuple[int, ...], size: Any, stride: Any, padding: Any, ceil: Any
    ) -> None:
        stride = size if stride is None or stride == [] else stride
        side = _pair(size)
        if side[0] != side[1] or _pair(stride) != side or _pair(padding) != (0, 0) or ceil:
            raise Unsupported(
                name, "average pooling: expected square windows side by side, no padding, floor"
            )
        self._emit(node, "avg_pool", x, size=side[0])

    def _adaptive(self, node: fx.Node, name: str, x: tuple[int, ...], size: Any) -> None:
        if _pair(size) != (1, 1):
            raise Unsupported(name, f"adaptive average pooling: expected output size 1, got {size!r}")
        self._emit(node, "global_pool", x, keepdim=True)

    def _flatten(self, node: fx.Node, name: str, x: tuple[int, ...], start: Any, end: Any) -> None:
        if start != 1 or end not in (-1, 3):
            raise Unsupported(name, f"flatten: expected start_dim=1, end_dim=-1, got {start!r}, {end!r}")
        self._emit(node, "flatten", x)


_FUNCTIONS: frozenset[Any] = frozenset(
    {
        *(
            F.relu,
            torch.relu,
            F.leaky_relu,
            F.max_pool2d,
            torch.max_pool2d,
            F.avg_pool2d,
            F.adaptive_avg_pool2d,
        ),
        *(operator.add, operator.iadd, torch.add, torch.mean, torch.flatten),
    }
)
_SIGNATURES: dict[str, tuple[str, ...]] = {
    "leaky_relu": ("negative_slope", "inplace"),
    "max_pool2d": ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    "avg_pool2d": ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    "adaptive_avg_pool2d": ("output_size",),
    "mean": ("dim", "keepdim"),
    "flatten": ("start_dim", "end_dim"),
}


def _pair(value: Any) -> tuple[Any, Any]:
    if isinstance(value, (tuple, list)):
        return (value[0], value[-1])
    return (value, value)


def _conv(name: str, module: nn.Conv2d) -> tuple[int, int]:
    """Stride and padding of a convolution with rules."""
    kernel = module.kernel_size
    if kernel not in ((1, 1), (3, 3)):
        raise Unsupported(name, f"convolution: expected kernel 1x1 or 3x3, got {kernel[0]}x{kernel[1]}")
    if module.stride not in ((1, 1), (2, 2)):
        raise Unsupported(name, f"convolution: expected stride 1 or 2, got {module.stride}")
    if module.groups != 1 or module.dilation != (1, 1) or module.padding_mode != "zeros":
        raise Unsupported(name, "convolution: expected one group, no dilation, zero padding")
    padding = module.padding
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        padding = (kernel[0] // 2, kernel[0] // 2)
    assert isinstance(padding, tuple)
    if padding[0] != padding[1] or padding[0] >= kernel[0]:
        raise Unsupported(name, f"convolution: expected equal padding below the kernel, got {padding}")
    return module.stride[0], padding[0]
