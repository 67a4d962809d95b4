"""What the fused engine cannot know, or a reader of ``forward`` easily misses; see ``random_programs.py``."""

from __future__ import annotations

import math
from collections.abc import Callable

from tests.random_writer import Writer

__all__ = ["CUTS", "INSIDE", "WHOLE", "random_numbers"]


def _other_activation(w: Writer) -> None:
    w.one_of("""h = torch.tanh(h) | h = F.gelu(h) | h = torch.sigmoid(h) | h = F.elu(h) | h = F.silu(h)
        | h = F.softplus(h) | h = torch.where(h > 0, h, 0.2 * h) | h = h.clamp(min=-0.5) | h = h.abs()
        | h = torch.maximum(h, 0.1 * h) | h = F.normalize(h, dim=1) | h = F.relu6(h) | h = F.softmax(h, 1)
        | h = h / (1 + h.abs())""")


# In place ------------------------------------------------------------------------------------------------------------


def _shortcut_in_place(w: Writer) -> None:
    w.fresh()
    act = w.pick("h.relu_()", "F.relu(h, inplace=True)", f"{w.member('act', 'nn.ReLU(inplace=True)')}(h)")
    w.lines(f"kept = h\nh = {w.mix()}({act})\nh = h + kept", writable=True)


def _augmented_alias(w: Writer) -> None:
    w.fresh()
    update = w.pick("h += {}", "h.add_({})", "h -= {}").format(f"{w.mix()}(F.relu(h))")
    w.lines(f"kept = h\n{update}\nh = {w.mix()}(h) + kept", writable=True)


def _slice_write(w: Writer) -> None:
    w.fresh()
    w.one_of("""h[:, 0] = 0.5 * h[:, 0] | h[:, :1] *= 0.5 | h[..., 0] = 0.25 | h[:, 0].mul_(0.5)
        | h[0] = h[0] * 0.5 | h[..., :1].relu_() | h[h < -1] = -1.0 | h.select(1, 0).add_(0.5)""")


def _discarded(w: Writer) -> None:
    w.fresh()
    act = f"{w.member('act', 'nn.ReLU(inplace=True)')}(h)"
    w.one_of(f"h.add_(1.0) | h.mul_(0.5) | F.relu(h, inplace=True) | torch.relu_(h) | {act} | h.neg_()")


# Without gradients ---------------------------------------------------------------------------------------------------


def _no_grad(w: Writer) -> None:
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


def _detach(w: Writer) -> None:
    mix = w.mix()
    w.one_of(f"""h = h + h.detach() | h = h.detach() | h = h.data | h = h * h.detach().abs()
        | kept = h.detach()\\nh = {mix}(h) + kept | h = h + {mix}(h.detach())""")
    if w.chance(0.3):
        w.fresh()
        w.lines("h.data.mul_(0.5)")


def _detached_parameter(w: Writer) -> None:
    name = w.mix()
    weight = w.pick(f"{name}.weight.detach()", f"{name}.weight.data", f"{name}.weight.clone().detach()")
    _functional(w, name, weight)


# Parameters and buffers ----------------------------------------------------------------------------------------------


def _functional(w: Writer, name: str, weight: str) -> None:
    """A call of a layer's operation with another weight."""
    w.layers[name[5:]] = "functional"
    call = f"F.conv2d(h, {weight}, {name}.bias, padding={name}.padding)"
    w.lines(f"h = {call if w.image else f'F.linear(h, {weight}, {name}.bias)'}", writable=True)


def _own_parameter(w: Writer) -> None:
    kind = w.pick("scale", "shift", "matmul", "scalar", "exponential", "weight")
    if kind == "weight" and not w.image:
        name = w.mix(bias=True)
        w.layers[name[5:]] = "functional"
        w.lines(f"h = h @ {name}.weight.t() + {name}.bias")
    elif kind == "matmul":
        width = w.shape[-1]
        w.lines(f"h = h @ {w.parameter(f'torch.eye({width}) + 0.1 * torch.ones({width}, {width})')}")
    elif kind == "scalar":
        w.lines(f"h = h * {w.parameter('torch.tensor(0.7)')}")
    else:
        p = w.parameter(f"0.5 + 0.5 * torch.rand{w.per_channel}")
        w.lines({"scale": f"h = h * {p}", "shift": f"h = h + {p}"}.get(kind, f"h = h * torch.exp(-{p})"))


