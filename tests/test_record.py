"""What a recording holds, what it refuses, and that it leaves the model and the world as they were."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import small_conv4
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast import reference
from mamlpp_fast.engine.base import Unsupported
from mamlpp_fast.engine.fingerprint import fingerprint
from mamlpp_fast.engine.record import Recording, head_names, record
from mamlpp_fast.engine.recorder import Buffer, Constant, Parameter, Value

draw_array = np.random.rand  # from NumPy's global generator, as a user's forward may


class Net(nn.Module):
    """Two layers, and in between what a test says: ``between(self, hidden [n, 4])``."""

    def __init__(self, between: Callable[[Any, Tensor], Any] = lambda net, h: h) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("scale", torch.ones(4))
        self.offset = torch.zeros(4)
        self.calls = 0
        self.between = between

    def forward(self, x: Tensor) -> Any:
        return self.head(self.between(self, self.body(x)))


def recorded(model: nn.Module, *example: int, counts: tuple[int, int] = (3, 4)) -> Recording:
    x, other = (torch.randn(n, *(example or (3,))) for n in counts)
    return record(model, x, other)


def refusal(model: nn.Module, *example: int) -> tuple[str, str]:
    with pytest.raises(Unsupported) as error:
        recorded(model, *example)
    return error.value.module, error.value.why


def between(fn: Callable[[Any, Tensor], Any]) -> Recording:
    """The recording of a net that computes this between its layers."""
    return recorded(Net(fn))


# What it holds -------------------------------------------------------------------------------------------------------


def test_operations_arguments_shapes_and_modules() -> None:
    found = between(lambda net, h: torch.relu(h))
    first, act, last = found.operations
    assert [op.function for op in found.operations] == [F.linear, torch.relu, F.linear]
    assert [op.where for op in found.operations] == ["body", "", "head"]
    assert first.args == (Value(0), Parameter("body.weight"), Parameter("body.bias"))
    assert act.args == (Value(first.output),) and last.args[0] == Value(act.output)
    assert [op.shape for op in found.operations] == [(3, 4), (3, 4), (3, 2)]
    assert found.output == last.output
    assert found.shapes == {0: (3,), first.output: (4,), act.output: (4,), last.output: (2,)}
    assert not any(op.constant for op in found.operations)
    assert first.name == "linear" and act.name == "relu"


def test_buffers_and_attributes_are_told_apart() -> None:
    _, scaled, moved, _ = between(lambda net, h: h * net.scale + net.offset).operations
    assert scaled.inputs()[1] == Buffer("scale")
    assert moved.inputs()[1] == Constant()


def test_what_is_made_from_attributes_alone_is_no_operation() -> None:
    found = between(lambda net, h: h + (net.offset + 1) * 2)
    assert [op.name for op in found.operations] == ["linear", "add", "linear"]
    assert found.operations[1].inputs()[1] == Constant()


def test_a_tensor_made_in_the_forward_is_fixed() -> None:
    assert between(lambda net, h: h + torch.ones(4)).operations[1].inputs()[1] == Constant()


def test_one_parameter_under_two_names_has_the_first() -> None:
    net = Net(lambda net, h: F.linear(h, net.twin))
    net.body = nn.Linear(3, 4, bias=False)
    net.twin = nn.Parameter(torch.randn(4, 4))
    net.again = net.twin
    assert recorded(net).operations[1].args[1] == Parameter("twin")


def _no_grad(net: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        return F.relu(h)


@pytest.mark.parametrize(
    ("fn", "constant"),
    [
        pytest.param(lambda net, h: h.detach(), [True], id="detach"),
        pytest.param(lambda net, h: h.data, [True], id="data"),
        pytest.param(_no_grad, [True], id="no-grad"),
        pytest.param(lambda net, h: h + h.detach(), [True, False], id="half"),
        pytest.param(lambda net, h: F.relu(h.detach()), [True, False], id="after-a-detach"),
    ],
)
def test_constants(fn: Callable[[Any, Tensor], Tensor], constant: list[bool]) -> None:
    assert [op.constant for op in between(fn).operations[1:-1]] == constant


def test_a_detached_parameter_is_an_argument_and_no_operation() -> None:
    found = between(lambda net, h: F.linear(h, torch.eye(4), net.body.bias.detach()))
    assert found.operations[1].args[2] == Parameter("body.bias", detached=True)


def test_frozen_parameters_leave_no_constants() -> None:
    net = Net()
    net.body.requires_grad_(False)
    assert [op.constant for op in recorded(net).operations] == [False, False]


def _in_place(net: Any, h: Tensor) -> Tensor:
    h += 1
    h.relu_()
    return F.relu(h, inplace=True)


def test_operations_in_place_are_values_in_order() -> None:
    found = between(_in_place)
    values = [op.output for op in found.operations]
    assert [op.name for op in found.operations] == ["linear", "add_", "relu_", "relu", "linear"]
    assert len(set(values)) == 5
    assert [op.args[0] for op in found.operations[1:]] == [Value(v) for v in values[:-1] if v is not None]


def test_assignment_to_a_part_leaves_its_value_in_the_whole() -> None:
    def fn(net: Any, h: Tensor) -> Tensor:
        h[:, 0] = 0.0
        return h

    _, assigned, last = between(fn).operations
    assert assigned.name == "__setitem__" and last.args[0] == Value(assigned.output or -1)


def test_a_per_step_batch_norm_is_one_operation() -> None:
    model = small_conv4(2).float()
    found = recorded(model, 1, 12, 12)
    norms = [op for op in found.operations if op.function is reference.per_step_norm]
    assert [op.where for op in norms] == ["blocks.0.norm", "blocks.1.norm"]
    assert norms[0].kwargs["weight"] == Parameter("blocks.0.norm.weight")
    assert norms[0].kwargs["running_var"] == Buffer("blocks.0.norm.running_var")
    assert norms[0].kwargs["training"] and not model.eval().training
    (again, _) = (
        op for op in recorded(model, 1, 12, 12).operations if op.function is reference.per_step_norm
    )
    assert not again.kwargs["training"]


def test_pytorchs_batch_norm_counts_without_an_operation() -> None:
    found = recorded(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), 1, 5, 5)
    assert [op.name for op in found.operations] == ["conv2d", "batch_norm"]
    assert found.operations[1].args[1:3] == (Buffer("1.running_mean"), Buffer("1.running_var"))


def test_shapes_that_follow_the_batch_are_followed() -> None:
    found = between(lambda net, h: h.view(h.size(0), 2, 2).reshape(len(h), -1))
    assert [found.shapes[op.output or -1] for op in found.operations] == [(4,), (2, 2), (4,), (2,)]


def test_a_call_that_gives_several_tensors_has_no_one_output() -> None:
    def fn(net: Any, h: Tensor) -> Tensor:
        a, b = h.chunk(2, 1)
        return torch.cat([b, a], 1)

    chunk, cat = between(fn).operations[1:3]
    assert chunk.output is None and chunk.name == "chunk"
    assert len(cat.inputs()) == 2 and chunk.args[0] not in cat.inputs()


def test_control_flow_of_python_is_followed() -> None:
    def fn(net: Any, h: Tensor) -> Tensor:
        for _ in range(2 if net.training else 1):
            h = F.relu(h)
        return h if h.dim() == 2 and h.shape[1] == 4 and h.is_floating_point() else -h

    net = Net(fn)
    assert [op.name for op in recorded(net).operations] == ["linear", "relu", "relu", "linear"]
    assert [op.name for op in recorded(net.eval()).operations] == ["linear", "relu", "linear"]


@pytest.mark.parametrize("layer", [nn.Dropout(0.0), nn.Dropout(0.5).eval(), nn.Dropout2d(0.0)])
def test_dropout_that_drops_nothing_draws_nothing(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), layer)
    assert [op.where for op in recorded(model, 1, 5, 5).operations] == ["0"]


# What it refuses -----------------------------------------------------------------------------------------------------


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


def _count(net: Any, h: Tensor) -> Tensor:
    net.calls += 1
    return h


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
    "dropout": (lambda net, h: F.dropout(h, 0.5), "Net", "dropout draws random numbers"),
    "noise": (lambda net, h: h + torch.randn(4), "Net", "randn draws random numbers"),
    "noise-like": (lambda net, h: h + torch.rand_like(h), "Net", "rand_like draws random numbers"),
    "in-place-noise": (lambda net, h: h + torch.empty(4).normal_(), "Net", "normal_ draws random numbers"),
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
    "attribute-write": (_count, "Net", "its forward changes attributes of the model"),
    "activation-kept": (_keep_activation, "Net", "its forward changes attributes of the model"),
    "stale-view": (
        _stale_view,
        "head",
        "reads memory that an operation in place has changed under another name",
    ),
    "stale-whole": (
        _stale_whole,
        "head",
        "reads memory that an operation in place has changed under another name",
    ),
    "autocast": (_autocast, "Net", "computes under torch.autocast"),
    "raises": (_raises, "Net", "its forward raises, 'no such\\nkey'"),
    "other-operation": (_examples_decide, "Net", "relu: depends on the number of examples"),
    "other-length": (_more_for_more, "Net", "executes other operations for another number of examples"),
    "other-number": (lambda net, h: h * len(h), "Net", "mul: depends on the number of examples"),
    "mixed-examples": (
        lambda net, h: h.flatten().view(4, -1).t(),
        "Net",
        "flatten: expected examples along the first axis, got (12,) for 3 of them",
    ),
}


@pytest.mark.parametrize(("fn", "module", "why"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals_name_module_and_reason(fn: Callable[[Any, Tensor], Any], module: str, why: str) -> None:
    net: nn.Module = Net(fn)
    if "input in place" in why:
        net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2))
        module = "0"
        why = why.replace("relu_", "relu")
    found = refusal(net)
    assert found[0] == module
    assert why in found[1]


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


HOOKS: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "forward": (lambda net: net.body.register_forward_hook(_nothing), "body", "has a forward hook"),
    "forward-pre": (
        lambda net: net.body.register_forward_pre_hook(_nothing),
        "body",
        "has a forward-pre hook",
    ),
    "backward": (lambda net: net.head.register_full_backward_hook(_nothing), "head", "has a backward hook"),
    "backward-pre": (
        lambda net: net.register_full_backward_pre_hook(_nothing),
        "Net",
        "has a backward-pre hook",
    ),
    "gradient": (
        lambda net: net.head.weight.register_hook(_nothing),
        "head.weight",
        "has a hook on its gradient",
    ),
    "accumulated": (
        lambda net: net.head.bias.register_post_accumulate_grad_hook(_nothing),
        "head.bias",
        "has a hook on its gradient",
    ),
    "global-forward": (
        lambda net: torch_module.register_module_forward_hook(_nothing),
        "torch.nn",
        "has a global forward hook on all modules",
    ),
    "global-forward-pre": (
        lambda net: torch_module.register_module_forward_pre_hook(_nothing),
        "torch.nn",
        "has a global forward_pre hook on all modules",
    ),
    "global-backward": (
        lambda net: torch_module.register_module_full_backward_hook(_nothing),
        "torch.nn",
        "has a global backward hook on all modules",
    ),
    "global-backward-pre": (
        lambda net: torch_module.register_module_full_backward_pre_hook(_nothing),
        "torch.nn",
        "has a global backward_pre hook on all modules",
    ),
}


@pytest.mark.parametrize(("put", "module", "why"), HOOKS.values(), ids=HOOKS.keys())
def test_hooks_are_refused_and_not_called(put: Callable[[Any], Any], module: str, why: str) -> None:
    net = Net()
    handle = put(net)
    try:
        assert refusal(net) == (module, why)
    finally:
        handle.remove()
    recorded(net)


def test_compiled_and_scripted_modules_are_refused() -> None:
    net = Net()
    net.body.compile(backend="eager")
    assert refusal(net) == ("body", "is compiled")
    with pytest.warns(DeprecationWarning, match="torch.jit"):
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


# What it leaves ------------------------------------------------------------------------------------------------------


def _everything(net: Any, h: Tensor) -> Tensor:
    """Does what no forward should, and draws from all three generators."""
    net.calls += 1
    net.offset.add_(1)
    with torch.no_grad():
        net.head.weight.mul_(2)
        net.scale.add_(1)
    return F.dropout(h, 0.5) * random.random() * float(draw_array()) * torch.rand(4)


def _norms(net: Any, h: Tensor) -> Tensor:
    return F.relu(h)


@pytest.mark.parametrize("kind", ["everything", "plain", "conv4", "raises"])
@pytest.mark.parametrize("training", [True, False])
def test_model_and_generators_are_left_as_they_were(kind: str, training: bool) -> None:
    nets = {"everything": _everything, "plain": _norms, "raises": _raises}
    model: Any = small_conv4(2).float() if kind == "conv4" else Net(nets[kind])
    if kind == "conv4":
        model.blocks[0].train(not training)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    model.training = training
    example = (1, 12, 12) if kind == "conv4" else (3,)
    x, other = torch.randn(3, *example), torch.randn(4, *example, requires_grad=True)
    given = x.clone()
    state, known = copy.deepcopy(model.state_dict()), fingerprint(model)
    flags = [m.training for m in model.modules()]
    attributes = {k: v for k, v in vars(model).items() if not k.startswith("_")}
    own, arrays, torchs = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()  # noqa: NPY002
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
    try:
        record(model, x, other)
    except Unsupported:
        assert kind in ("everything", "raises")
    assert random.getstate() == own
    now = np.random.get_state(legacy=False)  # noqa: NPY002
    assert all(np.array_equal(now["state"][k], arrays["state"][k]) for k in arrays["state"])
    assert torch.equal(torch.get_rng_state(), torchs)
    assert (torch.is_grad_enabled(), torch.get_num_threads()) == (grad, threads)
    assert fingerprint(model) == known
    assert [m.training for m in model.modules()] == flags
    assert {k: v for k, v in vars(model).items() if not k.startswith("_")} == attributes
    assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    assert all(p.grad is not None and bool((p.grad == 3).all()) for p in model.parameters())
    assert torch.equal(x, given) and other.grad is None
    if kind != "conv4":
        assert model.calls == 0 and not model.offset.any()


def test_no_gradient_mode_of_the_caller_changes_nothing() -> None:
    net = Net(lambda net, h: F.relu(h))
    expected = recorded(net)
    with torch.no_grad():
        assert not any(op.constant for op in recorded(net).operations)
    assert recorded(net).shapes == expected.shapes


# Heads ---------------------------------------------------------------------------------------------------------------


class _Body(nn.Module):
    def __init__(self, head: nn.Module, *, first: bool = False) -> None:
        super().__init__()
        if first:
            self.head = head
        self.body = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        if not first:
            self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class _Cosine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.centres = nn.Parameter(torch.randn(2, 4))
        self.temperature = nn.Parameter(torch.tensor(5.0))

    def forward(self, x: Tensor) -> Tensor:
        similar = F.normalize(self.body(x), dim=-1) @ F.normalize(self.centres, dim=-1).T
        return self.temperature * similar


class _Unused(_Body):
    """Registers, and calls, a layer that reaches no output."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 2))
        self.probe = nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.probe(self.body(x))
        return out


