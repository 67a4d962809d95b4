"""Other ways to differentiate than ``torch.autograd``: each is right, or refused in words.

The functions are right under ``torch.func``, where they are plain PyTorch; the operations beneath them refuse it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, func
from torch.autograd import forward_ad, functional
from torch.testing import assert_close

import mamlpp_fast as mf
from mamlpp_fast import ops, reference
from mamlpp_fast.testing import backends, use_backend

Function = Callable[..., Tensor]
Transform = Callable[[Function], Callable[..., Any]]

# Forward mode loads decompositions written for torch.jit: a DeprecationWarning in torch 2.13, a FutureWarning in 2.14.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.*"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]


def plain_batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """By hand: PyTorch's own is wrong in some of these (docs/derivations/per_step_batch_norm.md)."""
    centred = x - x.mean(0)
    y = centred * (centred.square().mean(0) + 1e-5).rsqrt() * weight + bias
    return F.leaky_relu(y, 0.1)


def module(kind: type[reference.PerStepBatchNorm2d]) -> Function:
    """A layer in evaluation mode, with the statistics of the batch."""
    layer = kind(3, 2, negative_slope=0.1).double().eval()
    return lambda x, weight, bias: mf.reference.functional_call(layer, {"weight": weight, "bias": bias}, (x,))