def _normalised_weight(w: Writer) -> None:
    name = w.mix()
    weights = [f"F.normalize({name}.weight, dim=1)", f"{name}.weight * 0.7", f"torch.tanh({name}.weight)"]
    weights += [f"{name}.weight - {name}.weight.mean(dim=1, keepdim=True)"]
    _functional(w, name, w.pick(*weights))


def _read_buffer(w: Writer) -> None:
    center, spread = (w.buffer(f"{base} + torch.rand{w.per_channel}") for base in ("0.0", "1.0"))
    w.one_of(f"h = (h - {center}) / {spread} | h = h - {center} | h = h * {spread}")
    if w.chance(0.3):
        w.change.append(f"model.{center[5:]}.add_(0.5)")


def _written_buffer(w: Writer) -> None:
    mean = "mean((0, 2, 3), keepdim=True).squeeze(0)" if w.image else "mean(0)"
    when = "self.training" if w.chance(0.7) else "True"
    w.volatile |= when == "True"
    if w.chance(0.4):
        lines = f"{w.buffer('torch.zeros((), dtype=torch.int64)')}.add_(1)"
    else:
        b = w.buffer(f"torch.zeros{w.per_channel}")
        new = f"0.9 * {b} + 0.1 * h.detach().{mean}"
        lines = w.pick(f"{b}.copy_({new})", f"with torch.no_grad():\n        {b} = {new}")
        w.lines(f"h = h - 0.5 * {b}")
    w.lines(f"if {when}:\n    {lines}")


def _twice(w: Writer) -> None:
    name = w.mix()
    if w.image and w.chance(0.3):
        norm = w.layer("bn", "norm", f"nn.BatchNorm2d({w.shape[0]})")
        w.lines(f"h = {norm}(F.relu({norm}({name}(h))))", writable=True)
    else:
        w.lines(f"h = {name}(F.relu({name}(h)))", writable=True)


def _tied(w: Writer) -> None:
    first = w.mix()
    w.init.append(w.init[-1].replace(first, second := f"{first}t"))
    w.layers[second[5:]] = "product"
    w.init.append(f"{second}.weight = {first}.weight")
    w.lines(f"h = {second}(F.relu({first}(h)))", writable=True)


def _tied_norms(w: Writer) -> None:
    if not w.image:
        return _tied(w)
    first, second = (w.layer("bn", "norm", f"nn.BatchNorm2d({w.shape[0]})") for _ in range(2))
    w.init.append(f"{second}.{(which := w.pick('weight', 'bias'))} = {first}.{which}")
    w.lines(f"h = {second}(F.relu({w.mix()}({first}(h))))", writable=True)
    return None


def _alias(w: Writer) -> None:
    name = w.mix()
    w.init.append(f"{name}b = {name}")
    w.one_of(f"h = {name}b(F.relu({name}(h))) | h = {name}b(h)", writable=True)


# Branches and side effects -------------------------------------------------------------------------------------------


def _training_branch(w: Writer) -> None:
    mix = w.mix()
    w.one_of(f"""h = F.relu(h) if self.training else F.leaky_relu(h, 0.2) | h = h if self.training else h / 2.0
        | if not self.training:\\n    h = {mix}(h) | if self.training:\\n    h = h + {mix}(h)
        | h = h * (1.0 + 0.5 * self.training) | h = F.dropout(h, 0.0, self.training) + float(self.training)""")


def _attribute_branch(w: Writer) -> None:
    name, mix = f"switch{w.count}", w.mix()
    before, after = w.pick((True, False), (False, True), (1.0, 0.5), (2, 0))
    w.init.append(f"self.{name} = {before}")
    w.one_of(f"""if self.{name}:\\n    h = {mix}(h) | h = F.leaky_relu(h, 0.1 + 0.1 * self.{name})
        | h = F.relu(h) if self.{name} else F.leaky_relu(h, 0.3)""")
    if w.chance(0.7):
        w.change.append(f"model.{name} = {after}")


def _data_branch(w: Writer) -> None:
    test = w.pick("h.abs().max() > 1.5", "h.flatten()[0] > 0", "float(h.detach().flatten()[-1]) > 0")
    w.one_of(f"""if {test}:\\n    h = h * 0.5 | h = h * 2.0 if {test} else {w.mix()}(h)
        | if bool({test}):\\n    h = F.relu(h)""")


