"""What is no fixed list of operations: every refusal of a recording with its module and reason."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from record_helpers import Net, draw_array, recorded
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import mamlpp_fast as mf
from mamlpp_fast.engine.base import Unsupported


def refusal(model: nn.Module, *example: int) -> tuple[str, str]:
    with pytest.raises(Unsupported) as error:
        recorded(model, *example)
    return error.value.module, error.value.why


def _sum_decides(net: Any, h: Tensor) -> Tensor:
    return h if h.sum() > 0 else -h


def _write_parameter(net: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        net.head.weight.mul_(0.9)
    return h


def _write_buffer(net: Any, h: Tensor) -> Tensor:
    net.scale.add_(1)
    return h


def _put_buffer(net: Any, h: Tensor) -> Tensor:
    net.scale = h.detach()
    return h


def _write_attribute_tensor(net: Any, h: Tensor) -> Tensor:
    net.offset.add_(1)
    return h


def _write_constant(net: Any, h: Tensor) -> Tensor:
    """After it was read: what is recorded of it are its last values."""
    shift = torch.zeros(2, 4).fill_(1)[0]
    h = h + shift
    shift.add_(1)
    return h * shift


def _sum_up(net: Any, h: Tensor) -> Tensor:
    net.calls += 0.5
    return h


def _count(net: Any, h: Tensor) -> Tensor:
    net.calls += 1
    return h * net.calls


def _keep_activation(net: Any, h: Tensor) -> Tensor:
    net.kept = h
    return h


def _stale_view(net: Any, h: Tensor) -> Tensor:
    view = h.view(-1, 4)
    h.relu_()
    return view


def _stale_whole(net: Any, h: Tensor) -> Tensor:
    h[:, :2].mul_(2)
    return h


def _stale_constant(net: Any, h: Tensor) -> Tensor:
    zeros = torch.zeros(len(h), 4)
    part = zeros[:, :2]
    zeros.add_(h)
    return h + part.sum()


def _read_before(net: Any, h: Tensor) -> Tensor:
    zeros = torch.zeros(len(h), 4)
    h = h + zeros.cos()
    h = h * zeros
    return h + zeros.add_(h)


def _attribute_view(net: Any, h: Tensor) -> Tensor:
    return h + net.offset.view(1, 4).add_(h.sum(0))


def _autocast(net: Any, h: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.relu(h)


class _Straight(torch.autograd.Function):
    """Rounds, and lets the gradient through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0]


def _hook_inside(net: Any, h: Tensor) -> Tensor:
    h.register_hook(lambda g: g * 2)
    return h


def _raises(net: Any, h: Tensor) -> Tensor:
    raise KeyError("no such\nkey")


def _examples_decide(net: Any, h: Tensor) -> Tensor:
    return F.relu(h) if len(h) == 3 else F.leaky_relu(h)


def _more_for_more(net: Any, h: Tensor) -> Tensor:
    for _ in range(len(h)):
        h = F.relu(h)
    return h


_STALE = "reads memory that an operation in place has changed under another name"
REFUSALS: dict[str, tuple[Callable[[Any, Tensor], Any], str, str]] = {
    "branch": (_sum_decides, "Net", "__bool__ asks for values, which decide what is executed"),
    "item": (lambda net, h: h * h.mean().item(), "Net", "item asks for values"),
    "float": (lambda net, h: h * float(h.detach().mean()), "Net", "asks for values"),
    "tolist": (lambda net, h: h * h[0].tolist()[0], "Net", "tolist asks for values"),
    "numpy": (lambda net, h: h * float(h.detach().numpy().sum()), "Net", "numpy asks for values"),
    "array": (lambda net, h: h * float(np.asarray(h.detach()).sum()), "Net", "asks for values"),
    "nonzero": (lambda net, h: h + len(h.nonzero()), "Net", "nonzero asks for values"),
    "mask": (lambda net, h: h + h[h > 0].sum(), "Net", "__getitem__ asks for values"),
    "parameter-decides": (
        lambda net, h: h * (2 if net.head.bias.norm() > 1 else 3),
        "Net",
        "__bool__ asks for values",
    ),
    "dropout": (lambda net, h: h * F.dropout(torch.ones(4), 0.5), "Net", "dropout draws random numbers"),
    "python-random": (lambda net, h: h * random.random(), "Net", "draws random numbers"),
    "numpy-random": (lambda net, h: h * float(draw_array()), "Net", "draws random numbers"),
    "function": (
        lambda net, h: _Straight.apply(h),
        "head",  # which reads what it gave
        "passes through an autograd.Function or another change of the graph",
    ),
    "gradient-hook": (_hook_inside, "Net", "register_hook changes how a tensor takes part in gradients"),
    "requires-grad": (
        lambda net, h: h.detach().requires_grad_(),
        "Net",
        "requires_grad_ changes how a tensor takes part in gradients",
    ),
    "parameter-write": (_write_parameter, "head.weight", "is changed in place by mul_"),
    "input-write": (lambda net, h: h, "Net", "relu_ changes the network's input in place"),
    "buffer-write": (_write_buffer, "scale", "is changed in place by add_"),
    "buffer-put": (_put_buffer, "scale", "is replaced in the forward"),
    "tensor-attribute-write": (_write_attribute_tensor, "an attribute", "is changed in place by add_"),
    "constant-write": (_write_constant, "a tensor of the forward's own", "is changed in place by add_"),
    "attribute-write": (_sum_up, "Net", "its forward changes attributes of the model"),
    "computes-with-a-count": (_count, "Net", "computes with a count of its calls"),
    "activation-kept": (_keep_activation, "Net", "its forward changes attributes of the model"),
    "stale-view": (_stale_view, "head", _STALE),
    "stale-whole": (_stale_whole, "head", _STALE),
    "stale-constant": (_stale_constant, "Net", _STALE),
    "constant-read-before": (_read_before, "a tensor of the forward's own", "is changed in place by add_"),
    "attribute-view-write": (_attribute_view, "an attribute", "is changed in place by add_"),
    "autocast": (_autocast, "Net", "computes under torch.autocast"),
    "raises": (_raises, "Net", "its forward raises, 'no such\\nkey'"),
    "other-operation": (_examples_decide, "Net", "relu: depends on the number of examples"),
    "other-length": (_more_for_more, "Net", "executes other operations for another number of examples"),
}