def plain_module(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = x.movedim(1, -1)
    return plain_batch_norm(rows.flatten(0, 2), weight[0], bias[0]).view(rows.shape).movedim(-1, 1)


OFFSETS = torch.tensor([0, 5, 7])


def plain_update(theta: Tensor, grad: Tensor, rates: Tensor) -> Tensor:
    return theta - torch.cat([rates[:1, 1].expand(5), rates[1:, 1].expand(2)]) * grad


def plain_elementwise(theta: Tensor, grad: Tensor, rates: Tensor) -> Tensor:
    return theta - rates[1] * grad


FUNCTIONS: dict[str, tuple[Function, Function, list[tuple[int, ...]]]] = {
    "batch-norm": (
        lambda *t: ops.per_step_batch_norm(*t, negative_slope=0.1),
        plain_batch_norm,
        [(6, 3), (3,), (3,)],
    ),
    "lslr": (lambda *t: ops.lslr_update(*t, OFFSETS, 1), plain_update, [(2, 7), (2, 7), (2, 3)]),
    "element": (lambda *t: ops.lslr_update(*t, None, 1), plain_elementwise, [(2, 7), (2, 7), (3, 7)]),
    "module": (
        module(mf.PerStepBatchNorm2d),
        module(reference.PerStepBatchNorm2d),
        [(4, 3, 2, 2), (2, 3), (2, 3)],
    ),
}

# Without the functions above them, which know of transforms.
OWN = torch.ops.mamlpp_fast
OPERATIONS: dict[str, tuple[Function, Function, list[tuple[int, ...]]]] = {
    "batch-norm operation": (
        lambda *t: OWN.per_step_batch_norm(*t, None, 1e-5, 0.1)[0],
        *FUNCTIONS["batch-norm"][1:],
    ),
    "lslr operation": (lambda *t: OWN.lslr_update(*t, OFFSETS, 1), *FUNCTIONS["lslr"][1:]),
    "element operation": (lambda *t: OWN.lslr_update(*t, None, 1), *FUNCTIONS["element"][1:]),
}


def loss(f: Function) -> Function:
    return lambda *args: f(*args).pow(3).sum()


def twice(f: Function) -> Callable[..., Any]:
    """The gradient in every argument, and that of its square."""

    def differentiate(*args: Tensor) -> Any:
        leaves = [t.detach().requires_grad_() for t in args]
        first = torch.autograd.grad(loss(f)(*leaves), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, materialize_grads=True)
        return *first, *second

    return differentiate


def stacked(args: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.stack([t, 1.5 * t + 0.1]) for t in args]


def batched_cotangents(f: Function) -> Callable[..., Any]:
    def differentiate(*args: Tensor) -> Any:
        leaves = [t.detach().requires_grad_() for t in args]
        first = torch.autograd.grad(loss(f)(*leaves), leaves, create_graph=True)
        cotangents = [torch.stack([t.detach(), t.detach() ** 2]) for t in first]
        return torch.autograd.grad(first, leaves, cotangents, is_grads_batched=True)

    return differentiate


RIGHT: dict[str, Transform] = {
    "autograd, twice": twice,
    "vmap": lambda f: lambda *a: func.vmap(f)(*stacked(a)),
    "vmap over one": lambda f: lambda *a: func.vmap(f, (None, 0, None))(a[0], stacked(a)[1], a[2]),
    "vmap, twice from outside": lambda f: lambda *a: twice(func.vmap(f))(*stacked(a)),
    "is_grads_batched": batched_cotangents,
    "autograd hessian": lambda f: lambda *a: functional.hessian(loss(f), a),
    "autograd jvp": lambda f: lambda *a: functional.jvp(f, a, tuple(t * t for t in a)),
    "autograd jacobian": lambda f: lambda *a: functional.jacobian(f, a, vectorize=True),
}


def dual(argument: int, *, reverse: bool = False) -> Transform:
    """Forward mode without torch.func, of the result or of its gradient."""

    def transform(f: Function) -> Callable[..., Any]:
        def tangent(*args: Tensor) -> Tensor | None:
            leaves = [t.detach().requires_grad_(reverse) for t in args]
            with forward_ad.dual_level():
                given = [forward_ad.make_dual(t, t * t) if i == argument else t for i, t in enumerate(leaves)]
                y = f(*given)
                if reverse:
                    (y,) = torch.autograd.grad(y.pow(3).sum(), leaves[argument], create_graph=True)
                return forward_ad.unpack_dual(y).tangent

        return tangent

    return transform


def dual_cotangent(f: Function) -> Callable[..., Any]:
    """A tangent that only the backward meets."""

    def tangent(*args: Tensor) -> Tensor | None:
        leaves = [t.detach().requires_grad_() for t in args]
        y = f(*leaves)
        with forward_ad.dual_level():
            gy = forward_ad.make_dual(y.detach(), torch.ones_like(y))
            (g,) = torch.autograd.grad(y, leaves[1], gy)
            return forward_ad.unpack_dual(g).tangent

    return tangent


def closed_over(f: Function) -> Callable[..., Any]:
    """``torch.func.grad`` of one argument, autograd's gradient of that in another."""

    def differentiate(*args: Tensor) -> Any:
        leaf = args[1].detach().requires_grad_()
        inner = func.grad(lambda t: loss(f)(t, leaf, args[2]))(args[0])
        return torch.autograd.grad(inner.square().sum(), leaf)

    return differentiate


def meta(f: Function) -> Callable[..., Any]:
    """As MAML nests them: the gradient of a mean over tasks of a loss at gradient steps."""

    def task(*args: Tensor) -> Tensor:
        moved = [t - 0.01 * g for t, g in zip(args, func.grad(loss(f), (0, 1, 2))(*args), strict=True)]
        return loss(f)(*moved)

    def differentiate(*args: Tensor) -> Any:
        first = stacked(args)[0]
        return func.grad(lambda x, *rest: func.vmap(task, (0, None, None))(x, *rest).mean(), (0, 1, 2))(
            first, *args[1:]
        )

    return differentiate


REVERSE = "torch.func.grad does not pass through it; use torch.autograd.grad(..., create_graph=True)"
FORWARD = "forward-mode derivatives (torch.func.jvp, jacfwd) are not implemented; use torch.autograd.grad"
UNDER_FUNC: dict[str, tuple[Transform, str]] = {
    "vjp": (lambda f: lambda *a: func.vjp(f, *a)[1](f(*a)), REVERSE),
    "grad of grad": (
        lambda f: func.grad(lambda *a: func.grad(loss(f), 1)(*a).square().sum(), (0, 1, 2)),
        REVERSE,
    ),
    "vmap of grad": (lambda f: lambda *a: func.vmap(func.grad(loss(f), 1))(*stacked(a)), REVERSE),
    "grad of vmap": (lambda f: lambda *a: func.grad(loss(func.vmap(f)), 1)(*stacked(a)), REVERSE),
    "autograd of grad": (closed_over, REVERSE),
    "maml": (meta, REVERSE),
}
FORWARD_MODE: dict[str, tuple[Transform, str]] = {
    "dual cotangent": (dual_cotangent, FORWARD),
    "vectorized jacobian": (
        lambda f: lambda *a: functional.jacobian(f, a, vectorize=True, strategy="forward-mode"),
        FORWARD,
    ),
}
for _i in range(3):
    UNDER_FUNC |= {
        f"grad {_i}": (lambda f, i=_i: func.grad(loss(f), i), REVERSE),
        f"jacrev {_i}": (lambda f, i=_i: func.jacrev(f, i), REVERSE),
        f"hessian {_i}": (lambda f, i=_i: func.hessian(loss(f), i), REVERSE),
        f"jacfwd {_i}": (lambda f, i=_i: func.jacfwd(f, i), FORWARD),
        f"jvp {_i}": (
            lambda f, i=_i: lambda *a: func.jvp(lambda t: f(*a[:i], t, *a[i + 1 :]), (a[i],), (a[i],)),
            FORWARD,
        ),
    }
    FORWARD_MODE |= {
        f"dual {_i}": (dual(_i), FORWARD),
        f"dual of grad {_i}": (dual(_i, reverse=True), FORWARD),
    }


@pytest.fixture(params=sorted({*backends("per_step_batch_norm"), *backends("lslr_update")} - {"triton"}))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Triton's kernels are below all this: they take the derivative that Python registers."""
    with use_backend(request.param):
        yield request.param


def arguments(name: str) -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in (FUNCTIONS | OPERATIONS)[name][2])


