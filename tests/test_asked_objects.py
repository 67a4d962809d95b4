"""Forwards that ask which objects they are given, run texts, or read what is set on tensors, lies deep in objects or
hides behind weak references: every loop has PyTorch's result, whatever changes between its iterations."""

from __future__ import annotations

import builtins
import copy
import ctypes
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from front_end_helpers import Calls
from inner_loops import CLASSES, Loss, adapted, learned, task, textbook
from record_helpers import Net, recorded
from torch import Tensor, nn
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast.compat import learn2learn as l2l
from mamlpp_fast.engine.base import Unsupported
from mamlpp_fast.engine.fingerprint import fingerprint
from mamlpp_fast.engine.record import head_names

pytestmark = pytest.mark.usefixtures("nothing_accelerated")

How = Callable[[Any], Any]
Change = Callable[[Any, float], object]

scale = 1.0
TABLE: dict[nn.Module, float] = {}
WEAK: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()
BESIDE = torch.ones(1, dtype=torch.float64)


class Settings:
    """Holds a tensor as well, so that it is no plain record."""

    def __init__(self) -> None:
        self.by, self.other = 1.0, torch.ones(2)

    def get(self) -> float:
        return self.by


class Factor(nn.Module):
    by = 1.0

    def forward(self, x: float) -> float:
        return self.by * x


class Deep(Settings):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Settings()
        self.inner.module = Factor()  # type: ignore[attr-defined]

    def call(self, x: float) -> float:
        made: float = self.inner.module(x)  # type: ignore[attr-defined]
        return made


def _ever() -> Iterator[float]:
    while True:
        yield scale


SETTINGS, DEEP, EVER = Settings(), Deep(), _ever()
BYTES, NUMBER, ARRAY = bytearray(1), ctypes.c_double(), np.ones(1)
REFERENCE, PROXY = weakref.ref(SETTINGS), weakref.proxy(SETTINGS)


def _of_a_frame(m: Any) -> float:
    by: float = sys._getframe().f_globals["scale"]
    return by


def _set_precision(m: Any, value: float) -> None:
    torch.set_float32_matmul_precision("high" if value == 3 else "highest")


def built(how: How) -> nn.Module:
    """Features [n, 6] to predictions [n, 4]; ``how`` tells the number that scales what is in between."""
    model = Calls(
        lambda m, x: m.head(m.norm(m.body(x)) * how(m)),
        body=nn.Linear(6, 4),
        norm=nn.GroupNorm(2, 4),
        head=nn.Linear(4, CLASSES),
    ).double()
    model.register_buffer("buffer", torch.ones(1, dtype=torch.float64))
    model.attribute, model.table = torch.ones(1, dtype=torch.float64), {"deep": Deep()}
    return model


def _by_text(m: Any) -> Any:
    own: dict[str, Any] = {}
    exec("by = scale", globals(), own)
    return own["by"]


def _of_a_reference(m: Any) -> Any:
    return m.settings().by


def _set_global(m: Any, value: float) -> None:
    global scale
    scale = value


def _set_settings(m: Any, value: float) -> None:
    SETTINGS.by = value


def _put(name: str, of: Callable[[Any], Any]) -> Change:
    return lambda m, value: setattr(of(m), name, value)


def _tag(of: Callable[[Any], Any]) -> tuple[How, Change]:
    return lambda m: getattr(of(m), "tag", 1.0), _put("tag", of)


def _nothing(m: Any, value: float) -> None: ...


def _weakly(m: Any, value: float) -> None:
    m.settings = weakref.ref(SETTINGS)
    SETTINGS.by = value