@pytest.mark.parametrize(("fn", "module", "why"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals_name_module_and_reason(fn: Callable[[Any, Tensor], Any], module: str, why: str) -> None:
    net: nn.Module = type("Net", (Net,), {})(fn)  # counts are known by class
    if "input in place" in why:
        net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2))
        module = "0"
        why = why.replace("relu_", "relu")
    found = refusal(net)
    assert found[0] == module
    assert why in found[1]


def test_a_sparse_buffer() -> None:
    """A constant adjacency, say."""
    net: nn.Module = Net(lambda net, h: torch.sparse.mm(net.edges, h.t()).t())
    net.register_buffer("edges", torch.eye(4).to_sparse())
    assert refusal(net) == ("edges", "is a tensor of torch.sparse_coo")


def test_the_module_is_the_innermost_that_was_called() -> None:
    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.mean().item()

    assert refusal(nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), Part())))[0] == "1.1"


def test_an_error_names_the_module_that_raised_it() -> None:
    module, why = refusal(nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(5, 2))))
    assert module == "1.0" and why.startswith("its forward raises, mat1 and mat2 shapes cannot be multiplied")


@pytest.mark.parametrize(
    "result",
    [
        pytest.param(lambda out: (out, out), id="tuple"),
        pytest.param(lambda out: None, id="nothing"),
        pytest.param(lambda out: torch.ones(2), id="a-constant"),
    ],
)
def test_one_tensor_of_predictions_is_expected(result: Callable[[Tensor], Any]) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Any:
            return result(self.layer(x))

    assert refusal(Wrapped()) == (
        "Wrapped",
        "expected forward to return one tensor of predictions made of its input",
    )


def test_the_input_alone_is_no_prediction() -> None:
    assert refusal(nn.Identity())[1].startswith("expected forward to return one tensor")


OUTSIDE = torch.ones(4)


def test_a_tensor_from_elsewhere_is_named() -> None:
    assert "neither its input, a parameter nor a buffer" in refusal(Net(lambda net, h: h + OUTSIDE))[1]


def _nothing(*_: Any) -> None:
    return None


_GRADIENT = "has a hook on its gradient"
HOOKS: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "forward": (lambda net: net.body.register_forward_hook(_nothing), "body", "has a forward hook"),
    "pre": (lambda net: net.body.register_forward_pre_hook(_nothing), "body", "has a forward-pre hook"),
    "backward": (lambda net: net.head.register_full_backward_hook(_nothing), "head", "has a backward hook"),
    "backward-pre": (lambda n: n.register_full_backward_pre_hook(_nothing), "Net", "has a backward-pre hook"),
    "gradient": (lambda net: net.head.weight.register_hook(_nothing), "head.weight", _GRADIENT),
    "accumulated": (
        lambda net: net.head.bias.register_post_accumulate_grad_hook(_nothing),
        "head.bias",
        _GRADIENT,
    ),
} | {
    f"global-{kind}": (
        lambda net, name=f"register_module_{full}{kind}_hook": getattr(torch_module, name)(_nothing),
        "torch.nn",
        f"has a global {kind} hook on all modules",
    )
    for full, kinds in {"": ("forward", "forward_pre"), "full_": ("backward", "backward_pre")}.items()
    for kind in kinds
}


@pytest.mark.parametrize(("put", "module", "why"), HOOKS.values(), ids=HOOKS.keys())
def test_hooks_are_refused_and_not_called(put: Callable[[Any], Any], module: str, why: str) -> None:
    net = Net()
    with put(net):
        assert refusal(net) == (module, why)
    recorded(net)


def test_compiled_and_scripted_modules_are_refused() -> None:
    net = Net()
    net.body.compile(backend="eager")
    assert refusal(net) == ("body", "is compiled")
    with pytest.warns((DeprecationWarning, FutureWarning), match="torch.jit"):
        scripted = torch.jit.script(nn.ReLU())
    assert refusal(nn.Sequential(nn.Linear(3, 2), scripted)) == ("1", "is compiled")


def test_a_norm_of_ones_own_is_refused() -> None:
    class Norm(mf.PerStepBatchNorm2d):
        def normalise(self, x: Tensor) -> Tensor:
            return super().normalise(x) * 2

    module, why = refusal(nn.Sequential(nn.Conv2d(1, 2, 3), Norm(2, 2)), 1, 5, 5)
    assert (module, why) == ("1", "Norm normalises in a way of its own")


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    net = Net()
    net.stream = (i for i in range(3))
    module, why = refusal(net)
    assert module == "Net" and why.startswith("expected one that copy.deepcopy can copy")
