"""A glance at a model tells what its whole form tells: equal where nothing changed, another where anything did."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import form_of
from torch import Tensor, nn

import mamlpp_fast as mf
from mamlpp_fast.compat import learn2learn as l2l
from mamlpp_fast.engine import fingerprint
from mamlpp_fast.engine.glances import Glance


def network() -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, momentum=0.0)
    inner = nn.Sequential(norm, l2l.nn.Lambda(F.relu))
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), inner, norm, nn.Flatten(), nn.Linear(4, 2))


def per_step() -> nn.Module:
    return mf.convert_batch_norm(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), 3)


def whole(model: nn.Module) -> Any:
    return fingerprint._fingerprint(model, (), form=True)


@pytest.fixture(autouse=True)
def _own_glances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_glances", {})


@pytest.mark.parametrize(
    "make", [network, lambda: l2l.vision.models.OmniglotCNN(5), lambda: l2l.vision.models.CNN4(5)]
)
def test_copies_clones_and_new_weights_are_seen_at_a_glance(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    form = form_of(model)
    assert form == whole(model)
    copied, again = copy.deepcopy(model), make()
    for child in copied.modules():
        for name, p in child._parameters.items():
            child._parameters[name] = None if p is None else nn.Parameter(p + 1, requires_grad=False)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "_fingerprint", None)
        assert all(form_of(m) is form for m in (model, copied, again))
    expected = form_of(l2l.clone_module(model))  # its modules may be of classes that fuse
    monkeypatch.setattr(fingerprint, "_fingerprint", None)
    assert form_of(l2l.clone_module(model)) is expected


def _share(model: Any) -> None:
    model[4] = model[1]


def _tie(model: Any) -> None:
    model[4].bias = model[1][0].bias


def _own(model: Any) -> None:
    model[0] = type("Own", (nn.Conv2d,), {"__module__": "own"})(1, 4, 3, bias=False)


class Halved(Tensor):
    """Computes otherwise than a plain tensor."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [a.as_subclass(Tensor) / 2 if isinstance(a, Halved) else a for a in args]
        if func in (F.conv2d, torch.conv2d):
            return func(*plain, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


def _halve(model: Any) -> None:
    model[0]._parameters["weight"] = model[0].weight.detach().as_subclass(Halved).requires_grad_()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "value": lambda m: setattr(m[2], "eps", 1e-3),
    "sign of zero": lambda m: setattr(m[2], "momentum", -0.0),
    "class of a weight": _halve,
    "layout of a weight": lambda m: setattr(m[4], "weight", nn.Parameter(torch.zeros(2, 4).to_sparse())),
    "type": lambda m: setattr(m[0], "groups", True),
    "tuple": lambda m: setattr(m[0], "stride", (1, 2)),
    "more": lambda m: setattr(m[3], "more", 1),
    "less": lambda m: delattr(m[3], "end_dim"),
    "renamed": lambda m: (delattr(m[3], "end_dim"), setattr(m[3], "last_dim", -1)),
    "list": lambda m: setattr(m[3], "start_dim", [1]),
    "function": lambda m: setattr(m[1][1], "lmb", F.silu),
    "own function": lambda m: setattr(m[1][1], "lmb", lambda x: x),
    "mode of one": lambda m: m[1].eval(),
    "hook": lambda m: m[2].register_forward_hook(lambda *_: None),
    "other class": lambda m: m.__setitem__(3, nn.Identity()),
    "own class": _own,
    "names of children": lambda m: m._modules.update(last=m._modules.pop("4")),
    "one child less": lambda m: m.__delitem__(4),
    "one child more": lambda m: m.append(nn.ReLU()),
    "no child": lambda m: m._modules.update({"3": None}),
    "shared": _share,
    "no longer shared": lambda m: m.__setitem__(2, nn.BatchNorm2d(4)),
    "tied": _tie,
    "shape": lambda m: setattr(m[4], "weight", nn.Parameter(torch.zeros(3, 4))),
    "precision": lambda m: m.double(),
    "a bias": lambda m: setattr(m[0], "bias", nn.Parameter(torch.zeros(4))),
    "no bias": lambda m: setattr(m[4], "bias", None),
    "no buffer": lambda m: setattr(m[2], "running_mean", None),
    "buffer": lambda m: m[3].register_buffer("more", torch.zeros(2)),
    "buffer with a graph": lambda m: setattr(m[2], "running_mean", torch.zeros(4, requires_grad=True)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_any_change_is_another_form(name: str) -> None:
    model = network()
    form = form_of(model)
    assert fingerprint._glances[nn.Sequential].fits(network())
    CHANGES[name](model)
    assert not fingerprint._glances[nn.Sequential].fits(model)
    changed = form_of(model)
    assert changed != form and changed == whole(model) == form_of(model)
    assert form_of(network()) == form  # and back, whichever was looked at last


@pytest.mark.parametrize("first", [False, True])
def test_a_weight_of_another_class_computes_as_it_likes(first: bool) -> None:
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    ours, x = mf.accelerate(copy.deepcopy(plain)), torch.randn(2, 1, 5, 5)
    if not first:
        torch.testing.assert_close(ours(x), plain(x))
        assert "one operation" in mf.acceleration(ours)
    for model in (plain, ours):
        _halve(model)
    torch.testing.assert_close(ours(x), plain(x))
    assert "a parameter or buffer is no plain tensor, but a Halved" in mf.acceleration(ours)


def test_hooks_of_all_modules_and_another_forward_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    form = form_of(model)
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert form_of(model) != form
    assert form_of(model) is form
    monkeypatch.setattr(nn.Flatten, "forward", lambda self, x: x.flatten(1))
    assert form_of(model) != form


def test_a_step_is_of_a_call_and_no_part_of_the_form() -> None:
    model: Any = per_step()
    form = form_of(model)
    model[1].step = 2
    assert form_of(model) is form
    model[1].eval_stats = "running"
    assert form_of(model) != form


def test_equal_values_in_other_objects_are_the_same_form(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = network()
    form = form_of(model)
    model[2].eps, model[0].stride = float("1e-05"), eval("(1, 1)")
    monkeypatch.setattr(fingerprint, "_fingerprint", None)
    assert form_of(model) is form


def test_models_that_hold_more_than_plain_values_are_read_as_ever() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model: Any = nn.Sequential(nn.Flatten())
    model[0].more = [1]
    for other in (Own(), model):
        assert Glance.of(None, other) is None
        form = form_of(other)
        assert form == form_of(other) and type(other) not in fingerprint._glances
    model[0].more.append(2)
    assert form_of(model) != form


def test_it_keeps_no_model_alive() -> None:
    model = network()
    form_of(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and fingerprint._glances