@pytest.mark.parametrize("transform", RIGHT)
@pytest.mark.parametrize("name", FUNCTIONS | OPERATIONS)
def test_what_passes_is_right(backend: str, name: str, transform: str) -> None:
    ours, plain, _ = (FUNCTIONS | OPERATIONS)[name]
    args = arguments(name)
    assert_close(RIGHT[transform](ours)(*args), RIGHT[transform](plain)(*args))


@pytest.mark.parametrize("transform", UNDER_FUNC)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_right_under_torch_func(backend: str, name: str, transform: str) -> None:
    ours, plain, _ = FUNCTIONS[name]
    if name == "module":  # PyTorch's own batch norm is wrong in some of these
        plain = plain_module
    args = arguments(name)
    differentiate = UNDER_FUNC[transform][0]
    assert_close(differentiate(ours)(*args), differentiate(plain)(*args), rtol=1e-9, atol=1e-10)


def of_operations_and_functions() -> list[tuple[str, str]]:
    refused = [(name, transform) for name in OPERATIONS for transform in UNDER_FUNC | FORWARD_MODE]
    refused += [(name, transform) for name in FUNCTIONS if name != "module" for transform in FORWARD_MODE]
    return [*refused, ("module", "dual cotangent")]  # whose forward is in no forward mode


@pytest.mark.parametrize("transform", [name for name in FORWARD_MODE if name != "dual cotangent"])
def test_a_module_is_right_in_forward_mode(backend: str, transform: str) -> None:
    args = arguments("module")
    differentiate = FORWARD_MODE[transform][0]
    found, expected = (differentiate(f)(*args) for f in (FUNCTIONS["module"][0], plain_module))
    assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("name", "transform"), of_operations_and_functions())
def test_what_does_not_pass_says_so(backend: str, name: str, transform: str) -> None:
    ours, plain, _ = (FUNCTIONS | OPERATIONS)[name]
    args = arguments(name)
    differentiate, words = (UNDER_FUNC | FORWARD_MODE)[transform]
    differentiate(plain)(*args)
    with pytest.raises(NotImplementedError, match=re.escape(words)):
        differentiate(ours)(*args)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["batch-norm operation", "lslr operation"])
@pytest.mark.parametrize("whole", [True, False], ids=["transform", "operation"])
@pytest.mark.parametrize("transform", ["grad 1", "jvp 1", "dual 1"])
def test_a_compiled_program_says_so_too(name: str, transform: str, whole: bool, compiler: str) -> None:
    ours = OPERATIONS[name][0]
    args = arguments(name)
    differentiate, words = (UNDER_FUNC | FORWARD_MODE)[transform]
    torch._dynamo.reset()
    if whole:
        compiled = torch.compile(differentiate(ours), backend=compiler)
    else:
        compiled = differentiate(torch.compile(ours, backend=compiler))
    with pytest.raises((NotImplementedError, torch._dynamo.exc.TorchRuntimeError), match=re.escape(words)):
        compiled(*args)
    torch._dynamo.reset()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["batch-norm", "lslr"])
@pytest.mark.parametrize("transform", ["grad 1", "jvp 1", "grad of grad"])
def test_a_compiled_function_is_right_too(name: str, transform: str, compiler: str) -> None:
    ours, plain, _ = FUNCTIONS[name]
    args = arguments(name)
    differentiate = UNDER_FUNC[transform][0]
    torch._dynamo.reset()
    found = torch.compile(differentiate(ours), backend=compiler)(*args)
    torch._dynamo.reset()
    assert_close(found, differentiate(plain)(*args), rtol=1e-9, atol=1e-10)