OBJECTS, TEXT, REFERRED = "asks which objects it is given", "runs what a text says", "reads a weak reference"
SERVED = "one operation"
# What scales; what is done with 2, 3 and 4 before each iteration; what is said of the last.
CASES: dict[str, tuple[How, Change, str]] = {
    "the class of a weight": (
        lambda m: 2.0 if isinstance(m.head.weight, nn.Parameter) else 1.0,
        _nothing,
        OBJECTS,
    ),
    "its name": (lambda m: len(type(m.head.weight).__name__), _nothing, OBJECTS),
    "the class of all weights": (
        lambda m: sum(isinstance(p, nn.Parameter) for p in m.parameters()),
        _nothing,
        OBJECTS,
    ),
    "set on a weight": (*_tag(lambda m: m.head.weight), OBJECTS),
    "whether it is set": (
        lambda m: 2.0 if hasattr(m.head.weight, "tag") else 1.0,
        _put("tag", lambda m: m.head.weight),
        OBJECTS,
    ),
    "set on a buffer": (*_tag(lambda m: m.buffer), SERVED),
    "set on an attribute": (*_tag(lambda m: m.attribute), SERVED),
    "set on a global tensor": (*_tag(lambda m: BESIDE), SERVED),
    "set on a weight by the forward": (
        lambda m: setattr(m.head.weight, "tag", 1.0) or 1.0,
        _nothing,
        "is given attributes",
    ),
    "counted on a buffer": (
        lambda m: setattr(m.buffer, "tag", getattr(m.buffer, "tag", 0) + 1) or m.buffer.tag,
        _nothing,
        "is given attributes",
    ),
    "a table of models": (lambda m: TABLE.get(m, 1.0), lambda m, value: TABLE.update({m: value}), OBJECTS),
    "a weak table of models": (
        lambda m: WEAK.get(m, 1.0),
        lambda m, value: WEAK.update({m: value}),
        REFERRED,
    ),
    "an identity": (
        lambda m: {id(m.head.weight): 2.0}.get(id(m.head.weight)),
        _nothing,
        "asks for the id of objects",
    ),
    "eval": (lambda m: eval("scale"), _set_global, TEXT),
    "eval by another name": (lambda m: builtins.eval("scale"), _set_global, TEXT),
    "exec": (_by_text, _set_global, TEXT),
    "a weak reference": (_of_a_reference, _weakly, REFERRED),
    "a global weak reference": (lambda m: REFERENCE().by, _set_settings, REFERRED),
    "a global proxy": (lambda m: PROXY.get(), _set_settings, REFERRED),
    "deep in an object": (lambda m: DEEP.inner.by, _put("by", lambda m: DEEP.inner), SERVED),
    "deep in a table": (
        lambda m: m.table["deep"].inner.get(),
        _put("by", lambda m: m.table["deep"].inner),
        SERVED,
    ),
    "a module deep in an object": (
        lambda m: m.table["deep"].call(1.0),
        _put("by", lambda m: m.table["deep"].inner.module),
        SERVED,
    ),
    "bytes": (lambda m: BYTES[0], lambda m, value: BYTES.__setitem__(0, int(value)), SERVED),
    "a number of C": (lambda m: NUMBER.value, _put("value", lambda m: NUMBER), SERVED),
    "an array": (lambda m: float(ARRAY[0]), lambda m, value: ARRAY.fill(value), SERVED),
    "an iterator": (lambda m: next(EVER), _set_global, "reads an iterator"),
    "a frame": (_of_a_frame, _set_global, "looks for objects by their names or frames"),
    "a setting of PyTorch's": (lambda m: len(torch.get_float32_matmul_precision()), _set_precision, SERVED),
}


def of_a_learner(model: nn.Module) -> Loss:
    config = mf.MAMLConfig(
        steps=2, inner_lr=0.3, lslr=False, msl=False, bnwb=False, bnrs=False, adapt_norm=True
    )
    learner = mf.MAMLPlusPlus(model, config, precision="float64", verify=False)
    return lambda data: learner.meta_gradient(mf.EpisodeBatch(*(part[None] for part in data))).loss


LOOPS: dict[str, Callable[[nn.Module], Loss]] = {
    "accelerate": lambda model: textbook(mf.accelerate(model)),
    "adapt": adapted,
    "learner": of_a_learner,
}


