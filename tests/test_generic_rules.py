"""The four rules of generic steps, written down as a program, against autograd in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from mamlpp_fast.engine.fused.composites import COMPOSITES
from mamlpp_fast.engine.fused.masks import PassMasks
from mamlpp_fast.engine.fused.program import Emitter, Ref, Workspace
from mamlpp_fast.engine.fused.steps import Generic, Slot, Step
from mamlpp_fast.engine.fused.steps.base import Gradients, Pass, aten
from mamlpp_fast.engine.fused.steps.generic import Recorded
from mamlpp_fast.engine.operation import Operation, Parameter, Value

N = 4
Form = tuple[int, ...]


def step_of(function: Callable[..., Tensor], forms: list[Form], weights: list[Form]) -> Generic:
    """A step of a function of activations and parameters, in this order."""
    args = (*(Value(i) for i in range(len(forms))), *(Parameter(f"w{i}") for i in range(len(weights))))
    op = Operation(function, "", args, {}, (len(forms),), (((), torch.float64),), False)
    recorded = Recorded("f", {N: op}, dict.fromkeys(range(len(forms)), True), torch.float64)
    slots = tuple(Slot(f"w{i}", form, form, tuple(range(len(form)))) for i, form in enumerate(weights))
    inputs = tuple(range(len(forms)))
    return Generic("f", inputs, len(forms), (), recorded, 0, inputs, slots, (), {}, False)


def rules(
    step: Step,
    tasks: int,
    values: Mapping[Any, Tensor],
    moving: Mapping[Any, Tensor],
    gy: Tensor,
    gy_dot: Tensor,
    masks: PassMasks | None = None,
    ready: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:
    """What the rules leave: values and tangents by name, gradients and theirs by input or parameter.

    Args:
        masks: of the pass.
        ready: called when these have memory, before the rules run.
    """
    em = Emitter(torch.device("cpu"), torch.float64)
    given = {n: em.own(f"{n}", v) for n, v in values.items()}
    along = {n: em.own(f"direction of {n}", v) for n, v in moving.items()}
    names = [n for n in given if isinstance(n, str)]
    ps = Pass(
        tasks,
        N,
        0,
        {n: given[n] for n in names},
        {},
        {n: r for n, r in given.items() if isinstance(n, int)},
        directions={n: r for n, r in along.items() if isinstance(n, str)},
        tangents={n: r for n, r in along.items() if isinstance(n, int)},
        masks=masks,
    )
    wanted = frozenset(n for n in given if isinstance(n, int)), frozenset(names)
    first, second = Gradients(*wanted), Gradients(*wanted)
    step.forward(em, ps)
    g, g_dot = em.own("gy", gy), em.own("gy_dot", gy_dot)
    step.backward(em, ps, g, first)
    step.tangent(em, ps)
    step.backward_tangent(em, ps, g, g_dot, second)
    left: dict[str, Ref] = {"y": ps.values[step.output], "y_dot": ps.tangents[step.output]}
    for prefix, found in (("g", first), ("g_dot", second)):
        left |= {f"{prefix} {n}": em.sum("sum", terms) for n, terms in found.terms.items()}
        left |= {f"{prefix} {n}": ref for n, ref in found.params.items()}
    kept = {}
    for name, ref in left.items():
        kept[name] = em.own(name, torch.full(ref.shape, torch.nan, dtype=torch.float64))
        em.call(aten.copy_.default, kept[name], ref)
    program = em.finish()
    workspace = Workspace(torch.device("cpu"))
    program.bind(workspace)
    workspace.memory.fill_(255)  # NaN
    ready()
    program.run()
    return {name: ref.tensor() for name, ref in kept.items()}


def autograd(
    function: Callable[..., Tensor],
    values: Mapping[Any, Tensor],
    moving: Mapping[Any, Tensor],
    gy: Tensor,
    gy_dot: Tensor,
) -> dict[str, Tensor]:
    """The same of one task, by nested autograd."""
    names = list(values)

    def both(*xs: Tensor) -> tuple[Tensor, ...]:
        *inputs, g = xs
        y = function(*inputs)
        return (y, *torch.autograd.grad(y, inputs, g, create_graph=True, materialize_grads=True))

    primals = (*(values[n].clone().requires_grad_() for n in names), gy.clone().requires_grad_())
    tangents = (*(moving.get(n, torch.zeros_like(values[n])) for n in names), gy_dot)
    (y, *grads), (y_dot, *dots) = torch.autograd.functional.jvp(both, primals, tangents)
    found = {"y": y, "y_dot": y_dot}
    found |= {f"g {n}": g for n, g in zip(names, grads, strict=True)}
    return found | {f"g_dot {n}": g for n, g in zip(names, dots, strict=True)}


def assert_four_rules(
    step: Step,
    function: Callable[..., Tensor],
    shapes: Mapping[Any, Form],
    tasks: int,
    still: Collection[Any],
    rtol: float,
    atol: float,
) -> None:
    """Holds a step's rules against autograd.

    Args:
        function: what the step computes of one task.
        shapes: of inputs, by number and with the examples, and of parameters, by name.
        still: those that have no direction.
    """
    values, directions = (
        {n: torch.randn(tasks, *form, dtype=torch.float64) for n, form in shapes.items()} for _ in range(2)
    )
    directions = {n: d for n, d in directions.items() if n not in still}
    like = function(*(v[0] for v in values.values()))
    gy, gy_dot = (torch.randn(tasks, *like.shape, dtype=torch.float64) for _ in range(2))
    found = rules(step, tasks, values, directions, gy, gy_dot)
    for t in range(tasks):
        own = ({n: v[t] for n, v in given.items()} for given in (values, directions))
        for name, expected in autograd(function, *own, gy[t], gy_dot[t]).items():
            result = found[name][t] if name in found else torch.zeros_like(expected)
            assert_close(
                result, expected, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )


def _scan(x: Tensor, h: Tensor, *params: Tensor) -> Tensor:
    return COMPOSITES[torch.gru](x, h, params, True, 1, 0.0, True, False, True)[0]  # type: ignore[no-any-return]


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], list[Form], list[Form]]] = {
    "gelu": (F.gelu, [(N, 5)], []),
    "gelu-tanh": (lambda x: F.gelu(x, approximate="tanh"), [(N, 3, 5)], []),
    "product": (torch.mul, [(N, 5), (N, 5)], []),
    "broadcast": (torch.mul, [(N, 5)], [(5,)]),
    "linear": (F.linear, [(N, 3, 5)], [(4, 5), (4,)]),
    "matmul": (torch.matmul, [(N, 3, 5), (N, 5, 2)], []),
    "softmax": (lambda x: torch.softmax(x, -1), [(N, 5)], []),
    "conv5x5": (lambda x, w, b: F.conv2d(x, w, b, padding=2), [(N, 2, 6, 5)], [(3, 2, 5, 5), (3,)]),
    "depthwise": (lambda x, w: F.conv2d(x, w, None, 1, 1, 2, 4), [(N, 4, 6, 5)], [(4, 1, 3, 3)]),
    "transposed": (lambda x, w: F.conv_transpose2d(x, w, stride=2), [(N, 2, 3, 3)], [(2, 3, 2, 2)]),
    "max-pool": (lambda x: F.max_pool2d(x, 3, 2, 1), [(N, 2, 7, 6)], []),
    "average-pool": (lambda x: F.avg_pool2d(x, 3, 2, 1), [(N, 2, 7, 6)], []),
    "group-norm": (lambda x, w, b: COMPOSITES[F.group_norm](x, 2, w, b), [(N, 4, 3)], [(4,), (4,)]),
    "layer-norm": (lambda x, w, b: COMPOSITES[F.layer_norm](x, (5,), w, b), [(N, 3, 5)], [(5,), (5,)]),
    "weights": (lambda v, g: v * (g / v.square().sum(1, keepdim=True).sqrt()), [], [(6, 4), (6, 1)]),
    "attention": (COMPOSITES[F.scaled_dot_product_attention], [(N, 2, 3, 4)] * 3, []),
    "gru": (_scan, [(N, 3, 2), (1, N, 4)], [(12, 2), (12, 4), (12,), (12,)]),
    "lstm-cell": (
        lambda x, h, c, *params: torch.cat(COMPOSITES[torch.lstm_cell](x, (h, c), *params), 1),
        [(N, 3), (N, 2), (N, 2)],
        [(8, 3), (8, 2), (8,), (8,)],
    ),
    "gru-cell": (COMPOSITES[torch.gru_cell], [(N, 3), (N, 2)], [(6, 3), (6, 2), (6,), (6,)]),
    "padded": (
        lambda w: COMPOSITES[F.embedding](torch.arange(2 * N).view(N, 2) % 5, w, padding_idx=-2),
        [],
        [(5, 3)],
    ),
    "viewed": (lambda x: COMPOSITES[Tensor.view](x.transpose(1, 2), N, -1) * 2, [(N, 3, 5)], []),
    "slice": (lambda x: x[:, 1:, ::2].flatten(1), [(N, 3, 5)], []),
    "permuted": (lambda x: x.transpose(1, 2).reshape(N, -1) * 2, [(N, 3, 5)], []),
    "cat": (lambda x, y: torch.cat([x, y, x], 1), [(N, 2), (N, 3)], []),
    "index": (lambda x: x[:, torch.arange(5) // 2], [(N, 3)], []),
    "assigned": (
        lambda x, y: COMPOSITES[Tensor.__setitem__](x, (slice(None), slice(1, 3)), y),
        [(N, 4), (N, 2)],
        [],
    ),
    "cumulative": (lambda x: torch.cumsum(x, 1).logsumexp(1), [(N, 4)], []),
    "no-forward-formula": (lambda x, w, b: F.group_norm(x, 2, w, b), [(N, 4, 3)], [(4,), (4,)]),
    "solve": (lambda x, w: torch.linalg.solve(w, x.T), [(N, 4)], [(4, 4)]),
    "norm": (lambda x: torch.linalg.vector_norm(x, dim=1), [(N, 4)], []),
    "norm-of-order-3": (lambda x: torch.linalg.vector_norm(x, 3, dim=1), [(N, 4)], []),
    "powers-in-place": (
        lambda x: (
            (x * x + 1).pow_(3) + (x * x + 1).float_power_(0.5) + (x * x + 1).ldexp_(torch.full((3,), 2))
        ),
        [(N, 3)],
        [],
    ),
    "examples-mixed": (lambda x: torch.tanh(x @ x.T) @ x, [(N, 3)], []),
    "repeated": (
        lambda x, w: (x.mean(1) * 3 + w).exp() / 7 + (x.sum(1, keepdim=True) * w).mean(1),
        [(N, 3, 5)],
        [(5,)],
    ),
    "around-a-circle": (lambda x: COMPOSITES[F.pad](x, (2, 1, 0, 3), "circular").square(), [(N, 3, 4)], []),
    "affine-grid": (lambda x: COMPOSITES[F.affine_grid](x, (N, 1, 3, 4), False).exp(), [(N, 2, 3)], []),
    "affine-grid-of-corners": (
        lambda x: COMPOSITES[F.affine_grid](x, (N, 1, 2, 1, 3), True).exp(),
        [(N, 3, 4)],
        [],
    ),
    "infinite-beside": (
        lambda x: torch.softmax(0.5 * x.masked_fill(torch.ones(3, 3).triu(1) > 0, -math.inf), -1),
        [(N, 3, 3)],
        [],
    ),
    "likelihood": (
        lambda x, y, w: COMPOSITES[F.gaussian_nll_loss](x, y, w, True, 0.3, "none"),
        [(N, 3), (N, 3)],
        [(N, 3)],
    ),
    "zero-derivative": (lambda x: torch.sign(x) + x.round(), [(N, 3)], []),
}


def _check(
    function: Callable[..., Tensor],
    forms: list[Form],
    weights: list[Form],
    tasks: int,
    still: Collection[Any] = (),
) -> None:
    shapes: dict[Any, Form] = dict(enumerate(forms)) | {f"w{i}": form for i, form in enumerate(weights)}
    assert_four_rules(step_of(function, forms, weights), function, shapes, tasks, still, 1e-10, 1e-12)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_four_rules(name: str, tasks: int) -> None:
    _check(*FUNCTIONS[name], tasks)


@pytest.mark.parametrize("still", [0, 1, "w0"])
def test_inputs_without_a_direction(still: int | str) -> None:
    _check(lambda x, y, w: F.silu(x * y @ w) + y, [(N, 5), (N, 5)], [(5, 5)], 2, [still])


@pytest.mark.parametrize("tasks", [1, 3])
def test_what_repeats_is_computed_once(tasks: int) -> None:
    """The gradient of a mean over a sequence has the memory of one element of it."""
    step = step_of(lambda x: x.mean(1), [(N, 50, 5)], [])
    em = Emitter(torch.device("cpu"), torch.float64)
    x, gy = (torch.randn(tasks, N, *shape, dtype=torch.float64) for shape in ((50, 5), (5,)))
    ps = Pass(tasks, N, 0, {}, {}, {0: em.own("x", x)})
    out = Gradients(frozenset({0}), frozenset())
    step.forward(em, ps)
    step.backward(em, ps, em.own("gy", gy), out)
    (found,) = out.terms[0]
    program = em.finish()
    program.bind(Workspace(torch.device("cpu")))
    program.run()
    assert_close(found.tensor(), (gy / 50).unsqueeze(2).expand(tasks, N, 50, 5), rtol=1e-12, atol=0)
    assert found.buffer.nbytes == gy.nbytes
