"""Batch norm under opcheck, torch.compile, vmap and several threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from batch_norm_helpers import LAYOUTS, derivatives, random, witness
from torch import Tensor
from torch.autograd import grad
from torch.testing import assert_close

from mamlpp_fast import ops, testing

NATIVE = "native" in testing.backends("per_step_batch_norm")


# AOTAutograd, in torch 2.14's opcheck as in torch.compile, asks non-leaf tensors for their gradient, and says so.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "sliced"])
@pytest.mark.parametrize("step", [None, 1])
def test_registrations_pass_opcheck(layout: str, step: int | None) -> None:
    x, weight, bias = random((3, 4, 2, 2), (4,) if step is None else (2, 4), torch.float32)
    gy, u = (LAYOUTS[layout](t).requires_grad_() for t in torch.randn(2, *x.shape))
    x = LAYOUTS[layout](x)
    namespace = torch.ops.mamlpp_fast
    _, mean, rstd, _ = namespace.per_step_batch_norm(x, weight, bias, step, 1e-5, 0.1)
    x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))
    saved = (gy, x, weight, bias, mean, rstd, step, 0.1)
    torch.library.opcheck(namespace.per_step_batch_norm.default, (x, weight, bias, step, 1e-5, 0.1))
    torch.library.opcheck(namespace.per_step_batch_norm_backward.default, saved)
    # Its derivative, the third, raises by design.
    plain = tuple(t.detach() if isinstance(t, Tensor) else t for t in saved)
    for cotangents in ((u.detach(), None, None), (u.detach(), weight.detach(), bias.detach())):
        torch.library.opcheck(
            namespace.per_step_batch_norm_double_backward.default,
            (*cotangents, *plain),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )
    rows = (torch.zeros(weight.shape), torch.ones(weight.shape))
    torch.library.opcheck(
        namespace.update_running_stats.default, (*rows, mean, rstd, 12, 0.1, step), test_utils="test_schema"
    )


def _meta_loss(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One inner step on γ, then the loss again: its gradient takes the double backward."""

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        (g,) = grad(f(x, weight, bias, negative_slope=0.1).pow(3).sum(), weight, create_graph=True)
        return f(x, weight - 0.01 * g, bias, negative_slope=0.1).pow(2).sum()

    return loss


# Dynamo's: a DeprecationWarning in torch 2.13, a FutureWarning in 2.14.
@pytest.mark.filterwarnings("ignore:`torch.jit.*")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("whole", [True, False], ids=["meta-step", "operation"])
def test_a_compiled_second_derivative_is_the_eager_one_or_an_error(compiler: str, whole: bool) -> None:
    x, weight, bias = (t.requires_grad_() for t in random((4, 3, 3, 3), (3,)))
    expected = grad(_meta_loss(witness)(x, weight, bias), (x, weight))
    torch._dynamo.reset()
    if whole:
        loss = torch.compile(_meta_loss(ops.per_step_batch_norm), backend=compiler)
    else:
        loss = _meta_loss(torch.compile(ops.per_step_batch_norm, backend=compiler))
    error = None
    try:
        found = grad(loss(x, weight, bias), (x, weight))
    except RuntimeError as refusal:
        error = str(refusal)
    torch._dynamo.reset()
    if error is None:
        assert_close(found, expected)
    else:
        assert "aot_autograd does not currently support double backward" in error


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_under_vmap_the_second_derivative_in_an_adapted_weight_is_right() -> None:
    """PyTorch's own batch norm, differentiated inside vmap, gets the mixed derivative of γ and x wrong."""
    x, weight, bias = random((2, 4, 3, 3, 3), (2, 3))

    def mixed(f: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        leaf, gamma = x.detach().requires_grad_(), weight.detach().requires_grad_()
        (g,) = grad(f(leaf, gamma, bias).pow(3).sum(), gamma, create_graph=True)
        return grad(g.pow(2).sum(), leaf)[0]

    assert_close(mixed(torch.func.vmap(ops.per_step_batch_norm)), mixed(witness))


@pytest.mark.skipif(not NATIVE, reason="the native library is not loaded")
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_results_do_not_depend_on_the_number_of_threads(layout: str, own_threads: None) -> None:
    x, weight, bias = random((6, 32, 28, 28), (32,), torch.float32)
    x = LAYOUTS[layout](x)
    gy, u = torch.randn(2, *x.shape)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            derivatives(
                lambda *t: ops.per_step_batch_norm(*t, negative_slope=0.01),
                x,
                weight,
                bias,
                gy,
                (u, weight, bias),
            )
        )
    for other in results[1:]:
        assert all(torch.equal(other[name], t) for name, t in results[0].items())