def _frozen_head() -> nn.Module:
    net = _Body(nn.Linear(4, 2))
    net.head.requires_grad_(False)
    return net


HEADS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], set[str]]] = {
    "last": (lambda: _Body(nn.Linear(4, 2)), {}, {"head.weight", "head.bias"}),
    "registered-first": (lambda: _Body(nn.Linear(4, 2), first=True), {}, {"head.weight", "head.bias"}),
    "of-several-layers": (
        lambda: _Body(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))),
        {},
        {"head.2.weight", "head.2.bias"},
    ),
    "reparametrised": (
        lambda: _Body(nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))),
        {},
        {"head.bias", "head.parametrizations.weight.original0", "head.parametrizations.weight.original1"},
    ),
    "of-the-model-itself": (_Cosine, {}, {"centres", "temperature"}),
    "unused-layer": (_Unused, {}, {"head.weight", "head.bias"}),
    "frozen": (_frozen_head, {}, {"body.0.weight", "body.0.bias"}),
    "norm-last": (
        lambda: _Body(nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2))),
        {},
        {"head.0.weight", "head.0.bias"},
    ),
    "adapting-norm-last": (
        lambda: _Body(nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2))),
        {"adapt_norm": True},
        {"head.1.weight", "head.1.bias"},
    ),
    "beyond-the-fused-engine": (
        lambda: _Body(nn.Sequential(nn.GELU(), nn.Dropout(0.5), nn.Linear(4, 2), nn.Softmax(-1))),
        {},
        {"head.2.weight", "head.2.bias"},
    ),
}


@pytest.mark.parametrize(("make", "options", "names"), HEADS.values(), ids=HEADS.keys())
def test_the_head_is_what_reaches_the_output_last(
    make: Callable[[], nn.Module], options: dict[str, Any], names: set[str]
) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    assert set(head_names(model, torch.randn(5, 3), **options)) == names
    assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_a_head_needs_parameters() -> None:
    with pytest.raises(
        ValueError, match="adapt: expected a last module with parameters that reach the output"
    ):
        head_names(nn.Sequential(nn.Flatten(), nn.ReLU()), torch.randn(5, 3))