def _batch_size(w: Writer) -> None:
    w.one_of(f"""h = h * (2.0 / h.shape[0]) | h = h / len(h) | h = h - h.mean(0, keepdim=True)
        | if h.shape[0] > 4:\\n    h = h * 0.5 | h = {w.mix()}(h) if x.size(0) % 2 else h
        | h = h + h.flip(0) | h = torch.cat([h[1:], h[:1]])""")


def _counted_calls(w: Writer) -> None:
    w.volatile = True
    w.init.append("self.calls = 0")
    w.lines("self.calls += 1\nh = h * (1.0 if self.calls % 2 else 0.5)")


def _records(w: Writer) -> None:
    w.init.append("self.seen = []")
    w.lines(f"self.seen.append({w.pick('h.detach()', 'h.shape', 'float(h.detach().mean())')})")


def _unused_result(w: Writer) -> None:
    if w.image and math.prod(w.shape[1:]) >= 8 and w.chance(0.6):
        w.lines(f"{w.layer('bn', 'norm', f'nn.BatchNorm2d({w.shape[0]})')}(h)")
    else:
        w.lines(f"aside = {w.mix()}(h)")


# Other operations and layers -----------------------------------------------------------------------------------------


def _cut_and_join(w: Writer) -> None:
    texts = "h = h.flip(1) | h = torch.stack([h, F.relu(h)]).mean(0) | h = torch.roll(h, 1, dims=1)"
    if w.image and w.shape[1] == w.shape[2]:
        texts += " | h = h.transpose(-1, -2).contiguous()" * 3
    if w.shape[0] % 2 == 0:
        texts += " | a, b = h.chunk(2, 1)\\nh = torch.cat([b, F.relu(a)], 1)" * 2
    if w.shape[0] > 1:
        split = f"a, b = torch.split(h, [1, {w.shape[0] - 1}], 1)"
        texts += f" | {split}\\nh = torch.cat([b, a * 0.5], dim=1)" * 2
    doubled = "h = torch.cat([h, F.relu(h)], 1)"
    if w.one_of(f"{texts} | {doubled}") == doubled:
        w.shape = (2 * w.shape[0], *w.shape[1:])


def _arithmetic(w: Writer) -> None:
    mix = w.mix()
    w.one_of(f"""h = h * torch.sigmoid({mix}(h)) | h = h - {mix}(h) | h = 2 * h | h = h / 2.0 | h = -h | h = h + 1
        | h = torch.add(h, {mix}(h), alpha=0.5) | h = 1 - h | h = h.add({mix}(h), alpha=2) | h = h * {mix}(h)
        | h = h + h | h = h * h | h = torch.subtract(h, 0.5) | h = sum([h, h]) | h = h + h.mean(1, keepdim=True)
        | h = h + h[:, :1] | h = h + x.mean() | h = torch.add(h, h[:1])""")


def _called_directly(w: Writer) -> None:
    name = w.mix()
    w.one_of(f'h = {name}.forward(h) | h = {name}(input=h) | h = getattr(self, "{name[5:]}")(h)')


def _other_norm(w: Writer) -> None:
    width = w.shape[0]
    choices = [f"nn.RMSNorm({width})", f"nn.GroupNorm(1, {width})"]
    if w.image:
        groups = max(g for g in (1, 2, 3) if width % g == 0)
        choices = [f"nn.GroupNorm({groups}, {width})", f"nn.InstanceNorm2d({width}, affine={w.chance(0.4)})"]
        choices += [f"nn.LayerNorm({list(w.shape[1:])})"]
    w.lines(f"h = {w.layer('norm', 'norm', w.pick(*choices))}(h)", writable=True)


def _norm_of_features(w: Writer) -> None:
    if w.image:
        return _other_norm(w)
    w.lines(f"h = {w.layer('norm', 'norm', f'nn.BatchNorm1d({w.shape[0]})')}(h)", writable=True)
    return None


