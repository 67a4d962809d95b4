"""Random models as source text: each a class that a user might write, from one integer.

Half of them keep to what the fused engine knows, in all its spellings; the others have one to three features that it
cannot know, or that a reader of ``forward`` easily misses. The text runs by itself; nothing of the package is imported.
"""

from __future__ import annotations

import linecache
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.textbook import Batch

__all__ = ["Program", "make_program"]

_HEADER = """\
import warnings
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize


class Model(nn.Module):
    def __init__(self):
        super().__init__()
"""
_BUILD = """

def build():
    torch.manual_seed({seed})
    model = Model()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
        for name, b in model.named_buffers():
            if "running" in name:
                b.add_(0.3 * torch.rand(b.shape))
"""


@dataclass(frozen=True)
class Program:
    """A random model, the settings it is trained with and its tasks.

    Attributes:
        source: the text of a module with ``build()``, and ``change(model)`` for between two meta-steps.
        features: names of what was drawn.
        plain: whether nothing but layers with fused rules was drawn.
        draws: whether ``forward`` draws random numbers: no two runs are alike.
        volatile: whether ``forward`` changes the model in evaluation too.
        settings: keywords of ``MAMLConfig``.
        shape: of an example, (C, H, W) or (F,).
        images: support and target examples of a task.
    """

    seed: int
    source: str
    features: tuple[str, ...]
    plain: bool
    draws: bool
    volatile: bool
    settings: dict[str, Any]
    shape: tuple[int, ...]
    ways: int
    tasks: int
    images: tuple[int, int]
    permuted: bool

    def namespace(self) -> dict[str, Any]:
        """The module of the source, run anew; tracebacks quote it."""
        name = f"<random model {self.seed}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(keepends=True), name)
        names: dict[str, Any] = {"__name__": "random_model"}
        exec(compile(self.source, name, "exec"), names)
        return names

    def build(self) -> nn.Module:
        """The model, always with the same values; leaves the global generator as it was."""
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = self.namespace()["build"]()
        return model

    def batch(self, index: int) -> Batch:
        """A meta-batch in float64."""
        generator = torch.Generator().manual_seed(100 * self.seed + index)
        sides = []
        for count in self.images:
            shape = (self.tasks, count, *self.shape)
            if self.permuted:  # pictures as files hold them: [H, W, C] in memory
                shape = (*shape[:2], *self.shape[1:], self.shape[0])
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            sides.append(x.movedim(-1, 2) if self.permuted else x)
            if self.settings["loss"] == "mse":
                size = (self.tasks, count, self.ways)
                sides.append(torch.randn(size, generator=generator, dtype=torch.float64))
            else:
                sides.append(torch.randint(self.ways, (self.tasks, count), generator=generator))
        return sides[0], sides[1], sides[2], sides[3]


def _names(name: str, texts: list[str]) -> bool:
    return any(re.search(rf"\b{re.escape(name)}\b", text) for text in texts)