def run(model: nn.Module, loop: Callable[[nn.Module], Loss], change: Change) -> list[Any]:
    """Losses and meta-gradients of three tasks, with what changes before each."""
    loss, seen = loop(model), list[Any]()
    for i in range(3):
        change(model, i + 2.0)
        model.zero_grad()
        made = loss(task(i))
        if made.requires_grad:
            made.backward()
        seen += [made.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return seen


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(globals(), "scale", 1.0)
    monkeypatch.setattr(SETTINGS, "by", 1.0)
    monkeypatch.setattr(BESIDE, "tag", 1.0, raising=False)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("case", CASES)
def test_the_textbook(case: str, loop: str) -> None:
    how, change, said = CASES[case]
    found = []
    for made in (textbook, LOOPS[loop]):
        torch.manual_seed(0)
        model = built(how)
        found.append(run(model, made, change))
    assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
    if loop == "accelerate":
        assert said in mf.acceleration(model), mf.acceleration(model)


def test_clones_first_and_the_model_itself_afterwards() -> None:
    """A clone's weights are no parameters, which the model's are; both have one form."""
    model = built(CASES["the class of a weight"][0])
    loss, data = learned(l2l.algorithms.MAML(model, 0.3)), task(0)
    loss(data).backward()
    accelerated = mf.accelerate(model)
    plain = F.linear(model.norm(model.body(data[0])) * 2, model.head.weight, model.head.bias)
    assert_close(accelerated(data[0]), plain)


@pytest.mark.parametrize("part", ["norm", "head"])
def test_a_predictor_knows_what_is_set_on_weights_that_do_not_adapt(part: str) -> None:
    model = built(lambda m: getattr(m.get_submodule(part).weight, "tag", 1.0))
    model.get_submodule(part).weight.tag = 3.0  # type: ignore[union-attr]
    learner = mf.MAMLPlusPlus(model, mf.MAMLConfig(steps=2), precision="float64")
    x, y, target_x, target_y = task(0)
    expected = learner.evaluate(mf.EpisodeBatch(x[None], y[None], target_x[None], target_y[None]))
    assert_close(learner.adapt(x, y)(target_x), expected.logits[-1, 0])


class Marks(nn.Module):
    """Says in which way predictions came about."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.GroupNorm(1, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        y: Any = self.head(self.norm(x)) * getattr(x, "scale", 1.0)
        y.way = "plain"
        return y


def test_what_is_set_on_examples_and_predictions() -> None:
    model, x = mf.accelerate(Marks()), torch.randn(4, 6)
    for factor in (1.0, 1.0, 3.0):
        plain = model.head(model.norm(x)) * factor
        if factor != 1:
            x.scale = factor  # type: ignore[attr-defined]
        y = model(x)
        assert y.way == "plain"
        assert_close(y, plain)
    assert "gives attributes to its input, or to its result" in mf.acceleration(model)
    assert "an argument has attributes of its own" in mf.acceleration(model)


def test_a_reference_that_is_not_read_stands_in_no_way() -> None:
    net = Net()
    net.unread = weakref.ref(net)
    recorded(net)
    settings = Settings()
    net.dead = weakref.proxy(settings)
    del settings
    assert fingerprint(net) == fingerprint(net)
    with pytest.raises(ReferenceError):
        copy.deepcopy(net)
    del net.dead
    net.between = lambda own, h: h * (own.unread() is not None)
    with pytest.raises(Unsupported, match=REFERRED):
        recorded(net)


def test_a_loss_of_a_text_is_handed_over() -> None:
    def loss(prediction: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(prediction * eval("scale"), labels)

    learner = mf.MAMLPlusPlus(built(lambda m: 1.0), mf.MAMLConfig(steps=2), precision="float64", loss_fn=loss)
    learner.meta_gradient(mf.EpisodeBatch(*(part[None] for part in task(0))))
    assert learner.engine.name == "autograd" and TEXT in learner.engine_reason


def test_operators_that_compile_are_not_tried() -> None:
    """``torch.cond`` that ran under a dispatch mode once fails ever after."""
    net = Net(lambda own, h: torch.cond(h.sum() > 0, lambda z: z * 2, lambda z: z * 3, (h,)))
    with pytest.raises(Unsupported, match="computes by cond, which compiles what it is given"):
        recorded(net)


def test_adapting_the_head_is_told_of_any_forward() -> None:
    net = Net(lambda own, h: h * eval("scale"))
    assert head_names(net, torch.randn(3, 3)) == ("head.weight", "head.bias")
