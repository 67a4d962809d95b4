"""What a recording holds, and that making one leaves the model and the world as they were."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import small_conv4
from record_helpers import Net, draw_array, recorded
from test_accelerate import CLOSE, WAYS, data
from torch import Tensor, nn
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast import reference
from mamlpp_fast.engine.base import Unsupported
from mamlpp_fast.engine.fingerprint import fingerprint
from mamlpp_fast.engine.operation import Buffer, Constant, Parameter, Value
from mamlpp_fast.engine.record import Recording, record


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
    assert [shape for op in found.operations for shape, _ in op.tensors] == [(3, 4), (3, 4), (3, 2)]
    assert [shape for op in found.others for shape, _ in op.tensors] == [(4, 4), (4, 4), (4, 2)]
    assert found.output == last.output
    assert found.shapes == {0: (3,), first.output: (4,), act.output: (4,), last.output: (2,)}
    assert not any(op.constant for op in found.operations)
    assert first.name == "linear" and act.name == "relu"


def test_buffers_and_attributes_are_told_apart() -> None:
    _, scaled, moved, _ = between(lambda net, h: h * net.scale + net.offset).operations
    assert scaled.inputs()[1] == Buffer("scale")
    assert moved.inputs()[1] == Constant(torch.zeros(4))


def test_what_is_made_from_attributes_alone_is_no_operation() -> None:
    found = between(lambda net, h: h + (net.offset + 1) * 2)
    assert [op.name for op in found.operations] == ["linear", "add", "linear"]
    assert found.operations[1].inputs()[1] == Constant(2 * torch.ones(4))


def test_a_tensor_made_in_the_forward_is_fixed() -> None:
    assert between(lambda net, h: h + torch.ones(4)).operations[1].inputs()[1] == Constant(torch.ones(4))


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


def test_what_activations_are_written_into_is_one_from_then_on() -> None:
    """A constant of the forward's own; what is recorded of it are its values before."""

    def fn(net: Any, h: Tensor) -> Tensor:
        sums = torch.full((len(h), 4), 0.5)
        sums.mul_(2.0)
        sums.index_add_(1, torch.tensor([3, 0, 0, 1]), h)
        sums[:, 2] = 7.0
        return sums

    found = between(fn)
    for operations, count in ((found.operations, 3), (found.others, 4)):
        _, added, assigned, last = operations
        assert [added.name, assigned.name] == ["index_add_", "__setitem__"]
        assert added.args[0] == Constant(torch.ones(count, 4)) and added.args[3] == Value(1)
        assert assigned.args[0] == Value(added.output or -1) and last.args[0] == Value(assigned.output or -1)


def test_a_tensor_that_is_returned_as_it_came_keeps_its_name() -> None:
    def fn(net: Any, h: Tensor) -> Tensor:
        same, wide = torch.broadcast_tensors(h, net.scale)
        return same * wide

    _, spread, product, _ = between(fn).operations
    assert len(spread.outputs) == len(spread.tensors) == 2 and spread.output is None
    assert product.args == (Value(1), Value(spread.outputs[1]))


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


# What it leaves ------------------------------------------------------------------------------------------------------


def _everything(net: Any, h: Tensor) -> Tensor:
    """Does what no forward should, and draws from all three generators."""
    net.calls += 1
    net.offset.add_(1)
    with torch.no_grad():
        net.head.weight.mul_(2)
        net.scale.add_(1)
    return F.dropout(h, 0.5) * random.random() * float(draw_array()) * torch.rand(4)


def _raises(net: Any, h: Tensor) -> Tensor:
    raise KeyError


@pytest.mark.parametrize("kind", ["everything", "plain", "conv4", "raises"])
@pytest.mark.parametrize("training", [True, False])
def test_model_and_generators_are_left_as_they_were(kind: str, training: bool) -> None:
    nets = {"everything": _everything, "plain": lambda net, h: F.relu(h), "raises": _raises}
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


class Log:
    """What a forward writes to besides its model."""

    def __init__(self) -> None:
        self.calls, self.shapes, self.mean = 0, list[tuple[int, ...]](), torch.zeros(3, dtype=torch.float64)


LOG, CALLS, SHAPES, MEAN = Log(), 0, list[tuple[int, ...]](), torch.zeros(3, dtype=torch.float64)


class Logging(nn.Module):
    shapes: ClassVar[dict[int, tuple[int, ...]]] = {}
    calls = 0

    def __init__(self, where: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 3), nn.Linear(3, WAYS)
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        global CALLS, FRESH
        mean = MEAN
        if self.where == "global":
            CALLS += 1
            FRESH = globals().get("FRESH", 0) + 1
            SHAPES.append(tuple(x.shape))
        elif self.where == "class":
            Logging.calls += 1
            Logging.fresh = getattr(Logging, "fresh", 0) + 1
            Logging.shapes[Logging.calls] = tuple(x.shape)
        else:
            LOG.calls += 1
            LOG.shapes.append(tuple(x.shape))
            mean = LOG.mean
        h = F.batch_norm(self.first(x.flatten(1)), mean, torch.ones_like(mean), None, None, True)
        made: Tensor = self.last(h.tanh())
        return made


def logged() -> list[Any]:
    state = [
        globals().get("FRESH"),
        getattr(Logging, "fresh", None),
        CALLS,
        *SHAPES,
        Logging.calls,
        *Logging.shapes.values(),
        LOG.calls,
        *LOG.shapes,
    ]
    return [*state, MEAN.clone(), LOG.mean.clone()]


@pytest.mark.usefixtures("nothing_accelerated")
@pytest.mark.parametrize("where", ["global", "class", "object"])
def test_what_a_forward_writes_beside_the_model_is_written_by_its_calls_alone(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for accelerated in (False, True):
        for name, value in (("LOG", Log()), ("CALLS", 0), ("SHAPES", []), ("MEAN", torch.zeros(3).double())):
            monkeypatch.setitem(globals(), name, value)
        monkeypatch.setattr(Logging, "shapes", {})
        monkeypatch.setattr(Logging, "calls", 0)
        monkeypatch.delitem(globals(), "FRESH", raising=False)
        monkeypatch.delattr(Logging, "fresh", raising=False)
        torch.manual_seed(0)
        model = Logging(where).double()
        if accelerated:
            mf.accelerate(model)
        for x, y, target, _ in data(3):
            F.cross_entropy(model(x), y).backward()
            model.eval()
            model(target[:4])
            model.train()
        found.append([*logged(), [p.grad for p in model.parameters()]])
    torch.testing.assert_close(found[1], found[0], **CLOSE)
    assert model.first.weight.grad is not None