class _Writer:
    """The text so far, and the shape of the value ``h``.

    Attributes:
        writable: whether ``h`` may be changed in place: no operation has kept it for its backward, and it is not the
            input.
        layers: what has parameters: name and kind.
    """

    def __init__(self, rng: random.Random, shape: tuple[int, ...]) -> None:
        self.rng = rng
        self.shape = shape
        self.init: list[str] = []
        self.forward: list[str] = ["h = x"]
        self.after: list[str] = []
        self.before: list[str] = []
        self.change: list[str] = []
        self.methods: list[str] = []
        self.features: list[str] = []
        self.layers: dict[str, str] = {}
        self.writable = False
        self.volatile = False
        self.strided = False  # weights or inputs that are not contiguous: no view
        self.count = 0

    @property
    def image(self) -> bool:
        return len(self.shape) == 3

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def pick(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def lines(self, text: str, writable: bool = False) -> None:
        self.forward += text.splitlines()
        self.writable = writable

    def member(self, stem: str, value: str) -> str:
        """A new attribute of the model; returns how ``forward`` names it."""
        name = f"{stem}{self.count}"
        self.count += 1
        self.init.append(f"self.{name} = {value}")
        return f"self.{name}"

    def layer(self, stem: str, kind: str, value: str) -> str:
        name = self.member(stem, value)
        self.layers[name[5:]] = kind
        return name

    def parameter(self, value: str) -> str:
        return self.member("p", f"nn.Parameter({value})")

    def buffer(self, value: str) -> str:
        name = f"b{self.count}"
        self.count += 1
        self.init.append(f'self.register_buffer("{name}", {value})')
        return f"self.{name}"

    def mix(self, bias: bool | None = None) -> str:
        """A layer that keeps the shape, called by nothing yet."""
        bias = self.chance(0.7) if bias is None else bias
        width, (k, p) = self.shape[0], self.pick((1, 0), (3, 1))
        if self.image:
            return self.layer("mix", "product", f"nn.Conv2d({width}, {width}, {k}, padding={p}, bias={bias})")
        return self.layer("mix", "product", f"nn.Linear({width}, {width}, bias={bias})")

    def fresh(self) -> None:
        """Makes ``h`` one that may be changed in place."""
        if not self.writable:
            self.lines(f"h = {self.mix()}(h)", writable=True)

    @property
    def per_channel(self) -> str:
        """Shape of one number a channel or feature."""
        return f"({self.shape[0]}, 1, 1)" if self.image else f"({self.shape[0]},)"

    def prune(self) -> None:
        """Takes out the members that no drawn text names."""
        for line in list(self.init):
            name = line.split(" = ")[0]
            texts = [*self.forward, *self.methods, *(other for other in self.init if other is not line)]
            if line.startswith("self.") and "." not in name[5:] and not _names(name, texts):
                self.init.remove(line)
                self.layers.pop(name[5:], None)

    def text(self, seed: int) -> str:
        def block(lines: list[str], depth: int) -> str:
            return "".join(f"{'    ' * depth}{line}\n" for line in lines)

        source = _HEADER + block(self.init, 2) + "\n    def forward(self, x):\n"
        source += block([*self.forward, "return h"], 2)
        if self.methods:
            source += "\n" + block(self.methods, 1)
        source += _BUILD.format(seed=seed) + block([*self.after, "return model"], 1)
        return source + "\n\ndef change(model):\n" + block(self.change or ["pass"], 1)


# The plain parts -----------------------------------------------------------------------------------------------------


def _convolution(w: _Writer) -> None:
    channels, height, width = w.shape
    out, k = w.rng.randint(2, 5), w.pick(1, 3, 3)
    stride = 2 if min(height, width) >= 6 and w.chance(0.25) else 1
    padding = w.pick(*range(k), 1) if k == 3 else 0
    if k == 3 and padding == 0 and min(height, width) < 6:
        padding = 1
    given = '"same"' if k == 3 and padding == 1 and stride == 1 and w.chance(0.15) else str(padding)
    value = f"nn.Conv2d({channels}, {out}, {k}, stride={stride}, padding={given}, bias={w.chance(0.7)})"
    name = w.layer("conv", "product", value)
    call = f"F.conv2d(h, {name}.weight, {name}.bias, {name}.stride, {name}.padding)"
    if w.chance(0.06):
        w.features.append("functional layer")
        w.layers[name[5:]] = "functional"
    else:
        call = f"{name}(h)"
    w.lines(f"h = {call}", writable=True)
    w.shape = (out, *((s + 2 * padding - k) // stride + 1 for s in (height, width)))


def _linear(w: _Writer) -> None:
    out = w.rng.randint(3, 8)
    name = w.layer("linear", "product", f"nn.Linear({w.shape[0]}, {out}, bias={w.chance(0.8)})")
    functional = w.chance(0.06)
    if functional:
        w.features.append("functional layer")
        w.layers[name[5:]] = "functional"
    w.lines(f"h = F.linear(h, {name}.weight, {name}.bias)" if functional else f"h = {name}(h)", writable=True)
    w.shape = (out,)


def _norm(w: _Writer, images: int) -> None:
    if w.image and math.prod(w.shape[1:]) * images >= 16 and w.chance(0.75):
        options = w.pick("", "", ", eps=1e-3", ", momentum=0.3")
        w.lines(f"h = {w.layer('bn', 'norm', f'nn.BatchNorm2d({w.shape[0]}{options})')}(h)", writable=True)
    elif math.prod(w.shape) >= 4:
        shape = str(list(w.shape))
        affine = w.pick("", "", ", elementwise_affine=False", ", bias=False")
        w.lines(f"h = {w.layer('ln', 'layer norm', f'nn.LayerNorm({shape}{affine})')}(h)", writable=True)


def _activation(w: _Writer) -> None:
    if w.writable and w.chance(0.35):
        module = w.pick("nn.ReLU(inplace=True)", "nn.LeakyReLU(0.2, inplace=True)")
        call = w.pick("F.relu(h, inplace=True)", "h.relu_()", "F.leaky_relu(h, 0.1, inplace=True)", "")
        w.lines(f"h = {call or w.member('act', module) + '(h)'}")
        return
    module = w.pick("nn.ReLU()", "nn.LeakyReLU(0.2)", "nn.LeakyReLU()")
    call = w.pick("F.relu(h)", "torch.relu(h)", "h.relu()", "F.leaky_relu(h, negative_slope=0.1)", "", "")
    if call:
        w.lines(f"h = {call}")
        return
    name = w.member("act", module)
    if w.chance(0.1):
        w.change.append(f"model.{name[5:]} = nn.LeakyReLU(0.3)")
        w.features.append("replaced module")
    w.lines(f"h = {name}(h)")


def _pool(w: _Writer) -> None:
    channels, height, width = w.shape
    k = 2 if min(height, width) < 6 else w.pick(2, 2, 3)
    calls = ["F.max_pool2d(h, 2)", f"{w.member('pool', 'nn.MaxPool2d(2)')}(h)"]
    if w.chance(0.4):
        calls = [f"F.avg_pool2d(h, {k})", f"{w.member('pool', f'nn.AvgPool2d({k})')}(h)"]
    else:
        k = 2
    w.lines(f"h = {w.pick(*calls)}", writable=True)
    w.shape = (channels, height // k, width // k)


def _residual(w: _Writer) -> None:
    kept = f"kept{w.count}"
    first, second = w.mix(), w.mix()
    w.lines(f"{kept} = h\nh = {first}(h)", writable=True)
    if w.chance(0.5):
        _activation(w)
    inner = kept if w.chance(0.7) else f"{w.mix()}({kept})"
    total = w.pick(f"h = h + {inner}", f"h = {inner} + h", f"h += {inner}", f"h = torch.add(h, {inner})")
    w.lines(f"h = {second}(h)\n{total}", writable=True)


def _loop(w: _Writer) -> None:
    first, second = w.mix(), w.mix()
    act = w.pick("F.relu", "F.leaky_relu")
    kind = w.pick("tuple", "list", "dict")
    if kind == "tuple":
        w.lines(f"for layer in ({first}, {second}):\n    h = {act}(layer(h))")
    elif kind == "list":
        w.init.append(f"self.order = [{first}, {second}]")
        w.lines(f"for layer in self.order:\n    h = {act}(layer(h))")
    else:
        w.lines(f'parts = {{"a": {first}(h), "b": ({second}(h), 0)}}\nh = {act}(parts["a"] + parts["b"][0])')
    w.features.append("python containers")


def _nothing(w: _Writer) -> None:
    name = w.member("idle", w.pick("nn.Dropout(0.0)", "nn.Identity()", "nn.Sequential(nn.Identity())"))
    w.lines(f"h = {name}(h)")


def _flatten(w: _Writer) -> None:
    channels, height, width = w.shape
    size, module = channels * height * width, w.member
    whole = ["torch.flatten(h, 1)", "h.flatten(1)", "h.reshape(h.shape[0], -1)"]
    whole += ["h.reshape(h.size(0), -1)", f"{module('flat', 'nn.Flatten()')}(h)", "h.flatten(start_dim=1)"]
    whole += [] if w.strided else ["h.view(h.size(0), -1)", "h.view(h.shape[0], -1)"]
    means = ["h.mean((2, 3))", "h.mean(dim=(-2, -1))", "torch.mean(h, dim=[2, 3])"]
    means += [f"{module('mean', 'nn.AdaptiveAvgPool2d(1)')}(h).flatten(1)"]
    means += ["torch.flatten(F.adaptive_avg_pool2d(h, 1), 1)"]
    if size > 60 or w.chance(0.4):
        w.lines(f"h = {w.pick(*means)}", writable=True)
        w.shape = (channels,)
    else:
        w.lines(f"h = {w.pick(*whole)}", writable=w.writable)
        w.shape = (size,)


# What the fused engine cannot know, or must look at closely ------------------------------------------------------------


def _other_activation(w: _Writer) -> None:
    calls = "torch.tanh(h)", "F.gelu(h)", "torch.sigmoid(h)", "F.elu(h)", "F.silu(h)", "F.softplus(h)"
    more = "torch.where(h > 0, h, 0.2 * h)", "h.clamp(min=-0.5)", "torch.maximum(h, 0.1 * h)", "h.abs()"
    last = "F.normalize(h, dim=1)", "F.relu6(h)", "F.softmax(h, 1)", "h / (1 + h.abs())"
    w.lines(f"h = {w.pick(*calls, *more, *last)}")


def _shortcut_in_place(w: _Writer) -> None:
    w.fresh()
    act = w.pick("h.relu_()", "F.relu(h, inplace=True)", f"{w.member('act', 'nn.ReLU(inplace=True)')}(h)")
    w.lines(f"kept = h\nh = {w.mix()}({act})\nh = h + kept", writable=True)


def _augmented_alias(w: _Writer) -> None:
    w.fresh()
    update = w.pick("h += {}", "h.add_({})", "h -= {}").format(f"{w.mix()}(F.relu(h))")
    w.lines(f"kept = h\n{update}\nh = {w.mix()}(h) + kept", writable=True)


def _slice_write(w: _Writer) -> None:
    w.fresh()
    writes = ["h[:, 0] = 0.5 * h[:, 0]", "h[:, :1] *= 0.5", "h[..., 0] = 0.25", "h[:, 0].mul_(0.5)"]
    writes += ["h[0] = h[0] * 0.5", "h[..., :1].relu_()", "h[h < -1] = -1.0", "h.select(1, 0).add_(0.5)"]
    w.lines(w.pick(*writes))


def _discarded(w: _Writer) -> None:
    w.fresh()
    act = f"{w.member('act', 'nn.ReLU(inplace=True)')}(h)"
    calls = "h.add_(1.0)", "h.mul_(0.5)", "F.relu(h, inplace=True)", "torch.relu_(h)", act, "h.neg_()"
    w.lines(w.pick(*calls))


def _no_grad(w: _Writer) -> None:
    kind = w.pick("side", "all", "in place", "method")
    if kind == "side":
        w.lines(f"with torch.no_grad():\n    side = {w.mix()}(h)\nh = h + 0.3 * side", writable=True)
    elif kind == "all":
        w.lines(f"with torch.no_grad():\n    h = {w.mix()}(h)")
    elif kind == "in place":
        w.fresh()
        w.lines("with torch.no_grad():\n    h.mul_(0.5)")
    else:
        w.methods += ["@torch.no_grad()", "def constant(self, h):", f"    return F.relu({w.mix()}(h))"]
        w.lines("h = h + self.constant(h)", writable=True)


def _detach(w: _Writer) -> None:
    calls = ["h = h + h.detach()", "h = h.detach()", "h = h.data", "h = h * h.detach().abs()"]
    calls += [f"kept = h.detach()\nh = {w.mix()}(h) + kept", f"h = h + {w.mix()}(h.detach())"]
    w.lines(w.pick(*calls))
    if w.chance(0.3):
        w.fresh()
        w.lines("h.data.mul_(0.5)")


def _detached_parameter(w: _Writer) -> None:
    name = w.mix()
    weight = w.pick(f"{name}.weight.detach()", f"{name}.weight.data", f"{name}.weight.clone().detach()")
    w.lines(_functional(w, name, weight), writable=True)


def _functional(w: _Writer, name: str, weight: str) -> str:
    """A call of a layer's operation with another weight."""
    w.layers[name[5:]] = "functional"
    if w.image:
        return f"h = F.conv2d(h, {weight}, {name}.bias, padding={name}.padding)"
    return f"h = F.linear(h, {weight}, {name}.bias)"


def _own_parameter(w: _Writer) -> None:
    kind = w.pick("scale", "shift", "matmul", "scalar", "exponential")
    if kind == "matmul":
        width = w.shape[-1]
        w.lines(f"h = h @ {w.parameter(f'torch.eye({width}) + 0.1 * torch.ones({width}, {width})')}")
    elif kind == "scalar":
        w.lines(f"h = h * {w.parameter('torch.tensor(0.7)')}")
    else:
        p = w.parameter(f"0.5 + 0.5 * torch.rand{w.per_channel}")
        w.lines({"scale": f"h = h * {p}", "shift": f"h = h + {p}"}.get(kind, f"h = h * torch.exp(-{p})"))


def _normalised_weight(w: _Writer) -> None:
    name = w.mix()
    weights = [f"F.normalize({name}.weight, dim=1)", f"{name}.weight * 0.7"]
    weights += [f"{name}.weight - {name}.weight.mean(dim=1, keepdim=True)", f"torch.tanh({name}.weight)"]
    w.lines(_functional(w, name, w.pick(*weights)), writable=True)


def _read_buffer(w: _Writer) -> None:
    center, spread = (w.buffer(f"{base} + torch.rand{w.per_channel}") for base in ("0.0", "1.0"))
    w.lines(w.pick(f"h = (h - {center}) / {spread}", f"h = h - {center}", f"h = h * {spread}"))
    if w.chance(0.3):
        w.change.append(f"model.{center[5:]}.add_(0.5)")


def _written_buffer(w: _Writer) -> None:
    dims = "(0, 2, 3), keepdim=True).squeeze(0)" if w.image else "0)"
    when = "self.training" if w.chance(0.7) else "True"
    w.volatile |= when == "True"
    if w.chance(0.4):
        lines = f"{w.buffer('torch.zeros((), dtype=torch.int64)')}.add_(1)"
    else:
        b = w.buffer(f"torch.zeros{w.per_channel}")
        new = f"0.9 * {b} + 0.1 * h.detach().mean({dims}"
        lines = w.pick(f"{b}.copy_({new})", f"with torch.no_grad():\n        {b} = {new}")
        w.lines(f"h = h - 0.5 * {b}")
    w.lines(f"if {when}:\n    {lines}")


def _training_branch(w: _Writer) -> None:
    texts = [
        "h = F.relu(h) if self.training else F.leaky_relu(h, 0.2)",
        "h = h if self.training else h / 2.0",
    ]
    texts += [f"if not self.training:\n    h = {w.mix()}(h)", f"if self.training:\n    h = h + {w.mix()}(h)"]
    texts += [
        "h = h * (1.0 + 0.5 * self.training)",
        "h = F.dropout(h, 0.0, self.training) + float(self.training)",
    ]
    w.lines(w.pick(*texts))


def _attribute_branch(w: _Writer) -> None:
    name = f"switch{w.count}"
    before, after = w.pick((True, False), (False, True), (1.0, 0.5), (2, 0))
    w.init.append(f"self.{name} = {before}")
    texts = [f"if self.{name}:\n    h = {w.mix()}(h)", f"h = F.leaky_relu(h, 0.1 + 0.1 * self.{name})"]
    texts += [f"h = F.relu(h) if self.{name} else F.leaky_relu(h, 0.3)"]
    w.lines(w.pick(*texts))
    if w.chance(0.7):
        w.change.append(f"model.{name} = {after}")


def _data_branch(w: _Writer) -> None:
    test = w.pick("h.abs().max() > 1.5", "h.flatten()[0] > 0", "float(h.detach().flatten()[-1]) > 0")
    texts = [f"if {test}:\n    h = h * 0.5", f"h = h * 2.0 if {test} else {w.mix()}(h)"]
    texts += [f"if bool({test}):\n    h = F.relu(h)"]
    w.lines(w.pick(*texts))


def _batch_size(w: _Writer) -> None:
    texts = ["h = h * (2.0 / h.shape[0])", "h = h / len(h)", "h = h - h.mean(0, keepdim=True)"]
    texts += ["if h.shape[0] > 4:\n    h = h * 0.5", f"h = {w.mix()}(h) if x.size(0) % 2 else h"]
    texts += ["h = h + h.flip(0)", "h = torch.cat([h[1:], h[:1]])"]
    w.lines(w.pick(*texts))


def _cut_and_join(w: _Writer) -> None:
    texts = ["h = h.flip(1)", "h = torch.stack([h, F.relu(h)]).mean(0)", "h = torch.roll(h, 1, dims=1)"]
    if w.shape[0] % 2 == 0:
        texts += ["a, b = h.chunk(2, 1)\nh = torch.cat([b, F.relu(a)], 1)"] * 2
    if w.shape[0] > 1:
        rest = w.shape[0] - 1
        texts += [f"a, b = torch.split(h, [1, {rest}], 1)\nh = torch.cat([b, a * 0.5], dim=1)"] * 2
    doubled = "h = torch.cat([h, F.relu(h)], 1)"
    text = w.pick(*texts, doubled)
    w.lines(text)
    if text == doubled:
        w.shape = (2 * w.shape[0], *w.shape[1:])


def _arithmetic(w: _Writer) -> None:
    kept = w.mix()
    texts = [f"h = h * torch.sigmoid({kept}(h))", f"h = h - {kept}(h)", "h = 2 * h", "h = h / 2.0", "h = -h"]
    texts += [
        f"h = torch.add(h, {kept}(h), alpha=0.5)",
        "h = h + 1",
        "h = 1 - h",
        f"h = h.add({kept}(h), alpha=2)",
    ]
    texts += [
        f"h = h * {kept}(h)",
        "h = h + h",
        "h = h.pow(2)",
        "h = torch.subtract(h, 0.5)",
        "h = sum([h, h])",
    ]
    w.lines(w.pick(*texts))


def _twice(w: _Writer) -> None:
    name = w.mix()
    if w.image and w.chance(0.3):
        norm = w.layer("bn", "norm", f"nn.BatchNorm2d({w.shape[0]})")
        w.lines(f"h = {norm}(F.relu({norm}({name}(h))))", writable=True)
    else:
        w.lines(f"h = {name}(F.relu({name}(h)))", writable=True)


def _tied(w: _Writer) -> None:
    first = w.mix()
    w.init.append(w.init[-1].replace(first, second := f"{first}t"))
    w.layers[second[5:]] = "product"
    w.init.append(f"{second}.weight = {first}.weight")
    w.lines(f"h = {second}(F.relu({first}(h)))", writable=True)


def _tied_norms(w: _Writer) -> None:
    if not w.image:
        return _tied(w)
    first, second = (w.layer("bn", "norm", f"nn.BatchNorm2d({w.shape[0]})") for _ in range(2))
    w.init.append(f"{second}.{(which := w.pick('weight', 'bias'))} = {first}.{which}")
    w.lines(f"h = {second}(F.relu({w.mix()}({first}(h))))", writable=True)
    return None


def _alias(w: _Writer) -> None:
    name = w.mix()
    w.init.append(f"{name}b = {name}")
    w.lines(w.pick(f"h = {name}b(F.relu({name}(h)))", f"h = {name}b(h)"), writable=True)


def _other_norm(w: _Writer) -> None:
    width = w.shape[0]
    if w.image:
        groups = max(g for g in (1, 2, 3) if width % g == 0)
        choices = f"nn.GroupNorm({groups}, {width})", f"nn.InstanceNorm2d({width}, affine={w.chance(0.4)})"
        w.lines(f"h = {w.layer('norm', 'norm', w.pick(*choices))}(h)", writable=True)
        return
    choices = f"nn.RMSNorm({width})", f"nn.GroupNorm(1, {width})"
    w.lines(f"h = {w.layer('norm', 'norm', w.pick(*choices))}(h)", writable=True)


def _batch_norm_of_features(w: _Writer) -> None:
    if w.image:
        return _other_norm(w)
    w.lines(f"h = {w.layer('norm', 'norm', f'nn.BatchNorm1d({w.shape[0]})')}(h)", writable=True)
    return None


def _other_layer(w: _Writer) -> None:
    if not w.image:
        return _other_activation(w)
    c, height, width = w.shape
    convs = [f"nn.Conv2d({c}, {c}, 5, padding=2)", f"nn.Conv2d({c}, {c}, 3, padding=1, groups={c})"]
    convs += [
        f"nn.Conv2d({c}, {c}, 3, padding=2, dilation=2)",
        f"nn.Conv2d({c}, {c}, (3, 1), padding=(1, 0))",
    ]
    convs += [
        f'nn.Conv2d({c}, {c}, 3, padding=1, padding_mode="reflect")',
        f"nn.ConvTranspose2d({c}, {c}, 1)",
    ]
    pools = ["nn.MaxPool2d(3, 1, 1)", "nn.AvgPool2d(3, 1, 1)", "nn.MaxPool2d(3, stride=1, padding=1)"]
    name = w.layer("odd", "odd", w.pick(*convs)) if w.chance(0.6) else w.member("odd", w.pick(*pools))
    w.lines(f"h = {name}(h)")
    return None


def _subclass(w: _Writer) -> None:
    base = w.pick("nn.ReLU", "nn.Identity", "nn.Linear", "nn.Conv2d")
    w.before += [
        f"class Own({base}):",
        "    def forward(self, h):",
        "        return 0.5 * super().forward(h)",
    ]
    width, call = w.shape[0], "Own()"
    if base in ("nn.Linear", "nn.Conv2d"):
        w.before[0] = w.before[0].replace(base, "nn.Conv2d" if w.image else "nn.Linear")
        call = f"Own({width}, {width}, 1)" if w.image else f"Own({width}, {width})"
    w.lines(f"h = {w.member('own', call)}(h)")


def _counted_calls(w: _Writer) -> None:
    w.volatile = True
    w.init.append("self.calls = 0")
    w.lines("self.calls += 1\nh = h * (1.0 if self.calls % 2 else 0.5)")


def _records(w: _Writer) -> None:
    w.init.append("self.seen = []")
    w.lines(f"self.seen.append({w.pick('h.detach()', 'h.shape', 'float(h.detach().mean())')})")


_INSIDE: dict[str, Callable[[_Writer], None]] = {
    "other activation": _other_activation,
    "in-place activation on a shortcut": _shortcut_in_place,
    "augmented assignment, old name kept": _augmented_alias,
    "write into a slice": _slice_write,
    "in-place result discarded": _discarded,
    "no_grad island": _no_grad,
    "detached activation": _detach,
    "detached parameter": _detached_parameter,
    "own arithmetic with parameters": _own_parameter,
    "normalised weight": _normalised_weight,
    "buffer read": _read_buffer,
    "buffer written": _written_buffer,
    "branch on training": _training_branch,
    "branch on an attribute": _attribute_branch,
    "branch on data": _data_branch,
    "batch size used": _batch_size,
    "cat, chunk, split": _cut_and_join,
    "arithmetic": _arithmetic,
    "called twice": _twice,
    "tied weights": _tied,
    "tied batch norms": _tied_norms,
    "alias": _alias,
    "other norm": _other_norm,
    "BatchNorm1d": _batch_norm_of_features,
    "other layer": _other_layer,
    "subclass of a layer": _subclass,
    "counted calls": _counted_calls,
    "recorded calls": _records,
}
_CUTS = ("no_grad island", "detached activation")


def _random_numbers(w: _Writer) -> None:
    drop = w.member("drop", "nn.Dropout(0.5)")
    texts = [f"h = {drop}(h)", "h = F.dropout(h, 0.3, self.training)", "h = h + torch.randn_like(h)"]
    texts += [
        "h = h * torch.rand(())",
        f"if torch.rand(()) < 0.5:\n    h = {w.mix()}(h)",
        "h = F.rrelu(h, training=True)",
    ]
    w.lines(w.pick(*texts))


# Of the whole model, after it is made --------------------------------------------------------------------------------


def _hook(w: _Writer) -> None:
    names = list(w.layers)
    target = f"model.{w.pick(*names)}" if w.chance(0.85) else "model"
    kinds = [f"{target}.register_forward_hook(lambda m, i, o: 0.5 * o)"] * 2
    kinds += [f"{target}.register_forward_pre_hook(lambda m, i: (i[0] + 1.0,))"] * 2
    kinds += [f"model.seen = []\n{target}.register_forward_hook(lambda m, i, o: model.seen.append(o.shape))"]
    kinds += [f"{target}.register_forward_hook(lambda m, i, o: 0.5 * o).remove()"]
    w.after += w.pick(*kinds).splitlines()


def _patched(w: _Writer) -> None:
    name = w.pick(*(n for n, kind in w.layers.items() if kind == "product"))
    w.after += [f"plain = model.{name}.forward", f"model.{name}.forward = lambda h: 0.5 * plain(h)"]


def _parametrized(w: _Writer) -> None:
    name = w.pick(*(n for n, kind in w.layers.items() if kind == "product"))
    kind = w.pick("new", "old", "own")
    if kind == "new":
        w.after.append(f"torch.nn.utils.parametrizations.weight_norm(model.{name})")
    elif kind == "old":
        w.after += ["with warnings.catch_warnings():", '    warnings.simplefilter("ignore")']
        w.after.append(f"    torch.nn.utils.weight_norm(model.{name})")
    else:
        w.before += [
            "class Halved(nn.Module):",
            "    def forward(self, p):",
            "        return torch.tanh(p) / 2",
        ]
        w.after.append(f'parametrize.register_parametrization(model.{name}, "weight", Halved())')


def _norm_in_evaluation(w: _Writer) -> None:
    norms = [name for name in w.layers if name.startswith("bn")]
    if norms:
        w.methods += ["def train(self, mode=True):", "    super().train(mode)"]
        w.methods += [f"    self.{w.pick(*norms)}.eval()", "    return self"]


_WHOLE: dict[str, Callable[[_Writer], None]] = {
    "hook": _hook,
    "patched forward": _patched,
    "parametrization": _parametrized,
    "norm kept in evaluation": _norm_in_evaluation,
}


def _harmless(w: _Writer) -> None:
    """What changes no value: frozen parts, memory order, parts that nothing calls."""
    names = [name for name in w.layers if name != "head"]
    if names and w.chance(0.15):
        w.after.append(f"model.{w.pick(*names)}.requires_grad_(False)")
        w.features.append("frozen")
    if w.strided:
        w.features.append("strided parameters")
        if w.chance(0.4):
            w.after.append("model.to(memory_format=torch.channels_last)")
        else:
            w.after += ["for p in list(model.parameters()):", "    if p.dim() > 1:"]
            w.after.append("        p.data = p.data.transpose(0, 1).contiguous().transpose(0, 1)")
    if w.chance(0.08):
        w.member("spare", w.pick("nn.Linear(2, 3)", "nn.BatchNorm2d(3)", "nn.Parameter(torch.ones(2))"))
        w.features.append("unused part")
    if names and w.chance(0.05):
        w.init.append(f"self.alias = self.{w.pick(*names)}")
        w.features.append("unused alias")
    if w.chance(0.2):
        w.change.append("model.head.weight.data.mul_(0.9)")


def _settings(rng: random.Random, names: list[str], steps: int) -> dict[str, Any]:
    bnwb = rng.random() < 0.6
    adapt: Any = "all"
    if rng.random() < 0.25:  # the head at least: something must depend on what adapts
        adapt = ("head.", *(f"{name}." for name in names if rng.random() < 0.5))
    return {
        "steps": steps,
        "inner_lr": rng.choice([0.05, 0.1, 0.2]),
        "lslr": rng.random() < 0.9,
        "rates": "element" if rng.random() < 0.1 else "tensor",
        "second_order": rng.random() < 0.7,
        "msl": rng.random() < 0.6,
        "bnwb": bnwb,
        "bnrs": rng.random() < 0.6,
        "adapt": adapt,
        "adapt_norm": not bnwb and rng.random() < 0.4,
        "loss": "mse" if rng.random() < 0.3 else "cross_entropy",
        "eval_stats": rng.choice(["batch", "running"]),
        "meta_lr": 0.01,
    }


def make_program(seed: int) -> Program:
    """The random model of this number."""
    rng = random.Random(seed)
    kind = rng.choices(["plain", "features", "draws"], [0.45, 0.5, 0.05])[0]
    image = rng.random() < 0.75
    shape: tuple[int, ...] = (rng.randint(3, 8),)
    if image:
        shape = (rng.randint(1, 4), rng.randint(6, 12), rng.randint(6, 12))
    images = (rng.randint(3, 6), rng.randint(2, 6))
    w = _Writer(rng, shape)
    w.strided = w.chance(0.08)
    permuted = image and w.chance(0.08)
    # Where the features go: among the parts, in this order.
    chosen = rng.sample([*_INSIDE, *_WHOLE], rng.randint(1, 3)) if kind == "features" else []
    inside = [name for name in chosen if name in _INSIDE]
    stages = rng.randint(1, 3 if image else 2)
    _stages(w, stages, images, inside, permuted, kind == "draws")
    for name in _CUTS:  # not behind the head: something must depend on what adapts
        if name in inside:
            inside.remove(name)
            _INSIDE[name](w)
    ways = rng.randint(2, 5)
    w.init.append(f"self.head = nn.Linear({w.shape[0]}, {ways})")
    w.layers["head"] = "product"
    w.lines("h = self.head(h)", writable=True)
    w.shape = (ways,)
    for name in inside:
        _INSIDE[name](w)
    w.prune()
    for name in chosen:
        if name in _WHOLE:
            _WHOLE[name](w)
    _harmless(w)
    source = w.text(seed)
    if w.before:
        head, tail = source.split("\n\nclass Model", 1)
        source = head + "\n\n" + "\n".join(w.before) + "\n\n\nclass Model" + tail
    names = [name for name in w.layers if name != "head"]
    return Program(
        seed=seed,
        source=source,
        features=tuple(sorted({*chosen, *w.features, *(["random numbers"] if kind == "draws" else [])})),
        plain=kind == "plain",
        draws=kind == "draws",
        volatile=w.volatile,
        settings=_settings(rng, names, rng.randint(1, 3)),
        shape=shape,
        ways=w.shape[0],
        tasks=rng.randint(2, 3),
        images=images,
        permuted=permuted,
    )


def _stages(
    w: _Writer, stages: int, images: tuple[int, int], inside: list[str], permuted: bool, draws: bool
) -> None:
    """The parts in front of the head; takes from ``inside`` what it places."""
    strided, w.strided = w.strided, w.strided or permuted

    def feature() -> None:
        if inside and w.chance(0.5):
            _INSIDE[inside.pop()](w)

    position = w.rng.randrange(stages)
    for stage in range(stages):
        if w.image:
            _convolution(w)
            feature()
            if w.chance(0.7):
                _norm(w, min(images))
            feature()
            if w.chance(0.85):
                _activation(w)
            if min(w.shape[1:]) >= 4 and w.chance(0.6):
                _pool(w)
            if w.chance(0.25):
                _residual(w)
        else:
            _linear(w)
            feature()
            if w.chance(0.5):
                _norm(w, min(images))
            if w.chance(0.85):
                _activation(w)
            if w.chance(0.25):
                _residual(w)
        if w.chance(0.12):
            _loop(w)
        if w.chance(0.12):
            _nothing(w)
        if draws and stage == position:
            _random_numbers(w)
        feature()
    if w.image:
        _flatten(w)
        if w.chance(0.3):
            _linear(w)
            _activation(w)
    feature()
    w.strided = strided