def _other_layer(w: Writer) -> None:
    if not w.image:
        return _other_activation(w)
    c = w.shape[0]
    layer = w.pick(
        f"nn.Conv2d({c}, {c}, 5, padding=2)",
        f"nn.Conv2d({c}, {c}, 3, padding=1, groups={c})",
        f"nn.Conv2d({c}, {c}, 3, padding=2, dilation=2)",
        f"nn.Conv2d({c}, {c}, (3, 1), padding=(1, 0))",
        f'nn.Conv2d({c}, {c}, 3, padding=1, padding_mode="reflect")',
        f"nn.ConvTranspose2d({c}, {c}, 1)",
        "nn.MaxPool2d(3, 1, 1)",
        "nn.AvgPool2d(3, 1, 1)",
    )
    w.lines(f"h = {w.member('odd', layer) if 'Pool' in layer else w.layer('odd', 'odd', layer)}(h)")
    return None


def _subclass(w: Writer) -> None:
    base = w.pick("nn.ReLU", "nn.Identity", "product", "product")
    width, call = w.shape[0], "Own()"
    if base == "product":
        base = "nn.Conv2d" if w.image else "nn.Linear"
        call = f"Own({width}, {width}, 1)" if w.image else f"Own({width}, {width})"
    w.before += [
        f"class Own({base}):",
        "    def forward(self, h):",
        "        return 0.5 * super().forward(h)",
        "",
    ]
    w.lines(f"h = {w.member('own', call)}(h)")


INSIDE: dict[str, Callable[[Writer], None]] = {
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
    "called twice": _twice,
    "tied weights": _tied,
    "tied batch norms": _tied_norms,
    "alias": _alias,
    "branch on training": _training_branch,
    "branch on an attribute": _attribute_branch,
    "branch on data": _data_branch,
    "batch size used": _batch_size,
    "counted calls": _counted_calls,
    "recorded calls": _records,
    "result unused": _unused_result,
    "cat, chunk, split": _cut_and_join,
    "arithmetic": _arithmetic,
    "called directly": _called_directly,
    "other norm": _other_norm,
    "norm of features": _norm_of_features,
    "other layer": _other_layer,
    "subclass of a layer": _subclass,
}
"""Lines of ``forward``."""
CUTS = ("no_grad island", "detached activation")
"""Those behind which nothing may depend on what is in front."""


def random_numbers(w: Writer) -> None:
    drop = w.member("drop", "nn.Dropout(0.5)")
    w.one_of(f"""h = {drop}(h) | h = F.dropout(h, 0.3, self.training) | h = h + torch.randn_like(h)
        | h = h * torch.rand(()) | if torch.rand(()) < 0.5:\\n    h = {w.mix()}(h)
        | h = F.rrelu(h, training=True)""")


# Of the whole model, after it is made --------------------------------------------------------------------------------


def _hook(w: Writer) -> None:
    target = f"model.{w.pick(*w.layers)}" if w.chance(0.85) else "model"
    # A block may give a tuple, and be called with keywords alone.
    half = "lambda m, i, o: tuple(0.5 * t for t in o) if isinstance(o, tuple) else 0.5 * o"
    hooks = [f"{target}.register_forward_hook({half})"] * 2
    hooks += [f"{target}.register_forward_pre_hook(lambda m, i: tuple(t + 1.0 for t in i))"] * 2
    hooks += [f"model.seen = []\n{target}.register_forward_hook(lambda m, i, o: model.seen.append(type(o)))"]
    hooks += [f"{target}.register_forward_hook({half}).remove()"]
    w.after += w.pick(*hooks).splitlines()


def _patched(w: Writer) -> None:
    name = w.pick(*(n for n, kind in w.layers.items() if kind == "product"))
    w.after += [f"plain = model.{name}.forward", f"model.{name}.forward = lambda h: 0.5 * plain(h)"]


def _parametrized(w: Writer) -> None:
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
            "",
        ]
        w.after.append(f'parametrize.register_parametrization(model.{name}, "weight", Halved())')


def _norm_in_evaluation(w: Writer) -> None:
    norms = [name for name in w.layers if name.startswith("bn")]
    if norms:
        w.methods += ["def train(self, mode=True):", "    super().train(mode)"]
        w.methods += [f"    self.{w.pick(*norms)}.eval()", "    return self"]


WHOLE: dict[str, Callable[[Writer], None]] = {
    "hook": _hook,
    "patched forward": _patched,
    "parametrization": _parametrized,
    "norm kept in evaluation": _norm_in_evaluation,
}
"""Lines of ``build``."""
