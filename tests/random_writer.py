"""The text of a random model as it grows, and the parts that the fused engine takes; see ``random_programs.py``."""

from __future__ import annotations

import math
import random
import re
from typing import Any

__all__ = [
    "Writer",
    "activation",
    "container",
    "convolution",
    "flatten",
    "linear",
    "loop",
    "norm",
    "nothing",
    "pool",
    "residual",
]

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


def _names(name: str, texts: list[str]) -> bool:
    return any(re.search(rf"\b{re.escape(name)}\b", text) for text in texts)


class Writer:
    """The text so far, and the shape of the value ``h``.

    Attributes:
        writable: whether ``h`` may be changed in place: no operation has kept it for its backward, and it is not the
            input.
        layers: what has parameters: name and kind.
    """

    def __init__(self, rng: random.Random, shape: tuple[int, ...]) -> None:
        self.rng = rng
        self.shape = shape
        self.arguments = "x"
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

    def one_of(self, texts: str, writable: bool = False) -> str:
        """Adds and returns one of the texts that ``|`` parts; in them ``\\n`` begins a line."""
        text: str = self.pick(*(t.strip().replace("\\n", "\n") for t in texts.split("|")))
        self.lines(text, writable)
        return text

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
            if line.startswith("self.") and "." not in name[5:] and not _names(name[5:], texts):
                self.init.remove(line)
                self.layers.pop(name[5:], None)

    def text(self, seed: int) -> str:
        def block(lines: list[str], depth: int) -> str:
            return "".join(f"{'    ' * depth}{line}\n" for line in lines)

        source = _HEADER + block(self.init, 2) + f"\n    def forward(self, {self.arguments}):\n"
        source += block([*self.forward, "return h"], 2)
        if self.methods:
            source += "\n" + block(self.methods, 1)
        source += _BUILD.format(seed=seed) + block([*self.after, "return model"], 1)
        return source + "\n\ndef change(model):\n" + block(self.change or ["pass"], 1)


# The plain parts -----------------------------------------------------------------------------------------------------


def convolution(w: Writer) -> None:
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
    if w.chance(0.04):
        w.features.append("functional layer")
        w.layers[name[5:]] = "functional"
    else:
        call = f"{name}(h)"
    w.lines(f"h = {call}", writable=True)
    w.shape = (out, *((s + 2 * padding - k) // stride + 1 for s in (height, width)))


def linear(w: Writer) -> None:
    out = w.rng.randint(3, 8)
    name = w.layer("linear", "product", f"nn.Linear({w.shape[0]}, {out}, bias={w.chance(0.8)})")
    functional = w.chance(0.04)
    if functional:
        w.features.append("functional layer")
        w.layers[name[5:]] = "functional"
    w.lines(f"h = F.linear(h, {name}.weight, {name}.bias)" if functional else f"h = {name}(h)", writable=True)
    w.shape = (out,)


def norm(w: Writer, images: int) -> None:
    if w.image and math.prod(w.shape[1:]) * images >= 16 and w.chance(0.75):
        options = w.pick("", "", ", eps=1e-3", ", momentum=0.3")
        w.lines(f"h = {w.layer('bn', 'norm', f'nn.BatchNorm2d({w.shape[0]}{options})')}(h)", writable=True)
    elif math.prod(w.shape) >= 4:
        shape = str(list(w.shape))
        affine = w.pick("", "", ", elementwise_affine=False", ", bias=False")
        w.lines(f"h = {w.layer('ln', 'layer norm', f'nn.LayerNorm({shape}{affine})')}(h)", writable=True)


def activation(w: Writer) -> None:
    if w.writable and w.chance(0.35):
        module = w.pick("nn.ReLU(inplace=True)", "nn.LeakyReLU(0.2, inplace=True)")
        call = w.pick("F.relu(h, inplace=True)", "h.relu_()", "F.leaky_relu(h, 0.1, inplace=True)", "")
        w.lines(f"h = {call or w.member('act', module) + '(h)'}")
        return
    module = w.pick("nn.ReLU()", "nn.LeakyReLU(0.2)", "nn.LeakyReLU()")
    call = w.pick("F.relu(h)", "torch.relu(h)", "h.relu()", "F.leaky_relu(h, negative_slope=0.1)", "", "", "")
    if w.chance(0.1):
        call = w.pick("F.relu(input=h)", "F.leaky_relu(h, -0.3)", "F.leaky_relu(h, 0.0)", "nn.ReLU()(h)")
    if call:
        w.lines(f"h = {call}")
        return
    name = w.member("act", module)
    if w.chance(0.1):
        w.change.append(f"model.{name[5:]} = nn.LeakyReLU(0.3)")
        w.features.append("replaced module")
    w.lines(f"h = {name}(h)")


def pool(w: Writer) -> None:
    channels, height, width = w.shape
    k = 2 if min(height, width) < 6 else w.pick(2, 2, 3)
    calls = ["F.max_pool2d(h, 2)", f"{w.member('pool', 'nn.MaxPool2d(2)')}(h)"]
    if w.chance(0.4):
        calls = [f"F.avg_pool2d(h, {k})", f"{w.member('pool', f'nn.AvgPool2d({k})')}(h)"]
    else:
        k = 2
    w.lines(f"h = {w.pick(*calls)}", writable=True)
    w.shape = (channels, height // k, width // k)


def residual(w: Writer) -> None:
    kept = f"kept{w.count}"
    first, second = w.mix(), w.mix()
    w.lines(f"{kept} = h\nh = {first}(h)", writable=True)
    if w.chance(0.5):
        activation(w)
    inner = kept if w.chance(0.7) else f"{w.mix()}({kept})"
    total = w.pick(f"h = h + {inner}", f"h = {inner} + h", f"h += {inner}", f"h = torch.add(h, {inner})")
    w.lines(f"h = {second}(h)\n{total}", writable=True)


def loop(w: Writer) -> None:
    first, second = w.mix(), w.mix()
    act = w.pick("F.relu", "F.leaky_relu")
    kind = w.pick("tuple", "list", "dict")
    if kind == "tuple":
        w.lines(f"for layer in ({first}, {second}):\n    h = {act}(layer(h))")
    elif kind == "list":
        order = w.member("order", f"[{first}, {second}]")
        w.lines(f"for layer in {order}:\n    h = {act}(layer(h))")
    else:
        w.lines(f'parts = {{"a": {first}(h), "b": ({second}(h), 0)}}\nh = {act}(parts["a"] + parts["b"][0])')
    w.features.append("python containers")


def container(w: Writer) -> None:
    """Layers that keep the shape, one module: a sequence, or a block with a forward of its own."""
    width = w.shape[0]
    product = f"nn.Conv2d({width}, {width}, 3, padding=1)" if w.image else f"nn.Linear({width}, {width})"
    norm = f"nn.BatchNorm2d({width})" if w.image and w.pick(True, False) else f"nn.LayerNorm({list(w.shape)})"
    norm = "nn.Identity()" if math.prod(w.shape) < 4 or (w.image and math.prod(w.shape[1:]) < 8) else norm
    act = w.pick("nn.ReLU(inplace=True)", "nn.LeakyReLU(0.2)")
    if w.chance(0.5):
        name = w.layer("block", "container", f"nn.Sequential({product}, {norm}, {act})")
        w.layers[f"{name[5:]}[0]"] = "product"
        each = f"for layer in {name}:\n    h = layer(h)"
        w.lines(w.pick(f"h = {name}(h)", f"h = {name}(h)", each, f"h = {name}[2]({name}[1]({name}[0](h)))"))
        return
    name = w.layer("block", "container", f"Block{w.count}()")
    w.layers[f"{name[5:]}.product"] = "product"
    key = w.pick("", '["out"]', "[0]")
    result = {"": "{}", '["out"]': '{{"out": {}, "in": h}}', "[0]": "({}, h)"}[key]
    total = w.pick("self.act(h + self.norm(self.product(h)))", "h + self.act(self.norm(self.product(h)))")
    w.before += [f"class Block{w.count - 1}(nn.Module):", "    def __init__(self):"]
    w.before.append("        super().__init__()")
    w.before += [f"        self.{n} = {v}" for n, v in (("product", product), ("norm", norm), ("act", act))]
    w.before += ["", "    def forward(self, h):", f"        return {result.format(total)}", ""]
    w.lines(f"h = {name}(h){key}")


def nothing(w: Writer) -> None:
    name = w.member("idle", w.pick("nn.Dropout(0.0)", "nn.Identity()", "nn.Sequential(nn.Identity())"))
    if w.chance(0.3):
        w.features.append("call without effect")
        w.one_of("""h = h.contiguous() | h = h.clone() | h = h.to(x.dtype) | h = h + 0.0 | h = h[:]
            | h = 1.0 * h | h = F.dropout(h, 0.0)""")
    else:
        w.lines(f"h = {name}(h)")


def flatten(w: Writer) -> None:
    channels, height, width = w.shape
    if channels * height * width > 60 or w.chance(0.4):
        mean = w.member("mean", "nn.AdaptiveAvgPool2d(1)")
        if w.chance(0.1):
            w.features.append("other pooling")
            w.one_of("""h = h.mean(-1).mean(-1) | h = h.sum((2, 3)) | h = h.amax((2, 3))
                | h = h.permute(0, 2, 3, 1).mean((1, 2))""")
        else:
            w.one_of(
                f"""h = h.mean((2, 3)) | h = h.mean(dim=(-2, -1)) | h = torch.mean(h, dim=[2, 3])
                | h = {mean}(h).flatten(1) | h = torch.flatten(F.adaptive_avg_pool2d(h, 1), 1)
                | h = h.mean((2, 3), keepdim=True).flatten(1)""",
                writable=True,
            )
        w.shape = (channels,)
    else:
        whole = f"""h = torch.flatten(h, 1) | h = h.flatten(1) | h = h.flatten(start_dim=1)
            | h = {w.member("flat", "nn.Flatten()")}(h)
            | h = h.reshape(h.shape[0], -1) | h = h.reshape(h.size(0), -1)"""
        views = "| h = h.view(h.size(0), -1) | h = h.view(h.shape[0], -1)"
        w.one_of(whole if w.strided else whole + views, writable=w.writable)
        w.shape = (channels * height * width,)
